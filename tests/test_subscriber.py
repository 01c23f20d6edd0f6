"""A subscriber serves the newest snapshot that verifies, and keeps it when another is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from errno import EACCES, EIO, ENOTDIR, ESTALE
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec import structs
from support.keys import write_keys
from support.manifests import RUN, edit_json, edit_manifest, make_newer
from support.memory_topic import topic_of
from support.patience import PATIENCE_SECONDS, wait_until
from support.reliability import Outcome
from support.served import publish, write_served
from support.snapshots import flip_bit

from stream_ctr.cli.main import main
from stream_ctr.connectors.errors import KafkaReadFailed
from stream_ctr.errors import ConfigError, InvalidFeatures, SnapshotError
from stream_ctr.learn.runtimes import RUNTIMES
from stream_ctr.snapshots import pointer as pointers
from stream_ctr.snapshots import subscriber as following
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.manifest import FORMAT
from stream_ctr.snapshots.pointer import Pointer, encode_pointer
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.subscriber import Follow, Subscriber

ROWS: list[dict[str, object]] = [{"app": "maps", "age": 31}, {"os": "a"}]


class Queue:
    """A source of pointers of the run `RUN` that returns one batch a poll."""

    holder = RUN

    def __init__(self, *batches: Sequence[Pointer | SnapshotError]) -> None:
        self.batches = list(batches)

    def poll(self, timeout_seconds: float) -> Sequence[Pointer | SnapshotError]:
        return self.batches.pop(0) if self.batches else []

    def locate(self, pointer: Pointer) -> Path:
        return Path(pointer.path)


def write(state: Path, sequence: int, **changes: Any) -> Path:
    return write_served(state / "snapshots", seed=sequence, sequence=sequence, **changes)


def subscribe_once(state: Path) -> Result:
    arguments = ["subscribe", "--state", str(state), "--once", "--timeout", "0.2"]
    return CliRunner().invoke(main, arguments)


# -- following -----------------------------------------------------------------------------------


def test_each_published_snapshot_is_loaded_in_turn(tmp_path: Path) -> None:
    subscriber = Subscriber(tmp_path)
    assert subscriber.next(0.0) is None
    with pytest.raises(SnapshotError, match="no snapshot was published yet"):
        subscriber.predict(ROWS)
    predictions = []
    for sequence in (1, 2):
        pointer = publish(write(tmp_path, sequence))
        assert subscriber.next(PATIENCE_SECONDS) == pointer == subscriber.pointer
        predictions.append(subscriber.predict(ROWS).tolist())
        assert predictions[-1] == subscriber.scorer.predict(ROWS).tolist()
    assert predictions[0] != predictions[1]
    assert subscriber.next(0.0) is None


def test_a_subscriber_follows_in_the_background_until_it_is_closed(tmp_path: Path) -> None:
    loaded: list[Pointer] = []
    with Subscriber(tmp_path, on_snapshot=loaded.append) as subscriber:
        assert not subscriber.wait(0.0)
        first = publish(write(tmp_path, 1))
        assert subscriber.wait(PATIENCE_SECONDS)
        second = publish(write(tmp_path, 2))
        wait_until(lambda: subscriber.pointer == second)
        assert not subscriber.closing
    assert subscriber.closing
    assert loaded[-1] == second
    assert set(loaded[:-1]) <= {first}
    assert subscriber.predict(ROWS).shape == (2,)
    assert threading.active_count() < 50


def test_an_additional_model_can_be_served(tmp_path: Path) -> None:
    publish(write(tmp_path, 1))
    published = Subscriber(tmp_path)
    additional = Subscriber(tmp_path, model="ftrl")
    for subscriber in (published, additional):
        assert subscriber.next(PATIENCE_SECONDS)
    assert additional.predict(ROWS).tolist() != published.predict(ROWS).tolist()
    with pytest.raises(ConfigError, match="there is no model 'deepfn'; did you mean 'deepfm'"):
        Subscriber(tmp_path, model="deepfn")


def test_a_subscriber_serves_with_the_runtime_that_it_is_given(tmp_path: Path) -> None:
    publish(write_served(tmp_path / "snapshots"))
    probabilities = []
    for runtime in RUNTIMES:
        model = Subscriber(tmp_path, runtime=runtime)
        assert model.next(10)
        assert (model.runtime, model.scorer.runtime) == (runtime, runtime)
        probabilities.append(model.predict({"app": "maps", "age": 31}))
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)
    with pytest.raises(ConfigError, match="a runtime is torch or onnx, got 'numpy'"):
        Subscriber(tmp_path, runtime="numpy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="predicts on the CPU"):
        Subscriber(tmp_path, runtime="onnx", device="cuda")


def test_what_was_scored_as_missing_is_counted_over_all_snapshots(tmp_path: Path) -> None:
    strict = Subscriber(tmp_path)
    lenient = Subscriber(tmp_path, on_invalid="score")
    for sequence in (1, 2):
        publish(write(tmp_path, sequence))
        assert lenient.next(PATIENCE_SECONDS)
        assert 0 < lenient.predict({"app": "maps", "ap": 1}) < 1
    assert lenient.invalid == {"unknown_field": 2}
    assert strict.next(PATIENCE_SECONDS)
    with pytest.raises(InvalidFeatures, match="there is no field 'ap'"):
        strict.predict({"app": "maps", "ap": 1})


# -- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "sequence", "loaded"),
    [
        (2, 4, False),
        (1, 9, False),
        (2, 5, True),  # the same once more: a resumed run publishes it again
        (2, 6, True),
        (3, 1, True),  # a rollback
    ],
)
def test_a_snapshot_that_ranks_below_the_loaded_one_is_ignored(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    epoch: int,
    sequence: int,
    loaded: bool,
) -> None:
    subscriber = Subscriber(tmp_path)
    path = write(tmp_path, 5, epoch=1)
    first = publish(path, epoch=2)
    assert subscriber.next(0.0) == first
    before = subscriber.scorer
    again = path if sequence == 5 else write(tmp_path, sequence, epoch=1)
    second = publish(again, epoch=epoch)
    with caplog.at_level(logging.WARNING):
        found = subscriber.next(0.0)
    assert found == (second if loaded else None)
    assert subscriber.pointer == (second if loaded else first)
    assert (subscriber.scorer is before) is not loaded
    assert ("older than the loaded one" in caplog.text) is not loaded


def test_the_first_pointer_that_verifies_is_loaded_and_the_rest_are_not(
    tmp_path: Path,
) -> None:
    newest, older = (publish(write(tmp_path, sequence)) for sequence in (2, 1))
    subscriber = Subscriber(Queue([newest, older]))
    assert subscriber.next(0.0) == newest
    assert subscriber.next(0.0) is None

    flip_bit(Path(newest.path) / "model.safetensors", -1)
    subscriber = Subscriber(Queue([newest, older]))
    assert subscriber.next(0.0) == older
    assert "model.safetensors has SHA-256" in str(subscriber.refusal)
    assert subscriber.health.awaited == newest.snapshot


# -- runs ----------------------------------------------------------------------------------------

OTHER = "f" * 32
THIRD = "e" * 32


def copy_published(state: Path, target: Path) -> None:
    """Replace what is published in one state directory by what is in another."""
    shutil.copytree(state / "snapshots", target / "snapshots", dirs_exist_ok=True)
    shutil.copy(state / "latest.json", target)


@pytest.mark.parametrize("follow", ["never", "replace"])
@pytest.mark.parametrize(
    ("run", "replaces", "loaded"),
    [
        (RUN, (), ("never", "replace")),
        (OTHER, (), ()),
        (OTHER, (THIRD,), ()),
        (OTHER, (THIRD, RUN), ("replace",)),
    ],
    ids=["its own", "another", "another's successor", "its successor"],
)
def test_a_subscriber_changes_run_only_when_both_sides_were_told(
    tmp_path: Path, follow: Follow, run: str, replaces: tuple[str, ...], loaded: tuple[str, ...]
) -> None:
    subscriber = Subscriber(tmp_path, follow=follow)
    assert subscriber.run is None
    first = publish(write(tmp_path, 1))
    assert subscriber.next(0.0) == first
    # Two runs have the same epochs and sequences.
    second = publish(write(tmp_path / run, 2, run=run), replaces=replaces)
    copy_published(tmp_path / run, tmp_path)
    found = subscriber.next(0.0)
    assert (found == second) is (follow in loaded)
    assert subscriber.run == subscriber.scorer.manifest.run == (run if follow in loaded else RUN)
    assert subscriber.refused == ({} if follow in loaded else {run: 1})
    assert subscriber.refusal is None


def test_after_a_replacement_the_replaced_run_is_refused_whatever_it_ranks(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", 2), write(tmp_path / "new", 1, run=OTHER, epoch=1)
    first = publish(old)
    second = publish(new, replaces=(RUN,))
    late = structs.replace(first, epoch=99)
    subscriber = Subscriber(TopicPointers(topic_of(first, second, late).reader()), follow="replace")
    assert subscriber.next(0.0) == second
    assert subscriber.refused == {RUN: 2}


def test_the_pointers_of_another_run_are_counted_and_logged_once_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subscriber = Subscriber(tmp_path / "state")
    publish(write(tmp_path / "state", 1))
    assert subscriber.next(0.0)
    for run, replaces, count in ((OTHER, (), 3), (THIRD, (RUN,), 2)):
        other = write(tmp_path / run, 2, run=run)
        for number in range(count):
            publish(other, created_ms=number, replaces=replaces)
            copy_published(tmp_path / run, tmp_path / "state")
            assert subscriber.next(0.0) is None
    assert subscriber.refused == {OTHER: 3, THIRD: 2}
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(", which ")[2] for message in messages] == [
        f"is not run {RUN}, the one that is followed. To serve it, start a subscriber with "
        f"--run {OTHER}",
        f"replaces run {RUN}, the one that is followed. To serve it, start a subscriber with "
        f"--run {THIRD} or with --follow replace",
    ]


def test_a_pinned_run_is_followed_from_the_beginning(tmp_path: Path) -> None:
    publish(write(tmp_path, 1))
    subscriber = Subscriber(tmp_path, run=OTHER)
    assert subscriber.next(0.0) is None
    assert (subscriber.run, subscriber.refused) == (OTHER, {RUN: 1})
    assert f"which is not run {OTHER}" in str(subscriber.refusal)
    assert Subscriber(tmp_path, run=RUN).next(0.0)
    with pytest.raises(ConfigError, match="'x' is not the id of a run"):
        Subscriber(tmp_path, run="x")
    with pytest.raises(ConfigError, match="follow is one of never, replace, got 'always'"):
        Subscriber(tmp_path, follow="always")  # type: ignore[arg-type]


def test_a_run_file_keeps_the_run_over_restarts(tmp_path: Path) -> None:
    kept = tmp_path / "served.run"
    publish(write(tmp_path, 1))
    assert Subscriber(tmp_path, run_file=kept).next(0.0)
    assert kept.read_text() == f"{RUN}\n"
    publish(write(tmp_path / "other", 2, run=OTHER), replaces=(RUN,))
    copy_published(tmp_path / "other", tmp_path)
    restarted = Subscriber(tmp_path, run_file=kept)
    assert restarted.next(0.0) is None
    assert restarted.refused == {OTHER: 1}
    assert Subscriber(tmp_path, run_file=kept, run=OTHER).next(0.0)
    assert kept.read_text() == f"{OTHER}\n"


def test_a_run_file_that_cannot_be_read_or_written_serves_nothing(tmp_path: Path) -> None:
    publish(write(tmp_path, 1))
    kept = tmp_path / "served.run"
    kept.write_text("nonsense")
    with pytest.raises(ConfigError, match=r"served\.run does not hold a run: 'nonsense' is not"):
        Subscriber(tmp_path, run_file=kept)
    kept.unlink()
    subscriber = Subscriber(tmp_path, run_file=tmp_path / "missing" / "served.run")
    assert subscriber.next(0.0) is None
    assert "cannot write" in str(subscriber.refusal)
    with pytest.raises(SnapshotError, match="no snapshot was published yet"):
        subscriber.predict(ROWS)


def test_a_pointer_that_names_another_run_than_its_snapshot_is_refused(tmp_path: Path) -> None:
    publish(write(tmp_path, 1), run=OTHER)
    subscriber = Subscriber(tmp_path)
    assert subscriber.next(0.0) is None
    assert f"its run is {RUN}, its pointer says {OTHER}" in str(subscriber.refusal)
    assert subscriber.run is None


def test_a_fresh_subscriber_reads_the_topic_to_its_end_before_it_chooses_a_run(
    tmp_path: Path,
) -> None:
    first = publish(write(tmp_path / "old", 1))
    second = publish(write(tmp_path / "new", 2, run=OTHER), replaces=(RUN,))

    class Slow:
        """A reader that returns one record a poll."""

        def __init__(self) -> None:
            self.records = [("default", encode_pointer(each)) for each in (first, second)]

        @property
        def caught_up(self) -> bool:
            return not self.records

        def poll(self, timeout_seconds: float) -> list[tuple[str, bytes]]:
            return [self.records.pop(0)] if self.records else []

    reader = Slow()
    subscriber = Subscriber(TopicPointers(reader))
    assert subscriber.next(0.0) is None
    assert subscriber.next(0.0) == second
    assert subscriber.refused == {RUN: 1}


# -- following never ends ------------------------------------------------------------------------


class Failing(Queue):
    """A source that raises each error once before it returns its batches."""

    def __init__(self, *errors: BaseException, then: Sequence[Pointer | SnapshotError]) -> None:
        super().__init__(then)
        self.errors = list(errors)

    def poll(self, timeout_seconds: float) -> Sequence[Pointer | SnapshotError]:
        if self.errors:
            raise self.errors.pop(0)
        return super().poll(timeout_seconds)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a subscriber try again at once."""
    monkeypatch.setattr(following, "_FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(following, "_SOURCE_RETRY_SECONDS", 0.01)


@pytest.mark.fault(
    26,
    injected="ENOTDIR, ESTALE, EIO, EACCES, RecursionError, MemoryError, KafkaReadFailed while a "
    "subscriber in a thread polls",
)
@pytest.mark.usefixtures("hasty")
def test_whatever_a_source_raises_is_counted_and_the_thread_goes_on(
    tmp_path: Path, outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [
        *(OSError(code, os.strerror(code)) for code in (ENOTDIR, ESTALE, EIO, EACCES)),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        KafkaReadFailed("reading topic 'snapshots' failed"),
    ]
    published = publish(write(tmp_path, 1))
    with Subscriber(Failing(*errors, then=[published])) as subscriber:
        assert subscriber.wait(PATIENCE_SECONDS)
        wait_until(lambda: subscriber.health.ok)
        health = subscriber.health
        assert (health.snapshot, health.awaited) == (published.snapshot, None)
        assert health.failures == {"source": len(errors)}
        assert health.polled_seconds is not None
        assert subscriber.predict(ROWS).shape == (2,)
    assert not subscriber.health.following
    for name in ("NotADirectoryError", "RecursionError: maximum", "MemoryError", "KafkaReadFailed"):
        assert f"ignored what is published: {name}" in caplog.text
    outcome("each is counted and logged, and the next pointer is loaded", times=len(errors))


@pytest.mark.usefixtures("hasty")
def test_a_state_directory_that_turns_into_a_file_and_back_is_followed_again(
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    publish(write(state, 1))
    with Subscriber(state) as subscriber:
        assert subscriber.wait(PATIENCE_SECONDS)
        state.rename(tmp_path / "aside")
        state.write_text("")
        wait_until(lambda: subscriber.failures["source"] > 1)
        assert not subscriber.health.ok
        assert "NotADirectoryError" in str(subscriber.health.refusal)
        state.unlink()
        (tmp_path / "aside").rename(state)
        second = publish(write(state, 2))
        wait_until(lambda: subscriber.pointer == second)
        wait_until(lambda: subscriber.health.ok)


@pytest.mark.fault(29, injected="100 pointers that are none, on the topic and in latest.json")
@pytest.mark.usefixtures("hasty")
def test_no_pointer_ends_a_subscriber(tmp_path: Path, outcome: Outcome) -> None:
    published = publish(write(tmp_path, 1))
    good = encode_pointer(published)
    bad = [b"[" * 200_000, b'{"a":' * 100_000, b"", b"\x00", b"9" * 5000, good[:-1], good + b"x"]
    bad += [good.replace(b"3", digit, 1) for digit in (b"4", b"2", b"1e400", b"-1")]
    bad += [good[:cut] for cut in range(0, len(good), len(good) // 88)]
    subscriber = Subscriber(TopicPointers(topic_of(*bad, published).reader()))
    assert subscriber.next(0.0) == published
    assert subscriber.failures == {"pointer": len(bad)}
    followed = Subscriber(tmp_path)
    assert followed.next(0.0) == published
    for number, data in enumerate(bad):
        (tmp_path / "latest.json").write_bytes(data)
        os.utime(tmp_path / "latest.json", ns=(number, number))
        assert followed.next(0.0) is None
    assert followed.failures == {"pointer": len(bad)}
    assert followed.pointer == published
    outcome("all are counted, the model stays", times=2 * len(bad))


def test_an_error_of_on_snapshot_is_counted_and_the_model_serves(tmp_path: Path) -> None:
    def fail(pointer: Pointer) -> None:
        raise ValueError("no such cache")

    subscriber = Subscriber(tmp_path, on_snapshot=fail)
    publish(write(tmp_path, 1))
    assert subscriber.next(0.0)
    assert subscriber.failures == {"on_snapshot": 1}
    assert str(subscriber.refusal) == "ValueError: no such cache"
    assert subscriber.predict(ROWS).shape == (2,)


@pytest.mark.fault(26, injected="a pointer that comes before its snapshot, whole or file by file")
@pytest.mark.usefixtures("hasty")
def test_a_snapshot_that_arrives_after_its_pointer_is_loaded_when_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, outcome: Outcome
) -> None:
    state, remote = tmp_path / "state", tmp_path / "remote"
    path = write(state, 1)
    published = publish(path)
    shutil.copytree(state, remote)
    here = remote / "snapshots" / path.name
    shutil.rmtree(here)
    subscriber = Subscriber(remote)
    assert subscriber.next(0.0) is None
    assert subscriber.health.awaited == path.name
    here.mkdir()
    for file in sorted(path.iterdir(), reverse=True):
        assert subscriber.next(0.1) is None
        shutil.copy(file, here)
    assert subscriber.next(PATIENCE_SECONDS) == published
    assert subscriber.path == here
    assert subscriber.health.awaited is None
    assert subscriber.refusal is None
    assert len(caplog.records) == len(set(caplog.messages)), "each reason is said once"
    outcome("it is tried again, and loaded when it is whole")


@pytest.mark.usefixtures("hasty")
def test_a_newer_snapshot_ends_the_wait_for_one_that_cannot_be_loaded(tmp_path: Path) -> None:
    subscriber = Subscriber(tmp_path)
    damage_tensors_of(publish(write(tmp_path, 1)))
    assert subscriber.next(0.2) is None
    assert subscriber.failures["snapshot"] > 1
    second = publish(write(tmp_path, 2))
    assert subscriber.next(0.0) == second
    assert subscriber.health.awaited is None


def test_a_snapshot_is_tried_again_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("stream_ctr.snapshots.subscriber.time.monotonic", lambda: now[0])
    published = publish(write(tmp_path, 1))
    damage_tensors_of(published)
    subscriber = Subscriber(Queue([published]))
    tried = []
    for second in range(200):
        now[0] = float(second)
        before = subscriber.failures["snapshot"]
        assert subscriber.next(0.0) is None
        tried += [second] * (subscriber.failures["snapshot"] - before)
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]


# -- places --------------------------------------------------------------------------------------


def test_a_state_directory_may_be_moved(tmp_path: Path) -> None:
    published = publish(write(tmp_path / "trained", 1))
    (tmp_path / "trained").rename(tmp_path / "mounted")
    subscriber = Subscriber(tmp_path / "mounted")
    assert subscriber.next(0.0) == published
    assert subscriber.path == tmp_path / "mounted" / "snapshots" / published.snapshot
    line = json.loads(
        CliRunner()
        .invoke(main, ["subscribe", "--state", str(tmp_path / "mounted"), "--once", "--json"])
        .stdout
    )
    assert line["path"] == str(subscriber.path)


def test_the_pointers_of_a_topic_lead_to_the_folder_that_is_given(tmp_path: Path) -> None:
    published = publish(write(tmp_path / "trained", 1))
    (tmp_path / "trained").rename(tmp_path / "mounted")
    assert Subscriber(TopicPointers(topic_of(published).reader())).next(0.0) is None
    snapshots = tmp_path / "mounted" / "snapshots"
    subscriber = Subscriber(TopicPointers(topic_of(published).reader(), snapshots=snapshots))
    assert subscriber.next(0.0) == published
    assert subscriber.path == snapshots / published.snapshot


# -- refusals ------------------------------------------------------------------------------------


def damage_tensors_of(published: Pointer) -> None:
    flip_bit(Path(published.path) / "model.safetensors", -1)


def damage_tensors(path: Path) -> None:
    flip_bit(path / "model.safetensors", -1)
    publish_as_is(path)


def publish_as_is(path: Path) -> None:
    """Touch the pointer, so that a subscriber reads it again."""
    latest = path.parent.parent / "latest.json"
    edit_json(latest, lambda pointer: pointer.update(created_ms=pointer["created_ms"] + 1))


def replace_manifest(path: Path) -> None:
    """Change the manifest alone: the digests in it are still those of the files."""
    edit_manifest(path, lambda manifest: manifest.update(examples=1))
    publish_as_is(path)


def damage_pointer(path: Path) -> None:
    edit_json(path.parent.parent / "latest.json", lambda pointer: pointer.pop("epoch"))


def make_pointer_newer(path: Path) -> None:
    make_newer(path.parent.parent / "latest.json")


def make_manifest_newer(path: Path) -> None:
    edit_manifest(path, lambda manifest: manifest.update(format=FORMAT + 1, new=1))
    digest = sha256((path / "manifest.json").read_bytes()).hexdigest()
    latest = path.parent.parent / "latest.json"
    edit_json(latest, lambda pointer: pointer.update(manifest_sha256=digest))


NEWER = (
    "{} has format {}, and this version of stream-ctr reads formats up to {}: install the version"
)
NEWER_POINTER = NEWER.format("latest.json", pointers.FORMAT + 1, pointers.FORMAT)
NEWER_MANIFEST = NEWER.format("manifest.json", FORMAT + 1, FORMAT)
HARM = [
    pytest.param(damage_tensors, logging.WARNING, "model.safetensors has SHA-256", id="tensors"),
    pytest.param(replace_manifest, logging.WARNING, "its pointer says", id="another manifest"),
    pytest.param(damage_pointer, logging.WARNING, "latest.json is damaged", id="pointer"),
    pytest.param(make_pointer_newer, logging.ERROR, NEWER_POINTER, id="newer pointer"),
    pytest.param(make_manifest_newer, logging.ERROR, NEWER_MANIFEST, id="newer manifest"),
]


@pytest.mark.parametrize(("harm", "level", "reason"), HARM)
def test_a_refused_snapshot_is_logged_and_the_loaded_one_continues_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any, level: int, reason: str
) -> None:
    subscriber = Subscriber(tmp_path)
    first = publish(write(tmp_path, 1))
    assert subscriber.next(PATIENCE_SECONDS) == first
    before = subscriber.predict(ROWS).tolist()
    second = write(tmp_path, 2)
    publish(second)
    harm(second)
    with caplog.at_level(logging.WARNING):
        assert subscriber.next(0.0) is None
    [record] = caplog.records
    assert (record.levelno, record.getMessage().startswith("ignored ")) == (level, True)
    assert reason in record.getMessage()
    assert reason in str(subscriber.refusal)
    assert isinstance(subscriber.refusal, NewerFormat) is (level == logging.ERROR)
    assert subscriber.pointer == first
    assert subscriber.predict(ROWS).tolist() == before

    third = publish(write(tmp_path, 3))
    assert subscriber.next(PATIENCE_SECONDS) == third
    assert subscriber.refusal is None


@pytest.mark.parametrize(("harm", "level", "reason"), HARM)
def test_subscribe_once_exits_6_with_the_reason_of_the_refusal(
    tmp_path: Path, harm: Any, level: int, reason: str
) -> None:
    write(tmp_path, 1)
    second = write(tmp_path, 2)
    publish(second)
    harm(second)
    result = subscribe_once(tmp_path)
    assert result.exit_code == 6
    message = " ".join(result.output.split())
    assert "no valid snapshot was published within 0.2 s: " in message
    assert reason in message


def test_with_a_public_key_a_snapshot_without_its_signature_is_refused(tmp_path: Path) -> None:
    _, public = write_keys(tmp_path, "trainer")
    publish(write(tmp_path, 1))
    subscriber = Subscriber(tmp_path, public_key=public)
    assert subscriber.next(0.0) is None
    assert "is not signed, and a signature is required" in str(subscriber.refusal)


def test_subscribe_once_without_a_snapshot_has_no_reason_to_give(tmp_path: Path) -> None:
    result = subscribe_once(tmp_path)
    assert result.exit_code == 6
    assert "no valid snapshot was published within 0.2 s\n" in result.output


def test_subscribe_once_prints_the_loaded_snapshot(tmp_path: Path) -> None:
    pointer = publish(write(tmp_path, 1))
    arguments = ["subscribe", "--state", str(tmp_path), "--once", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["snapshot"] == pointer.snapshot
