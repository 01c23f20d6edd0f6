"""The figures of docs/results.md: runs the commands as a user would and prints a table and the machine they ran on.

    python tests/bench/quality.py simulated    # 1 M simulated impressions, three seeds, one pass
    python tests/bench/quality.py samples      # Criteo and Avazu samples through Kafka, three seeds
    python tests/bench/quality.py joins        # the Open Bandit log, to the last click
    python tests/bench/quality.py speed        # 200,000 simulated impressions from Kafka, read, joined and learned
    python tests/bench/quality.py freshness    # from publication to a subscriber in another process

Kafka is a real one where KAFKA_HOME (or ../shared/kafka) has it, the embedded broker otherwise; each table says which. The samples are
looked for in STREAM_CTR_DATA or ../shared/data.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.brokers import ApacheBroker, KafkaMissing, find_kafka  # noqa: E402
from support.record import machine, print_table  # noqa: E402

from stream_ctr.connectors.embedded import EmbeddedBroker, embedded_version  # noqa: E402

DATA = Path(os.environ.get("STREAM_CTR_DATA") or ROOT.parent / "shared" / "data")
# Samples of a few thousand impressions need smaller steps than a stream that goes on.
SAMPLE_OPTIONS = ("-X", "learn.batch_size=128", "-X", "join.label_window=10m")
# What reports call the models of a run, and what the tables do.
TITLES = {"river_ftrl": "River FTRL", "ftrl": "exact FTRL", "deepfm": "DeepFM"}
LINEAR = ("river_ftrl", "ftrl")
DIFFERENCES = [f"DeepFM - {TITLES[name]} [95 %]" for name in LINEAR]


def stream_ctr(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stream_ctr", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(
            f"stream-ctr {shlex.join(map(str, arguments))} ended with status {done.returncode}:\n{done.stderr}"
        )


def final(state: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((state / "reports.jsonl").read_text().splitlines()[-1])
    assert report["kind"] == "final"
    return report


@contextlib.contextmanager
def kafka(directory: Path) -> Iterator[tuple[str, str]]:
    """(bootstrap servers, what it is)."""
    try:
        installation = find_kafka()
    except KafkaMissing:
        with EmbeddedBroker() as embedded:
            yield embedded.bootstrap_servers, f"embedded Tansu {embedded_version()}"
        return
    directory.mkdir()
    with ApacheBroker(installation, directory) as broker:
        yield broker.bootstrap_servers, f"Apache Kafka {installation.version}"


def differences(summary: dict[str, Any]) -> list[str]:
    """Of DeepFM's logloss and that of each linear model on the same examples."""
    pairs = [summary["pairs"][name] for name in LINEAR]
    return [
        f"{pair['logloss_difference']:+.5f} [{pair['low']:+.5f}, {pair['high']:+.5f}]"
        for pair in pairs
    ]


def simulated(arguments: argparse.Namespace) -> None:
    rows = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as name:
            log, state = Path(name) / "sim.jsonl", Path(name) / "state"
            stream_ctr(
                "simulate", "--impressions", arguments.impressions, "--seed", seed, "--out", log
            )
            stream_ctr(
                "run", "--source", log, "--state", state, "--until-end", "-X", f"learn.seed={seed}"
            )
            half = final(state)["last_half"]
        constant, best = half["constant_logloss"], half["best_possible_logloss"]
        closed = {name: (constant - half[name]["logloss"]) / (constant - best) for name in TITLES}
        losses = [f"{half[name]['logloss']:.5f} ({closed[name]:.1%})" for name in TITLES]
        rows.append(
            [
                seed,
                f"{constant:.5f}",
                *losses,
                f"{best:.5f}",
                f"{half['deepfm']['auc']:.4f}",
                *differences(half),
            ]
        )
    print(
        f"{arguments.impressions:,} simulated impressions, one pass; "
        "logloss over the last half (share of the gap from constant to best possible)\n"
    )
    print_table(
        ["seed", "constant", *TITLES.values(), "best possible", "DeepFM AUC", *DIFFERENCES], rows
    )


def samples(arguments: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name, kafka(Path(name) / "kafka") as (servers, broker):
        for log_format in ("criteo", "avazu"):
            path = DATA / log_format / "train.csv"
            topic = f"{log_format}-clicks"
            stream_ctr(
                "replay",
                path,
                "--format",
                log_format,
                "--topic",
                topic,
                "--bootstrap-servers",
                servers,
            )
            for seed in arguments.seeds:
                state = Path(name) / f"{log_format}-{seed}"
                run = [
                    "run",
                    "--topic",
                    topic,
                    "--bootstrap-servers",
                    servers,
                    "--state",
                    state,
                    "--until-end",
                    "-X",
                    f"learn.seed={seed}",
                ]
                stream_ctr(*run, *SAMPLE_OPTIONS)
                report = final(state)
                quarter = report["last_quarter"]
                scores = [
                    f"{quarter[name]['logloss']:.4f} / {quarter[name]['auc']:.4f}"
                    for name in TITLES
                ]
                rows.append(
                    [
                        log_format,
                        report["examples"],
                        seed,
                        f"{quarter['constant_logloss']:.4f}",
                        *scores,
                        *differences(quarter),
                    ]
                )
    print(
        f"samples through {broker}, one pass, logloss / AUC over the last quarter; options {' '.join(SAMPLE_OPTIONS)}\n"
    )
    print_table(["log", "impressions", "seed", "constant", *TITLES.values(), *DIFFERENCES], rows)


def joins(_: argparse.Namespace) -> None:
    path = DATA / "obd" / "impressions.csv"
    with path.open(newline="") as file:
        labels = [row["click"] for row in csv.DictReader(file)]
    with tempfile.TemporaryDirectory() as name, kafka(Path(name) / "kafka") as (servers, broker):
        stream_ctr(
            "replay",
            path,
            "--format",
            "obd",
            "--topic",
            "obd",
            "--partitions",
            4,
            "--bootstrap-servers",
            servers,
        )
        state = Path(name) / "state"
        run = [
            "run",
            "--topic",
            "obd",
            "--bootstrap-servers",
            servers,
            "--state",
            state,
            "--until-end",
        ]
        stream_ctr(*run, "--config", ROOT / "configs" / "obd.toml")
        counters = final(state)["counters"]
    print(f"the Open Bandit log through {broker}, four partitions\n")
    rows: list[list[object]] = [
        [
            "impressions",
            len(labels),
            counters["impressions"]
            - counters["impressions_late"]
            - counters["impressions_duplicate"],
        ],
        ["clicks", labels.count("1"), counters["clicks"]],
        [
            "joined + late",
            labels.count("1"),
            f"{counters['clicks_joined']} + {counters['clicks_late']}",
        ],
        [
            "duplicate, unmatched, rejected",
            0,
            counters["clicks_duplicate"] + counters["clicks_unmatched"] + counters["rejected"],
        ],
    ]
    print_table(["", "in the log", "learned"], rows)


def speed(arguments: argparse.Namespace) -> None:
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name, kafka(Path(name) / "kafka") as (servers, broker):
        log = Path(name) / "sim.jsonl"
        stream_ctr("simulate", "--impressions", 200_000, "--seed", 0, "--out", log)
        stream_ctr("replay", log, "--topic", "clicks", "--bootstrap-servers", servers)
        for repetition in range(arguments.repetitions):
            state = Path(name) / str(repetition)
            stream_ctr(
                "run",
                "--topic",
                "clicks",
                "--bootstrap-servers",
                servers,
                "--state",
                state,
                "--until-end",
            )
            report = final(state)
            rows.append(
                [
                    repetition + 1,
                    f"{report['events']:,}",
                    f"{report['seconds']:.1f}",
                    f"{report['events_per_second']:,.0f}",
                ]
            )
    print(
        f"200,000 simulated impressions from {broker} on the same processors, 400-400-400, River FTRL on every impression\n"
    )
    print_table(["run", "events", "seconds", "events/s"], rows)


def freshness(arguments: argparse.Namespace) -> None:
    delays: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        log, state = Path(name) / "sim.jsonl", Path(name) / "state"
        state.mkdir()
        stream_ctr("simulate", "--impressions", 50_000, "--seed", 0, "--out", log)
        follower = subprocess.Popen(
            [sys.executable, "-m", "stream_ctr", "subscribe", "--state", state, "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )

        def read() -> None:
            assert follower.stdout
            for line in follower.stdout:
                pointer = json.loads(line)
                delays.append(time.time() - (state / "latest.json").stat().st_mtime)
                print(f"{pointer['snapshot']}: loaded {delays[-1]:.2f} s after the pointer was replaced, "
                      f"{pointer['delay_seconds']:.2f} s after the snapshot was begun", flush=True)  # fmt: skip

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(8)
        stream_ctr(
            "run", "--source", log, "--state", state, "-X", "schedule.snapshot_examples=20000"
        )
        time.sleep(3)
        follower.send_signal(signal.SIGTERM)
        follower.wait(20)
        reader.join()
    print(f"\nthe longest of {len(delays)}: {max(delays):.2f} s (2^20 rows, 68 MB)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["simulated", "samples", "joins", "speed", "freshness"])
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)
    print(f"{machine()}: python tests/bench/quality.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
