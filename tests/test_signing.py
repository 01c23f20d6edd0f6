"""Who has the public key loads nothing that the trainer's private key did not sign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.lineage import QUICK
from support.patience import PATIENCE_SECONDS

from stream_ctr.cli.main import main
from stream_ctr.errors import ConfigError
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.signing import PublicKey, SigningKey
from stream_ctr.snapshots.subscriber import Subscriber


def write_keys(directory: Path, name: str) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = directory / f"{name}.pem", directory / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "trainer")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(2000, seed=5).write_jsonl(path)
    return path


def run(log: Path, state: Path, *options: str) -> Any:
    return CliRunner().invoke(
        main, ["run", "--source", str(log), "--state", str(state), *QUICK, *options]
    )


def verify(state: Path, key: Path) -> Any:
    return CliRunner().invoke(main, ["snapshots", "verify", str(state), "--public-key", str(key)])


def test_a_signed_snapshot_is_loaded_with_the_public_key_and_by_who_asks_for_none(
    log, tmp_path, keys
):
    private, public = keys
    assert run(log, tmp_path, "-X", f"snapshots.signing_key={private}").exit_code == 0
    for subscriber in (Subscriber(tmp_path, public_key=public), Subscriber(tmp_path)):
        assert subscriber.next(PATIENCE_SECONDS)
    assert verify(tmp_path, public).exit_code == 0
    again = run(log, tmp_path, "-X", f"snapshots.signing_key={private}")
    assert "resumed from snapshot" in again.output


@pytest.mark.security(
    "only what the trainer's key signed is loaded",
    how="no signature, another key's, half of one, a changed manifest",
)
@pytest.mark.parametrize(
    "forgery", ["unsigned", "another key", "a changed manifest", "half a signature"]
)
@pytest.mark.slow
def test_what_the_key_did_not_sign_is_refused_before_anything_is_loaded(
    log, tmp_path, keys, forgery, caplog, outcome
):
    private, public = keys
    signer = write_keys(tmp_path, "other")[0] if forgery == "another key" else private
    state = tmp_path / "state"
    assert (
        run(
            log,
            state,
            *([] if forgery == "unsigned" else ["-X", f"snapshots.signing_key={signer}"]),
        ).exit_code
        == 0
    )
    path = snapshot.newest(state / "snapshots")
    assert path
    if (
        forgery == "a changed manifest"
    ):  # as the hashes in the manifest are right again, only the signature tells
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "examples": 1}))
        snapshot.write_pointer(state / "latest.json", snapshot.pointer_for(path, manifest))
        assert snapshot.verify(path)
    elif forgery == "half a signature":
        (path / "manifest.sig").write_bytes((path / "manifest.sig").read_bytes()[:32])
    assert Subscriber(state, public_key=public).next(0.3) is None
    assert "signature" in caplog.text
    checked = verify(state, public)
    assert checked.exit_code == 6
    assert "sign" in checked.output
    resumed = run(log, state, "-X", f"snapshots.signing_key={private}")
    assert resumed.exit_code == 6, "a trainer does not go on from it either"
    assert (
        CliRunner()
        .invoke(main, ["score", str(log), "--snapshot", str(path), "--public-key", str(public)])
        .exit_code
        == 6
    )
    outcome("refused by subscriber, score, verify and the resuming trainer")


def test_what_is_no_key_is_refused_by_name(tmp_path, keys):
    private, public = keys
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    for path, reason in (
        (tmp_path / "none.pem", "cannot read the private key .*none.pem: No such file"),
        (tmp_path / "rsa.pem", "not Ed25519"),
        (tmp_path / "locked.pem", "without a passphrase"),
        (public, "is no private key"),
    ):
        with pytest.raises(ConfigError, match=reason):
            SigningKey(path)
    with pytest.raises(ConfigError, match="is no public key"):
        PublicKey(private)
