"""A subscriber with the public key loads only snapshots that the trainer's private key signed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from msgspec import structs
from support.commands import succeed
from support.keys import write_keys
from support.lineage import QUICK
from support.manifests import edit_manifest
from support.memory_topic import topic_of
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome
from support.served import write_served

from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import pointer as pointers
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import (
    Pointer,
    decode_pointer,
    encode_pointer,
    pointer_for,
    read_pointer,
    write_pointer,
)
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import PublicKey, SigningKey, verifier
from stream_ctr.snapshots.snapshot_topic import NameHeld, SnapshotTopic
from stream_ctr.snapshots.subscriber import Subscriber

PASSPHRASE = BestAvailableEncryption(b"x")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "trainer")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(2000, seed=5).write_jsonl(path)
    return path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(log: Path, state: Path, *, signing_key: Path | None = None) -> Result:
    signing = ["-X", f"snapshots.signing_key={signing_key}"] if signing_key else []
    return command("run", "--source", log, "--state", state, *QUICK, *signing)


def test_a_key_verifies_its_own_signatures_and_no_others(keys: tuple[Path, Path]) -> None:
    private, public = keys
    signature = SigningKey(private).sign(b"manifest")
    for key in (PublicKey(public), SigningKey(private)):
        key.verify(b"manifest", signature)
        for data, found in ((b"manifesT", signature), (b"manifest", signature[:32])):
            with pytest.raises(SnapshotError, match="not that of the expected key"):
                key.verify(data, found)
    assert verifier(None) is None


def test_a_signed_snapshot_is_loaded_with_the_public_key_and_without_one(
    log: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    assert run(log, tmp_path, signing_key=private).exit_code == 0
    for subscriber in (Subscriber(tmp_path, public_key=public), Subscriber(tmp_path)):
        assert subscriber.next(PATIENCE_SECONDS)
    assert command("snapshots", "verify", tmp_path, "--public-key", public).exit_code == 0
    assert "resumed from snapshot" in run(log, tmp_path, signing_key=private).output


@pytest.mark.security(
    "only what the trainer's key signed is loaded",
    how="no signature, another key's, half of one, a changed manifest",
)
@pytest.mark.parametrize(
    "forgery", ["unsigned", "another key", "a changed manifest", "half a signature"]
)
@pytest.mark.slow
def test_a_snapshot_that_the_key_did_not_sign_is_refused_before_anything_is_loaded(
    log: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
    forgery: str,
    caplog: pytest.LogCaptureFixture,
    outcome: Outcome,
) -> None:
    private, public = keys
    signers = {"unsigned": None, "another key": write_keys(tmp_path, "other")[0]}
    state = tmp_path / "state"
    assert run(log, state, signing_key=signers.get(forgery, private)).exit_code == 0
    path = snapshot.newest(state / "snapshots")
    assert path
    if forgery == "a changed manifest":
        # The digests in the manifest are right, and so is the pointer: only the signature is not.
        edit_manifest(path, lambda manifest: manifest.update(examples=1))
        write_pointer(state / "latest.json", pointer_for(path, snapshot.verify(path)))
    elif forgery == "half a signature":
        (path / "manifest.sig").write_bytes((path / "manifest.sig").read_bytes()[:32])
    assert Subscriber(state, public_key=public).next(0.3) is None
    assert "signature" in caplog.text
    checked = command("snapshots", "verify", state, "--public-key", public)
    assert checked.exit_code == 6
    assert "sign" in checked.output
    resumed = run(log, state, signing_key=private)
    assert resumed.exit_code == 6, "a trainer does not resume from it either"
    scored = command("score", log, "--snapshot", path, "--public-key", public)
    assert scored.exit_code == 6
    outcome("refused by subscriber, score, verify and the resuming trainer")


# -- pointers ------------------------------------------------------------------------------------


class Signed:
    """The state directory of a run that signs."""

    def __init__(self, state: Path, key: SigningKey, public: Path) -> None:
        self.state = state
        self.key = key
        self.public = public
        self.publisher = Publisher(state, signing=key)
        self.pointers: list[Pointer] = []
        for _ in range(2):
            self.publish()

    def publish(self) -> Pointer:
        sequence = len(self.pointers) + 1
        path = write_served(self.state / "snapshots", sequence=sequence, sign=self.key.sign)
        self.publisher.publish(path, snapshot.verify(path))
        pointer = read_pointer(self.state / "latest.json")
        assert pointer
        self.pointers.append(pointer)
        return pointer

    def forge(self, pointer: Pointer) -> None:
        write_pointer(self.state / "latest.json", pointer)

    def subscribe(self) -> Subscriber:
        return Subscriber(self.state, public_key=self.public)


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Signed:
    """A state directory with two signed snapshots, of which the second is published."""
    return Signed(tmp_path / "state", SigningKey(keys[0]), keys[1])


@pytest.mark.security(
    "an old signed snapshot is not published again",
    how="its pointer under epoch 2^40: unsigned, with its old signature, and with another key's; "
    "in latest.json and on the topic",
)
def test_an_old_snapshot_under_a_later_epoch_is_refused_and_the_next_one_is_loaded(
    signed: Signed, tmp_path: Path, outcome: Outcome
) -> None:
    old, new = signed.pointers
    other = SigningKey(write_keys(tmp_path, "other")[0])
    raised = structs.replace(old, epoch=2**40)
    forged = [
        raised,
        structs.replace(raised, signature=""),
        pointers.signed(raised, other.sign),
    ]
    subscriber = signed.subscribe()
    assert subscriber.next(0.0) == new
    for pointer in forged:
        signed.forge(pointer)
        assert subscriber.next(0.0) is None
        assert signed.subscribe().next(0.0) is None
        assert signed.publisher.published() is None
    assert subscriber.failures == {"pointer": len(forged)}
    topic = TopicPointers(topic_of(*forged, new).reader())
    assert Subscriber(topic, public_key=signed.public).next(0.0) == new

    third = signed.publish()
    assert third.epoch == new.epoch
    assert subscriber.next(0.0) == third
    outcome("refused and counted; what the run publishes next is loaded", times=2 * len(forged))


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 4},
        {"sequence": 9},
        {"run": "f" * 32},
        {"replaces": ("f" * 32,)},
        {"model": "other"},
        {"examples": 9},
        {"created_ms": 9},
        {"event_time_ms": 9},
        {"manifest_sha256": "0" * 64},
        {"snapshot": "1", "path": "/snapshots/1"},
        {"path": "/elsewhere/{snapshot}"},
        {"signature": "0" * 128},
        {"signature": ""},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_signature_covers_every_key_of_a_pointer(signed: Signed, changes: dict[str, Any]) -> None:
    pointer = signed.pointers[1]
    changed = {
        name: value.format(snapshot=pointer.snapshot) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    verify = signed.key.verify
    pointers.require_signature(pointer, verify)
    pointers.require_signature(decode_pointer(encode_pointer(pointer)), verify)
    with pytest.raises(SnapshotError, match="the pointer to snapshot .*sign"):
        pointers.require_signature(structs.replace(pointer, **changed), verify)


def test_the_signature_of_another_document_is_not_that_of_a_pointer(signed: Signed) -> None:
    pointer = structs.replace(signed.pointers[1], signature="")
    over_the_json_alone = signed.key.sign(msgspec.json.encode(pointer)).hex()
    with pytest.raises(SnapshotError, match="not that of the expected key"):
        pointers.require_signature(
            structs.replace(pointer, signature=over_the_json_alone), signed.key.verify
        )


def test_a_forged_pointer_takes_the_name_from_no_run_that_signs(signed: Signed) -> None:
    first, second = signed.pointers
    forged = structs.replace(second, run="f" * 32, replaces=(second.run,), signature="")
    topic = topic_of(first, forged)
    source = TopicPointers(topic.reader(), signature=signed.key.verify)
    subscriber = Subscriber(source, public_key=signed.public)
    assert subscriber.next(0.0) == first
    on_topic = SnapshotTopic(
        "snapshots",
        sink=topic,
        reader=topic.reader(),
        name="default",
        run=first.run,
        signing=signed.key,
    )
    on_topic.check(first.rank)
    on_topic.send(second, second.rank)
    assert subscriber.next(0.0) == second
    with pytest.raises(NameHeld):
        SnapshotTopic(
            "snapshots", sink=topic, reader=topic.reader(), name="default", run=first.run
        ).check(second.rank)


def test_a_pointer_says_what_the_manifest_of_its_snapshot_says(tmp_path: Path) -> None:
    path = write_served(tmp_path / "snapshots", sequence=3)
    manifest = snapshot.verify(path)
    pointer = pointer_for(path, manifest)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"run": "f" * 32}, f"its run is {manifest.run}, its pointer says {'f' * 32}"),
        ({"sequence": 4}, "its sequence is 3, its pointer says 4"),
        ({"model": "x"}, "its model is default, its pointer says x"),
        ({"epoch": 2}, "it is of epoch 3, its pointer of 2"),
    ]
    for changes, reason in wrong:
        write_pointer(tmp_path / "latest.json", structs.replace(pointer, **changes))
        subscriber = Subscriber(tmp_path)
        assert subscriber.next(0.0) is None
        assert str(subscriber.refusal) == reason


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.security(
    "a snapshot under another name is not resumed from",
    how="an old signed snapshot, copied to the name of a newer one",
)
@pytest.mark.parametrize("name", ["00000009-20250101T101500Z", "zzz"])
def test_a_renamed_snapshot_is_not_the_newest(
    signed: Signed, name: str, caplog: pytest.LogCaptureFixture, outcome: Outcome
) -> None:
    root = signed.state / "snapshots"
    old, new = (root / pointer.snapshot for pointer in signed.pointers)
    shutil.copytree(old, root / name)
    assert snapshot.newest(root, signature=signed.key.verify) == new
    assert f"{root / name} is snapshot {old.name} under another name" in caplog.text
    verified = command("snapshots", "verify", signed.state)
    assert verified.exit_code == 6
    assert f"is snapshot {old.name} under another name" in verified.output
    # A person may serve a copy under any name.
    assert Scorer(root / name).predict({"app": "maps"}) == Scorer(old).predict({"app": "maps"})
    outcome("passed over with a warning; the newest under its own name is used")


# -- rolling back --------------------------------------------------------------------------------


def test_a_run_that_signs_is_rolled_back_with_its_key_only(
    signed: Signed, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    old, new = signed.pointers
    subscriber = signed.subscribe()
    assert subscriber.next(0.0) == new
    back = ("snapshots", "rollback", signed.state, old.snapshot)
    without = command(*back)
    assert without.exit_code == 3
    assert "load signed pointers only: give --signing-key" in " ".join(without.output.split())
    assert command(*back, "--signing-key", write_keys(tmp_path, "other")[0]).exit_code == 6
    signature = signed.state / "snapshots" / old.snapshot / "manifest.sig"
    signature.rename(tmp_path / "kept.sig")
    assert command(*back).exit_code == 3, "the published pointer is signed"
    (tmp_path / "kept.sig").rename(signature)
    assert read_pointer(signed.state / "latest.json") == new
    succeed(*back, "--signing-key", keys[0])
    loaded = subscriber.next(0.0)
    assert loaded
    assert (loaded.snapshot, loaded.epoch) == (old.snapshot, new.epoch + 1)
    assert signed.publish().epoch == new.epoch + 1
    assert subscriber.next(0.0) == signed.pointers[-1]


# -- keys ----------------------------------------------------------------------------------------


def test_a_file_that_holds_no_suitable_key_is_refused_by_name(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, PASSPHRASE
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    for path, reason in (
        (tmp_path / "none.pem", "cannot read the private key .*none.pem: No such file"),
        (tmp_path / "rsa.pem", "not Ed25519"),
        (tmp_path / "locked.pem", "without a passphrase"),
        (public, "is not a private key"),
    ):
        with pytest.raises(ConfigError, match=reason):
            SigningKey(path)
    with pytest.raises(ConfigError, match="is not a public key"):
        PublicKey(private)
    with pytest.raises(ConfigError, match="cannot read the public key"):
        verifier(tmp_path / "none.pem")
