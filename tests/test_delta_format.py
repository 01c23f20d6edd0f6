"""A reader of deltas that is written from docs/deltas.md alone, as in another language.

It uses no code of the package: bytes, JSON, SHA-256 and Ed25519.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.evaluate.gate import Measured, Other, Verdict
from stream_ctr.snapshots import delta_topic
from stream_ctr.snapshots.delta import (
    Closed,
    DeltaHeader,
    DeltaRank,
    Precision,
    encode_header,
    encode_payload,
)
from stream_ctr.snapshots.delta_store import DeltaStore

PAGE = Path(__file__).parents[1] / "docs" / "deltas.md"
NUMBERS = {"F32": "<f4", "F64": "<f8", "U32": "<u4", "U16": "<u2"}
SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\Z')
Arrays = dict[str, npt.NDArray[Any]]


# -- the reader ----------------------------------------------------------------------------------


def unsealed(document: bytes) -> bytes:
    """Return the bytes before the seal, and a brace; the seal must be theirs."""
    found = SEAL.search(document)
    assert found
    body = document[: found.start()]
    assert hashlib.sha256(body).hexdigest().encode() == found[1]
    return body + b"}"


def read_header(document: bytes, key: Ed25519PublicKey | None = None) -> dict[str, Any]:
    body = unsealed(document)
    header: dict[str, Any] = json.loads(body)
    if key:
        signature = header["signature"].encode()
        unsigned = body.removesuffix(signature + b'"}') + b'"'
        seal = hashlib.sha256(unsigned).hexdigest().encode()
        text = b"stream-ctr delta\n" + unsigned + b',"sha256":"' + seal + b'"}'
        key.verify(bytes.fromhex(signature.decode()), text)
    return header


def read_payload(payload: bytes, precision: str) -> Arrays:
    length = int.from_bytes(payload[:8], "little")
    described = json.loads(payload[8 : 8 + length])
    data = payload[8 + length :]
    arrays: Arrays = {}
    for name, entry in described.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], NUMBERS[entry["dtype"]]).reshape(entry["shape"])
        if name.endswith("/values") and precision == "bf16":
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[name] = array
    return arrays


def assemble(records: Iterable[tuple[bytes, Mapping[str, bytes]]]) -> tuple[bytes, bytes]:
    """Return header and payload of one delta, from records in any order."""
    parts: dict[int, bytes] = {}
    for value, headers in records:
        parts.setdefault(int(headers["__stream_ctr.delta.index"]), value)
        count = int(headers["__stream_ctr.delta.count"])
    assert len(parts) == count + 1
    return parts[count], b"".join(parts[index] for index in range(count))


# -- what is read --------------------------------------------------------------------------------


def changes() -> dict[str, Arrays]:
    rng = np.random.default_rng(0)
    return {
        "deepfm.model": {
            "rows": np.array([3, 5, 4_000_000_000], np.uint32),
            "values": rng.normal(size=(3, 4)).astype(np.float32),
            "dense.bias": np.array(0.25, np.float32),
            "intercept": np.array([-1.5], np.float32),
        },
        "model": {"omega": np.array([0.75, 0.25]), "u": np.array([1.0, 0.0])},
    }


def header_of(payload: bytes, precision: Precision) -> DeltaHeader:
    # No two libraries write all of these alike.
    odd = Measured(
        clicks=1,
        count=2,
        ne=1e-05,
        logloss=1e16,
        constant_logloss=0.1,
        calibration=None,
        others={"\u20ac": Other(logloss=1e-7, difference=-0.0, calibration=1.0)},
    )
    return DeltaHeader(
        run="0" * 32,
        model="d\u00e9fault",
        rank=DeltaRank(3, 12),
        base="00000001-20250101T000000Z",
        base_sha256="1" * 64,
        parent="2" * 64,
        identity_sha256="3" * 64,
        precision=precision,
        verdict=Verdict(evidence=odd),
        examples=100,
        oldest_event_ms=1,
        newest_event_ms=2,
        watermark_ms=3,
        positions={"clicks:0": 7},
        closed=(Closed(4, 100),),
        learned_ms=5,
        created_ms=6,
        rows={"deepfm.model": 3},
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        payload_bytes=len(payload),
    )


def written(precision: Precision, key: Ed25519PrivateKey | None = None) -> tuple[bytes, bytes]:
    payload = encode_payload(changes(), precision)
    return encode_header(header_of(payload, precision), key.sign if key else None), payload


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reader_made_from_the_page_reads_a_payload(precision: Precision) -> None:
    document, payload = written(precision)
    header = read_header(document)
    assert header["payload_sha256"] == hashlib.sha256(payload).hexdigest()
    found = read_payload(payload, precision)
    expected = {
        f"{stem}/{name}": a for stem, named in changes().items() for name, a in named.items()
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        near = 2.0**-8 if name.endswith("values") and precision == "bf16" else 0.0
        np.testing.assert_allclose(found[name], array, rtol=near, atol=0)


def test_a_reader_made_from_the_page_verifies_a_signature() -> None:
    key = Ed25519PrivateKey.generate()
    document, _ = written("fp32", key)
    assert read_header(document, key.public_key())["rank"] == {"epoch": 3, "sequence": 12}
    with pytest.raises(InvalidSignature):
        read_header(document, Ed25519PrivateKey.generate().public_key())


@given(st.randoms(use_true_random=False), st.integers(1, 5000))
def test_a_reader_made_from_the_page_puts_a_delta_together(random: Any, chunk: int) -> None:
    document, payload = written("fp32")
    header = header_of(payload, "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_topic, "CHUNK_BYTES", chunk)
        records = [
            (value, dict(headers))
            for value, headers in delta_topic.records(document, header, payload)
        ]
    records += random.choices(records, k=3)
    random.shuffle(records)
    assert assemble(records) == (document, payload)


def test_the_files_and_the_index_are_those_of_the_page(tmp_path: Path) -> None:
    document, payload = written("fp32")
    DeltaStore(tmp_path).write(document, header_of(payload, "fp32"), payload)
    folder = tmp_path / "deltas"
    index = json.loads(unsealed((folder / "index.json").read_bytes()))
    (entry,) = index["deltas"]
    name = f"{entry['rank']['epoch']:08d}-{entry['rank']['sequence']:08d}"
    assert (folder / f"{name}.json").read_bytes() == document
    assert (folder / f"{name}.safetensors").read_bytes() == payload
    assert entry["sha256"] == hashlib.sha256(document).hexdigest()
    assert entry["bytes"] == len(document) + len(payload)
    assert entry["base"] == "00000001-20250101T000000Z"


def test_the_page_lists_every_key_of_a_header_in_its_order() -> None:
    document, _ = written("fp32")
    section = PAGE.read_text().partition("### Header")[2].partition("### Payload")[0]
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, flags=re.MULTILINE)
    listed = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    assert listed == [*json.loads(document)]
