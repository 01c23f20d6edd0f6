"""The figures of docs/results.md, measured with the command line.

    python tests/bench/quality.py simulated    # 1 M simulated impressions, three seeds, one pass
    python tests/bench/quality.py samples      # Criteo and Avazu samples through Kafka, three seeds
    python tests/bench/quality.py joins        # the Open Bandit log, to the last click
    python tests/bench/quality.py speed        # 200,000 impressions read, joined and learned
    python tests/bench/quality.py freshness    # from publication to a subscriber's process

Each prints a table and the machine. Kafka is a real broker if KAFKA_HOME or ../shared/kafka has
one, otherwise the embedded broker; each table says which. The samples are read from
STREAM_CTR_DATA or ../shared/data.
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
# Samples of a few thousand impressions need smaller batches than an endless stream.
SAMPLE_OPTIONS = ("-X", "learn.batch_size=128", "-X", "join.label_window=10m")
# Names of the models in reports: names in the tables.
TITLES = {"river_ftrl": "River FTRL", "ftrl": "exact FTRL", "deepfm": "DeepFM"}
LINEAR = ("river_ftrl", "ftrl")
DIFFERENCES = [f"DeepFM - {TITLES[name]} [95 %]" for name in LINEAR]
SPEED_IMPRESSIONS = 200_000
FRESHNESS_IMPRESSIONS = 50_000
FRESHNESS_EVERY = 20_000  # examples between two snapshots
SUBSCRIBER_START_SECONDS = 8
SUBSCRIBER_END_SECONDS = 3


def stream_ctr(*arguments: object) -> None:
    """Run a command of stream-ctr, and exit with its error message if it fails."""
    words = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "stream_ctr", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        status = f"ended with status {done.returncode}"
        sys.exit(f"stream-ctr {shlex.join(words)} {status}:\n{done.stderr}")


def from_topic(topic: str, servers: str, state: Path) -> list[object]:
    """Return the arguments that learn a topic to its end."""
    broker = ["--bootstrap-servers", servers]
    unpublished = ["-X", "snapshots.topic="]  # each state directory is a run of its own
    return ["run", "--topic", topic, *broker, "--state", state, "--until-end", *unpublished]


def final(state: Path) -> dict[str, Any]:
    """Return the last report of a run that has ended."""
    report: dict[str, Any] = json.loads((state / "reports.jsonl").read_text().splitlines()[-1])
    assert report["kind"] == "final"
    return report


@contextlib.contextmanager
def kafka(directory: Path) -> Iterator[tuple[str, str]]:
    """Run a broker and yield (bootstrap servers, its name and version)."""
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
    """Return the difference of DeepFM's logloss from each linear model's, on the same examples."""
    pairs = [summary["pairs"][name] for name in LINEAR]
    return [
        f"{pair['logloss_difference']:+.5f} [{pair['low']:+.5f}, {pair['high']:+.5f}]"
        for pair in pairs
    ]


def simulated(arguments: argparse.Namespace) -> None:
    rows = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as name:
            log = Path(name) / "sim.jsonl"
            state = Path(name) / "state"
            count = ["--impressions", arguments.impressions]
            stream_ctr("simulate", *count, "--seed", seed, "--out", log)
            options = ["--until-end", "-X", f"learn.seed={seed}"]
            stream_ctr("run", "--source", log, "--state", state, *options)
            half = final(state)["last_half"]
        constant = half["constant_logloss"]
        best = half["best_possible_logloss"]
        closed = {name: (constant - half[name]["logloss"]) / (constant - best) for name in TITLES}
        losses = [f"{half[name]['logloss']:.5f} ({closed[name]:.1%})" for name in TITLES]
        auc = f"{half['deepfm']['auc']:.4f}"
        rows.append([seed, f"{constant:.5f}", *losses, f"{best:.5f}", auc, *differences(half)])
    print(
        f"{arguments.impressions:,} simulated impressions, one pass; "
        "logloss over the last half (share of the gap from constant to best possible)\n"
    )
    print_table(
        ["seed", "constant", *TITLES.values(), "best possible", "DeepFM AUC", *DIFFERENCES], rows
    )


def samples(arguments: argparse.Namespace) -> None:
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name, kafka(Path(name) / "kafka") as (servers, broker):
        for log_format in ("criteo", "avazu"):
            topic = f"{log_format}-clicks"
            log = [DATA / log_format / "train.csv", "--format", log_format]
            stream_ctr("replay", *log, "--topic", topic, "--bootstrap-servers", servers)
            for seed in arguments.seeds:
                state = Path(name) / f"{log_format}-{seed}"
                run = from_topic(topic, servers, state)
                stream_ctr(*run, "-X", f"learn.seed={seed}", *SAMPLE_OPTIONS)
                report = final(state)
                quarter = report["last_quarter"]
                first = [log_format, report["examples"], seed]
                rows.append([*first, *sample_scores(quarter), *differences(quarter)])
    print(
        f"samples through {broker}, one pass, logloss / AUC over the last quarter; "
        f"options {' '.join(SAMPLE_OPTIONS)}\n"
    )
    print_table(["log", "impressions", "seed", "constant", *TITLES.values(), *DIFFERENCES], rows)


def sample_scores(quarter: dict[str, Any]) -> list[str]:
    scores = [quarter[name] for name in TITLES]
    cells = [f"{score['logloss']:.4f} / {score['auc']:.4f}" for score in scores]
    return [f"{quarter['constant_logloss']:.4f}", *cells]


def joins(_: argparse.Namespace) -> None:
    log = DATA / "obd" / "impressions.csv"
    with log.open(newline="") as file:
        labels = [row["click"] for row in csv.DictReader(file)]
    with tempfile.TemporaryDirectory() as name, kafka(Path(name) / "kafka") as (servers, broker):
        to_topic = ["--topic", "obd", "--partitions", 4, "--bootstrap-servers", servers]
        stream_ctr("replay", log, "--format", "obd", *to_topic)
        state = Path(name) / "state"
        run = from_topic("obd", servers, state)
        stream_ctr(*run, "--config", ROOT / "configs" / "obd.toml")
        counters = final(state)["counters"]
    print(f"the Open Bandit log through {broker}, four partitions\n")
    dropped_impressions = counters["impressions_late"] + counters["impressions_duplicate"]
    dropped_clicks = counters["clicks_duplicate"] + counters["clicks_unmatched"]
    clicks = labels.count("1")
    joined = f"{counters['clicks_joined']} + {counters['clicks_late']}"
    rows: list[list[object]] = [
        ["impressions", len(labels), counters["impressions"] - dropped_impressions],
        ["clicks", clicks, counters["clicks"]],
        ["joined + late", clicks, joined],
        ["duplicate, unmatched, rejected", 0, dropped_clicks + counters["rejected"]],
    ]
    print_table(["", "in the log", "learned"], rows)


def speed(arguments: argparse.Namespace) -> None:
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name, kafka(Path(name) / "kafka") as (servers, broker):
        log = Path(name) / "sim.jsonl"
        stream_ctr("simulate", "--impressions", SPEED_IMPRESSIONS, "--seed", 0, "--out", log)
        stream_ctr("replay", log, "--topic", "clicks", "--bootstrap-servers", servers)
        for repetition in range(arguments.repetitions):
            state = Path(name) / str(repetition)
            stream_ctr(*from_topic("clicks", servers, state))
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
        f"{SPEED_IMPRESSIONS:,} simulated impressions from {broker} on the same processors, "
        "400-400-400, River FTRL on every impression\n"
    )
    print_table(["run", "events", "seconds", "events/s"], rows)


def freshness(_: argparse.Namespace) -> None:
    delays: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "sim.jsonl"
        state = Path(name) / "state"
        state.mkdir()
        stream_ctr("simulate", "--impressions", FRESHNESS_IMPRESSIONS, "--seed", 0, "--out", log)
        subscriber = subprocess.Popen(
            [sys.executable, "-m", "stream_ctr", "subscribe", "--state", state, "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )

        def read() -> None:
            assert subscriber.stdout
            for line in subscriber.stdout:
                pointer = json.loads(line)
                delays.append(time.time() - (state / "latest.json").stat().st_mtime)
                loaded = f"loaded {delays[-1]:.2f} s after the pointer was replaced"
                age = f"{pointer['delay_seconds']:.2f} s after the snapshot was begun"
                print(f"{pointer['snapshot']}: {loaded}, {age}", flush=True)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(SUBSCRIBER_START_SECONDS)
        every = ["-X", f"schedule.snapshot_examples={FRESHNESS_EVERY}"]
        stream_ctr("run", "--source", log, "--state", state, *every)
        time.sleep(SUBSCRIBER_END_SECONDS)
        subscriber.send_signal(signal.SIGTERM)
        subscriber.wait(20)
        reader.join()
    print(f"\nthe longest of {len(delays)}: {max(delays):.2f} s (2^20 rows, 68 MB)")


MEASUREMENTS = {
    "simulated": simulated,
    "samples": samples,
    "joins": joins,
    "speed": speed,
    "freshness": freshness,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(MEASUREMENTS))
    parser.add_argument("--impressions", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    MEASUREMENTS[arguments.what](arguments)
    print(f"{machine()}: python tests/bench/quality.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
