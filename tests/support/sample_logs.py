"""Lines of the logs that `stream-ctr` reads, and where real samples are."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

OBD = Path(__file__).parents[1] / "data" / "obd" / "impressions.csv"


AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    "app_category,device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,"
    "C18,C19,C20,C21"
)


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
    return ",".join(
        [str(identity), str(click), hour, "1005", "0", site, *(f"x{i}" for i in range(18))]
    )


def shared_data(name: str) -> Path:
    """The Criteo and Avazu samples may not be copied into the repository; they lie beside it or where STREAM_CTR_DATA says."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("STREAM_CTR_DATA", beside)) / name
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data or STREAM_CTR_DATA")
    return path


T = 1_735_689_600_000


COLUMNS = {
    "kind": ["impression", "click", "impression", "impression", "open", "impression", None],
    "impression_id": ["a", "a", "b", None, "d", "e", "f"],
    "time": [T, T + 10, T + 20, T + 30, T + 40, 17, T + 60],
    "app": ["maps", None, None, "x", "x", "x", "x"],
    "age": [31, None, 32, 1, 1, 1, 1],
    "score": [float("nan"), None, 0.5, 1.0, 1.0, 1.0, 1.0],
    "true_probability": [0.25, None, float("nan"), 0.5, 0.5, 0.5, 0.5],
}


def nested(table: pa.Table) -> pa.Table:
    names = ["app", "age", "score"]
    features = pa.StructArray.from_arrays([table[name].combine_chunks() for name in names], names)
    return table.drop_columns(names).append_column("features", features)
