"""Text logs: compression, damage, and lines of any length in bounded memory."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
from support.sample_logs import T, criteo_line, impression, write_lines

from stream_ctr.errors import DataError
from stream_ctr.logs import text_log
from stream_ctr.logs.open import open_log
from stream_ctr.logs.text_log import TextLog, head


class Lines(TextLog):
    format = "lines"


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 22])
def test_blocks_are_whole_numbered_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(text_log, "_BLOCK_BYTES", block)
    path = tmp_path / "log"
    path.write_bytes(b"one\n\nthree\nfour")
    blocks = list(Lines(path, None).line_blocks())
    assert b"".join(data for _, data in blocks) == b"one\n\nthree\nfour\n"
    numbers = [number for number, _ in blocks]
    ends = [number + data.count(b"\n") for number, data in blocks]
    assert numbers == [1, *ends[:-1]]
    assert ends[-1] == 5


def test_a_line_without_end_is_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_log, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(text_log, "_LONGEST_LINE_BYTES", 4000)
    good = [json.dumps(impression(str(i), T + i)) for i in range(3)]
    endless = b'{"x":"' + b"x" * 20_000 + b'"}'
    path = write_lines(tmp_path / "log.jsonl", good[0], endless, *good[1:], criteo_line("2") * 100)
    log = open_log(path)
    values = [value for batch in log.batches() for value in batch.value.to_pylist()]
    assert b"".join(values).decode() == "".join(good)
    assert [line for line, _ in log.rejected.first] == [2, 5]


def test_a_cut_off_gzip_file_gives_its_whole_lines_and_names_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    lines = [json.dumps(impression(str(rng.random()), T + i)) + "\n" for i in range(2000)]
    compressed = gzip.compress("".join(lines).encode())
    path = tmp_path / "events.jsonl.gz"
    path.write_bytes(compressed[: len(compressed) // 2])
    monkeypatch.setattr(text_log, "_BLOCK_BYTES", 10_000)
    log = open_log(path)
    *whole, _half = [value for batch in log.batches() for value in batch.value.to_pylist()]
    assert 500 < len(whole) < 1500
    assert [json.loads(line)["time"] - T for line in whole] == list(range(len(whole)))
    assert "what comes after is lost" in log.rejected.first[0][1]


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_the_head_is_decompressed_and_without_byte_order_mark(
    tmp_path: Path, compression: str | None
) -> None:
    path = tmp_path / "log"
    with pa.output_stream(str(path), compression=compression) as out:
        out.write(b"\xef\xbb\xbfid,click\n")
    assert head(path) == b"id,click\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n\n \n", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"\x1f\x8b\x08", "cannot read"),
    ],
)
def test_a_file_without_content_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        head(path)


def test_a_path_that_is_not_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} is a directory, not a log"):
        head(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}/nothing does not exist"):
        head(tmp_path / "nothing")
    with pytest.raises(DataError, match="/dev/null is not a regular file"):
        head(Path("/dev/null"))
