"""`stream-ctr init`: what it guesses of a file that it has never seen, and what it refuses."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from click.testing import Result
from support.commands import command
from support.sample_logs import OBD, T, labelled_csv, shared_data

from stream_ctr.cli.layout import log_layout
from stream_ctr.config import Config, load
from stream_ctr.logs.facts import Facts, words
from stream_ctr.logs.guess import guess_field
from stream_ctr.logs.open import open_log

ROWS = 300


def columns(**more: Any) -> dict[str, Any]:
    """Return columns of labelled rows whose names say what they are."""
    rng = random.Random(1)
    rows = ROWS
    return {
        "event time": [1_735_689_600 + 60 * row for row in range(rows)],
        "request_id": [f"r{row:05}" for row in range(rows)],
        "clicked": [int(rng.random() < 0.3) for _ in range(rows)],
        "userId": [rng.randrange(40) * 1_000_003 for _ in range(rows)],
        "zip": [f"{rng.randrange(90):05}" for _ in range(rows)],
        "stadt": [rng.choice(["köln", 'a "b"', "x, y", "z\nz"]) for _ in range(rows)],
        "price": [round(rng.random() * 9, 2) if rng.random() < 0.9 else None for _ in range(rows)],
        "visits": [rng.randrange(500) for _ in range(rows)],
        "position": [rng.randrange(4) for _ in range(rows)],
        "site": ["shop"] * rows,
        "empty": [None] * rows,
        **more,
    }


def as_csv(path: Path, found: dict[str, Any], **options: Any) -> Path:
    header = options.pop("header", True)
    with path.open("wb") as out:
        pa.csv.write_csv(
            pa.table(found).cast(text_schema(found)),
            out,
            pa.csv.WriteOptions(include_header=header, **options),
        )
    return path


def text_schema(found: dict[str, Any]) -> pa.Schema:
    types = {name: pa.array(values).type for name, values in found.items()}
    plain = {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()}
    return pa.schema(list(plain.items()))


def init(path: Path, *options: str) -> tuple[Config, Result]:
    """Return the configuration that `init` writes, loaded as `run --config` does."""
    result = command("init", path, *options)
    assert result.exit_code == 0, result.output
    written = path.parent / "my.toml"
    written.write_text(result.stdout)
    return load(written, environ={}), result


def refusal(path: Path, *options: str) -> str:
    result = command("init", path, *options)
    assert result.exit_code in (3, 5), result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def events(path: Path, config: Config) -> list[dict[str, Any]]:
    log = open_log(path, layout=log_layout(config))
    return [json.loads(value) for batch in log.batches() for value in batch.value.to_pylist()]


@pytest.mark.parametrize("words", [("no", "yes"), ("N", "Y"), ("f", "t"), ("False", "TRUE")])
def test_labels_are_words_too(tmp_path: Path, words: tuple[str, str]) -> None:
    labels = [words[label] for label in columns()["clicked"]]
    config, result = init(as_csv(tmp_path / "log.csv", columns(clicked=labels)))
    assert config.input.columns.label == "clicked"
    read = events(tmp_path / "log.csv", config)
    assert [event["label"] for event in read] == columns()["clicked"]


@pytest.mark.parametrize(
    ("name", "is_code"), [("ad", True), ("lastCampaign", True), ("ads", False), ("age", False)]
)
def test_whole_numbers_are_codes_if_the_name_says_what_they_number(
    tmp_path: Path, name: str, is_code: bool
) -> None:
    numbers = [row % 60 for row in range(ROWS)]
    config, _ = init(as_csv(tmp_path / "log.csv", columns(**{name: numbers})))
    assert (name in config.features.categorical) == is_code
    assert (name in config.features.numeric) == (not is_code)


CATEGORICAL = ("userId", "zip", "stadt", "position")
NUMERIC = ("price", "visits")


def test_columns_are_guessed_by_their_values_and_names(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "log.csv", columns())
    config, result = init(path)
    found = config.input.columns
    assert (found.time, found.id, found.label) == ("event time", "request_id", "clicked")
    assert (found.kind, found.click_time) == ("", "")
    assert config.features.categorical == CATEGORICAL
    assert config.features.numeric == NUMERIC
    assert "codes" in result.stderr or "name says zip" in result.stderr
    assert "epoch seconds, 2025-01-01 00:00:00 to 2025-01-01 04:59:00" in result.stderr
    assert "site: always 'shop'" in result.stderr
    assert result.stderr.count('{"kind":"example","impression_id":"r0000') == 3
    read = events(path, config)
    assert len(read) == ROWS
    assert read[1]["time"] == T + 60_000


@pytest.mark.parametrize("written", ["parquet", "arrow", "jsonl", "json", "csv.gz", "semicolons"])
def test_a_file_of_any_format_gives_the_same_configuration(tmp_path: Path, written: str) -> None:
    found = columns()
    path = tmp_path / written
    table = pa.table(found)
    if written == "parquet":
        pa.parquet.write_table(table, path)
    elif written == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif written == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif written == "json":
        path.write_text(json.dumps(table.to_pylist()))
    elif written == "csv.gz":
        path.write_bytes(gzip.compress(as_csv(tmp_path / "plain", found).read_bytes()))
    else:
        as_csv(path, found, delimiter=";")
    config, _ = init(path)
    found_names = config.input.columns
    assert (found_names.time, found_names.id) == ("event time", "request_id")
    assert found_names.label == "clicked"
    assert config.features.categorical == CATEGORICAL
    assert config.features.numeric == NUMERIC
    assert config.input.delimiter == {"semicolons": ";", "csv.gz": ","}.get(written, "")
    assert len(events(path, config)) == ROWS


def test_a_file_without_a_header_gets_names(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "log.csv", columns(), header=False)
    config, _ = init(path)
    assert config.input.column_names[:3] == ("c1", "c2", "c3")
    assert config.input.columns.label == "c3"
    assert config.input.columns.time == "c1"  # the numbers are times and rise
    assert len(events(path, config)) == ROWS


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_do_not_matter(
    tmp_path: Path, ending: str, mark: str
) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes((mark + labelled_csv(200, lineterminator=ending)).encode())
    config, _ = init(path)
    assert config.input.columns.label == "label"
    assert config.features.fields() != ()
    assert len(events(path, config)) == 200


def test_times_without_a_zone_are_said_to_be_utc(tmp_path: Path) -> None:
    times = [f"2025-01-01 00:{row // 60:02}:{row % 60:02}" for row in range(ROWS)]
    path = as_csv(tmp_path / "log.csv", columns(**{"event time": times}))
    config, result = init(path)
    assert config.input.time_zone == "UTC"
    assert "the times name none" in result.stderr
    assert events(path, config)[1]["time"] == T + 1000
    config, _ = init(path, "-X", "input.time_zone=Europe/Berlin")
    assert config.input.time_zone == "Europe/Berlin"


def test_click_times_make_the_rows_impressions(tmp_path: Path) -> None:
    clicks = [1_735_689_605 + 60 * row if row % 3 == 0 else None for row in range(ROWS)]
    path = as_csv(tmp_path / "log.csv", columns(click_ts=clicks))
    config, result = init(path)
    assert config.input.columns.click_time == "click_ts"
    assert config.input.columns.label == ""
    assert "clicked" not in config.features.categorical  # it would give the label away
    assert "its name says what happened after the impression" in result.stderr
    kinds = [event["kind"] for event in events(path, config)]
    assert kinds.count("impression") == ROWS
    assert kinds.count("click") == 100


def test_kinds_make_the_rows_events(tmp_path: Path) -> None:
    rows = [
        {"type": kind, "imp": f"i{row}", "ts": T + 1000 * row, "app": f"a{row % 5}"}
        for row in range(100)
        for kind in (("impression", "click") if row % 4 == 0 else ("impression",))
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "name it with -X input.columns.id=NAME" in refusal(path)
    config, _ = init(path, "-X", "input.columns.id=imp")
    assert (config.input.columns.kind, config.input.columns.time) == ("type", "ts")
    assert config.features.categorical == ("app",)


def test_a_column_that_tells_the_label_is_left_out(tmp_path: Path) -> None:
    found = columns()
    found["basket"] = [["no", "yes"][label] for label in found["clicked"]]
    config, result = init(as_csv(tmp_path / "log.csv", found))
    assert "basket" not in config.features.categorical
    assert "basket: it tells the label exactly" in result.stderr


def test_a_named_column_is_not_guessed(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "log.csv", columns(**{"odd": [row % 2 for row in range(ROWS)]}))
    config, _ = init(path, "-X", "input.columns.label=odd")
    assert config.input.columns.label == "odd"
    assert "names 'od', which is no column" in refusal(path, "-X", "input.columns.label=od")


WITHOUT = {name: values for name, values in columns().items() if name != "clicked"}
REFUSED: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "header alone": (b"a,label\n", "no rows"),
    "binary": (bytes(range(256)), "no known log format"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0", "no known log format"),
    "utf-16": ("label,a\n1,b\n".encode("utf-16"), "UTF-16"),
    "no label": (WITHOUT, "no column that says who clicked: no column holds 0 and 1"),
    "two candidates": (
        {**WITHOUT, "f": [0, 1] * 150, "g": [1, 1, 0] * 100},
        "one of f, g may be it",
    ),
    "labels of three kinds": (
        {**WITHOUT, "label": ["a", "b", "c"] * 100},
        "column label cannot be the label: labels are 0 and 1, and it has 'a', 'b', 'c'",
    ),
    "labels that are missing": (
        {**WITHOUT, "label": [0, 1, None] * 100},
        "cannot be the label.*some are missing",
    ),
    "constant label": ({**WITHOUT, "label": [0] * ROWS}, "column label is 0 in all of the first"),
    "nothing to learn from": (
        {"label": [0, 1, 0] * 100, "x": [f"u{row}" for row in range(ROWS)], "y": ["c"] * ROWS},
        "no column of .* can be a feature .*all values differ.*always 'c'",
    ),
    "objects that are not rows": (b"[1, 2]", "holds no JSON objects"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nonsense_is_refused_with_the_reason(tmp_path: Path, what: str) -> None:
    content, reason = REFUSED[what]
    path = tmp_path / "log.csv"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        as_csv(path, content)
    found = refusal(path)
    assert found.startswith("error: ")
    assert re.search(reason, found)


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        (["a", "b"], "categorical", "text"),
        ([True, False], "categorical", "booleans"),
        ([0.5, 1.25], "numeric", "fractions"),
        ([1, 500], "numeric", "whole numbers"),
        ([1, 2] * 20, "categorical", "2 different whole numbers"),
        (["007", "012"], "categorical", "leading zeros"),
        ([123_456_789, 987_654_321], "categorical", "9 digits"),
        (["1.5", "NA", "2.5"], "numeric", "fractions"),
        ([7, 7], "", "always '7'"),
        ([None, None], "", "no values"),
        ([f"u{row}" for row in range(100)], "", "all values differ"),
        ([[1], [2]], "", "cannot be a feature"),
    ],
)
def test_the_kind_of_a_field_follows_from_its_values(
    values: list[Any], kind: str, reason: str
) -> None:
    guess = guess_field(Facts("x", pa.array(values)))
    assert (guess.field.kind if guess.field else "") == kind
    assert reason in guess.reason


def test_whole_numbers_whose_name_says_id_are_categorical() -> None:
    for name in ("user_id", "adId", "postal code"):
        found = guess_field(Facts(name, pa.array(range(50))))
        assert found.field is not None
        assert found.field.kind == "categorical"
    assert words("adId") == ("ad", "id")


# -- real logs under other names -----------------------------------------------------------------


def renamed(table: pa.Table, label: str) -> pa.Table:
    """Return a table with names that say nothing, except that of the label."""
    names = ["did_click" if n == label else f"Spalte {i}" for i, n in enumerate(table.column_names)]
    return table.rename_columns(names)


@pytest.mark.parametrize("written", ["csv", "parquet"])
def test_the_open_bandit_log_under_other_names(tmp_path: Path, written: str) -> None:
    table = renamed(pa.csv.read_csv(OBD), "click")
    path = tmp_path / f"log.{written}"
    if written == "csv":
        pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter="|"))
    else:
        pa.parquet.write_table(table, path)
    config, _ = init(path)
    assert config.input.columns.label == "did_click"
    times = pa.csv.read_csv(OBD)["timestamp"]
    position = pa.csv.read_csv(OBD).column_names.index("timestamp")
    assert config.input.columns.time == f"Spalte {position}"
    read = events(path, config)
    assert len(read) == len(times)
    assert [event["time"] for event in read] == sorted(event["time"] for event in read)


@pytest.mark.parametrize("name", ["criteo/train.csv", "avazu/train.csv"])
def test_the_public_logs_under_other_names(tmp_path: Path, name: str) -> None:
    source = shared_data(name)
    criteo = name.startswith("criteo")
    table = pa.csv.read_csv(
        source,
        read_options=pa.csv.ReadOptions(autogenerate_column_names=criteo),
        parse_options=pa.csv.ParseOptions(delimiter="\t" if criteo else ","),
    )
    path = tmp_path / "log.parquet"
    pa.parquet.write_table(renamed(table, "f0" if criteo else "click"), path)
    config, _ = init(path)
    assert config.input.columns.label == "did_click"
    assert len(config.features.fields()) > 15
    assert len(events(path, config)) == len(table)
