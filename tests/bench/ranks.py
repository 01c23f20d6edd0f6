r"""Ranks: throughput, a peer, the network between hosts, memory, and equality for any number.

    TORCHREC_VENV=DIRECTORY python tests/bench/ranks.py     # all cases, hours on two cores
    python tests/bench/ranks.py throughput memory           # some cases
    python tests/bench/ranks.py --quick                     # small and once, to see that they run
    python tests/bench/ranks.py --json docs/scaling.json --page docs/scaling.md
    python tests/bench/ranks.py --render --json docs/scaling.json --page docs/scaling.md

Cases
  throughput  examples a second of whole runs on two cores: one process with 1 and 2 threads, 1 and
              2 ranks; DeepFM alone and the default blend; equal weights in every round
              (rank_throughput.py)
  torchrec    training on two ranks beside TorchRec's, sharded by rows, in one run
              (rank_torchrec.py); needs TORCHREC_VENV, a virtual environment with TorchRec
  network     two network namespaces as two hosts: bytes of a step beside the formula, examples a
              second at 1 and 10 Gbit/s (rank_network.py); needs root, ip and tc
  memory      resident memory of each rank at a table of 2 ** bits rows, what rank 0 holds besides,
              and the rate at which it is the bound (rank_memory.py)
  stages      the time of each stage of a step on one core (rank_stages.py); capacity.py reads it
  resharding  equal weights and ledgers for 1, 2 and 4 ranks, and after changes of their number,
              from Apache Kafka with eight partitions (rank_resharding.py); needs Java and an Apache
              Kafka in KAFKA_HOME or ../shared/kafka

Ranks are started by `torchrun`, as a user starts them. The JSON file keeps every repetition with
the machine, the commit and the command; cases that are not measured stay in it. Run it on an
otherwise idle machine. What follows on paper is computed by capacity.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import machine  # noqa: E402

from bench import (  # noqa: E402
    rank_memory,
    rank_network,
    rank_resharding,
    rank_stages,
    rank_throughput,
    rank_torchrec,
)
from bench.kept import Kept  # noqa: E402

Result = dict[str, Any]
MEASURES: dict[str, Callable[[argparse.Namespace], Result]] = {
    "throughput": rank_throughput.measure,
    "torchrec": rank_torchrec.measure,
    "network": rank_network.measure,
    "memory": rank_memory.measure,
    "stages": rank_stages.measure,
    "resharding": rank_resharding.measure,
}
TABLES: dict[str, Callable[[Result], str]] = {
    "throughput": rank_throughput.table,
    "torchrec": rank_torchrec.table,
    "network": rank_network.table,
    "memory": rank_memory.table,
    "stages": rank_stages.table,
    "resharding": rank_resharding.table,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(MEASURES)}")
    add("--quick", action="store_true", help="small and once")
    add("--bits", type=int, default=24, help="the large table of memory has 2 ** bits rows")
    add("--train-bits", type=int, default=20, help="the same of torchrec, network and stages")
    add("--batch", type=int, default=4096, help="of torchrec, network and stages")
    add("--hidden", type=int, nargs="+", default=[400, 400, 400], help="of the same")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=5.0, help="of a repetition of torchrec")
    add("--steps", type=int, default=40, help="of a repetition of network and stages")
    add("--impressions", type=int, default=400_000, help="of runs but those of resharding")
    add("--many-impressions", type=int, default=1_000_000, help="of resharding")
    add("--stream", choices=["simulated", "wide"], default="simulated", help="of runs")
    add("-X", dest="extra", action="append", default=[], metavar="KEY=VALUE")
    add("--render", action="store_true", help="fill the page from --json alone")
    add("--json", type=Path)
    add("--page", type=Path)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(MEASURES):
        parser.error(f"no case {', '.join(sorted(unknown))}; the cases are {', '.join(MEASURES)}")
    if options.quick:
        quicken(options)
    return options


def quicken(options: argparse.Namespace) -> None:
    """Make every case small."""
    options.bits, options.train_bits = 18, 14
    options.batch, options.hidden = 512, [16, 16]
    options.rounds, options.seconds, options.steps = 1, 0.5, 3
    options.impressions = options.many_impressions = 10_000
    options.extra += ["model.hidden=16,16", "learn.batch_size=512"]


def main() -> None:
    options = parse()
    kept = Kept("ranks", TABLES, options.json, options.page)
    if options.render:
        kept.render()
        return
    for case in options.cases or MEASURES:
        print(f"{case}\n{kept.add(case, MEASURES[case](options))}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
