"""Logs in every format that `stream-ctr` reads, and the events that a log yields."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from stream_ctr.logs.log import Log
from stream_ctr.logs.open import open_log

OBD = Path(__file__).parents[1] / "data" / "obd" / "impressions.csv"
OBD_EVENTS = 2008
"""The number of impressions and clicks in `OBD`."""
T = 1_735_689_600_000
"""A time in epoch milliseconds."""

AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    "app_category,device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,"
    "C18,C19,C20,C21"
)

# Columns of a log. Rows 4 to 7 hold no event.
COLUMNS = {
    "kind": ["impression", "click", "impression", "impression", "open", "impression", None],
    "impression_id": ["a", "a", "b", None, "d", "e", "f"],
    "time": [T, T + 10, T + 20, T + 30, T + 40, 17, T + 60],
    "app": ["maps", None, None, "x", "x", "x", "x"],
    "age": [31, None, 32, 1, 1, 1, 1],
    "score": [float("nan"), None, 0.5, 1.0, 1.0, 1.0, 1.0],
    "true_probability": [0.25, None, float("nan"), 0.5, 0.5, 0.5, 0.5],
}


def criteo_line(
    label: str = "0",
    *,
    integers: dict[int, str] | None = None,
    categories: dict[int, str] | None = None,
) -> str:
    cells = (
        [label]
        + [(integers or {}).get(i, str(i)) for i in range(1, 14)]
        + [(categories or {}).get(i, f"{i:08x}") for i in range(1, 27)]
    )
    return "\t".join(cells)


def avazu_line(
    identity: object, click: object = 0, hour: str = "14102100", site: str = "1fbe01fe"
) -> str:
    others = [f"x{i}" for i in range(18)]
    return ",".join([str(identity), str(click), hour, "1005", "0", site, *others])


def impression(identity: str, time: object, **features: object) -> dict[str, object]:
    return {"kind": "impression", "impression_id": identity, "time": time, "features": features}


def nested(table: pa.Table) -> pa.Table:
    """Return the table with its features in a struct column."""
    names = ["app", "age", "score"]
    features = pa.StructArray.from_arrays([table[name].combine_chunks() for name in names], names)
    return table.drop_columns(names).append_column("features", features)


def shared_data(name: str) -> Path:
    """Return the path of a sample that may not be copied into the repository; skip without it.

    The Criteo and Avazu samples are in `../shared/data`, or in the directory that STREAM_CTR_DATA
    names.
    """
    default = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("STREAM_CTR_DATA", default)) / name
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data or STREAM_CTR_DATA")
    return path


def labelled_rows(count: int) -> list[dict[str, object]]:
    """Return labelled rows with a time, text that needs quotes, and missing values."""
    return [
        {
            "time": T + 1000 * row,
            "label": int(row % 3 == 0),
            "app": f'map "{row % 7}",\nküche' if row % 5 else None,
            "price": row / 8 if row % 4 else None,
        }
        for row in range(count)
    ]


def labelled_csv(count: int, **options: Any) -> str:
    """Return `labelled_rows` as CSV."""
    rows = labelled_rows(count)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_lines(path: Path, *lines: str | bytes) -> Path:
    encoded = (line.encode() if isinstance(line, str) else line for line in lines)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def every_format(folder: Path) -> dict[str, Path]:
    """Write a log of each format. Return the paths by file name; the event logs are of `OBD`."""
    jsonl = folder / "events.jsonl"
    open_log(OBD).write_jsonl(jsonl)
    (folder / "events.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    table = pa.Table.from_pylist([json.loads(line) for line in jsonl.read_bytes().splitlines()])
    pa.parquet.write_table(table, folder / "events.parquet", row_group_size=500)
    for name, new_writer in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with (
            pa.OSFile(str(folder / name), "wb") as out,
            new_writer(out, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=300)
    criteo = "".join(criteo_line(str(i % 2)) + "\n" for i in range(1000))
    with pa.output_stream(str(folder / "day.tsv.zst"), compression="zstd") as out:
        out.write(criteo.encode())
    avazu = (avazu_line(i, int(i % 3 == 0), f"141021{i // 100:02}") for i in range(1000))
    write_lines(folder / "train.csv", AVAZU_HEADER, *avazu)
    (folder / "labelled.csv.xz").write_bytes(lzma.compress(labelled_csv(1000).encode()))
    (folder / "labelled.json").write_text(json.dumps(labelled_rows(1000), indent=1))
    names = (
        "labelled.csv.xz",
        "labelled.json",
        "events.jsonl",
        "events.jsonl.gz",
        "events.parquet",
        "file.arrow",
        "stream.arrow",
        "day.tsv.zst",
        "train.csv",
    )
    return {name: folder / name for name in names} | {"obd": OBD}


def read(log: Log) -> list[dict[str, Any]]:
    """Return the events of one pass. Check that each batch agrees with its columns."""
    events = []
    for batch in log.batches():
        decoded = [json.loads(value) for value in batch.value.to_pylist()]
        assert [event["time"] for event in decoded] == batch.time.tolist()
        assert [event["impression_id"].encode() for event in decoded] == batch.key.to_pylist()
        events += decoded
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    return events


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == kind]
