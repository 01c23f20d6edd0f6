"""A subscriber follows deltas: every prediction is that of a true state, and at last the newest."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from support import forks
from support.commands import command
from support.delta_runs import (
    DeltaRun,
    ListedDeltas,
    blend_manifest,
    network_manifest,
    served,
    truth_of,
)
from support.keys import write_keys
from support.manifests import RUN
from support.patience import PATIENCE_SECONDS, started, wait_until
from support.served import ROWS

from stream_ctr.cli.serving import _delta_line, _snapshot_line
from stream_ctr.connectors import kafka
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.learn.runtimes import RUNTIMES
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots import subscriber as following
from stream_ctr.snapshots.delta import Delta, decode_payload, encode_payload
from stream_ctr.snapshots.delta_topic import send
from stream_ctr.snapshots.followed_deltas import REFUSALS, AppliedDelta
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import Pointer, encode_pointer, pointer_for, read_pointer
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import SigningKey
from stream_ctr.snapshots.subscriber import Subscriber


class Pointers:
    """A source of pointers to the snapshots of a state directory."""

    holder = RUN

    def __init__(self, state: Path) -> None:
        self.state = state
        self.arrived: list[Pointer | SnapshotError] = []
        self.located: list[str] = []

    def poll(self, timeout_seconds: float) -> Sequence[Pointer | SnapshotError]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def locate(self, pointer: Pointer) -> Path:
        self.located.append(pointer.snapshot)
        return self.state / "snapshots" / pointer.snapshot


@pytest.fixture
def run(tmp_path: Path) -> DeltaRun:
    """A run that has published a snapshot."""
    made = DeltaRun(tmp_path)
    made.learn(3)
    made.snapshot()
    return made


def learn_deltas(run: DeltaRun, count: int) -> list[Delta]:
    made = []
    for _ in range(count):
        run.learn()
        made.append(run.delta())
    return made


def follow(subscriber: Subscriber, times: int = 12) -> None:
    """Let a subscriber look for news, so often that all that came is taken."""
    for _ in range(times):
        subscriber.next(0.0)


def following_by_hand(run: DeltaRun, **options: Any) -> tuple[Subscriber, Pointers, ListedDeltas]:
    """Return a subscriber that has loaded the published snapshot, and its sources."""
    pointers, deltas = Pointers(run.state), ListedDeltas()
    subscriber = Subscriber(pointers, deltas=deltas, **options)
    pointers.arrived = [published(run)]
    assert subscriber.next(0.0)
    return subscriber, pointers, deltas


def published(run: DeltaRun) -> Pointer:
    found = read_pointer(run.state / "latest.json")
    assert found
    return found


# -- one after another ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("described", [network_manifest, blend_manifest])
def test_each_delta_brings_the_state_that_the_run_had(
    tmp_path: Path, described: Callable[..., Manifest], runtime: Any
) -> None:
    run = DeltaRun(tmp_path, described=described)
    run.learn(2)
    run.snapshot()
    subscriber = Subscriber(tmp_path, runtime=runtime)
    assert subscriber.next(0.0)
    for _ in range(8):
        (delta,) = learn_deltas(run, 1)
        assert subscriber.next(0.0) is None
        rank = delta.header.rank
        assert subscriber.deltas.rank == rank
        expected = run.truths[rank.epoch, rank.sequence]
        if runtime == "torch":
            assert served(subscriber) == expected
        else:
            assert served(subscriber) == pytest.approx(expected, abs=1e-6)
        digests = subscriber.scorer.serving_sha256()
        assert digests == {stem: run.digests()[stem] for stem in digests}
    assert subscriber.health.deltas == 8
    assert subscriber.failures == {}


def test_a_base_and_its_deltas_have_the_digests_of_the_next_snapshot(run: DeltaRun) -> None:
    subscriber = Subscriber(run.state)
    assert subscriber.next(0.0)
    learn_deltas(run, 3)
    run.learn()
    pointer = run.snapshot()
    follow(subscriber)
    loaded = Scorer(run.state / "snapshots" / pointer.snapshot)
    assert subscriber.scorer.manifest.snapshot != pointer.snapshot
    assert subscriber.scorer.serving_sha256() == loaded.serving_sha256()
    assert loaded.serving_sha256().items() <= loaded.manifest.serving_sha256.items()
    assert served(subscriber) == served(loaded)


def test_rounded_values_are_served_as_they_came(tmp_path: Path) -> None:
    run = DeltaRun(tmp_path, precision="bf16")
    run.learn(2)
    run.snapshot()
    subscriber = Subscriber(tmp_path)
    assert subscriber.next(0.0)
    (delta,) = learn_deltas(run, 1)
    follow(subscriber)
    exact = run.truths[delta.header.rank.epoch, delta.header.rank.sequence]
    assert served(subscriber) != exact
    assert served(subscriber) == pytest.approx(exact, abs=0.01)
    changes = decode_payload(delta.payload, "bf16")["model"]
    values = subscriber.scorer.model.served()["values"][changes["rows"]]
    assert (values == changes["values"]).all()


def test_a_scorer_that_is_held_predicts_as_before_and_is_absorbed_when_it_is_gone(
    run: DeltaRun,
) -> None:
    subscriber = Subscriber(run.state)
    assert subscriber.next(0.0)
    held = [subscriber.scorer]
    truths = [served(subscriber)]
    for _ in range(4):
        learn_deltas(run, 1)
        follow(subscriber, 2)
        held.append(subscriber.scorer)
        truths.append(served(subscriber))
    assert len(set(truths)) == 5
    assert not subscriber.scorer.absorb()
    assert [served(scorer) for scorer in held] == truths
    assert not subscriber._absorbed
    held.clear()
    follow(subscriber, 2)
    assert subscriber._absorbed
    assert served(subscriber) == truths[-1]


def test_an_additional_model_follows_its_part_of_the_deltas(run: DeltaRun) -> None:
    subscriber = Subscriber(run.state, model="ftrl")
    assert subscriber.next(0.0)
    before = served(subscriber)
    learn_deltas(run, 3)
    run.learn()
    pointer = run.snapshot()
    follow(subscriber)
    expected = served(Scorer(run.state / "snapshots" / pointer.snapshot, model="ftrl"))
    assert served(subscriber) == expected != before


def test_deltas_can_be_switched_off(run: DeltaRun) -> None:
    subscriber = Subscriber(run.state, deltas=False)
    assert subscriber.next(0.0)
    before = served(subscriber)
    learn_deltas(run, 2)
    follow(subscriber)
    assert (served(subscriber), subscriber.health.delta) == (before, None)
    run.learn()
    pointer = run.snapshot()
    assert subscriber.next(0.0) == pointer
    assert not subscriber.adopted


def test_a_model_that_cannot_take_deltas_follows_snapshots_with_one_warning(
    run: DeltaRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> Scorer:
        raise ConfigError("a model on a GPU follows snapshots only")

    subscriber, pointers, deltas = following_by_hand(run)
    monkeypatch.setattr(Scorer, "updated", refuse)
    deltas.arrive(*learn_deltas(run, 3))
    follow(subscriber)
    assert deltas.closed
    assert [record.getMessage() for record in caplog.records] == [
        "deltas are not followed: a model on a GPU follows snapshots only"
    ]
    assert subscriber.health.behind == "a model on a GPU follows snapshots only"
    run.learn()
    pointers.arrived = [run.snapshot()]
    assert subscriber.next(0.0)
    assert served(subscriber) == truth_of(run, subscriber.scorer)


# -- snapshots and deltas ------------------------------------------------------------------------


def test_a_snapshot_that_deltas_have_led_past_is_adopted_and_not_loaded(run: DeltaRun) -> None:
    subscriber, pointers, deltas = following_by_hand(run)
    deltas.arrive(*learn_deltas(run, 2))
    run.learn()
    pointer = run.snapshot()
    deltas.arrive(run.deltas[-1], *learn_deltas(run, 2))
    follow(subscriber)
    before = served(subscriber)
    pointers.arrived = [pointer]
    assert subscriber.next(0.0) == pointer == subscriber.pointer
    assert subscriber.adopted
    assert pointer.snapshot not in pointers.located
    assert served(subscriber) == before == run.truths[3, 5]
    assert subscriber.scorer.snapshot == subscriber.health.snapshot == pointer.snapshot
    deltas.arrive(*learn_deltas(run, 1))
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 6]


def test_a_pointer_that_comes_before_its_delta_waits_for_it(
    run: DeltaRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriber, pointers, deltas = following_by_hand(run)
    deltas.arrive(*learn_deltas(run, 1))
    follow(subscriber, 2)
    run.learn()
    pointers.arrived = [run.snapshot()]
    assert subscriber.next(0.0) is None
    deltas.arrive(run.deltas[-1])
    assert subscriber.next(0.0) == published(run)
    assert subscriber.adopted
    # The next delta is lost, so the snapshot is loaded at last.
    run.learn()
    pointers.arrived = [run.snapshot()]
    assert subscriber.next(0.0) is None
    monkeypatch.setattr(following, "_EXPECTED_SECONDS", 0.0)
    subscriber._expected = None
    pointers.arrived = [published(run)]
    assert subscriber.next(0.0) == published(run)
    assert not subscriber.adopted
    assert served(subscriber) == run.truths[3, 3]


def test_after_a_gap_the_model_serves_on_and_the_next_snapshot_leads_out(
    run: DeltaRun, caplog: pytest.LogCaptureFixture
) -> None:
    subscriber, pointers, deltas = following_by_hand(run)
    first, lost, third, fourth = learn_deltas(run, 4)
    deltas.arrive(first, third, fourth)
    with caplog.at_level(logging.WARNING):
        follow(subscriber)
    assert served(subscriber) == run.truths[3, 1]
    assert subscriber.failures == {"delta_gap": 2}
    assert len(caplog.records) == 1, "a gap is said once"
    behind = subscriber.health.behind
    assert behind is not None
    assert third.header.rank.name in behind
    run.learn()
    pointer = run.snapshot()
    following_delta = learn_deltas(run, 1)[0]
    deltas.kept = [first, third, fourth, *run.deltas[-2:]]
    pointers.arrived = [pointer]
    assert subscriber.next(0.0) == pointer
    assert not subscriber.adopted
    follow(subscriber)
    assert subscriber.deltas.rank == following_delta.header.rank
    assert served(subscriber) == run.truths[3, 6]
    assert subscriber.health.behind is None
    assert lost.header.rank.sequence == 2


def test_a_delta_that_comes_late_closes_the_gap(run: DeltaRun) -> None:
    subscriber, _, deltas = following_by_hand(run)
    made = learn_deltas(run, 3)
    deltas.kept = made
    deltas.arrive(made[0], made[2], made[1])
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 3]
    assert subscriber.failures == {"delta_gap": 1}
    assert subscriber.health.behind is None


def test_a_snapshot_that_is_published_again_takes_the_model_back(run: DeltaRun) -> None:
    subscriber, pointers, deltas = following_by_hand(run)
    learn_deltas(run, 2)
    run.learn()
    pointer = run.snapshot()
    deltas.kept = [*run.deltas, *learn_deltas(run, 2)]
    deltas.arrive(*deltas.kept)
    pointers.arrived = [pointer]
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 5]
    path = run.state / "snapshots" / pointer.snapshot
    again = pointer_for(path, snapshot.read_manifest(path), epoch=4)
    pointers.arrived = [again]
    assert subscriber.next(0.0) == again
    follow(subscriber)
    assert served(subscriber) == run.truths[pointer.snapshot], "deltas of the old chain are stale"


def test_the_deltas_of_a_resumed_run_begin_with_the_published_snapshot(run: DeltaRun) -> None:
    subscriber, pointers, deltas = following_by_hand(run)
    learn_deltas(run, 2)
    resumed = run.resumed(published(run), 4)
    deltas.kept = list(run.deltas)
    deltas.arrive(*run.deltas)
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 2]
    made = learn_deltas(resumed, 3)
    deltas.kept += made
    deltas.arrive(*made)
    follow(subscriber, 20)
    assert served(subscriber) == run.truths[4, 3]
    assert pointers.located == [published(run).snapshot] * 2
    # One that starts now finds both branches, and ends on the one that lives.
    fresh = Subscriber(run.state)
    follow(fresh, 20)
    assert served(fresh) == run.truths[4, 3]


def test_a_chain_that_lacks_its_first_link_is_not_begun_again_and_again(run: DeltaRun) -> None:
    subscriber, pointers, deltas = following_by_hand(run)
    deltas.arrive(*learn_deltas(run, 1))
    follow(subscriber)
    made = learn_deltas(run.resumed(published(run), 4), 5)
    deltas.kept = made[1:]
    for delta in made[1:]:
        deltas.arrive(delta)
        follow(subscriber, 4)
    assert len(pointers.located) <= 2
    assert served(subscriber) in (run.truths[3, 1], run.truths[published(run).snapshot])


# -- what is refused -----------------------------------------------------------------------------


def other_run(delta: Delta) -> Delta:
    return delta._replace(header=structs.replace(delta.header, run="f" * 32))


def other_model(delta: Delta) -> Delta:
    return delta._replace(header=structs.replace(delta.header, model="another"))


def other_schema(delta: Delta) -> Delta:
    return delta._replace(header=structs.replace(delta.header, identity_sha256="0" * 64))


def no_payload(delta: Delta) -> Delta:
    return delta._replace(payload=delta.payload[:-1])


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Delta], Delta]:
    def alter(delta: Delta) -> Delta:
        changes = {
            stem: dict(named) for stem, named in decode_payload(delta.payload, "fp32").items()
        }
        change(changes)
        return delta._replace(payload=encode_payload(changes, "fp32"))

    return alter


def set_value(name: str, value: Any) -> Callable[[Delta], Delta]:
    return changed(lambda changes: changes["model"].update({name: value}))


def descend(changes: dict[str, Any]) -> None:
    changes["model"]["rows"] = changes["model"]["rows"][::-1]


def make_infinite(changes: dict[str, Any]) -> None:
    changes["model"]["values"] = np.full_like(changes["model"]["values"], np.inf)


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        pytest.param(other_run, "delta_other_run", id="run"),
        pytest.param(other_model, "delta_other_model", id="model"),
        pytest.param(other_schema, "delta_other_schema", id="schema"),
        pytest.param(no_payload, "delta_damaged", id="truncated"),
        pytest.param(changed(lambda each: each.pop("model")), "delta_not_fitting", id="no model"),
        pytest.param(changed(descend), "delta_not_fitting", id="descending rows"),
        pytest.param(changed(make_infinite), "delta_not_fitting", id="infinite"),
        pytest.param(set_value("rows", np.array([64], np.uint32)), "delta_not_fitting", id="row"),
        pytest.param(
            set_value("dense.deep.layers.0.bias", np.zeros(3, np.float32)),
            "delta_not_fitting",
            id="shape",
        ),
        pytest.param(set_value("more", np.zeros(3)), "delta_not_fitting", id="unknown tensor"),
    ],
)
def test_a_delta_that_is_wrong_changes_nothing_and_is_counted_by_name(
    run: DeltaRun, harm: Callable[[Delta], Delta], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert kind in REFUSALS
    subscriber, _, deltas = following_by_hand(run)
    first, second = learn_deltas(run, 2)
    deltas.arrive(first)
    follow(subscriber)
    before = served(subscriber)
    deltas.arrive(harm(second), harm(second))
    follow(subscriber)
    assert served(subscriber) == before == run.truths[3, 1]
    assert subscriber.failures == {kind: 2}
    assert len(caplog.records) == 1, "it is said once"
    deltas.arrive(second)
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 2]


def test_a_delta_without_a_model_that_serves_is_refused_by_its_name(run: DeltaRun) -> None:
    scorer = Scorer(run.state / "snapshots" / published(run).snapshot)
    (delta,) = learn_deltas(run, 1)
    changes = decode_payload(delta.payload, "fp32")
    with pytest.raises(ValueError, match=r"the delta has nothing of model\.safetensors"):
        scorer.updated({"ftrl.model": changes["ftrl.model"]}, delta.header)
    assert served(scorer) == run.truths[published(run).snapshot]


def test_a_stale_delta_that_is_replayed_is_counted_and_changes_nothing(run: DeltaRun) -> None:
    subscriber, _, deltas = following_by_hand(run)
    made = learn_deltas(run, 3)
    deltas.arrive(*made, made[0], made[2])
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 3]
    assert subscriber.failures == {"delta_stale": 2}
    assert subscriber.health.behind is None


def test_deltas_without_the_signature_that_is_required_are_refused(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "trainer")
    other_private, _ = write_keys(tmp_path, "other")
    run = DeltaRun(tmp_path / "state", sign=SigningKey(private).sign)
    run.learn()
    run.snapshot()
    subscriber = Subscriber(run.state, public_key=public)
    assert subscriber.next(0.0)
    learn_deltas(run, 1)
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 1]
    for sign in (None, SigningKey(other_private).sign):
        before = subscriber.failures["delta_unsigned"]
        run._sign = sign
        learn_deltas(run, 1)
        follow(subscriber)
        assert served(subscriber) == run.truths[3, 1]
        assert subscriber.failures["delta_unsigned"] == before + 1
    assert "sign" in str(subscriber.health.behind)


def test_whatever_a_source_of_deltas_raises_the_model_serves(run: DeltaRun) -> None:
    class Failing(ListedDeltas):
        errors = [OSError("stale handle"), MemoryError(), RecursionError("too deep")]

        def poll(self, timeout_seconds: float) -> Sequence[Delta | SnapshotError]:
            if self.errors:
                raise self.errors.pop()
            return super().poll(timeout_seconds)

    pointers, deltas = Pointers(run.state), Failing()
    subscriber = Subscriber(pointers, deltas=deltas)
    pointers.arrived = [published(run)]
    assert subscriber.next(0.0)
    follow(subscriber, 3)
    assert subscriber.failures == {"delta_source": 3}
    deltas.arrive(*learn_deltas(run, 1))
    follow(subscriber)
    assert served(subscriber) == run.truths[3, 1]


def test_an_error_of_on_delta_is_counted_and_the_model_serves(run: DeltaRun) -> None:
    def fail(applied: AppliedDelta) -> None:
        raise ValueError("no such cache")

    subscriber, _, deltas = following_by_hand(run, on_delta=fail)
    deltas.arrive(*learn_deltas(run, 2))
    follow(subscriber)
    assert subscriber.failures == {"on_delta": 2}
    assert served(subscriber) == run.truths[3, 2]


# -- drop, duplicate, reorder --------------------------------------------------------------------


class Told:
    """A run of two epochs that was killed once, all of its deltas, and its published snapshots."""

    def __init__(self, state: Path) -> None:
        first = DeltaRun(state)
        first.learn(2)
        pointers = [first.snapshot()]
        learn_deltas(first, 2)
        first.learn()
        pointers.append(first.snapshot())
        learn_deltas(first, 2)  # a branch that ends here
        second = first.resumed(pointers[-1], 4)
        learn_deltas(second, 2)
        second.learn()
        pointers.append(second.snapshot())
        learn_deltas(second, 2)
        self.state = state
        self.run = second
        self.pointers = pointers
        self.deltas = list(second.deltas)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("told"))


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Deltas and pointers in nearly their order, with some lost, repeated or moved."""
    events: list[tuple[float, str, int]] = []
    at_pointer = {1: 3, 2: 8}  # a snapshot is published after so many deltas
    for index in range(10):
        times = draw(st.sampled_from([0, 1, 1, 1, 1, 2]))
        moved = [draw(st.sampled_from([0, 0, 0, 0.5, 2, -2])) for _ in range(times)]
        events += [(index + each, "delta", index) for each in moved]
    for index, after in at_pointer.items():
        if draw(st.booleans()):
            events.append((after - 0.5 + draw(st.sampled_from([0, 0, 1, 3])), "pointer", index))
    return [(kind, index) for _, kind, index in sorted(events)]


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arrivals(), st.booleans())
def test_whatever_is_lost_repeated_or_moved_only_true_states_are_served(
    told: Told, events: list[tuple[str, int]], kept: bool
) -> None:
    pointers, deltas = Pointers(told.state), ListedDeltas(told.deltas if kept else ())
    subscriber = Subscriber(pointers, deltas=deltas)
    pointers.arrived = [told.pointers[0]]
    assert subscriber.next(0.0)
    deltas.arrived.clear()
    for kind, index in events:
        if kind == "delta":
            deltas.arrive(told.deltas[index])
        else:
            pointers.arrived.append(told.pointers[index])
        subscriber.next(0.0)
        assert served(subscriber) == truth_of(told.run, subscriber.scorer)
    deltas.kept = told.deltas
    pointers.arrived = [told.pointers[-1]]
    deltas.arrive(*told.deltas[-2:])
    for _ in range(30):
        subscriber.next(0.0)
        assert served(subscriber) == truth_of(told.run, subscriber.scorer)
    assert served(subscriber) == told.run.truths[4, 5]
    assert subscriber.health.behind is None


# -- processes -----------------------------------------------------------------------------------


FOLLOW = """
import json, sys
from stream_ctr.snapshots.subscriber import Subscriber
rows, state = map(json.loads, sys.argv[1:])
subscriber = Subscriber(state)
while True:
    subscriber.next(0.02)
    if subscriber.pointer:
        scorer = subscriber.scorer
        rank = scorer.delta.rank if scorer.delta else None
        named = [rank.epoch, rank.sequence] if rank else scorer.snapshot
        print(json.dumps([named, scorer.predict(rows).tolist()]), flush=True)
"""


@pytest.mark.slow
def test_a_subscriber_that_is_killed_at_any_time_serves_true_states_after_its_restart(
    run: DeltaRun,
) -> None:
    for lines in (1, 5):
        process = started(
            subprocess.Popen(
                [sys.executable, "-c", FOLLOW, json.dumps(ROWS), json.dumps(str(run.state))],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert process.stdout
        seen = []
        for _ in range(lines):
            seen.append(process.stdout.readline())
            learn_deltas(run, 1)
        newest = run.deltas[-1].header.rank
        while (found := json.loads(seen[-1]))[0] != [newest.epoch, newest.sequence]:
            seen.append(process.stdout.readline())
        process.kill()
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        for named, predicted in map(json.loads, seen):
            key = named if isinstance(named, str) else tuple(named)
            assert tuple(predicted) == run.truths[key]
        assert found[1] == list(run.truths[newest.epoch, newest.sequence])
        run.learn()
        run.snapshot()


@pytest.mark.slow
def test_predictions_of_other_threads_are_those_of_the_state_that_they_name(run: DeltaRun) -> None:
    stopped = threading.Event()
    seen: list[tuple[Any, tuple[float, ...]]] = []

    def predict(subscriber: Subscriber) -> None:
        while not stopped.is_set():
            scorer = subscriber.scorer
            rank = scorer.delta.rank if scorer.delta else None
            key = (rank.epoch, rank.sequence) if rank else scorer.snapshot
            seen.append((key, served(scorer)))

    with Subscriber(run.state) as subscriber:
        assert subscriber.wait(PATIENCE_SECONDS)
        threads = [threading.Thread(target=predict, args=(subscriber,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(12):
                learn_deltas(run, 1)
                if number % 5 == 4:
                    run.learn()
                    run.snapshot()
            newest = run.deltas[-1].header.rank
            wait_until(lambda: subscriber.deltas.rank == newest)
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
    assert subscriber.scorer.absorb()
    assert len({key for key, _ in seen}) > 2
    assert all(run.truths[key] == predicted for key, predicted in seen)
    assert not subscriber.failures


# -- freshness and the command -------------------------------------------------------------------


def test_a_delta_says_how_old_its_rows_are(run: DeltaRun, monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[AppliedDelta] = []
    subscriber, _, deltas = following_by_hand(run, on_delta=applied.append)
    (delta,) = learn_deltas(run, 1)
    created = delta.header.created_ms
    monkeypatch.setattr(
        "stream_ctr.snapshots.followed_deltas._now_ms", lambda: float(created + 2000)
    )
    deltas.arrive(delta)
    follow(subscriber)
    (news,) = applied
    assert news.header == delta.header
    assert news.delays.copied_seconds == 2.0
    assert news.delays.learned_seconds == 2.5
    assert news.delays.closed_seconds == pytest.approx((6 * 5.0 + 2 * 3.0) / 8)
    assert news.delays.event_seconds == 7.0
    assert subscriber.delays == news.delays
    assert subscriber.deltas.closed_delays.total_seconds == 0, "it was taken before the start"
    deltas.arrive(*learn_deltas(run, 1))
    subscriber.deltas._started_ms = 0.0
    follow(subscriber)
    assert subscriber.deltas.closed_delays.cumulative()[-1] == ("+Inf", 8)


def test_health_tells_of_deltas(run: DeltaRun) -> None:
    subscriber, _, deltas = following_by_hand(run)
    health = subscriber.health
    assert (health.delta, health.deltas, health.delta_seconds, health.behind) == (
        None,
        0,
        None,
        None,
    )
    deltas.arrive(*learn_deltas(run, 2))
    follow(subscriber)
    health = subscriber.health
    assert health.ok
    assert (health.delta, health.deltas) == ("00000003-00000002", 2)
    assert health.delta_seconds is not None
    assert health.delta_seconds >= 0


@pytest.mark.slow
def test_subscribe_prints_a_line_for_each_snapshot_and_delta(run: DeltaRun) -> None:
    learn_deltas(run, 2)
    arguments = ["subscribe", "--state", run.state, "--json"]
    process = started(forks.start(*arguments, stdout=subprocess.PIPE, text=True))
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(1 + len(run.deltas))]
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == 0
    check_json(run, lines)


def test_the_lines_of_subscribe_for_people_name_the_delta_and_its_age(run: DeltaRun) -> None:
    lines: list[str] = []
    subscriber, pointers, deltas = following_by_hand(
        run, on_delta=lambda applied: lines.append(_delta_line(applied, as_json=False))
    )
    run.learn()
    pointer = run.snapshot()
    deltas.arrive(*run.deltas, *learn_deltas(run, 1))
    follow(subscriber)
    pointers.arrived = [pointer]
    assert subscriber.next(0.0) == pointer
    for line, delta in zip(lines, run.deltas, strict=True):
        assert line.startswith(delta.header.rank.name)
        assert "after its label windows closed" in line
    assert "not loaded" in _snapshot_line(pointer, subscriber, as_json=False)
    document = json.loads(_snapshot_line(pointer, subscriber, as_json=True))
    assert (document["verified"], document["adopted"]) == (False, True)


def check_json(run: DeltaRun, lines: Sequence[str]) -> None:
    first, *deltas = map(json.loads, lines)
    assert (first["kind"], first["snapshot"]) == ("snapshot", published(run).snapshot)
    assert (first["verified"], first["adopted"]) == (True, False)
    assert first["freshness"]["copied_seconds"] > 0
    for line, delta in zip(deltas, run.deltas, strict=True):
        header = delta.header
        assert line["kind"] == "delta"
        assert line["rank"] == {"epoch": header.rank.epoch, "sequence": header.rank.sequence}
        assert (line["base"], line["bytes"]) == (header.base, len(delta.payload))
        assert line["rows"] == sum(header.rows.values())
        assert line["freshness"]["closed_seconds"] > line["freshness"]["copied_seconds"]


@pytest.mark.slow
def test_subscribe_follows_the_topics_of_snapshots_and_of_deltas(
    run: DeltaRun, embedded_broker: str, topic: str
) -> None:
    client = kafka.client_options(embedded_broker, {})
    names = {name: f"{topic}.{name}" for name in ("snapshots", "deltas")}
    kafka.ensure_topic(client, names["snapshots"], compacted=True)
    arguments = ["subscribe", "--topic", names["snapshots"]]
    arguments += ["--bootstrap-servers", embedded_broker]
    arguments += ["--json", "-X", f"snapshots.delta_topic={names['deltas']}"]
    with contextlib.closing(kafka.KafkaSink(client)) as sink:
        sink.send(names["snapshots"], encode_pointer(published(run)), key=b"default")
        sink.flush(PATIENCE_SECONDS)
        kafka.ensure_topic(client, names["deltas"])
        process = started(forks.start(*arguments, stdout=subprocess.PIPE, text=True))
        assert process.stdout
        assert json.loads(process.stdout.readline())["kind"] == "snapshot"
        for delta in learn_deltas(run, 3):
            header = (run.state / "deltas" / f"{delta.header.rank.name}.json").read_bytes()
            send(sink, names["deltas"], b"default", header, delta.header, delta.payload)
            line = json.loads(process.stdout.readline())
            assert (line["kind"], line["rank"]["sequence"]) == (
                "delta",
                delta.header.rank.sequence,
            )
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == 0


def test_with_exec_each_snapshot_is_loaded_and_no_delta_followed(run: DeltaRun) -> None:
    learn_deltas(run, 1)
    done = command("subscribe", "--state", run.state, "--once", "--json", "--exec", "true")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kind"] == "snapshot"
    assert "no deltas are followed" in " ".join(command("subscribe", "--help").output.split())
