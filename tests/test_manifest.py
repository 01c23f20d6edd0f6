"""A manifest decodes to what was written, and is refused if its parts contradict each other."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec import structs
from support.manifests import LEARNER, SCHEMA, manifest, sealed
from support.reliability import Outcome

from stream_ctr.errors import SnapshotError
from stream_ctr.events.field import Field, Schema
from stream_ctr.snapshots.contract import decode
from stream_ctr.snapshots.delta import DeltaPosition, DeltaRank
from stream_ctr.snapshots.manifest import FORMAT, LedgerEntry, Manifest

WHOLE = manifest(
    delta=DeltaPosition(DeltaRank(3, 12), "a" * 64), serving_sha256={"model": "0" * 64}
)


def read(document: dict[str, Any]) -> Manifest:
    return decode(sealed(document), Manifest, newest=FORMAT, name="manifest.json")


def document(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(WHOLE))
    return {**plain, **changes}


def test_a_manifest_decodes_to_the_one_that_was_encoded() -> None:
    assert read(document()) == WHOLE
    assert read(document(delta=None)).delta is None


def test_the_specification_of_each_model_is_found_by_its_name() -> None:
    described = manifest()
    assert described.published == "deepfm"
    assert described.specs["deepfm"] == LEARNER
    assert described.specs["ftrl"].model == "lr"
    assert list(described.specs) == ["deepfm", "ftrl"]


def test_a_blend_is_published_in_place_of_a_model() -> None:
    mixed = document(blend=["ftrl"])
    del mixed["learner"]
    assert read(mixed).published == "blend"
    assert list(read(mixed).specs) == ["ftrl"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blend": ["ftrl"]}, "either one model or a blend"),
        ({"learner": None}, "either one model or a blend"),
        ({"learner": None, "blend": ["fm"]}, "a blend mixes models of its run"),
    ],
)
def test_a_run_publishes_a_model_of_its_own(changes: dict[str, Any], reason: str) -> None:
    changed = document(**changes)
    if changed["learner"] is None:
        del changed["learner"]
    with pytest.raises(SnapshotError, match=reason):
        read(changed)


@pytest.mark.parametrize("total", [0, 2**63, 2**64 - 1])
def test_a_ledgers_sum_is_any_number_of_64_bits(total: int) -> None:
    assert read(document(ledger={"count": 1, "sum": total})).ledger == LedgerEntry(1, total)


@pytest.mark.parametrize("total", [-1, 2**64])
def test_a_ledgers_sum_of_more_than_64_bits_is_damage(total: int) -> None:
    with pytest.raises(SnapshotError, match=f"a ledger's sum is a number of 64 bits, got {total}"):
        read(document(ledger={"count": 1, "sum": total}))


def keys(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key that a manifest's types name."""
    free: set[tuple[str, ...]] = {
        (name,)
        for name in ("config", "beside", "positions", "topic_ids", "counters", "serving_sha256")
    }
    free |= {("metrics", "models"), ("metrics", "pairs")}
    if not isinstance(tree, dict) or path in free:
        return []
    return [
        found for key, child in tree.items() for found in ((*path, key), *keys(child, (*path, key)))
    ]


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in keys(document())
        if path[0] not in ("guards_beside", "served_verdict")
        and path != ("gate", "evidence", "others", "ftrl")
    ],
    ids=".".join,
)
def test_every_key_is_required_and_has_one_type(path: tuple[str, ...]) -> None:
    damaged = document()
    owner = damaged
    for key in path[:-1]:
        owner = owner[key]
    value = owner.pop(path[-1])
    with pytest.raises(
        SnapshotError, match=rf"is damaged: .*({path[-1]}`|do not agree|the table|either one model)"
    ):
        read(damaged)
    for wrong in ({"x": None}, ["x"], "x", True, -1.5):
        may_be_right = value is None and isinstance(wrong, str | float)
        if type(wrong) is not type(value) and not may_be_right:
            owner[path[-1]] = wrong
            with pytest.raises(SnapshotError, match="manifest.json is damaged: Expected"):
                read(damaged)
    owner[path[-1]] = value
    assert read(damaged) == WHOLE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learner": {"fields": 4}}, "the fields of deepfm and of the schema do not agree"),
        ({"learner": {"value_fields": [0]}}, "the fields of deepfm and of the schema do not agree"),
        ({"learner": {"crosses": 0}}, "the cross products of deepfm and of the schema do not"),
        ({"learner": {"table_bits": 7}}, r"the table of deepfm has 2\^7 rows, .* reach 2\^6"),
        ({"learner": {"model": "deep fn"}}, "Expected `str` matching regex"),
        ({"learner": {"hidden": [0]}}, r"Expected `int` >= 1 - at `\$.learner.hidden\[0\]`"),
        ({"learner": {"dropout": 1.0}}, r"Expected `float` < 1.0"),
        ({"schema": {"fields": [["app", "categorical"]] * 3}}, "a field is listed twice: app"),
        ({"schema": {"fields": [["app", "categorical", 1]]}}, "Expected `array`"),
        ({"schema": {"fields": [["app"]]}}, "Expected `array` of at least length 2, got 1"),
        ({"schema": {"crosses": [["app", "size"]]}}, "'size', which is not a field"),
        ({"event_time_range": ["x"]}, "Expected `array` of length 2"),
        ({"positions": {"clicks:0": -1}}, r"Expected `int` >= 0 - at `\$.positions\[...\]`"),
    ],
)
def test_parts_that_contradict_each_other_are_damage(changes: dict[str, Any], reason: str) -> None:
    whole = document()
    for name, change in changes.items():
        whole[name] = {**whole[name], **change} if isinstance(change, dict) else change
    with pytest.raises(SnapshotError, match=f"manifest.json is damaged: .*{reason}"):
        read(whole)


def test_an_additional_model_must_fit_the_schema_too() -> None:
    other = structs.replace(LEARNER, model="fm", fields=2)
    with pytest.raises(ValueError, match="the fields of fm and of the schema do not agree"):
        manifest(beside={"fm": other})
    schema = Schema(fields=(Field("app", "categorical"), *SCHEMA.fields[1:]), table_bits=6)
    with pytest.raises(ValueError, match="the fields of deepfm and of the schema do not agree"):
        manifest(schema=schema)


FIELDS = 60_000


def many_fields() -> dict[str, Any]:
    names = [f"f{number}" for number in range(FIELDS)]
    schema = {"fields": [[name, "categorical"] for name in names], "crosses": []}
    return {"schema": schema, "learner": {"fields": FIELDS, "crosses": 0, "value_fields": []}}


def wide_crosses() -> dict[str, Any]:
    names = [f"f{number}" for number in range(2000)]
    shuffled = random.Random(0).sample(names, len(names))
    crosses = [[name for name in shuffled if name != names[number]] for number in range(256)]
    return {"schema": {"fields": [[name, "categorical"] for name in names], "crosses": crosses}}


def long_names() -> dict[str, Any]:
    letters = [chr(0x100 + number) for number in range(250)]
    one, other = "".join(letters) * 800, "".join(reversed(letters)) * 800
    return {"schema": {"fields": [[one, "categorical"]], "crosses": [[other, one]]}}


@pytest.mark.security(
    "a manifest costs time in proportion to its size",
    how="60,000 fields; 256 cross products of 2,000 fields; names of 200,000 letters",
)
@pytest.mark.parametrize("hostile", [many_fields, wide_crosses, long_names])
def test_a_manifest_that_claims_too_much_is_refused_soon(
    hostile: Callable[[], dict[str, Any]], outcome: Outcome
) -> None:
    whole = document()
    data = sealed({**whole, **{key: {**whole[key], **part} for key, part in hostile().items()}})
    began = time.process_time()
    with pytest.raises(SnapshotError, match="is damaged"):
        decode(data, Manifest, newest=FORMAT, name="manifest.json")
    assert time.process_time() - began < 5
    outcome("each is refused within 5 s of processor time")
