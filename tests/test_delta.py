"""A delta that decodes is the one that was encoded, to the bit, and any damage is found."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from msgspec import structs
from safetensors.numpy import load, save
from support.deltas import HEADER, SMALL_PAYLOAD, header, made
from support.keys import write_keys
from support.manifests import MANIFEST, sealed

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots.contract import NewerFormat, OlderFormat
from stream_ctr.snapshots.delta import (
    FORMAT,
    MOST_CLOSED,
    Changes,
    Closed,
    DeltaRank,
    Precision,
    decode_header,
    decode_payload,
    encode_header,
    encode_payload,
    header_sha256,
    identity_sha256,
    rounded_bf16,
    verified,
    widened_bf16,
)
from stream_ctr.snapshots.signing import PublicKey, SigningKey

# Another value for each key of a header, as JSON, which is valid where it stands.
OTHERS: dict[str, Any] = {
    "run": "f" * 32,
    "model": "other",
    "rank": {"epoch": 3, "sequence": 2},
    "base": "00000002-20250101T101500Z",
    "base_sha256": "1" * 64,
    "parent": "2" * 64,
    "identity_sha256": "3" * 64,
    "precision": "bf16",
    "verdict": {"last_step": [], "missing_clicks": [], "evidence": None, "refused": ["worse"]},
    "examples": 1101,
    "oldest_event_ms": 1,
    "newest_event_ms": 2,
    "watermark_ms": -3,
    "positions": {"clicks:0": 1301},
    "closed": [],
    "learned_ms": 4,
    "created_ms": 5,
    "rows": {"model": 1},
    "payload_sha256": "4" * 64,
    "payload_bytes": 6,
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[SigningKey, PublicKey]:
    private, public = write_keys(tmp_path_factory.mktemp("keys"), "trainer")
    return SigningKey(private), PublicKey(public)


def flips(data: bytes) -> list[bytes]:
    """Return the data with each of its bits flipped, one at a time."""
    number = int.from_bytes(data, "big")
    return [(number ^ 1 << bit).to_bytes(len(data), "big") for bit in range(8 * len(data))]


# -- headers -------------------------------------------------------------------------------------


def test_a_header_decodes_to_what_was_encoded() -> None:
    assert decode_header(encode_header(HEADER)) == HEADER


def test_every_flipped_bit_of_a_header_is_found() -> None:
    data = encode_header(HEADER)
    for damaged in flips(data):
        with pytest.raises(SnapshotError):
            decode_header(damaged)


def test_every_shortened_header_is_found() -> None:
    data = encode_header(HEADER)
    for length in range(len(data)):
        with pytest.raises(SnapshotError, match="delta 7 is damaged"):
            decode_header(data[:length], name="delta 7")


def test_the_parent_of_a_delta_is_the_digest_of_the_header_before_it() -> None:
    first = made()
    second = made(rank=DeltaRank(3, 2), parent=header_sha256(first.header_bytes))
    assert second.header.parent == first.sha256 == first.delta.sha256


def test_a_signature_covers_every_key_of_a_header(keys: tuple[SigningKey, PublicKey]) -> None:
    signing, public = keys
    whole = json.loads(encode_header(HEADER, signing.sign))
    assert {*whole} == {*OTHERS, "format", "signature", "sha256"}
    decode_header(sealed(whole), signature=public.verify)
    for key, value in OTHERS.items():
        changed = sealed({**whole, key: value})
        assert decode_header(changed) != HEADER, "without the key, a header with a seal is taken"
        with pytest.raises(SnapshotError, match="delta 7: the signature is not that of"):
            decode_header(changed, name="delta 7", signature=public.verify)


def test_a_header_without_a_signature_or_with_that_of_another_key_is_refused(
    keys: tuple[SigningKey, PublicKey], tmp_path: Path
) -> None:
    _, public = keys
    with pytest.raises(SnapshotError, match="delta is not signed"):
        decode_header(encode_header(HEADER), signature=public.verify)
    other = SigningKey(write_keys(tmp_path, "other")[0])
    with pytest.raises(SnapshotError, match="not that of the expected key"):
        decode_header(encode_header(HEADER, other.sign), signature=public.verify)


def test_the_signature_of_a_manifest_or_pointer_is_none_of_a_header(
    keys: tuple[SigningKey, PublicKey],
) -> None:
    """The bytes that are signed begin with a line that no other document begins with."""
    signed: list[bytes] = []

    def sign(data: bytes) -> bytes:
        signed.append(data)
        return keys[0].sign(data)

    encode_header(HEADER, sign)
    assert signed[0].startswith(b"stream-ctr delta\n{")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "x"}, "run"),
        ({"parent": "0" * 63}, "parent"),
        ({"precision": "fp16"}, "precision"),
        ({"payload_bytes": -1}, "payload_bytes"),
        ({"payload_bytes": (1 << 30) + 1}, "payload_bytes"),
        ({"examples": -1}, "examples"),
        ({"rank": DeltaRank(-1, 1)}, "epoch"),
        ({"rows": {"model": -1}}, "rows"),
        ({"closed": (Closed(1, 1),) * (MOST_CLOSED + 1)}, "closed"),
    ],
)
def test_what_would_be_refused_is_not_encoded(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SnapshotError, match=reason):
        encode_header(header(**changes))


def test_as_many_closed_windows_as_there_may_be_are_encoded() -> None:
    most = header(closed=tuple(Closed(number, 1) for number in range(MOST_CLOSED)))
    assert decode_header(encode_header(most)) == most


def test_a_header_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    positions = {f"clicks:{number}": 1 << 60 for number in range(20_000)}
    with pytest.raises(SnapshotError, match="the largest that is read has 524,288"):
        encode_header(header(positions=positions))
    with pytest.raises(SnapshotError, match="the header of delta 7 has 524,289 bytes"):
        decode_header(b"x" * ((1 << 19) + 1), name="delta 7")


def test_a_header_of_another_version_is_named_as_that() -> None:
    whole = json.loads(encode_header(HEADER))
    with pytest.raises(NewerFormat):
        decode_header(sealed({**whole, "format": FORMAT + 1, "new": 1}))
    with pytest.raises((OlderFormat, SnapshotError)):
        decode_header(sealed({**whole, "format": FORMAT - 1}))


def test_ranks_are_ordered_by_epoch_and_then_by_sequence() -> None:
    ranks = [DeltaRank(3, 12), DeltaRank(4, 1), DeltaRank(3, 2), DeltaRank(10, 0)]
    assert sorted(ranks) == [DeltaRank(3, 2), DeltaRank(3, 12), DeltaRank(4, 1), DeltaRank(10, 0)]
    assert [rank.name for rank in sorted(ranks)] == sorted(rank.name for rank in ranks)


def test_an_identity_is_that_of_fields_and_models_alone() -> None:
    identity = identity_sha256(MANIFEST)
    same = structs.replace(MANIFEST, examples=7, epoch=9, config={}, positions={})
    assert identity_sha256(same) == identity
    fewer = structs.replace(MANIFEST, beside={})
    other_seed = structs.replace(
        MANIFEST, schema=structs.replace(MANIFEST.schema, numeric_encoding="bucket")
    )
    assert len({identity, identity_sha256(fewer), identity_sha256(other_seed)}) == 3


# -- payloads ------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_payload_is_found() -> None:
    link = made()
    assert verified(link.header_bytes, link.payload) == link.delta
    for damaged in flips(SMALL_PAYLOAD):
        with pytest.raises(SnapshotError, match=r"the payload of delta 7 has SHA-256"):
            verified(link.header_bytes, damaged, name="delta 7")


@pytest.mark.parametrize("payload", [b"", SMALL_PAYLOAD[:-1], SMALL_PAYLOAD + b"\0"])
def test_a_payload_of_another_size_is_found(payload: bytes) -> None:
    with pytest.raises(SnapshotError, match=f"has {len(payload)} bytes, its header says"):
        verified(made().header_bytes, payload)


ROWS = arrays.arrays(np.uint32, st.integers(0, 8), elements=st.integers(0, 2**32 - 1))
FINITE = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def changes(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Return the changes of a network and of a logistic regression."""
    rows, some = np.unique(draw(ROWS)), np.unique(draw(ROWS))
    width = draw(st.integers(1, 4))
    return {
        "deepfm.model": {
            "rows": rows,
            "values": draw(arrays.arrays(np.float32, (len(rows), width), elements=FINITE)),
            "dense.w": draw(arrays.arrays(np.float32, (2, 3), elements=FINITE)),
            "intercept": draw(arrays.arrays(np.float32, 1, elements=FINITE)),
        },
        "lr.model": {
            "rows": some,
            "values": draw(arrays.arrays(np.float32, len(some), elements=FINITE)),
            "intercept": draw(arrays.arrays(np.float64, 1)),
        },
        "model": {"omega": draw(arrays.arrays(np.float64, 3))},
    }


def assert_equal(found: Changes, expected: Changes) -> None:
    assert {*found} == {*expected}
    for stem, tensors in expected.items():
        assert {*found[stem]} == {*tensors}
        for name, array in tensors.items():
            assert found[stem][name].dtype == array.dtype, (stem, name)
            assert found[stem][name].shape == array.shape
            assert found[stem][name].tobytes() == array.tobytes(), (stem, name)


@given(changes())
def test_a_payload_decodes_to_the_same_bits(sent: Changes) -> None:
    assert_equal(decode_payload(encode_payload(sent, "fp32"), "fp32"), sent)


@given(changes())
def test_bf16_rounds_the_values_of_rows_and_nothing_else(sent: Changes) -> None:
    rounded = {
        stem: {
            name: widened_bf16(rounded_bf16(array)) if name == "values" else array
            for name, array in tensors.items()
        }
        for stem, tensors in sent.items()
    }
    data = encode_payload(sent, "bf16")
    assert_equal(decode_payload(data, "bf16"), rounded)
    assert_equal(decode_payload(encode_payload(rounded, "bf16"), "bf16"), rounded)


@pytest.mark.parametrize(
    ("rows", "stored"),
    [
        (np.arange(1000), "bits"),
        (np.arange(1000) * 16, "bits"),
        (np.arange(1000) * 33, "rows"),
        (np.array([63]), "rows"),
        (np.array([0, 1, 64]), "rows"),
        (np.arange(62, 130), "bits"),
        (np.empty(0), "rows"),
    ],
)
def test_many_rows_are_sent_as_a_bitmap(rows: npt.NDArray[Any], stored: str) -> None:
    rows = rows.astype(np.uint32)
    sent = {"lr.model": {"rows": rows, "values": np.arange(len(rows), dtype=np.float32)}}
    data = encode_payload(sent, "fp32")
    assert f"lr.model/{stored}" in load(data)
    assert_equal(decode_payload(data, "fp32"), sent)


@given(ROWS)
def test_a_bitmap_stands_for_the_rows_whose_bits_are_set(drawn: npt.NDArray[np.uint32]) -> None:
    rows = np.unique(drawn % 4096).astype(np.uint32)
    words = [sum(1 << int(row % 64) for row in rows if row // 64 == at) for at in range(64)]
    values = np.zeros(len(rows), np.float32)
    data = save({"m/bits": np.array(words, np.uint64), "m/values": values})
    assert decode_payload(data, "fp32")["m"]["rows"].tolist() == rows.tolist()


def test_bf16_takes_two_bytes_of_a_value() -> None:
    sent = {"model": {"values": np.ones((1000, 11), np.float32)}}
    saved = len(encode_payload(sent, "fp32")) - len(encode_payload(sent, "bf16"))
    assert abs(saved - 22_000) < 16


def test_arrays_of_any_layout_are_encoded_as_what_they_hold() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        data = encode_payload({"model": {"values": np.asfortranarray(values).T.T}}, precision)
        assert decode_payload(data, precision)["model"]["values"].tolist() == values.tolist()
    foreign = values.astype(">f4")
    data = encode_payload({"model": {"values": foreign}}, "fp32")
    assert decode_payload(data, "fp32")["model"]["values"].tolist() == values.tolist()


@pytest.mark.parametrize(
    ("tensors", "precision", "reason"),
    [
        ({"omega": np.zeros(1)}, "fp32", "holds a tensor 'omega' of no model"),
        ({"/omega": np.zeros(1)}, "fp32", "holds a tensor '/omega' of no model"),
        ({"model/": np.zeros(1)}, "fp32", "holds a tensor 'model/' of no model"),
        *(
            (
                {"m/bits": np.full(2, 3, kind), "m/values": values},
                "fp32",
                "its bitmap does not have a bit for each of its values",
            )
            for kind, values in (
                (np.uint64, np.zeros(3, np.float32)),
                (np.uint64, np.zeros((), np.float32)),
                (np.uint32, np.zeros(4, np.float32)),
            )
        ),
        ({"m/bits": np.zeros(0, np.uint64)}, "fp32", "its bitmap does not have"),
        (
            {
                "m/bits": np.ones(1, np.uint64),
                "m/rows": np.zeros(1, np.uint32),
                "m/values": np.zeros(1, np.float32),
            },
            "fp32",
            "names its rows twice",
        ),
        (
            {"model/values": np.zeros(1, np.float32)},
            "bf16",
            "'model/values' does not hold bfloat16",
        ),
    ],
)
def test_tensors_that_no_delta_has_are_refused(
    tensors: dict[str, Any], precision: Precision, reason: str
) -> None:
    data = save(tensors)
    with pytest.raises(SnapshotError, match=f"delta 7.*{reason}"):
        decode_payload(data, precision, name="delta 7")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, SMALL_PAYLOAD[:-1]])
def test_bytes_that_are_no_payload_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError, match="delta 7 is not a payload"):
        decode_payload(data, "fp32", name="delta 7")


# -- bfloat16 ------------------------------------------------------------------------------------


def nearest_bf16(value: float) -> int:
    """Return the bits of the nearest bfloat16 to a finite float32, by exact fractions."""
    bits = int(np.float32(value).view(np.uint32))
    below = bits >> 16
    if below & 0x7F80 == 0x7F80 or (below + 1) & 0x7F80 == 0x7F80:
        return int(rounded_bf16(np.array([value], np.float32))[0])  # to infinity: see below
    lower, upper = (
        Fraction(float(widened_bf16(np.array([half], np.uint16))[0])) for half in (below, below + 1)
    )
    exact = Fraction(float(np.float32(value)))
    if abs(exact - lower) != abs(exact - upper):
        return below if abs(exact - lower) < abs(exact - upper) else below + 1
    return below if below % 2 == 0 else below + 1


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_finds_the_nearest_and_ties_to_even(value: float) -> None:
    assert int(rounded_bf16(np.array([value], np.float32))[0]) == nearest_bf16(value)


@pytest.mark.parametrize("half", [0x3F80, 0x3F81, 0xBF80, 0x0000, 0x8000, 0x0001])
def test_a_tie_goes_to_the_even_neighbour(half: int) -> None:
    tie = np.array([half << 16 | 0x8000], np.uint32).view(np.float32)
    assert int(rounded_bf16(tie)[0]) == half + half % 2


def test_rounding_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64)
    values = bits.astype(np.uint32).view(np.float32)
    ours = widened_bf16(rounded_bf16(values))
    theirs: npt.NDArray[Any] = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.isnan(ours).tolist() == np.isnan(theirs).tolist()
    finite = ~np.isnan(values)
    assert ours[finite].tobytes() == theirs[finite].tobytes()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_a_nan_stays_a_nan(bits: int) -> None:
    values = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(widened_bf16(rounded_bf16(values))).all()


def test_infinities_stay_and_what_is_beyond_the_largest_becomes_one() -> None:
    values = np.array([np.inf, -np.inf, np.finfo(np.float32).max], np.float32)
    assert widened_bf16(rounded_bf16(values)).tolist() == [np.inf, -np.inf, np.inf]
