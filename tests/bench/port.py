"""The cost of the port: a run with --http, while a client asks each second, beside one without.

    python tests/bench/port.py --rounds 7

Each round learns the same simulated log three times, in an order that changes from round to round:
*without* a port, *with* one, and without one *again*. With the port, a process of its own asks for
/metrics and /reports every --every seconds, as a page and Prometheus do, only more often. Each
figure is the events a second of the final report, which leaves the start out. *cost* is the share
of the time that the port adds, against the mean of the two runs without one in its round; *noise*
compares these two with each other in the same way. The median over the rounds counts, and the goal
is a cost of 2 % at most. All runs of a round must end with the same weights.
"""

from __future__ import annotations

import argparse
import http.client
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.lineage import last_report, newest  # noqa: E402
from support.record import machine, print_table  # noqa: E402

from stream_ctr.logs.simulate import Simulation  # noqa: E402

MOST_COST = 0.02
PATHS = ("/metrics", "/reports")
_ORDERS = (("without", "with", "again"), ("again", "without", "with"), ("with", "again", "without"))


@dataclass(frozen=True)
class Run:
    """The figures of one run; `asked` counts the answers of its port, and `bytes` their length."""

    events_per_second: float
    weights_sha256: str
    asked: int = 0
    bytes: int = 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask(port: int, every: float) -> None:
    """Ask for all paths every so many seconds, print each length, until the run has ended."""
    begun = False
    while True:
        began = time.monotonic()
        for path in PATHS:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.request("GET", path, headers={"accept-encoding": "gzip"})
                answer = connection.getresponse()
                length = len(answer.read())
            except OSError:
                if begun:
                    return
                continue
            finally:
                connection.close()
            begun = True
            print(path, answer.status, length, flush=True)
        time.sleep(max(0.0, began + every - time.monotonic()))


def learn(log: Path, options: list[str], *, every: float | None) -> Run:
    """Run once, and with a client every so many seconds unless `every` is None."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name) / "state"
        command = [sys.executable, "-m", "stream_ctr", "run", "--source", str(log)]
        command += ["--state", str(state), "-X", "schedule.report_every=10s", *options]
        client = None
        if every is not None:
            port = free_port()
            command += ["--http", f"127.0.0.1:{port}"]
            asks = [sys.executable, __file__, "--ask", str(port), "--every", str(every)]
            client = subprocess.Popen(asks, stdout=subprocess.PIPE, text=True)
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        answers = client.communicate()[0].splitlines() if client else []
        assert all(answer.split()[1] == "200" for answer in answers), answers
        found = newest(state)
        assert found
        return Run(
            events_per_second=float(last_report(state)["events_per_second"]),
            weights_sha256=found.weights_sha256,
            asked=len(answers),
            bytes=sum(int(answer.split()[2]) for answer in answers),
        )


def costs(runs: dict[str, Run]) -> tuple[float, float]:
    """Return the cost of the port and the noise, as shares of the time of an event.

    >>> cost, noise = costs({"without": Run(100, ""), "again": Run(100, ""), "with": Run(80, "")})
    >>> round(cost, 9), noise
    (0.25, 0.0)
    """
    seconds = {name: 1 / run.events_per_second for name, run in runs.items()}
    without = (seconds["without"] + seconds["again"]) / 2
    return seconds["with"] / without - 1, seconds["again"] / seconds["without"] - 1


def measure(log: Path, options: list[str], *, rounds: int, every: float) -> list[dict[str, Run]]:
    """Return the runs of each round. Raises `RuntimeError` if their weights differ."""
    learn(log, options, every=None)  # compiles, and reads the files into the page cache
    measured = []
    for number in range(rounds):
        order = _ORDERS[number % len(_ORDERS)]
        runs = {
            name: learn(log, options, every=every if name == "with" else None) for name in order
        }
        if len({run.weights_sha256 for run in runs.values()}) > 1:
            raise RuntimeError(f"round {number + 1}: the weights differ")
        measured.append(runs)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impressions", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two requests")
    parser.add_argument("--ask", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("-X", dest="extra", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.ask:
        ask(arguments.ask, arguments.every)
        return
    options = [word for pair in arguments.extra for word in ("-X", pair)]
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.jsonl"
        Simulation(arguments.impressions, seed=1).write_jsonl(log)
        measured = measure(log, options, rounds=arguments.rounds, every=arguments.every)
    rows: list[list[object]] = []
    for number, runs in enumerate(measured, 1):
        cost, noise = costs(runs)
        figures = [f"{runs[kind].events_per_second:,.0f}" for kind in ("without", "again", "with")]
        asked = f"{runs['with'].asked} ({runs['with'].bytes / 1e6:.1f} MB)"
        rows.append([number, *figures, f"{cost:+.1%}", f"{noise:+.1%}", asked])
    print_table(["round", "without", "again", "with", "cost", "noise", "answers"], rows)
    cost, noise = (statistics.median(each) for each in zip(*map(costs, measured), strict=True))
    verdict = "met" if cost <= MOST_COST else "missed"
    print(f"median cost {cost:+.2%}, noise {noise:+.2%}; goal {MOST_COST:.0%} at most: {verdict}")
    print(f"{machine()}: python tests/bench/port.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
