"""The columns and times of logs, from the configuration; scoring reads them without torch."""

from __future__ import annotations

from stream_ctr.config import Config
from stream_ctr.events.times import TimeFormat
from stream_ctr.logs.layout import ColumnNames, Layout


def log_layout(config: Config) -> Layout:
    """Return what the configuration says about the columns and times of logs."""
    inputs = config.input
    return Layout(
        columns=ColumnNames(**inputs.columns.model_dump()),
        fields=config.features.fields(),
        times=TimeFormat(inputs.time_unit, inputs.time_zone),
        delimiter=inputs.delimiter,
        column_names=inputs.column_names,
    )
