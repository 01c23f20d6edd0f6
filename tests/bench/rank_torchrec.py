r"""Training on two ranks beside TorchRec: the same data, model, batch and cores, in one run.

The peer is TorchRec 1.8.0 with fbgemm-gpu-cpu 1.8.0 on torch 2.13.0 for the CPU. It is installed in
a virtual environment of its own, which TORCHREC_VENV names:

    python -m venv DIRECTORY
    DIRECTORY/bin/pip install torch==2.13.0 numpy==2.4.6 fbgemm-gpu-cpu==1.8.0
    DIRECTORY/bin/pip install --no-deps torchrec==1.8.0 torchmetrics==1.0.3 tensordict iopath \
        lightning-utilities pyre-extensions typing-inspect mypy-extensions tqdm packaging orjson \
        pyvers importlib_metadata cloudpickle portalocker

TorchRec demands the CUDA build of fbgemm-gpu, so it is installed without its dependencies. It takes
its usual loop, plain, with exact rowwise Adagrad for the tables and Adam for the dense part; see
contenders/torchrec_deepfm.py. Ids are in memory, nothing is joined or measured, and only the steps
are timed. Ratios are taken within a round. The layers alone, which have no table, show how fast any
contender can be in fp32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench import zipf
from bench.comparison import Comparison, Goal
from bench.comparison import table as comparison_table
from bench.contest import Contender, Program, compare
from bench.environments import Installed
from bench.rank_runs import Result

VARIABLE = "TORCHREC_VENV"
LEAST = 2.0
PEER = "TorchRec, 2 ranks"
LAYERS = "the layers alone in torch, fp32"

LEARNERS = (
    ("ours, 2 ranks, bf16", ["--ranks", 2, "--precision", "bf16"]),
    ("ours, 2 ranks, fp32", ["--ranks", 2, "--precision", "fp32"]),
    ("ours, 2 ranks, fp32, adagrad",
     ["--ranks", 2, "--precision", "fp32", "--optimizer", "adagrad"]),
    ("ours, 1 rank, fp32", ["--ranks", 1, "--threads", 2, "--precision", "fp32"]),
)  # fmt: skip


def measure(options: argparse.Namespace) -> Result:
    """Return the comparison as JSON."""
    with tempfile.TemporaryDirectory() as name:
        rows = 1 << options.train_bits
        batch = options.batch
        data = zipf.write(Path(name), rows=rows, examples=16 * batch)
        common = ["--data", data, "--batch", batch, "--seconds", options.seconds]
        common += ["--hidden", *options.hidden]
        peer = Installed(VARIABLE)
        contenders: list[Contender] = [
            Program(title, "rank_learner", [*common, *arguments]) for title, arguments in LEARNERS
        ]
        contenders += [
            Program(PEER, "torchrec_deepfm", [*common, "--ranks", 2], peer),
            Program("TorchRec, 1 rank", "torchrec_deepfm", [*common, "--threads", 2], peer),
            Program(LAYERS, "mlp", [*common, "--precision", "fp32"]),
        ]
        results = compare(contenders, rounds=options.rounds, say=print)
    title = f"Training only: DeepFM, batch {batch:,}, {rows:,} rows, two cores"
    goals = [Goal(contender, least=LEAST, times=PEER) for contender, _ in LEARNERS[:2]]
    found = Comparison("torchrec", title, "examples/s", results, goals, peer=PEER).as_json()
    return found | {"hidden": options.hidden}


def table(results: Result) -> str:
    return comparison_table(results)
