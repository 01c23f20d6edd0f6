"""The paper's nine systems beside their counterparts in FuxiCTR and DeepCTR-Torch: how good and how fast; the tables of docs/systems.md.

    python tests/bench/systems.py                                 # all, a quarter of an hour on two cores
    python tests/bench/systems.py quality --systems deepfm fm     # these; the others of the page stay as they are
    python tests/bench/systems.py speed --quick                   # small and once: whether it runs, not how fast
    python tests/bench/systems.py --json docs/systems.json --page docs/systems.md

What
  quality  AUC and logloss of the test part of the Criteo sample (7,200 rows), split as `stream-ctr paper` splits it. Everyone gets the same
           features: the rows that ours hash to, counted anew within each field for those with a table a field. Batch 128; epochs until the
           validation part's logloss is no longer better, the best one counts. A round is a seed.
  splits   the same with another split for each seed: whether a difference is one of these test rows
  speed    training examples a second: batch 4096, 39 fields, 2^20 rows, ids by Zipf's law, in memory

How
  K = 10, 400-400-400, relu, dropout 0.5, Adam with rate 0.001 for all, no penalties. LR is FTRL-Proximal in ours, Adam in theirs. Every
  contender is a process of its own with as many threads as the machine has cores. All of a system are set up and warmed up first; then each
  is measured once, in turn, and so on for --rounds rounds. Peers get environments of their own in --cache when they are first needed. The
  JSON file has every repetition; systems that are not measured stay in it, and in the page. With --missing only those are measured that it
  has not: so a run that was interrupted goes on.

The sample is looked for in STREAM_CTR_DATA or ../shared/data. Run it on a machine that does nothing else.
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
from bench.speed import CACHE, REQUIREMENTS, TORCH, keep, record, say  # noqa: E402
from stream_ctr.events.features import Hasher  # noqa: E402
from stream_ctr.logs.open import open_log  # noqa: E402
from stream_ctr.models import MODELS  # noqa: E402
from stream_ctr.paper.dataset import Split  # noqa: E402

DATA = Path(os.environ.get("STREAM_CTR_DATA") or ROOT.parent / "shared" / "data")
PEERS = {"deepctr": REQUIREMENTS["deepctr"], "fuxictr": (TORCH, "fuxictr==2.3.10", "numpy==2.4.6")}
TITLES = {"fuxictr": "FuxiCTR", "deepctr": "DeepCTR-Torch"}
# What stands beside each, and in what it is not the same. A peer that is not named has none.
COUNTERPARTS: Mapping[str, Mapping[str, str]] = {
    "lr": {"fuxictr": "LR, by Adam", "deepctr": "WDL without its deep side, by Adam"},
    "fm": {"fuxictr": "FM", "deepctr": "DeepFM without its deep side"},
    "fnn": {
        "fuxictr": "DNN: no FM before it, no w",
        "deepctr": "PNN without products: no FM before it, no w",
    },
    "ipnn": {"fuxictr": "PNN", "deepctr": "PNN"},
    "opnn": {
        "deepctr": "PNN with outer products: a kernel for each of 741 pairs, not one product of sums"
    },
    "pnn": {"deepctr": "PNN with both, outer products likewise"},
    "lr_dnn": {"fuxictr": "WideDeep", "deepctr": "WDL"},
    "fm_dnn": {"fuxictr": "its FM beside its DNN, put together here"},
    "deepfm": {"fuxictr": "DeepFM", "deepctr": "DeepFM"},
}
NONE = "it has none"
TABLE_BITS = 20
_TEST_TO_TRAINING = 0.1 / 0.81  # rows, of `Split`
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases have in common; `data` are the directories of what each case learns, which are made when they are wanted."""

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
        """Ours, a name with options each, and the peers'."""
        arguments = [*common, *self.network, "--system", system]
        made: list[Contender] = [
            Program(name, "our_system", [*arguments, *options]) for name, options in ours.items()
        ]
        for peer, title in TITLES.items():
            if (what := COUNTERPARTS[system].get(peer)) is None:
                made.append(Absent(title, NONE))
            else:
                environment = Peer(peer, PEERS[peer], self.cache, self.offline)
                made.append(
                    Program(title, f"{peer}_system", arguments, environment, note=f"{what}.")
                )
        return made

    def measured(
        self, case: str, system: str, contenders: Sequence[Contender], title: str
    ) -> dict[str, Any]:
        say(f"\n{case}: {MODELS[system].title}")
        results = compare(contenders, rounds=self.rounds, say=say)
        peers = [result for result in results if result.name in TITLES.values() and result.values]
        told = [
            result.as_json()
            | {"against": {peer.name: _against(case, result, peer) for peer in peers}}
            for result in results
        ]
        return {
            "name": f"{case}-{system}",
            "case": case,
            "system": system,
            "title": title,
            "results": told,
        }


def _against(case: str, ours: Result, peer: Result) -> Any:
    """The ratio of speeds, or mean and 95 % interval of the paired differences in AUC.

    Splits of the same rows are not independent of each other: their variance is as much larger as Nadeau and Bengio ("Inference for the
    Generalization Error", Machine Learning 52, 2003) have it, by the ratio of test and training rows.
    """
    if case == "speed":
        return ratio(ours, peer)
    differences = [a - b for a, b in zip(ours.values, peer.values, strict=False)]
    if not differences:
        return None
    runs = len(differences)
    shared = _TEST_TO_TRAINING if case == "splits" else 0.0
    half = (
        0.0
        if runs < 2
        else _student(runs - 1) * statistics.stdev(differences) * math.sqrt(1 / runs + shared)
    )
    mean = statistics.mean(differences)
    return {"difference": mean, "low": mean - half, "high": mean + half}


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, from a table or, beyond it, from that of the normal one.

    >>> _student(4), round(_student(30), 2)  # 2.04 in tables
    (2.776, 2.04)
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.822 / freedom**2  # Cornish-Fisher


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
    if case == "splits" and system != "lr":  # whether it is their initial values
        ours["ours, embeddings from 0.0001"] = [*ours["ours"], "--initial-scale", 0.0001]
    contenders = bench.contenders(system, ours, common)
    how = "another split for each seed" if case == "splits" else "the split of `stream-ctr paper`"
    return bench.measured(
        case, system, contenders, f"Test part of the Criteo sample, {bench.rounds} seeds, {how}"
    )


def write_sample(directory: Path, splits: int) -> None:
    """What `training.Data` reads, of the Criteo sample in file order, which is that of its invented event times."""
    ids, labels = hashed(DATA / "criteo" / "train.csv")
    directory.mkdir(parents=True)
    counted = [np.unique(column, return_inverse=True) for column in ids.T]
    np.save(directory / "ids.npy", ids)
    np.save(
        directory / "local.npy", np.stack([place for _, place in counted], axis=1).astype(np.int32)
    )
    np.save(directory / "labels.npy", labels)
    np.save(
        directory / "parts.npy",
        np.stack([Split.of(len(labels), "random", seed=seed).part for seed in range(splits)]),
    )
    (directory / "sizes.json").write_text(json.dumps([len(rows) for rows, _ in counted]))


def hashed(path: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """ids [n, F] and labels [n] of a labelled log."""
    log = open_log(path)
    events = [json.loads(value) for batch in log.batches() for value in batch.value.to_pylist()]
    clicked = {event["impression_id"] for event in events if event["kind"] == "click"}
    shown = [event for event in events if event["kind"] == "impression"]
    kinds = {"categorical": pa.string(), "numeric": pa.float64()}
    columns = {
        field.name: pa.array(
            [event["features"].get(field.name) for event in shown], kinds[field.kind]
        )
        for field in log.fields or ()
    }
    ids, _ = Hasher(log.fields or (), table_bits=TABLE_BITS).rows(columns)
    return ids, np.array([event["impression_id"] in clicked for event in shown], np.uint8)


def quality_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """A row for each system and library."""
    header = [
        "system",
        "library",
        "AUC",
        "logloss",
        "best epoch",
        "AUC above the peer's [95 %]",
        "not below",
    ]
    results = [
        (MODELS[case["system"]].title, result, case["results"])
        for case in cases
        for result in case["results"]
    ]
    return formatted(
        header, [_quality_row(*told) for told in results if told[1].get("not_run") != NONE]
    )


def _quality_row(
    title: str, result: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]
) -> list[object]:
    if "not_run" in result:
        return [title, result["contender"], "not run", "", "", "", ""]
    scores = [
        f"{_mean(result, score):.4f} ± {_spread(result, score):.4f}" for score in ("auc", "logloss")
    ]
    row: list[object] = [title, result["contender"], *scores, f"{_mean(result, 'epoch'):.1f}"]
    if not result["contender"].startswith("ours"):
        return [*row, "", ""]
    against = {peer: told for peer, told in result["against"].items() if told}
    differences = [
        f"{peer} {told['difference']:+.4f} [{told['low']:+.4f}, {told['high']:+.4f}]"
        for peer, told in against.items()
    ]
    spreads = {told["contender"]: _spread(told, "auc") for told in beside if "not_run" not in told}
    verdicts = [told["difference"] >= -spreads[peer] for peer, told in against.items()]
    return [*row, "; ".join(differences), "" if not verdicts else "yes" if all(verdicts) else "no"]


def _mean(result: Mapping[str, Any], score: str) -> float:
    return statistics.mean(one[score] for one in result["repetitions"])


def _spread(result: Mapping[str, Any], score: str) -> float:
    values = [one[score] for one in result["repetitions"]]
    return statistics.stdev(values) if len(values) > 1 else 0.0


# -- speed ---------------------------------------------------------------------------------------


def speed(bench: Bench, system: str) -> dict[str, Any]:
    batch, bits = (256, 12) if bench.quick else (4096, TABLE_BITS)
    directory = bench.directory / "speed"
    if not directory.exists():
        zipf.write(directory, rows=1 << bits, examples=16 * batch)
    common = ["--data", directory, "--batch", batch, "--seconds", 0.2 if bench.quick else 1.5]
    names = ("ours",) if system == "lr" else ("ours, auto", "ours, fp32")
    ours = {
        name: [
            "--table-bits",
            bits,
            "--precision",
            name.removeprefix("ours, ") if ", " in name else "fp32",
        ]
        for name in names
    }
    title = f"Training: batch {batch:,}, {zipf.FIELDS} fields, {1 << bits:,} rows"
    return bench.measured("speed", system, bench.contenders(system, ours, common), title)


def speed_table(cases: Iterable[Mapping[str, Any]]) -> str:
    """A row for each system, examples/s and how many times the peers' ours are."""
    columns = {
        "ours, auto": "ours",
        "ours, fp32": "",
        **dict.fromkeys(TITLES.values(), ""),
    }  # LR has one of its own
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
    return formatted(
        ["system", *columns, *(f"ours (auto; fp32) / {title}" for title in TITLES.values())], rows
    )


def _rate(result: Mapping[str, Any] | None) -> str:
    if result is None or "not_run" in result:
        return "" if result is None or result["not_run"] == NONE else "not run"
    return number(result["median"])


CASES = {"quality": quality, "splits": splits, "speed": speed}
TABLES = {"quality": quality_table, "splits": quality_table, "speed": speed_table}
ROUNDS = {"quality": 5, "splits": 10, "speed": 3}
DEFAULT_SYSTEMS = {"quality": [*MODELS], "splits": ["deepfm"], "speed": [*MODELS]}


def block(case: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """The table of a case, how each contender was made, and by what the figures were made."""
    notes: dict[str, list[str]] = {}
    for told in cases:
        for result in told["results"]:
            said = f"not run: {result['not_run']}" if "not_run" in result else result["note"]
            notes.setdefault(f"{result['contender']}: {said}", []).append(
                MODELS[told["system"]].title
            )
    lines = [f"- {', '.join(titles)} - {note}" for note, titles in notes.items()]
    made = sorted({f"{told['machine']}: `{told['command']}`" for told in cases})
    return "\n\n".join(
        [f"**{cases[0]['title']}**", TABLES[case](cases), "\n".join(lines), "\n".join(made)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="of those above; all when none is named"
    )
    parser.add_argument(
        "--systems", nargs="+", choices=list(MODELS), help="all unless named (splits: deepfm)"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help="5 seeds, 10 splits, 3 repetitions unless given"
    )
    parser.add_argument("--quick", action="store_true", help="small, one round: whether it runs")
    parser.add_argument("--missing", action="store_true", help="only what the JSON file has not")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="install nothing: peers whose environment is not in the cache are not run",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        help="where peers' environments are kept (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all repetitions here")
    parser.add_argument(
        "--page",
        type=Path,
        help="put the tables into the blocks of this page that have the names of the cases",
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}: there are {', '.join(CASES)}")
    kept = {case["name"]: case for case in _kept(arguments.json)}
    for case in measure(arguments, kept if arguments.missing else {}):
        kept[case["name"]] = case
    for name in CASES:
        cases = [kept[f"{name}-{system}"] for system in MODELS if f"{name}-{system}" in kept]
        if cases:
            print(block(name, cases), end="\n\n")
            if arguments.page:
                arguments.page.write_text(
                    fill(arguments.page.read_text(), name, block(name, cases))
                )


def _kept(path: Path | None) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cases"] if path and path.exists() else []


def measure(arguments: argparse.Namespace, there: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each system of each case as it is done, by then in the file."""
    command = f"python tests/bench/systems.py {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as name:
        for case in arguments.cases or CASES:
            rounds = 1 if arguments.quick else arguments.rounds or ROUNDS[case]
            bench = Bench(Path(name), arguments.cache, rounds, arguments.quick, arguments.offline)
            for system in arguments.systems or DEFAULT_SYSTEMS[case]:
                if f"{case}-{system}" in there:
                    continue
                began = time.perf_counter()
                done = record(CASES[case](bench, system), command, time.perf_counter() - began) | {
                    "peers": PEERS
                }
                if arguments.json:
                    keep([done], arguments.json)
                yield done


if __name__ == "__main__":
    main()
