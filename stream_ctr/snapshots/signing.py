"""Ed25519 signatures over manifests: a subscriber with the public key loads only signed snapshots.

    openssl genpkey -algorithm ed25519 -out trainer.pem          # stays with the trainer
    openssl pkey -in trainer.pem -pubout -out trainer.pub.pem    # goes to subscribers

The manifest holds the SHA-256 of every file of its snapshot, so its signature covers them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots.contract import Verify


class PublicKey:
    """The public key in a PEM file. Raises `ConfigError` if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._key = _read(path, private=False)

    def verify(self, data: bytes, signature: bytes) -> None:
        """Raise `SnapshotError` unless `signature` over `data` was made with this key."""
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            raise SnapshotError("the signature is not that of the expected key") from None


class SigningKey(PublicKey):
    """The private key in a PEM file. Raises `ConfigError` if it cannot be read.

    It verifies too, because a trainer checks its own snapshots before it resumes.
    """

    def __init__(self, path: Path) -> None:
        self._private = _read(path, private=True)
        self._key = self._private.public_key()

    def sign(self, data: bytes) -> bytes:
        """Return the signature over `data`, 64 bytes."""
        signature: bytes = self._private.sign(data)
        return signature


def verifier(public_key: str | Path | None) -> Verify | None:
    """Return the check for signatures of the key in this PEM file, or None without a file.

    Raises `ConfigError` if the file cannot be read.
    """
    return PublicKey(Path(public_key)).verify if public_key is not None else None


def _shown(path: Path) -> str:
    """Return the path for a message; a text without a full stop may be a pasted key.

    >>> _shown(Path("keys/trainer.pem")), _shown(Path("MC4CAQAwBQYDK2VwBCIEIA/bc"))
    ('keys/trainer.pem', 'that is given (not shown: it has not the form of a file name)')
    """
    if "\n" in str(path) or "." not in path.name:
        return "that is given (not shown: it has not the form of a file name)"
    return str(path)


def _read(path: Path, *, private: bool) -> Any:
    kind = "private" if private else "public"
    try:
        data = path.read_bytes()
        key = load_pem_private_key(data, password=None) if private else load_pem_public_key(data)
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} key {_shown(path)}: {error.strerror}") from None
    except (ValueError, TypeError):  # TypeError: the key needs a passphrase
        raise ConfigError(f"{path} is not a {kind} key in PEM without a passphrase") from None
    if not isinstance(key, Ed25519PrivateKey if private else Ed25519PublicKey):
        raise ConfigError(
            f"{path} holds a {kind} key that is not Ed25519; "
            "openssl genpkey -algorithm ed25519 makes one"
        )
    return key
