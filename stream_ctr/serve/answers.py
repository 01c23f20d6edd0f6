"""Answers to requests, and the refusals of those that get no prediction.

    status   reason          the request
    ------   -------------   ------------------------------------------------------------
    400      malformed       is not JSON or Arrow of the expected form
    400      timeout_header  has a timeout that is not a positive number
    408      slow_body       did not arrive in time
    413      too_large       has a body, or unfolds to an amount, that is too large
    413      too_many_rows   has more rows than are answered at once
    415      content_type    is neither JSON nor an Arrow stream, or is compressed
    422      (see below)     has features that the model does not know
    500      internal        met a fault of the server, which is logged
    503      no_model        came before the first snapshot
    503      full            found too many requests waiting
    503      deadline        waited until its deadline

The reasons of 422 are those of `events.feature_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec

from stream_ctr.errors import InvalidFeatures
from stream_ctr.messages import one_line

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
RETRY_AFTER_SECONDS = 1
_SHOWN = 400  # characters of a message


class Problem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The body of a refusal: what is wrong, a code for it, and where in the request it is."""

    error: str
    reason: str
    row: int | None = None
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its status, its body, and what is counted about it.

    `rows` is the number of predictions. `reason` is the code of a refusal, "" for predictions.
    """

    status: int
    body: bytes
    content_type: str = JSON
    rows: int = 0
    reason: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """Raised for a request that gets no prediction."""

    def __init__(self, status: HTTPStatus, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason

    @property
    def answer(self) -> Answer:
        """The response to the request.

        >>> Refused(HTTPStatus.NOT_FOUND, "path", "there is no path /x").answer.body
        b'{"error":"there is no path /x","reason":"path"}'
        """
        return refusal(self.status, Problem(error=one_line(self, _SHOWN), reason=self.reason))


def refusal(status: HTTPStatus, problem: Problem) -> Answer:
    """Return the response that says `problem`. A busy server also says when to try again."""
    busy = status == HTTPStatus.SERVICE_UNAVAILABLE
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if busy else {}
    body = msgspec.json.encode(problem)
    return Answer(status, body, reason=problem.reason, headers=headers)


def invalid(error: InvalidFeatures) -> Answer:
    """Return the response to features that are not what the model learned from.

    >>> invalid(InvalidFeatures("there is no field 'ap'", reason="unknown_field", row=3)).body
    b'{"error":"row 3: there is no field \\'ap\\'","reason":"unknown_field","row":3}'
    """
    field = None if error.field is None else one_line(error.field)
    return refusal(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        Problem(error=one_line(error, _SHOWN), reason=error.reason, row=error.row, field=field),
    )
