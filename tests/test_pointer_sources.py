"""Pointers come from a file that is replaced, or from a topic, and unreadable ones are errors."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest
from support.manifests import make_newer, manifest, sealed, write_snapshot
from support.memory_topic import topic_of

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.pointer import (
    FORMAT,
    Pointer,
    encode_pointer,
    pointer_for,
    write_pointer,
)
from stream_ctr.snapshots.pointer_sources import FilePointers, TopicPointers


def write(root: Path, sequence: int, epoch: int = 1) -> Pointer:
    path = write_snapshot(root, sequence=sequence, epoch=epoch)
    return pointer_for(path, manifest(sequence=sequence, epoch=epoch))


# -- a file --------------------------------------------------------------------------------------


def test_a_pointer_is_returned_once_until_it_is_replaced(tmp_path: Path) -> None:
    source = FilePointers(tmp_path)
    assert source.poll(0.0) == []
    for sequence in (1, 2):
        pointer = write(tmp_path / "snapshots", sequence)
        write_pointer(tmp_path / "latest.json", pointer)
        assert source.poll(0.0) == [pointer]
        assert source.poll(0.0) == []


def test_a_replacement_with_the_same_time_is_noticed(tmp_path: Path) -> None:
    """File systems with coarse times give two files of one moment the same time."""
    source = FilePointers(tmp_path)
    latest = tmp_path / "latest.json"
    for sequence in (1, 2):
        pointer = write(tmp_path / "snapshots", sequence)
        write_pointer(latest, pointer)
        os.utime(latest, ns=(1_000_000_000, 1_000_000_000))
        assert source.poll(0.0) == [pointer]


def test_polling_waits_for_a_pointer(tmp_path: Path) -> None:
    pointer = write(tmp_path / "snapshots", 1)
    source = FilePointers(tmp_path)
    writing = threading.Timer(0.2, lambda: write_pointer(tmp_path / "latest.json", pointer))
    writing.start()
    began = time.monotonic()
    assert source.poll(60.0) == [pointer]
    assert time.monotonic() - began < 30
    writing.join()


def test_a_file_that_cannot_be_read_is_an_error_and_is_not_read_again(tmp_path: Path) -> None:
    latest = tmp_path / "latest.json"
    latest.write_text('{"format": 1')
    source = FilePointers(tmp_path)
    [error] = source.poll(0.0)
    assert isinstance(error, SnapshotError)
    assert "latest.json is damaged" in str(error)
    assert source.poll(0.0) == []
    write_pointer(latest, write(tmp_path / "snapshots", 1))
    make_newer(latest)
    [error] = source.poll(0.0)
    assert isinstance(error, NewerFormat)


# -- a topic -------------------------------------------------------------------------------------


def topic(*values: Pointer | bytes | None) -> TopicPointers:
    return TopicPointers(topic_of(*values).reader())


@pytest.fixture
def pointers(tmp_path: Path) -> list[Pointer]:
    """Pointers in the order of their rank."""
    return [write(tmp_path, sequence, epoch) for sequence, epoch in ((7, 1), (8, 1), (2, 2))]


def test_the_pointer_of_the_highest_rank_comes_first(pointers: list[Pointer]) -> None:
    first, second, third = pointers
    source = topic(second, third, first)
    assert source.poll(0.0) == [third, second, first]
    assert source.poll(0.0) == []


def test_the_pointers_of_other_models_are_left_alone(pointers: list[Pointer]) -> None:
    first, second, _ = pointers
    both = topic_of(second, name="other")
    both.append("default", encode_pointer(first))
    assert TopicPointers(both.reader()).poll(0.0) == [first]
    assert TopicPointers(both.reader(), model_name="other").poll(0.0) == [second]


def test_a_withdrawn_pointer_is_a_warning(
    pointers: list[Pointer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert topic(pointers[0], None).poll(0.0) == pointers[:1]
    assert "the pointer of model 'default' was withdrawn; the loaded one stays" in caplog.text


def test_a_damaged_pointer_is_an_error_and_hides_no_other(pointers: list[Pointer]) -> None:
    error, first = topic(pointers[0], b"{}").poll(0.0)
    assert isinstance(error, SnapshotError)
    assert str(error).startswith("pointer of model 'default' is damaged: ")
    assert first == pointers[0]


def test_a_pointer_of_a_newer_version_supersedes_those_before_it(pointers: list[Pointer]) -> None:
    first, second, third = map(encode_pointer, pointers)
    newer = sealed(json.loads(second) | {"format": FORMAT + 1})
    [error] = topic(first, third, newer).poll(0.0)
    assert isinstance(error, NewerFormat)
    assert f"pointer of model 'default' has format {FORMAT + 1}" in str(error)

    [error, following] = topic(third, newer, first).poll(0.0)
    assert isinstance(error, NewerFormat)
    assert following == pointers[0]
