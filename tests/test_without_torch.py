"""Serving works in an environment without torch: nothing on its way imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.patience import wait_until
from support.served import ROWS, publish, write_blend

from stream_ctr.learn.onnx_graph import build_graph
from stream_ctr.snapshots.export import export_snapshot
from stream_ctr.snapshots.scorer import Scorer

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "deploy" / "requirements-serve.txt"

# These belong to the trainer, its baseline and its pages.
BLOCKED = ("torch", "river", "scipy", "apscheduler", "plotly", "matplotlib", "triton", "pandas")
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    None if name.partition(".")[0] in {BLOCKED} else found(name, *more)
)
"""
COMMAND = "from stream_ctr.cli.main import main; main(sys.argv[1:])"
PREDICT = """
    import json, sys
    from stream_ctr import Scorer, Subscriber
    rows, state, snapshot = map(json.loads, sys.argv[1:4])
    scorer = Scorer(__import__("pathlib").Path(snapshot))
    with Subscriber(state) as model:
        assert model.wait(30), model.refusal
        served = model.predict(rows).tolist()
    alone = scorer.predict(rows).tolist()
    print(json.dumps([scorer.runtime, model.runtime, alone, served]))
"""


def python(code: str, *arguments: object, executable: str = sys.executable, **more: Any) -> str:
    """Run code in another process, and return what it prints."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in arguments]
    command = [executable, "-c", textwrap.dedent(code), *texts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocked(code: str, *arguments: object) -> str:
    return python(BLOCK + textwrap.dedent(code), *arguments)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with a published snapshot of a blend, without graphs."""
    folder = tmp_path_factory.mktemp("state")
    publish(write_blend(folder / "snapshots"))
    return folder


@pytest.mark.slow
def test_scorer_and_subscriber_serve_without_torch(state: Path, tmp_path: Path) -> None:
    (path,) = (state / "snapshots").iterdir()
    out = export_snapshot(path, tmp_path / "served", build_graph)
    expected = Scorer(path, runtime="torch").predict(ROWS)
    printed = blocked(PREDICT, ROWS, json.dumps(str(state)), json.dumps(str(out)))
    first, second, alone, served = json.loads(printed)
    assert (first, second) == ("onnx", "onnx")
    assert np.abs(np.array(alone) - expected).max() < 1e-6
    assert np.abs(np.array(served) - expected).max() < 1e-6


@pytest.mark.slow
def test_the_commands_that_serve_run_without_torch(state: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    event = {"kind": "impression", "impression_id": "i1", "time": 1_735_726_500_000}
    events.write_text(json.dumps({**event, "features": ROWS[0]}) + "\n")
    out = tmp_path / "served"
    assert "1,000 examples" in blocked(COMMAND, "subscribe", "--state", str(state), "--once")
    assert blocked(COMMAND, "export", str(state), str(out)) == f"{out}\n"
    line = blocked(COMMAND, "score", "--snapshot", str(out), str(events), "--runtime", "onnx")
    name, probability = line.split()
    assert name == "i1"
    expected = Scorer(out, runtime="torch").predict(ROWS[0])
    assert float(probability) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_server_answers_without_torch(state: Path) -> None:
    arguments = ["serve", "--state", str(state), "--http", "127.0.0.1:0"]
    command = [sys.executable, "-c", BLOCK + COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().split()[-1]
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == httpx.codes.OK)
            answer = httpx.post(f"{url}/predict", json={"rows": ROWS}).json()
        finally:
            process.terminate()
    assert process.returncode == 0
    (path,) = (state / "snapshots").iterdir()
    expected = Scorer(path, runtime="torch").predict(ROWS)
    assert answer["snapshot"] == path.name
    assert np.abs(np.array(answer["probabilities"]) - expected).max() < 1e-6


@pytest.mark.slow
def test_what_needs_torch_says_so_where_there_is_none(state: Path, tmp_path: Path) -> None:
    code = BLOCK + COMMAND
    for arguments, message in (
        (["subscribe", "--state", str(state), "--runtime", "torch"], "use the runtime onnx"),
        (["export", str(state), str(tmp_path / "x"), "--format", "torch"], "pip install torch"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_requirements_of_a_server_are_pinned_as_the_tests_are() -> None:
    pins = [line for line in REQUIREMENTS.read_text().splitlines() if line and line[0] != "#"]
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    assert pins == sorted(pins)
    assert not {*pins} - {*tested}
    names = {pin.partition("==")[0] for pin in pins}
    assert {"numpy", "numba", "onnx", "onnxruntime", "pyarrow", "safetensors"} <= names
    assert not {*BLOCKED} & names


@pytest.mark.slow
@pytest.mark.long
def test_an_environment_of_the_requirements_alone_serves(state: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    executable = str(tmp_path / "env" / "bin" / "python")
    install = [executable, "-m", "pip", "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install the requirements here: {done.stderr.strip()[-200:]}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    absent = "import importlib.util as u; print(u.find_spec('torch'))"
    assert python(absent, executable=executable) == "None\n"
    (path,) = (state / "snapshots").iterdir()
    out = export_snapshot(path, tmp_path / "served", build_graph)
    arguments = (ROWS, json.dumps(str(state)), json.dumps(str(out)))
    printed = python(PREDICT, *arguments, executable=executable, env=environment)
    first, second, alone, served = json.loads(printed)
    assert (first, second) == ("onnx", "onnx")
    expected = Scorer(path, runtime="torch").predict(ROWS)
    assert np.abs(np.array(alone) - expected).max() < 1e-6
    assert np.abs(np.array(served) - expected).max() < 1e-6
    shown = python("import sys; " + COMMAND, "--help", executable=executable, env=environment)
    assert "export" in shown
