"""What ranks must have in common, and errors that end all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from support.ranks import on_ranks

from stream_ctr.distributed import agreement
from stream_ctr.distributed.agreement import Failed, failure, require_same, together
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.errors import ConfigError, SnapshotError, StreamCtrError


def _error_of(work: Callable[[], object]) -> tuple[str, int, str]:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - it is compared
        return type(error).__name__, getattr(error, "exit_code", 0), str(error)
    return "", 0, ""


def _raising(error: Exception) -> object:
    raise error


def _on_a_rank(ranks: Ranks) -> list[tuple[str, int, str]]:
    me = ranks.rank
    same = {"learn.seed": "1", "model.name": '"deepfm"'}
    one_differs = {**same, "learn.seed": "2" if me == 1 else "1"}
    missing = {**same, **({"--until-end": "True"} if me == 2 else {})}
    many = {f"key{number:02}": str(me) for number in range(9)}
    worse = SnapshotError("no snapshot") if me == 2 else ConfigError("no model")
    return [
        _error_of(lambda: together(ranks, lambda: me)),
        _error_of(lambda: together(ranks, lambda: _raising(worse) if me else None)),
        _error_of(lambda: together(ranks, lambda: _raising(SnapshotError("gone")))),
        _error_of(
            lambda: together(ranks, lambda: None if me else _raising(click.UsageError("no log")))
        ),
        _error_of(lambda: require_same(ranks, same, way_out="none")),
        _error_of(lambda: require_same(ranks, one_differs, way_out="use one file")),
        _error_of(lambda: require_same(ranks, missing, way_out="use one command")),
        _error_of(lambda: require_same(ranks, many, way_out="none")),
    ]


def test_an_error_of_one_rank_and_a_difference_between_ranks_end_all() -> None:
    for me, found in enumerate(on_ranks(3, _on_a_rank)):
        fine, first, own, usage, same, differs, missing, many = found
        assert fine == same == ("", 0, "")
        named = "no model" if me == 1 else "rank 1: no model"
        assert first == ("ConfigError", 3, named)
        assert own == ("SnapshotError", 6, "gone")
        assert usage == ("Failed" if me else "UsageError", 2, "no log")
        assert differs[:2] == ("ConfigError", 3)
        shown = "the ranks differ: learn.seed is 1 on ranks 0, 2, 2 on rank 1. Way out: use one"
        assert differs[2].startswith(shown)
        assert "--until-end is missing on ranks 0, 1, True on rank 2" in missing[2]
        assert many[2].count(" on rank 2") == 5
        assert "and 4 more" in many[2]


def test_an_error_keeps_its_exit_code() -> None:
    assert isinstance(failure(6, "gone"), SnapshotError)
    odd = failure(2, "usage")
    assert isinstance(odd, Failed)
    assert isinstance(odd, StreamCtrError)
    assert odd.exit_code == 2


def test_an_error_without_an_exit_code_is_raised_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        together(Ranks.alone(), lambda: 1 // 0)


def test_a_long_or_odd_value_is_shown_on_one_short_line() -> None:
    odd = "a\x1b[31m\n" + 500 * "b"
    held = agreement._held(odd, [0])
    assert re.fullmatch(r"a\\x1b\[31m\\nb+\.\.\. on rank 0", held)
    assert len(held) < 130
    assert agreement._held("x", range(9)) == "x on ranks 0, 1, 2, 3, 4 ..."


def test_one_changed_byte_in_a_module_changes_the_digest_of_the_code(tmp_path: Path) -> None:
    module = tmp_path / "package" / "inner" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n")
    (tmp_path / "link").symlink_to(module.parent)
    before = agreement._digest_of_sources(tmp_path)
    (tmp_path / "module.pyc").write_text("ignored")
    assert agreement._digest_of_sources(tmp_path) == before
    module.write_text("x = 2\n")
    changed = agreement._digest_of_sources(tmp_path)
    module.rename(module.with_name("other.py"))
    assert len({before, changed, agreement._digest_of_sources(tmp_path)}) == 3
