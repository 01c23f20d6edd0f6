"""The thread that predicts: requests that wait together are scored together, by one model.

A prediction takes time that does not depend on its number of rows, so the requests that came while
the last ones were computed are joined (docs/serving-performance.md has the effect):

    bodies -> rows of each request -> ids of all rows -> one prediction -> answers

A request that is wrong gets its own answer and the others theirs. All of them are answered by the
model that was loaded when they were taken, whatever is published meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

import numpy as np

from stream_ctr.errors import InvalidFeatures
from stream_ctr.learn.step import Ids, Values
from stream_ctr.serve import bodies
from stream_ctr.serve.answers import Answer, Problem, Refused, invalid, refusal
from stream_ctr.serve.bodies import Limits, Rows, Served
from stream_ctr.serve.waiting import Request, WaitingRequests
from stream_ctr.snapshots.scorer import Scorer

_log = logging.getLogger(__name__)
_NO_MODEL = refusal(
    HTTPStatus.SERVICE_UNAVAILABLE,
    Problem(error="no snapshot was published yet", reason="no_model"),
)
DEADLINE = refusal(
    HTTPStatus.SERVICE_UNAVAILABLE,
    Problem(error="the request waited until its deadline", reason="deadline"),
)
_INTERNAL = refusal(
    HTTPStatus.INTERNAL_SERVER_ERROR,
    Problem(error="the server could not predict; its log says why", reason="internal"),
)
_FIRST_MODEL_SECONDS = 0.05  # between two looks for the first model

Answers = Sequence[tuple[Request, Answer]]


@dataclass(slots=True)
class _Hashed:
    """The ids [n, F + C] and values [n, V] of a request's rows."""

    request: Request
    ids: Ids
    values: Values


class Scoring:
    """Answer the requests of `waiting` in a thread, until the block is left.

    `scorer` returns the loaded model, or None before the first. `model` is the name of an
    additional model, None for the published one. `deliver` is called in the thread, with requests
    and their answers. `observe` is called with the number of rows of each prediction and the
    seconds that it took.
    """

    def __init__(
        self,
        waiting: WaitingRequests,
        scorer: Callable[[], Scorer | None],
        deliver: Callable[[Answers], None],
        *,
        model: str | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._waiting = waiting
        self._scorer = scorer
        self._deliver = deliver
        self._model = model
        self._limits = limits
        self._observe = observe
        self.ready = False
        """Whether a model is loaded, and has made a prediction."""
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    @property
    def running(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.close()
        self._thread.join()

    def _run(self) -> None:
        while not self.ready and not self._waiting.closed:
            requests = self._waiting.take(_FIRST_MODEL_SECONDS)
            if scorer := self._scorer():
                self._warm_up(scorer)
            if requests:
                self._deliver(self._answered(requests))
        while requests := self._waiting.take():
            self._deliver(self._answered(requests))

    def _warm_up(self, scorer: Scorer) -> None:
        """Predict once, because the first prediction of a process compiles and loads code."""
        row = {field.name: "" if field.kind == "categorical" else 0 for field in scorer.fields}
        try:
            scorer.predict_ids(*scorer.ids([row]))
        except Exception:  # noqa: BLE001 - requests will be told
            _log.exception("the first prediction failed")
        self.ready = True

    def _answered(self, requests: Sequence[Request]) -> Answers:
        now = time.perf_counter()
        late = [(request, DEADLINE) for request in requests if request.deadline <= now]
        requests = [request for request in requests if request.deadline > now]
        scorer = self._scorer()
        if scorer is None:
            return [*late, *((request, _NO_MODEL) for request in requests)]
        try:
            return [*late, *self._scored(scorer, requests)]
        except Exception:  # noqa: BLE001 - one request must not harm the others
            if len(requests) > 1:
                alone = [self._answered([request]) for request in requests]
                return [*late, *(answered for each in alone for answered in each)]
            _log.exception("a request cannot be answered")
            return [(request, _INTERNAL) for request in requests]

    def _scored(self, scorer: Scorer, requests: Sequence[Request]) -> Answers:
        answers: list[tuple[Request, Answer]] = []
        rows: dict[Request, Rows] = {}
        for request in requests:
            read = bodies.read_arrow if request.is_arrow else bodies.read_json
            try:
                rows[request] = read(request.body, self._limits)
            except Refused as refused:
                answers.append((request, refused.answer))
        hashed, wrong = _hash(scorer, rows)
        answers += wrong
        answers += self._predicted(scorer, hashed)
        return answers

    def _predicted(self, scorer: Scorer, hashed: Sequence[_Hashed]) -> Answers:
        if not hashed:
            return []
        started = time.perf_counter()
        ids = np.concatenate([each.ids for each in hashed])
        values = np.concatenate([each.values for each in hashed])
        probabilities = scorer.predict_ids(ids, values)
        self._observe(len(ids), time.perf_counter() - started)
        served = _served(scorer, self._model)
        ends = np.cumsum([len(each.ids) for each in hashed])
        parts = np.split(probabilities, ends[:-1])
        return [
            (
                each.request,
                bodies.arrow_answer(part, served)
                if each.request.is_arrow
                else bodies.json_answer(part, served),
            )
            for each, part in zip(hashed, parts, strict=True)
        ]


def _served(scorer: Scorer, model: str | None) -> Served:
    manifest = scorer.manifest
    rank = scorer.delta.rank if scorer.delta else None
    return Served(
        snapshot=scorer.snapshot,
        run=manifest.run,
        model=model or manifest.published,
        delta=rank.sequence if rank else None,
        epoch=rank.epoch if rank else manifest.epoch,
    )


def _hash(
    scorer: Scorer, rows: Mapping[Request, Rows]
) -> tuple[list[_Hashed], list[tuple[Request, Answer]]]:
    """Return the ids of each request, and the answers to those with invalid features.

    The rows of all requests in JSON are hashed at once, which takes little longer than those of
    one. If one of them is invalid, each request is read by itself, to find which.
    """
    named = [request for request in rows if not request.is_arrow]
    together: list[_Hashed] = []
    if len(named) > 1:
        with contextlib.suppress(InvalidFeatures, RecursionError):
            together = _hash_together(scorer, named, rows)
    done = {each.request for each in together}
    hashed, answers = together, []
    for request, given in rows.items():
        if request in done:
            continue
        try:
            hashed.append(_Hashed(request, *scorer.ids(given)))
        except InvalidFeatures as error:
            answers.append((request, invalid(error)))
        except RecursionError:  # a message quotes the value
            problem = Problem(error="a value is nested too deep", reason="malformed")
            answers.append((request, refusal(HTTPStatus.BAD_REQUEST, problem)))
    return hashed, answers


def _hash_together(
    scorer: Scorer, requests: Sequence[Request], rows: Mapping[Request, Rows]
) -> list[_Hashed]:
    joined = [row for request in requests for row in rows[request]]
    ids, values = scorer.ids(joined)
    ends = np.cumsum([len(rows[request]) for request in requests])[:-1]
    parts = zip(requests, np.split(ids, ends), np.split(values, ends), strict=True)
    return [_Hashed(request, own_ids, own_values) for request, own_ids, own_values in parts]
