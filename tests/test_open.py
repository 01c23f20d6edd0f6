"""Opening a log: its format is detected, and wrong arguments are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sample_logs import OBD, criteo_line, every_format, read, write_lines

from stream_ctr.errors import ConfigError, DataError
from stream_ctr.logs import csv_table, text_log
from stream_ctr.logs.log import Log
from stream_ctr.logs.open import FORMATS, open_log, sniff

FORMAT_OF_FILE = {
    "events.jsonl": "events",
    "events.jsonl.gz": "events",
    "events.parquet": "parquet",
    "file.arrow": "arrow",
    "stream.arrow": "arrow",
    "day.tsv.zst": "criteo",
    "train.csv": "avazu",
    "labelled.csv.xz": "csv",
    "labelled.json": "json",
    "obd": "obd",
}


def columns(log: Log) -> list[tuple[list[int], list[bytes], list[bytes]]]:
    return [
        (batch.time.tolist(), batch.key.to_pylist(), batch.value.to_pylist())
        for batch in log.batches()
    ]


@pytest.mark.slow
def test_every_format_is_detected_and_two_passes_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = every_format(tmp_path)
    assert paths.keys() == FORMAT_OF_FILE.keys()
    assert {*FORMAT_OF_FILE.values(), "tsv"} == set(FORMATS)
    for name, path in paths.items():
        assert sniff(path) == FORMAT_OF_FILE[name], name
        log = open_log(path, seed=5)
        assert columns(log) == columns(log), name
        assert log.progress == 1.0
        for module in (text_log, csv_table):
            monkeypatch.setattr(module, "_BLOCK_BYTES", 5_000)
        assert read(open_log(path, seed=5)) == read(log), f"{name} in smaller blocks"
        monkeypatch.undo()


@pytest.mark.parametrize("content", [bytes(range(1, 256)), b"id,hour\n\0", b"\xff\xfb\n"])
def test_a_file_of_no_known_format_is_an_error_that_lists_the_formats(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} has no known log format; .*events, csv"):
        open_log(path)


def test_a_file_that_does_not_exist_is_an_error_with_a_format_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_log(tmp_path / "nothing", format="criteo")


def test_an_unknown_format_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "day.tsv", criteo_line())
    with pytest.raises(ConfigError, match="unknown log format 'critoe'; did you mean 'criteo'"):
        open_log(path, format="critoe")


@pytest.mark.parametrize(
    ("rate", "delay", "seed"), [(0, 1, 0), (1, -1, 0), (1, 1, -1), (float("nan"), 1, 0)]
)
def test_impossible_parameters_of_synthetic_times_are_refused(
    rate: float, delay: float, seed: int
) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        open_log(OBD, rate=rate, click_delay_seconds=delay, seed=seed)
