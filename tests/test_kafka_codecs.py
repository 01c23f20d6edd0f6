"""Codecs of record batches: those that are missing. `test_record_batches` expands with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.reliability import Outcome

from stream_ctr.connectors.kafka import (
    KafkaCodecMissing,
    KafkaSink,
    KafkaSource,
    PointerReader,
    client_options,
    codecs,
    stored_records,
)

CLIENT = client_options("127.0.0.1:1", {})


@pytest.mark.bad_input("codec not installed", via="a broker that may hold any codec")
@pytest.mark.parametrize(
    "connect",
    [
        lambda: KafkaSource(["t"], client=CLIENT, group="g"),
        lambda: KafkaSink(CLIENT),
        lambda: PointerReader(CLIENT, "t"),
        lambda: list(stored_records(CLIENT, "t")),
    ],
    ids=["source", "sink", "pointers", "records"],
)
def test_a_missing_codec_is_found_before_anything_connects(
    connect: Callable[[], object], monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    monkeypatch.setitem(codecs._LIBRARIES, "zstd", None)
    monkeypatch.setitem(codecs._LIBRARIES, "crc32c", None)
    lacks = r"lacks crc32c, zstd: pip install 'kafka-python\[crc32c,lz4,snappy,zstd\]'"
    with pytest.raises(KafkaCodecMissing, match=lacks):
        connect()
    outcome("an error at the start that names the library, before anything connects")


def test_a_library_that_is_not_installed_is_none() -> None:
    assert codecs._library("no_such_library") is None
