"""The paper's nine models compared with FuxiCTR and DeepCTR-Torch; the tables of docs/systems.md.

    python tests/bench/systems.py                               # all, 15 minutes on two cores
    python tests/bench/systems.py quality --systems deepfm fm   # these; others in the page stay
    python tests/bench/systems.py speed --quick                 # small and once: does it run?
    python tests/bench/systems.py --json docs/systems.json --page docs/systems.md

Cases
  quality  AUC and logloss on the test part of the Criteo sample (7,200 rows), split as
           `stream-ctr paper` splits it. All get the same features: the row indices that our hashing
           gives, renumbered within each field for a library with a table for each field. Batch 128.
           Epochs continue until the logloss of the validation part no longer improves, and the best
           epoch counts. A round is a seed.
  splits   the same with another split for each seed: does a difference depend on the test rows?
  speed    training examples a second: batch 4096, 39 fields, 2^20 rows, Zipf-distributed ids, in
           memory

Method
  K = 10, 400-400-400, relu, dropout 0.5, Adam with rate 0.001 for all, no penalties. LR is
  FTRL-Proximal in ours and Adam in theirs. Every contender is a separate process with as many
  threads as the machine has cores. All contenders of a model are set up and warmed up first. Then
  each is measured once, in turn, for --rounds rounds. Peers get their own environments in --cache
  when they are first needed. The JSON file keeps every repetition. Models that are not measured
  stay in it and in the page. With --missing only those are measured that it lacks, so that an
  interrupted run can continue.

The sample is read from STREAM_CTR_DATA or ../shared/data. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import fill, formatted  # noqa: E402

from bench import zipf  # noqa: E402
from bench.comparison import number  # noqa: E402
from bench.contest import Absent, Contender, Program, Result, compare, ratio  # noqa: E402
from bench.environments import Peer  # noqa: E402
from bench.speed import (  # noqa: E402
    REQUIREMENTS,
    TORCH,
    add_common_options,
    keep,
    record,
    say,
)
from stream_ctr.events.features import Hasher  # noqa: E402
from stream_ctr.logs.open import open_log  # noqa: E402
from stream_ctr.models import MODELS  # noqa: E402
from stream_ctr.paper.dataset import Split  # noqa: E402

DATA = Path(os.environ.get("STREAM_CTR_DATA") or ROOT.parent / "shared" / "data")
PEERS = {"deepctr": REQUIREMENTS["deepctr"], "fuxictr": (TORCH, "fuxictr==2.3.10", "numpy==2.4.6")}
TITLES = {"fuxictr": "FuxiCTR", "deepctr": "DeepCTR-Torch"}
# The counterpart of each model in each library, with its differences. A peer that is not listed
# has none.
COUNTERPARTS: Mapping[str, Mapping[str, str]] = {
    "lr": {"fuxictr": "LR, by Adam", "deepctr": "WDL without its deep side, by Adam"},
    "fm": {"fuxictr": "FM", "deepctr": "DeepFM without its deep side"},
    "fnn": {
        "fuxictr": "DNN: no FM before it, no w",
        "deepctr": "PNN without products: no FM before it, no w",
    },
    "ipnn": {"fuxictr": "PNN", "deepctr": "PNN"},
    "opnn": {
        "deepctr": "PNN with outer products: a kernel for each of 741 pairs, "
        "not one product of sums"
    },
    "pnn": {"deepctr": "PNN with both, outer products likewise"},
    "lr_dnn": {"fuxictr": "WideDeep", "deepctr": "WDL"},
    "fm_dnn": {"fuxictr": "its FM beside its DNN, put together here"},
    "deepfm": {"fuxictr": "DeepFM", "deepctr": "DeepFM"},
}
NONE = "it has none"
TABLE_BITS = 20
_TEST_TO_TRAINING = 0.1 / 0.81  # the ratio of rows in a `Split`
# 97.5 % quantiles of Student's distribution with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True)
class Bench:
    """The options that all cases share. Each case writes its data below `directory`."""

    directory: Path
    cache: Path
    rounds: int
    quick: bool
    offline: bool

    @property
    def network(self) -> list[object]:
        return ["--hidden", 16] if self.quick else ["--hidden", 400, 400, 400]

    def contenders(
        self, system: str, ours: Mapping[str, Sequence[object]], common: Sequence[object]
    ) -> list[Contender]:
        """Return our contenders, given as name: options, and those of the peers."""
        arguments = [*common, *self.network, "--system", system]
        contenders: list[Contender] = [
            Program(name, "our_system", [*arguments, *options]) for name, options in ours.items()
        ]
        for peer, title in TITLES.items():
            counterpart = COUNTERPARTS[system].get(peer)
            if counterpart is None:
                contenders.append(Absent(title, NONE))
                continue
            environment = Peer(peer, PEERS[peer], self.cache, self.offline)
            note = f"{counterpart}."
            contenders.append(Program(title, f"{peer}_system", arguments, environment, note=note))
        return contenders

    def measured(
        self, case: str, system: str, contenders: Sequence[Contender], title: str
    ) -> dict[str, Any]:
        """Measure the contenders and return the case as JSON."""
        say(f"\n{case}: {MODELS[system].title}")
        results = compare(contenders, rounds=self.rounds, say=say)
        peers = [result for result in results if result.name in TITLES.values() and result.values]
        as_json = []
        for result in results:
            against = {peer.name: _against(case, result, peer) for peer in peers}
            as_json.append(result.as_json() | {"against": against})
        return {
            "name": f"{case}-{system}",
            "case": case,
            "system": system,
            "title": title,
            "results": as_json,
        }


def _against(case: str, ours: Result, peer: Result) -> Any:
    """Return the ratio of speeds, or the mean and 95 % interval of the paired differences in AUC.

    Splits of the same rows are not independent. Their variance is corrected by the ratio of test to
    training rows, after Nadeau and Bengio, "Inference for the Generalization Error", Machine
    Learning 52 (2003).
    """
    if case == "speed":
        return ratio(ours, peer)
    differences = [a - b for a, b in zip(ours.values, peer.values, strict=False)]
    if not differences:
        return None
    runs = len(differences)
    shared = _TEST_TO_TRAINING if case == "splits" else 0.0
    half = 0.0
    if runs > 1:
        deviation = statistics.stdev(differences)
        half = _student(runs - 1) * deviation * math.sqrt(1 / runs + shared)
    mean = statistics.mean(differences)
    return {"difference": mean, "low": mean - half, "high": mean + half}


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution.

    Beyond the table, it is approximated by the Cornish-Fisher expansion.

    >>> _student(4), round(_student(30), 2)  # 2.04 in tables
    (2.776, 2.04)
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.822 / freedom**2


# -- quality -------------------------------------------------------------------------------------


def quality(bench: Bench, system: str) -> dict[str, Any]:
    return _quality(bench, system, "quality", splits=1)


def splits(bench: Bench, system: str) -> dict[str, Any]:
    return _quality(bench, system, "splits", splits=bench.rounds)


def _quality(bench: Bench, system: str, case: str, *, splits: int) -> dict[str, Any]:
    directory = bench.directory / case
    if not directory.exists():
        write_sample(directory, splits)
    common = ["--data", directory, "--batch", 128, "--epochs", 2 if bench.quick else 50]
    ours: dict[str, list[object]] = {"ours": ["--table-bits", TABLE_BITS]}
    if case == "splits" and system != "lr":  # to see the effect of the initial values
        ours["ours, embeddings from 0.0001"] = [*ours["ours"], "--initial-scale", 0.0001]
    contenders = bench.contenders(system, ours, common)
    how = "another split for each seed" if case == "splits" else "the split of `stream-ctr paper`"
    title = f"Test part of the Criteo sample, {bench.rounds} seeds, {how}"
    return bench.measured(case, system, contenders, title)


def write_sample(directory: Path, splits: int) -> None:
    """Write the Criteo sample as `training.Data` reads it, with so many random splits.

    The rows stay in file order, which is the order of the sample's invented event times.
    """
    ids, labels = hashed(DATA / "criteo" / "train.csv")
    directory.mkdir(parents=True)
    columns = [np.unique(column, return_inverse=True) for column in ids.T]
    local = np.stack([index for _, index in columns], axis=1).astype(np.int32)
    parts = [Split.of(len(labels), "random", seed=seed).part for seed in range(splits)]
    np.save(directory / "ids.npy", ids)
    np.save(directory / "local.npy", local)
    np.save(directory / "labels.npy", labels)
    np.save(directory / "parts.npy", np.stack(parts))
    (directory / "sizes.json").write_text(json.dumps([len(rows) for rows, _ in columns]))


def hashed(path: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Return (ids [n, F], labels [n]) of a labelled log."""
    log = open_log(path)
    events = [json.loads(value) for batch in log.batches() for value in batch.value.to_pylist()]
    clicked = {event["impression_id"] for event in events if event["kind"] == "click"}
    impressions = [event for event in events if event["kind"] == "impression"]
    kinds = {"categorical": pa.string(), "numeric": pa.float64()}
    columns = {
        field.name: pa.array(
            [event["features"].get(field.name) for event in impressions], kinds[field.kind]
        )
        for field in log.fields or ()
    }
    ids, _ = Hasher(log.fields or (), table_bits=TABLE_BITS).rows(columns)
    labels = [event["impression_id"] in clicked for event in impressions]
    return ids, np.array(labels, np.uint8)


def quality_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of AUC and logloss, with a row for each model and library."""
    header = [
        "system",
        "library",
        "AUC",
        "logloss",
        "best epoch",
        "AUC above the peer's [95 %]",
        "not below",
    ]
    rows = [
        _quality_row(MODELS[case["system"]].title, result, case["results"])
        for case in cases
        for result in case["results"]
        if result.get("not_run") != NONE
    ]
    return formatted(header, rows)


def _quality_row(
    title: str, result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> list[object]:
    if "not_run" in result:
        return [title, result["contender"], "not run", "", "", "", ""]
    scores = [
        f"{_mean(result, score):.4f} ± {_spread(result, score):.4f}" for score in ("auc", "logloss")
    ]
    row: list[object] = [title, result["contender"], *scores, f"{_mean(result, 'epoch'):.1f}"]
    if not result["contender"].startswith("ours"):
        return [*row, "", ""]
    against = {peer: interval for peer, interval in result["against"].items() if interval}
    differences = [
        f"{peer} {interval['difference']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"
        for peer, interval in against.items()
    ]
    spreads = {each["contender"]: _spread(each, "auc") for each in results if "not_run" not in each}
    not_below = [interval["difference"] >= -spreads[peer] for peer, interval in against.items()]
    verdict = ("yes" if all(not_below) else "no") if not_below else ""
    return [*row, "; ".join(differences), verdict]


def _mean(result: Mapping[str, Any], score: str) -> float:
    return statistics.mean(each[score] for each in result["repetitions"])


def _spread(result: Mapping[str, Any], score: str) -> float:
    values = [each[score] for each in result["repetitions"]]
    return statistics.stdev(values) if len(values) > 1 else 0.0


# -- speed ---------------------------------------------------------------------------------------


def speed(bench: Bench, system: str) -> dict[str, Any]:
    batch, bits = (256, 12) if bench.quick else (4096, TABLE_BITS)
    directory = bench.directory / "speed"
    if not directory.exists():
        zipf.write(directory, rows=1 << bits, examples=16 * batch)
    common = ["--data", directory, "--batch", batch, "--seconds", 0.2 if bench.quick else 1.5]
    if system == "lr":
        precisions = {"ours": "fp32"}
    else:
        precisions = {"ours, auto": "auto", "ours, fp32": "fp32"}
    ours = {
        name: ["--table-bits", bits, "--precision", precision]
        for name, precision in precisions.items()
    }
    title = f"Training: batch {batch:,}, {zipf.FIELDS} fields, {1 << bits:,} rows"
    return bench.measured("speed", system, bench.contenders(system, ours, common), title)


def speed_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of speeds: a row for each model, with the ratios of ours to the peers."""
    # Column: the contender that fills it where there is none of that name. LR has only "ours".
    columns = {"ours, auto": "ours", "ours, fp32": "", **dict.fromkeys(TITLES.values(), "")}
    rows: list[list[object]] = []
    for case in cases:
        reached = {result["contender"]: result for result in case["results"]}
        rates = [_rate(reached.get(name) or reached.get(other)) for name, other in columns.items()]
        ours = [
            result["against"]
            for name, result in reached.items()
            if name.startswith("ours") and "not_run" not in result
        ]
        times = [
            "; ".join(f"{each[peer]:.2f}" for each in ours if each.get(peer))
            for peer in TITLES.values()
        ]
        rows.append([MODELS[case["system"]].title, *rates, *times])
    ratios = [f"ours (auto; fp32) / {title}" for title in TITLES.values()]
    return formatted(["system", *columns, *ratios], rows)


def _rate(result: Mapping[str, Any] | None) -> str:
    if result is None or "not_run" in result:
        return "" if result is None or result["not_run"] == NONE else "not run"
    return number(result["median"])


CASES = {"quality": quality, "splits": splits, "speed": speed}
TABLES = {"quality": quality_table, "splits": quality_table, "speed": speed_table}
ROUNDS = {"quality": 5, "splits": 10, "speed": 3}
DEFAULT_SYSTEMS = {"quality": [*MODELS], "splits": ["deepfm"], "speed": [*MODELS]}


def block(case: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the block of a case: title, table, notes on the contenders, machines and commands."""
    notes: dict[str, list[str]] = {}
    for each in cases:
        title = MODELS[each["system"]].title
        for result in each["results"]:
            note = f"not run: {result['not_run']}" if "not_run" in result else result["note"]
            notes.setdefault(f"{result['contender']}: {note}", []).append(title)
    lines = [f"- {', '.join(titles)} - {note}" for note, titles in notes.items()]
    sources = sorted({f"{each['machine']}: `{each['command']}`" for each in cases})
    title = f"**{cases[0]['title']}**"
    return "\n\n".join([title, TABLES[case](cases), "\n".join(lines), "\n".join(sources)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; default: all")
    parser.add_argument(
        "--systems", nargs="+", choices=list(MODELS), help="default: all; splits: deepfm"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help="default: 5 seeds, 10 splits, 3 repetitions"
    )
    parser.add_argument("--quick", action="store_true", help="small, one round: does it run?")
    parser.add_argument("--missing", action="store_true", help="only what the JSON file lacks")
    add_common_options(parser)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}: there are {', '.join(CASES)}")
    kept = {case["name"]: case for case in _kept(arguments.json)}
    for case in measure(arguments, kept if arguments.missing else {}):
        kept[case["name"]] = case
    for name in CASES:
        cases = [kept[f"{name}-{system}"] for system in MODELS if f"{name}-{system}" in kept]
        if not cases:
            continue
        print(block(name, cases), end="\n\n")
        if arguments.page:
            page = fill(arguments.page.read_text(), name, block(name, cases))
            arguments.page.write_text(page)


def _kept(path: Path | None) -> list[dict[str, Any]]:
    """Return the cases in the JSON file, if there is one."""
    return json.loads(path.read_text())["cases"] if path and path.exists() else []


def measure(arguments: argparse.Namespace, measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the cases that are not among `measured`, and yield each after it is written to JSON."""
    command = f"python tests/bench/systems.py {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as name:
        for case in arguments.cases or CASES:
            rounds = 1 if arguments.quick else arguments.rounds or ROUNDS[case]
            bench = Bench(Path(name), arguments.cache, rounds, arguments.quick, arguments.offline)
            for system in arguments.systems or DEFAULT_SYSTEMS[case]:
                if f"{case}-{system}" in measured:
                    continue
                began = time.perf_counter()
                result = CASES[case](bench, system)
                result = record(result, command, time.perf_counter() - began) | {"peers": PEERS}
                if arguments.json:
                    keep([result], arguments.json)
                yield result


if __name__ == "__main__":
    main()
