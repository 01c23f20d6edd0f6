"""The example server in JavaScript computes the probabilities of `Scorer` from the same files."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import succeed
from support.keys import write_keys
from support.manifests import RUN
from support.patience import PATIENCE_SECONDS
from support.served import publish, write_served
from support.shards import in_shards

from stream_ctr.connectors.embedded import dies_with_parent
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import pointer_for, write_pointer
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import SigningKey

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "deploy" / "examples" / "node"
OLDEST_NODE = 20
pytestmark = pytest.mark.slow  # a run, and a process for each test
NUMERIC = {"rating", "days_since_visit"}
BOUND = 1e-6
"""The largest difference of a probability in double precision to one in single precision."""


def find_node() -> str:
    """Return the program, or skip the test."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    found = subprocess.run([node, "--version"], check=True, capture_output=True, text=True).stdout
    if int(found.removeprefix("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {OLDEST_NODE} or newer is needed, {node} is {found.strip()}")
    return node


class Server:
    """The example server in a process."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def ask(self, path: str, rows: object = None) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of an answer; with `rows`, of a prediction."""
        body = None if rows is None else json.dumps({"rows": rows}).encode()
        return self.send(path, body)

    def send(self, path: str, body: bytes | None) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(self.url + path, data=body)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.load(refused)

    def snapshot(self) -> str | None:
        return self.ask("/readyz")[1].get("snapshot")

    def said(self, text: str) -> bool:
        return text in self._log.read_text()


def serves(server: Server, path: Path) -> bool:
    return server.snapshot() == path.name


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def serving(state: Path, log: Path, *options: object) -> Iterator[Server]:
    command = [find_node(), EXAMPLE / "server.mjs", "--state", state, "--port", 0, *options]
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            dies_with_parent([str(word) for word in command]),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout
    try:
        url = process.stdout.readline().strip()
        assert url, log.read_text()
        yield Server(url, log)
    finally:
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
        process.stdout.close()


# -- a run with the default configuration ----------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the state of a run that publishes the blend, and the features of its log."""
    find_node()
    folder = tmp_path_factory.mktemp("run")
    log = folder / "sim.jsonl"
    Simulation(3000, seed=1).write_jsonl(log)
    crosses = "features.crosses=app_id*hour,rating*device"
    config = ["--config", ROOT / "configs" / "demo.toml", "-X", crosses]
    succeed("run", "--source", log, "--state", folder / "state", *config)
    events = map(json.loads, log.read_text().splitlines())
    return folder / "state", [event["features"] for event in events if "features" in event]


def altered(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a row with values that are missing, unknown, or of other types."""
    texts: list[Any] = [None, "", "地図", "Straße", "🗺️", True, False, -7, 2**53 - 1, "x" * 100]
    numbers: list[Any] = [None, 0, -3, 4.25, 1e300, 5e-324, 3.6500000000000004]
    return {
        name: rng.choice(numbers if name in NUMERIC else texts) if rng.random() < 0.2 else value
        for name, value in row.items()
        if rng.random() > 0.1
    }


def test_thousands_of_probabilities_are_those_of_the_scorer(
    run: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    state, rows = run
    rng = random.Random(1)
    rows = [*rows[:1500], *(altered(row, rng) for row in rows[:1500])]
    rows = [row for row in rows if any(value is not None for value in row.values())]
    path = state / "snapshots" / json.loads((state / "latest.json").read_text())["snapshot"]
    scorer = Scorer(path)
    expected = scorer.predict(rows)
    assert scorer.manifest.published == "blend"
    assert {spec.model for spec in scorer.manifest.specs.values()} == {"deepfm", "lr"}
    assert len(set(expected.round(6))) > 1000
    with serving(state, tmp_path / "log") as server:
        wait_for(lambda: server.snapshot() is not None)
        status, answer = server.ask("/predict", rows)
    assert status == 200, answer
    assert {**answer, "probabilities": ...} == {
        "probabilities": ...,
        "snapshot": path.name,
        "run": scorer.manifest.run,
        "model": "blend",
    }
    assert np.abs(np.array(answer["probabilities"]) - expected).max() <= BOUND


# -- snapshots of a small DeepFM with multipliers -------------------------------------------------


ROWS: list[dict[str, Any]] = [
    {"app": "maps", "age": 31, "os": "a"},
    {"app": 7, "age": -0.5},
    {"os": True},
    {"age": 1e300},
]


def write(state: Path, sequence: int, **options: Any) -> Path:
    name = f"{sequence:08d}-20250101T101500Z"
    root = state / "snapshots"
    return write_served(root, seed=sequence, snapshot=name, sequence=sequence, **options)


def test_the_tests_of_the_example_pass() -> None:
    done = subprocess.run(
        [find_node(), "--test", "test/"], cwd=EXAMPLE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "# fail 0" in done.stdout


def test_a_newer_snapshot_is_served_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    first = write(tmp_path, 1)
    with serving(tmp_path, tmp_path / "log") as server:
        assert server.ask("/predict", ROWS)[0] == 503
        assert server.ask("/healthz") == (200, {"ok": True})
        publish(first)
        wait_for(lambda: server.snapshot() == first.name)
        for path in (first, write(tmp_path, 2), in_shards(first, 3)):
            publish(path)
            wait_for(partial(serves, server, path))
            status, answer = server.ask("/predict", ROWS)
            assert status == 200
            assert answer["snapshot"] == path.name
            assert answer["model"] == "deepfm"
            expected = Scorer(path).predict(ROWS)
            assert np.abs(np.array(answer["probabilities"]) - expected).max() <= BOUND
        newer = write(tmp_path, 4)
        publish(newer)
        wait_for(partial(serves, server, newer))
        damaged = write(tmp_path, 5)
        pointer = pointer_for(damaged, snapshot.verify(damaged))
        weights = damaged / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        write_pointer(tmp_path / "latest.json", pointer)
        wait_for(lambda: server.said("was changed after it was written"))
        assert server.ask("/predict", ROWS)[1]["snapshot"] == newer.name


def test_a_pointer_of_another_run_and_an_older_one_are_passed_over(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    other = "f" * 32
    third = write(tmp_path, 3, run=other)
    with serving(tmp_path, tmp_path / "log") as server:
        publish(second)
        wait_for(lambda: server.snapshot() == second.name)
        publish(first)
        publish(third)
        wait_for(lambda: server.said(f"is of run {other}"))
        assert server.ask("/readyz")[1] == {
            "snapshot": second.name,
            "run": RUN,
            "model": "deepfm",
        }


@pytest.mark.parametrize("damage", ["unsigned pointer", "unsigned manifest", "seal", "extra file"])
def test_what_is_not_signed_or_sealed_is_refused(tmp_path: Path, damage: str) -> None:
    private, public = write_keys(tmp_path, "trainer")
    sign = SigningKey(private).sign
    good, bad = write(tmp_path, 1, sign=sign), write(tmp_path, 2, sign=sign)
    latest = tmp_path / "latest.json"
    with serving(tmp_path, tmp_path / "log", "--public-key", public) as server:
        write_pointer(latest, pointer_for(good, snapshot.verify(good), sign=sign))
        wait_for(lambda: server.snapshot() == good.name)
        signed = None if damage == "unsigned pointer" else sign
        pointer = pointer_for(bad, snapshot.verify(bad), sign=signed)
        if damage == "unsigned manifest":
            (bad / "manifest.sig").write_bytes(bytes(64))
        if damage == "extra file":
            (bad / "more.safetensors").write_bytes(b"")
        write_pointer(latest, pointer)
        if damage == "seal":
            latest.write_text(latest.read_text().replace('"examples": 1000', '"examples": 1001'))
        wait_for(lambda: server.said("refused: "))
        assert server.snapshot() == good.name


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "malformed"),
        (b'{"rows": 1}', 400, "malformed"),
        (b'{"rows": [{"app": "\xff"}]}', 400, "malformed"),
        (b'{"rows": [{"ap": "maps"}]}', 422, "unknown_field"),
        (b'{"rows": [{"app": "maps"}, {"age": "31"}]}', 422, "wrong_type"),
        (b'{"rows": [{}]}', 422, "no_field"),
        (b" " * (5 << 20), 413, "too_large"),
    ],
)
def test_a_request_that_is_wrong_is_refused_with_its_reason(
    tmp_path: Path, body: bytes, status: int, reason: str
) -> None:
    publish(write(tmp_path, 1))
    with serving(tmp_path, tmp_path / "log") as server:
        wait_for(lambda: server.snapshot() is not None)
        found, answer = server.send("/predict", body)
        assert (found, answer["reason"]) == (status, reason)
        assert server.ask("/predict", ROWS)[0] == 200
