r"""Deltas: their sizes, the time of each part, their cost, and how fast they reach a server.

    python tests/bench/deltas.py                  # all cases, an hour and a half on two cores
    python tests/bench/deltas.py sizes parts      # some cases
    python tests/bench/deltas.py --quick          # small and once, to see that they run
    python tests/bench/deltas.py --json docs/deltas.json --page docs/deltas.md
    python tests/bench/deltas.py --render --json docs/deltas.json --page docs/deltas.md

Cases
  sizes    rows touched and bytes a second: a stream with the cardinalities of the Criteo log
           (delta_sizes.py)
  parts    the time of each part of a delta of a million rows (delta_parts.py)
  cost     events a second of a run with deltas, beside one without (delta_cost.py)
  serving  predictions a second of a server while deltas are applied, against none
           (delta_serving.py)
  lag      from the closing of a label window to the served row, through a broker (delta_lag.py)
  bf16     logloss of a server that gets bfloat16, beside one that gets float32 (delta_bf16.py)

`--bits` are the sizes of tables: `cost` measures each, the others the last one. 2^26 rows need
about 16 GB of memory and 10 GB of disk. What freshness is worth is measured by freshness.py. The
JSON file keeps every repetition with the machine, the commit and the command; cases that are not
measured stay in it. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import formatted, machine  # noqa: E402

from bench import (  # noqa: E402
    delta_bf16,
    delta_cost,
    delta_lag,
    delta_parts,
    delta_serving,
    delta_sizes,
    zipf,
)
from bench.kept import Kept  # noqa: E402
from stream_ctr.learn.spec import LearnerSpec  # noqa: E402

Result = dict[str, Any]
WINDOWS = (1, 5, 60)
QUICK_WINDOWS = (1, 2)


def sizes(options: argparse.Namespace) -> Result:
    """Return the sizes of all tables and windows, and the rows that are expected."""
    bits, rate = options.bits[-1], options.emulated_rate
    spec = LearnerSpec(fields=zipf.FIELDS, table_bits=bits)
    law = delta_sizes.Law()
    windows = QUICK_WINDOWS if options.quick else WINDOWS
    touched = delta_sizes.touched_rows(law, bits=bits, rate=rate, seconds=windows)
    dense = delta_sizes.dense_bytes(spec)
    return {
        "rate": rate,
        "dense": dense,
        "expected": {
            str(length): law.expected_rows(rows=1 << bits, examples=rate * length)
            for length in windows
        },
        "sizes": delta_sizes.sizes(touched, bits=bits, width=spec.embedding_dim, dense=dense),
    }


def sizes_table(results: Result) -> str:
    rows: list[list[object]] = []
    for found in results["sizes"]:
        seconds = found["seconds"]
        sent = [f"{found[name] / 1e6:,.1f}" for name in ("fp32", "bf16")]
        a_second = [f"{found[name] / 1e6 / seconds:,.1f}" for name in ("fp32", "bf16")]
        counts: list[object] = ["", "", ""]
        if found["rows"] is not None:
            of = found["of"]
            by_formula = (
                results["expected"][str(seconds)] if "pairs" not in found["table"] else None
            )
            counts = [
                f"2^{of.bit_length() - 1}",
                f"{found['rows']:,.0f}",
                "" if by_formula is None else f"{by_formula:,.0f}",
            ]
        rows.append([f"{seconds} s", found["table"], *counts, *sent, *a_second])
    header = ["every", "table", "rows", "touched", "by the formula", "fp32, MB", "bf16, MB"]
    table = formatted([*header, "fp32, MB/s", "bf16, MB/s"], rows)
    return f"{table}\n\n{results['rate']:,} examples a second. The dense part has " + (
        f"{results['dense'] / 1e6:.1f} MB in each delta."
    )


MEASURES: dict[str, Callable[[argparse.Namespace], Result]] = {
    "sizes": sizes,
    "parts": delta_parts.measure,
    "cost": delta_cost.measure,
    "serving": delta_serving.measure,
    "lag": delta_lag.measure,
    "bf16": delta_bf16.measure,
}
TABLES = {
    "sizes": sizes_table,
    "parts": delta_parts.table,
    "cost": delta_cost.table,
    "serving": delta_serving.table,
    "lag": delta_lag.table,
    "bf16": delta_bf16.table,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(MEASURES)}")
    add("--quick", action="store_true", help="small and once")
    add("--bits", type=int, nargs="+", default=[20, 26], help="sizes of tables, 2 ** bits rows")
    add("--rows", type=int, default=1_000_000, help="of a delta, in parts and serving")
    add("--every", type=float, default=5.0, help="seconds between two deltas")
    add("--repetitions", type=int, default=7, help="deltas of the case parts")
    add("--rounds", type=int, default=5, help="of the cases cost and serving")
    add("--seconds", type=float, default=30.0, help="of each measurement of the case serving")
    add("--impressions", type=int, default=400_000, help="of each run of the case cost")
    add("--stream", choices=["simulated", "wide"], default="wide", help="of the case cost")
    add("--rate", type=float, default=2000.0, help="impressions a second, of the real lag")
    add("--live-seconds", type=float, default=180.0, help="of the real lag")
    add("--emulated-rate", type=int, default=100_000, help="examples a second, emulated")
    add("--deltas", type=int, default=24, help="of the emulated lag")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the case bf16")
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
    options.bits, options.rows, options.every = [16], 5000, 1.0
    options.repetitions, options.rounds, options.seconds = 2, 1, 3.0
    options.impressions = 15_000
    options.rate, options.live_seconds = 300.0, 15.0
    options.emulated_rate, options.deltas = 2000, 4
    options.extra += ["model.hidden=16,16", "baseline.enabled=false"]
    options.seeds = options.seeds[:1]


def main() -> None:
    options = parse()
    kept = Kept("deltas", TABLES, options.json, options.page)
    if options.render:
        kept.render()
        return
    for case in options.cases or MEASURES:
        results = MEASURES[case](options)
        if case == "cost":  # a size takes up to half an hour, so the others stay as they were
            before = kept.read().get(case, {"results": {}})["results"]
            results = dict(sorted({**before, **results}.items()))
        print(f"{case}\n{kept.add(case, results)}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
