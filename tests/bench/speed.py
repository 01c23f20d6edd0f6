"""How fast it is, beside its peers in the same run on the same data; the tables of docs/performance.md.

    python tests/bench/speed.py                            # all cases, about 25 minutes on two cores
    python tests/bench/speed.py train ftrl --rounds 5      # these
    python tests/bench/speed.py ingest --quick             # small and once: whether it runs, not how fast
    python tests/bench/speed.py --json speed.json --page docs/performance.md

Cases
  train      DeepFM (K=10, 400-400-400), batch 4096, 2^20 rows, ids in memory: ours in bf16 and fp32, DeepCTR-Torch, plain PyTorch with
             three optimisers, FBGEMM, and the network alone in plain PyTorch (what bounds ours: step.py)
  train-10m  the same at batch 1024 with 10 M rows: ours and PyTorch with dense Adam
  ingest     Kafka -> decode -> hash -> join, a window of 60 s, the broker on the same cores: ours with kafka-python, confluent-kafka and
             Arrow batches, Flink SQL's interval join, json.loads and a dict
  pipeline   Kafka -> learned and measured, FTRL on all, River on 1/16: ours, json.loads + dict + River, and of ours the parts alone, which
             tell what to expect: training on the same examples, all up to the join, River on its share
  ftrl       exact FTRL-Proximal, ids in memory, one core: ours, Vowpal Wabbit, River
  join       watermarks, lateness and the join alone, a million impressions pending, one core
  memory     a million impressions pending, against none
  flat       processor time an event as a stream grows to 20 M impressions
  start      `stream-ctr --help`
  pause      for how long a snapshot of 4 M rows stops the learner
  gpu        train on a CUDA GPU: ours, eager PyTorch

`ingest` and `pipeline` take two streams: `simulated`, 14 fields and some 300 bytes of JSON an event, and `wide`, 39 and some 600.

How
  Every contender is a process of its own with as many threads as the machine has cores. All of a case are set up and warmed up first, which
  is not counted; then each is measured once, in turn, and so on for --rounds rounds. The table has medians; ratios are taken within
  a round. The JSON file has every repetition, with the machine, the commit and the command; cases that are not measured stay in it.
  Peers get virtual environments of their own in --cache when they are first needed. What cannot run is in the table with the reason.

Needs Java and an Apache Kafka in KAFKA_HOME or ../shared/kafka (else the embedded broker is used), and for Flink its Kafka connector, a jar
in FLINK_KAFKA_JAR or ../shared/flink. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import commit, fill, machine  # noqa: E402

from bench import zipf  # noqa: E402
from bench.comparison import Comparison, Goal, table  # noqa: E402
from bench.contest import Absent, Call, Contender, Measurement, Program, Result, compare  # noqa: E402
from bench.environments import NotRun, Peer  # noqa: E402
from bench.streams import Topic, filled_topic  # noqa: E402

CACHE = Path.home() / ".cache" / "stream-ctr-bench"
TORCH = f"torch=={version('torch').partition('+')[0]}"
REQUIREMENTS = {
    "deepctr": (TORCH, "deepctr-torch==0.3.0", "requests"),  # which it imports and does not ask for
    "fbgemm": (TORCH, "fbgemm-gpu-cpu==1.8.0", "numpy==2.4.6"),
    "vowpal": ("vowpalwabbit==9.11.9", "numpy==2.4.6"),
    "flink": ("apache-flink==2.0.2",),
}
VERSIONS = (
    "stream-ctr",
    "torch",
    "numpy",
    "numba",
    "pyarrow",
    "kafka-python",
    "confluent-kafka",
    "river",
)
WINDOW_SECONDS = 60
JOIN = ("-X", f"join.label_window={WINDOW_SECONDS}s")


@dataclass(frozen=True, slots=True)
class Bench:
    """What the cases have in common; `size` picks the small number in a quick run."""

    directory: Path
    cache: Path
    rounds: int
    quick: bool
    offline: bool
    only: str

    def size(self, whole: int, quick: int) -> int:
        return quick if self.quick else whole

    def peer(self, name: str) -> Peer:
        return Peer(name, REQUIREMENTS[name], self.cache, self.offline)

    def compare(
        self,
        name: str,
        title: str,
        unit: str,
        contenders: Sequence[Contender],
        *goals: Goal,
        peer: str = "",
        rounds: int = 0,
    ) -> Comparison:
        say(f"\n{name}: {title}")
        chosen = [contender for contender in contenders if self.only in contender.name]
        results = compare(chosen, rounds=rounds or self.rounds, say=say)
        return Comparison(
            name, title, unit, results, [goal for goal in goals if self.only in goal.of], peer
        )


Case = Callable[[Bench], Iterator[Comparison]]


def train(bench: Bench) -> Iterator[Comparison]:
    batch, bits = bench.size(4096, 256), bench.size(20, 14)
    data = zipf.write(bench.directory / "train", rows=1 << bits, examples=32 * batch)
    common = ["--data", data, *network(bench), "--batch", batch]

    def torch(name: str, optimizer: str) -> Program:
        return Program(name, "torch_deepfm", [*common, "--optimizer", optimizer])

    contenders = [
        *(
            Program(f"ours, {precision}", "learner", [*common, "--precision", precision])
            for precision in ("bf16", "fp32")
        ),
        Program("deepctr-torch", "deepctr_deepfm", common, bench.peer("deepctr")),
        torch("torch, dense Adam", "dense-adam"),
        torch("torch, SparseAdam", "sparse-adam"),
        torch("torch, sparse Adagrad", "sparse-adagrad"),
        Program("FBGEMM, 39 tables", "fbgemm_deepfm", common, bench.peer("fbgemm")),
        Program("FBGEMM, one table", "fbgemm_deepfm", [*common, "--shared"], bench.peer("fbgemm")),
        *(
            Program(f"the network alone, {precision}", "mlp", [*common, "--precision", precision])
            for precision in ("bf16", "fp32")
        ),
    ]
    goals = [
        Goal("ours, bf16", least=4.5, times="deepctr-torch"),
        Goal("ours, fp32", least=2.0, times="deepctr-torch"),
    ]
    title = f"Training only: DeepFM, batch {batch:,}, {1 << bits:,} rows"
    yield bench.compare("train", title, "examples/s", contenders, *goals, peer="deepctr-torch")


def train_10m(bench: Bench) -> Iterator[Comparison]:
    batch, rows = bench.size(1024, 256), bench.size(10_000_000, 100_000)
    data = zipf.write(bench.directory / "train-10m", rows=rows, examples=64 * batch)
    common = ["--data", data, *network(bench), "--batch", batch]
    peer = "torch, dense Adam"
    contenders = [
        *(
            Program(f"ours, {precision}", "learner", [*common, "--precision", precision])
            for precision in ("bf16", "fp32")
        ),
        Program(peer, "torch_deepfm", [*common, "--optimizer", "dense-adam"]),
    ]
    title = f"Training only: DeepFM, batch {batch:,}, {rows:,} rows"
    yield bench.compare(
        "train-10m",
        title,
        "examples/s",
        contenders,
        Goal("ours, bf16", least=8.0, times=peer),
        peer=peer,
    )


def ingest(bench: Bench) -> Iterator[Comparison]:
    for stream, events in (
        ("simulated", bench.size(1_000_000, 20_000)),
        ("wide", bench.size(400_000, 10_000)),
    ):
        with (
            tempfile.TemporaryDirectory(dir=bench.directory) as name,
            filled_topic(stream, events, Path(name)) as topic,
        ):
            ours = [
                joined("ours, kafka-python", topic),
                joined("ours, confluent-kafka", topic, client="confluent"),
                arrow("ours, Arrow batches", topic),
            ]
            plain = [
                "--window-ms",
                1000 * WINDOW_SECONDS,
                "--events",
                bench.size(100_000, 5_000),
                "--model",
                "none",
            ]
            peers = [
                flink(bench, topic),
                Program("json.loads + dict", "json_pipeline", [*topic.options, *plain]),
            ]
            goals = [
                Goal(ours[0].name, least=100_000),
                Goal(ours[0].name, least=2.0, times="Flink SQL"),
                Goal(ours[1].name, least=250_000),
                Goal(ours[2].name, least=1_000_000),
            ]
            title = f"Kafka -> decode -> hash -> join: {described(topic, stream)}"
            yield bench.compare(
                f"ingest-{stream}", title, "events/s", [*ours, *peers], *goals, peer="Flink SQL"
            )


def pipeline(bench: Bench) -> Iterator[Comparison]:
    batch = bench.size(4096, 256)
    for stream, events in (
        ("simulated", bench.size(1_200_000, 20_000)),
        ("wide", bench.size(600_000, 10_000)),
    ):
        with (
            tempfile.TemporaryDirectory(dir=bench.directory) as name,
            filled_topic(stream, events, Path(name)) as topic,
        ):
            learning = [
                "-X",
                f"learn.batch_size={batch}",
                "-X",
                "baseline.sample_rate=0.0625",
                *JOIN,
            ]
            learning += ["-X", "model.hidden=16"] if bench.quick else []
            whole = Program(
                "ours", "stream_run", [*topic.options, "--", *learning, *topic.run_options]
            )
            confluent = Program(
                "ours, confluent-kafka", "stream_run", [*whole.arguments, "--client", "confluent"]
            )
            parts = [
                *on_examples(Path(name) / "examples", topic, batch, bench),
                joined("ours, to the join only", topic),
            ]
            only = parts[0]
            plain = [
                "--window-ms",
                1000 * WINDOW_SECONDS,
                "--events",
                bench.size(50_000, 2_000),
                "--model",
                "river",
            ]
            peer = Program("json.loads + dict + River", "json_pipeline", [*topic.options, *plain])
            goals = [Goal("ours", least=40_000), Goal("ours", least=0.6, times=only.name)]
            title = f"Kafka -> learned and measured, FTRL on all, River on 1/16: {described(topic, stream)}"
            compared = bench.compare(
                f"pipeline-{stream}",
                title,
                "events/s",
                [whole, confluent, *parts, peer],
                *goals,
                peer=peer.name,
            )
            yield replace(
                compared,
                results=[
                    *compared.results,
                    together("the parts, one after the other", compared.results, parts),
                ],
            )


def ftrl(bench: Bench) -> Iterator[Comparison]:
    bits, count = bench.size(20, 14), bench.size(1 << 19, 1 << 13)
    data = zipf.write(bench.directory / "ftrl", rows=1 << bits, examples=count)
    peer = "Vowpal Wabbit"
    vowpal = ["--text", zipf.write_vowpal(data, data / "vowpal.txt"), "--bits", bits]
    contenders = [
        Program("ours", "ftrl", ["--data", data, "--bits", bits]),
        Program(peer, "vowpal", [*vowpal, "--one-core"], bench.peer("vowpal")),
        Program(f"{peer}, all cores", "vowpal", vowpal, bench.peer("vowpal")),
        Program("River", "river_ftrl", ["--data", data, "--examples", count // 16]),
    ]
    title = f"Exact FTRL-Proximal, {zipf.FIELDS} fields, {1 << bits:,} rows, one core"
    yield bench.compare(
        "ftrl", title, "examples/s", contenders, Goal("ours", least=2.0, times=peer), peer=peer
    )


def join(bench: Bench) -> Iterator[Comparison]:
    pending, impressions = bench.size(1_000_000, 30_000), bench.size(2_000_000, 30_000)
    ours = Program("ours", "joiner", ["--pending", pending, "--impressions", impressions])
    title = f"The join alone: {pending:,} impressions of {zipf.FIELDS} fields pending, one core"
    yield bench.compare("join", title, "events/s", [ours], Goal("ours", least=1_000_000))


def memory(bench: Bench) -> Iterator[Comparison]:
    count = bench.size(1_000_000, 100_000)
    arguments = ["--impressions", count, "--pending"]
    contenders = [
        Program(f"ours, {which} pending", "pending", [*arguments, which])
        for which in ("all", "none")
    ]
    goal = Goal("ours, all pending", most=250.0, above="ours, none pending")
    title = f"Resident memory of the joiner after {count:,} impressions of {zipf.FIELDS} fields"
    yield bench.compare("memory", title, "MB", contenders, goal, rounds=1)


def flat(bench: Bench) -> Iterator[Comparison]:
    count, block = bench.size(20_000_000, 150_000), bench.size(1_000_000, 20_000)
    ours = Program("ours", "growth", ["--impressions", count, "--block", block])
    title = f"Processor time an event: the last quarter of {count:,} impressions against the first"
    yield bench.compare("flat", title, "ratio", [ours], Goal("ours", most=1.1), rounds=1)


def start(bench: Bench) -> Iterator[Comparison]:
    def help_() -> Measurement:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "stream_ctr", "--help"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        return {"value": time.perf_counter() - began}

    help_()  # from here on in the page cache
    yield bench.compare(
        "start",
        "`stream-ctr --help`",
        "s",
        [Call("ours", help_)],
        Goal("ours", most=0.3),
        rounds=bench.size(7, 1),
    )


def pause(bench: Bench) -> Iterator[Comparison]:
    bits, count, every = bench.size(22, 12), bench.size(120_000, 4_000), bench.size(25_000, 1_000)
    ours = Program(
        "ours", "snapshot_pause", ["--table-bits", bits, "--impressions", count, "--every", every]
    )
    title = f"How long a snapshot of {1 << bits:,} rows stops the learner"
    yield bench.compare("pause", title, "ms", [ours], Goal("ours", most=100.0))


def gpu(bench: Bench) -> Iterator[Comparison]:
    peer = "torch, SparseAdam"
    for batch, least in ((4096, 5e6), (65_536, 10e6)):
        name, title = (
            f"gpu-{batch}",
            f"Training only on a GPU: DeepFM, batch {batch:,}, {1 << 20:,} rows",
        )
        here = shutil.which("nvidia-smi") is not None
        data = (
            zipf.write(bench.directory / name, rows=1 << 20, examples=32 * batch)
            if here
            else bench.directory
        )
        common = ["--data", data, *network(bench), "--batch", batch, "--device", "cuda"]
        contenders: list[Contender] = [
            Program("ours, bf16", "learner", [*common, "--precision", "bf16"]),
            Program("ours, fp32", "learner", [*common, "--precision", "fp32"]),
            Program(peer, "torch_deepfm", [*common, "--optimizer", "sparse-adam"]),
            Program("the network alone, bf16", "mlp", [*common, "--precision", "bf16"]),
        ]
        if not here:
            contenders = [Absent(contender.name, "no GPU here") for contender in contenders]
        yield bench.compare(
            name, title, "examples/s", contenders, Goal("ours, bf16", least=least), peer=peer
        )


CASES: dict[str, Case] = {
    "train": train, "train-10m": train_10m, "ingest": ingest, "pipeline": pipeline, "ftrl": ftrl, "join": join, "memory": memory,
    "flat": flat, "start": start, "pause": pause, "gpu": gpu,
}  # fmt: skip


def network(bench: Bench) -> list[object]:
    hidden = (16,) if bench.quick else (400, 400, 400)
    return ["--hidden", *hidden, "--seconds", 0.2 if bench.quick else 4.0]


def joined(name: str, topic: Topic, *, client: str = "", of: str = "") -> Program:
    """Ours up to the join; `of` another topic of the broker."""
    options = [*JOIN, *topic.run_options, *(("--client", client) if client else ())]
    return Program(
        name,
        "stream_run",
        ["--servers", topic.servers, "--topic", of or topic.name, "--join-only", "--", *options],
    )


def arrow(name: str, topic: Topic) -> Contender:
    try:
        topic.replay("batches", "--wire", "arrow")
    except NotRun as error:
        return Absent(name, str(error))
    return joined(name, topic, of="batches")


def flink(bench: Bench, topic: Topic) -> Contender:
    name = "Flink SQL"
    jar = os.environ.get("FLINK_KAFKA_JAR") or next(
        iter(sorted((ROOT.parent / "shared" / "flink").glob("*.jar"))), None
    )
    if jar is None:
        return Absent(
            name,
            "no Kafka connector of Flink: set FLINK_KAFKA_JAR to flink-sql-connector-kafka-*.jar",
        )
    kinds = {"categorical": "STRING", "numeric": "DOUBLE"}
    features = [f"{field.name}:{kinds[field.kind]}" for field in topic.fields]
    options = [
        *topic.options,
        "--jar",
        jar,
        "--events",
        topic.events,
        "--window-seconds",
        WINDOW_SECONDS,
    ]
    return Program(
        name,
        "flink_join",
        [*options, "--parallelism", os.cpu_count() or 1, "--features", *features],
        bench.peer("flink"),
    )


def on_examples(directory: Path, topic: Topic, batch: int, bench: Bench) -> list[Contender]:
    """Ours and River on the examples of the topic, which our own join has put into the directory; both count events."""
    names = ("ours, train only", "River alone, on 1/16")
    saved = joined("examples", topic)
    (result,) = compare(
        [Program(saved.name, saved.script, ["--save", directory, *saved.arguments])], rounds=1
    )
    if result.reason:
        return [Absent(name, result.reason) for name in names]
    options = [
        *network(bench),
        "--batch",
        batch,
        "--fields",
        len(topic.fields),
        "--table-bits",
        20,
        "--precision",
        "auto",
    ]
    events = topic.events / result.repetitions[0]["examples"]
    river = ["--examples", bench.size(30_000, 1_000), "--events-per-example", 16 * events]
    return [
        Program(
            names[0], "learner", ["--data", directory, *options, "--events-per-example", events]
        ),
        Program(names[1], "river_ftrl", ["--data", directory, *river], note="on one core"),
    ]


def together(name: str, results: Sequence[Result], parts: Sequence[Contender]) -> Result:
    """How fast it would be, round by round, if cores did these parts one after the other and nothing else.

    Not quite a bound for what does them all: where a part leaves a core idle, another may use it.

    The second of them keeps one core busy, the others all.
    """
    by_name = {result.name: result for result in results}
    values = [by_name[part.name].values if part.name in by_name else [] for part in parts]
    if not all(values):
        return Result(name, reason="a part was not measured")
    cores = os.cpu_count() or 1
    whole = [
        1 / (1 / training + 1 / (cores * river) + 1 / joining)
        for training, river, joining in zip(*values, strict=True)
    ]
    times = statistics.median(
        all_ / training for all_, training in zip(whole, values[0], strict=True)
    )
    return Result(
        name,
        whole,
        note=f"computed from the three rows; {times:.2f} x {parts[0].name}, where no part uses what another leaves idle",
    )


def described(topic: Topic, stream: str) -> str:
    return f"{topic.events:,} {stream} events of {len(topic.fields)} fields, {topic.event_bytes} bytes of JSON, {topic.broker}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def record(case: dict[str, Any], command: str, seconds: float) -> dict[str, Any]:
    """The case with what its figures are of."""
    versions = {name: version(name) for name in VERSIONS if _installed(name)}
    made = {
        "machine": machine(),
        "commit": commit(),
        "command": command,
        "seconds": round(seconds, 1),
    }
    return case | made | {"versions": versions, "peers": REQUIREMENTS}


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


def keep(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """In the file, in place of what it has of the same names."""
    before = json.loads(path.read_text())["cases"] if path.exists() else []
    merged = {case["name"]: case for case in (*before, *cases)}
    path.write_text(json.dumps({"cases": list(merged.values())}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="of those above; all when none is named"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, one round: whether it runs")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="contenders that have this in their name"
    )
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
    parser.add_argument(
        "--read",
        type=Path,
        metavar="FILE",
        help="measure nothing: the tables of a file that --json has kept",
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}: there are {', '.join(CASES)}")
    if arguments.page and not arguments.page.exists():
        parser.error(
            f"no page {arguments.page}: write it, with a block <!-- CASE --> <!-- /CASE --> for each table"
        )
    measured = (
        json.loads(arguments.read.read_text())["cases"]
        if arguments.read
        else list(measure(arguments))
    )
    for case in measured:
        print(table(case), end="\n\n")
    if arguments.page:
        text = arguments.page.read_text()
        for case in measured:
            text = fill(text, case["name"], table(case))
        arguments.page.write_text(text)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each comparison as it is done, by then in the file."""
    command = f"python tests/bench/speed.py {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as name:
        rounds = 1 if arguments.quick else arguments.rounds
        bench = Bench(
            Path(name), arguments.cache, rounds, arguments.quick, arguments.offline, arguments.only
        )
        for case in arguments.cases or CASES:
            began = time.perf_counter()
            for comparison in CASES[case](bench):
                done = record(comparison.as_json(), command, time.perf_counter() - began)
                began = time.perf_counter()
                if arguments.json:
                    keep([done], arguments.json)
                yield done


if __name__ == "__main__":
    main()
