"""The layout of a log: which columns mean what, and how their values are written."""

from __future__ import annotations

from dataclasses import dataclass

from stream_ctr.events.field import Field
from stream_ctr.events.times import TimeFormat


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """The names of the columns of a log by their meaning; "" is not named.

    `kind` makes the rows events, `click_time` impressions with the times of their clicks, `label`
    labelled rows. `features` is a struct of the features.
    """

    time: str = ""
    id: str = ""
    label: str = ""
    kind: str = ""
    click_time: str = ""
    features: str = ""

    def __bool__(self) -> bool:
        """Return whether any column is named."""
        return any((self.time, self.id, self.label, self.kind, self.click_time, self.features))


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file does not say about itself.

    `fields` are the features to read; without any, all columns that are nothing else. `delimiter`
    and `column_names` are for CSV files; without the latter, the first line has the names. Rows
    that are `only_scored` need no label, click, time or id: named columns may be absent, and rows
    without a label are impressions.
    """

    columns: ColumnNames = ColumnNames()
    fields: tuple[Field, ...] = ()
    times: TimeFormat = TimeFormat()
    delimiter: str = ""
    column_names: tuple[str, ...] = ()
    only_scored: bool = False


PLAIN = Layout()
"""The layout of a file that names its columns by their meaning."""
