"""A subscriber with the public key loads only snapshots that the trainer's private key signed."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from support.keys import write_keys
from support.lineage import QUICK
from support.manifests import edit_manifest
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome

from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import pointer_for, write_pointer
from stream_ctr.snapshots.signing import PublicKey, SigningKey, verifier
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
