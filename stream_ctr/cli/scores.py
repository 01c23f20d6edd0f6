"""The scores of a log: the probability of each impression, and the records without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import DataError, InvalidFeatures
from stream_ctr.events.decoder import Decoder, Events, Impressions, Rejections
from stream_ctr.messages import one_line, printable
from stream_ctr.snapshots.scorer import Scorer


class _Impression(NamedTuple):
    row: int
    impression_id: str
    features: dict[str, object]


class Scores:
    """Score the records of a log, and count those that cannot be scored.

    The features of an impression are checked by the scorer. A record that is not an event is
    skipped.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.scored = 0
        self.skipped = 0
        self._first_reason = ""
        self._decoder = Decoder(scorer.fields)

    def of_records(self, values: pa.LargeBinaryArray) -> tuple[list[str], list[float]]:
        """Return the ids and the click probabilities of the impressions in these records.

        Raises `DataError` that names the impression, when the scorer does not accept its features.
        """
        events, rejected = self._decoder.decode(values)
        if _all_are_usual(events, rejected):
            shown = [part for part in _shown(events) if len(part)]
            ids = [name for part in shown for name in part.impression_id.to_pylist()]
            parts = [self.scorer.predict_columns(part.features) for part in shown]
            probabilities = np.concatenate(parts) if parts else np.empty(0)
            skipped = list(range(len(rejected)))
        else:
            ids, probabilities, skipped = self._check(values, events, rejected)
        if skipped and not self.skipped:
            record = values[int(rejected.row[skipped[0]])].as_py() or b""
            reason = one_line(rejected.message[skipped[0]], 300)
            self._first_reason = f"{reason}: {printable(record, 80)}"
        self.skipped += len(skipped)
        self.scored += len(ids)
        return ids, probabilities.tolist()

    def _check(
        self, values: pa.LargeBinaryArray, events: Events, rejected: Rejections
    ) -> tuple[list[str], npt.NDArray[np.float64], list[int]]:
        """Score each impression as the dictionary of its features, which the scorer checks.

        Impressions that training rejects for a value of a wrong type are among them. Returns the
        indices of the other rejections too.
        """
        impressions = [
            _Impression(row, impression_id, _features(values, row) or {})
            for part in _shown(events)
            for row, impression_id in zip(
                part.row.tolist(), part.impression_id.to_pylist(), strict=True
            )
        ]
        skipped = []
        for index, row in enumerate(rejected.row.tolist()):
            features = _features(values, row) if rejected.reason[index] == "wrong_type" else None
            if features is None:
                skipped.append(index)
            else:
                impressions.append(_Impression(row, _id(values, row), features))
        impressions.sort(key=lambda impression: impression.row)
        try:
            probabilities = self.scorer.predict([one.features for one in impressions])
        except InvalidFeatures as error:
            one = impressions[error.row or 0]
            raise DataError(
                f"impression {one_line(repr(one.impression_id), 80)}: {error.problem} "
                "(--on-invalid score scores it as missing)"
            ) from None
        return [one.impression_id for one in impressions], probabilities, skipped

    def warnings(self) -> Iterator[str]:
        """Yield a line for everything that was not scored as it came."""
        if not self.scored and not self.skipped:
            yield "there is no impression to score"
        if self.scored and self.skipped:
            was = "was" if self.skipped == 1 else "were"
            yield f"{self._malformed()} {was} not scored: {self._first_reason}"
        if invalid := self.scorer.invalid:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(invalid.items()))
            yield f"scored as missing: {counts}"

    def require_any(self) -> None:
        """Raise `DataError` if there were records and no impression could be scored for itself."""
        if not self.scored and self.skipped:
            raise DataError(
                f"no impression was scored: {self._malformed()}, the first: {self._first_reason}"
            )
        if self.scored and self.scorer.invalid["no_field"] == self.scored:
            raise DataError("no impression has any of the fields that this snapshot was trained on")

    def _malformed(self) -> str:
        return f"{self.skipped:,} malformed record{'s' * (self.skipped != 1)}"


def _all_are_usual(events: Events, rejected: Rejections) -> bool:
    """Return whether the decoder has seen all that there is to check: names, types and values."""
    return (
        not events.with_unknown_fields
        and "wrong_type" not in rejected.reason
        and not any(
            len(part) and all(column.null_count for column in part.features.values())
            for part in _shown(events)
        )
    )


def _shown(events: Events) -> tuple[Impressions, ...]:
    """Return the impressions and the examples."""
    return events.impressions, events.examples


def _document(values: pa.LargeBinaryArray, row: int) -> dict[str, Any]:
    """Return the JSON object of a record, or an empty one if it holds none."""
    try:
        document = msgspec.json.decode(values[row].as_py())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _features(values: pa.LargeBinaryArray, row: int) -> dict[str, object] | None:
    """Return the features of the impression in a record that are not null; None for no features."""
    document = _document(values, row)
    features = document.get("features")
    if document.get("kind") == "click" or not isinstance(features, dict):
        return None
    return {name: value for name, value in features.items() if value is not None}


def _id(values: pa.LargeBinaryArray, row: int) -> str:
    return str(_document(values, row).get("impression_id", ""))
