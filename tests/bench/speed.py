"""Throughput, compared with other libraries in the same run; the tables of docs/performance.md.

    python tests/bench/speed.py                            # all cases, 25 minutes on two cores
    python tests/bench/speed.py train ftrl --rounds 5      # some cases
    python tests/bench/speed.py ingest --quick             # small and once, to see that it runs
    python tests/bench/speed.py --json speed.json --page docs/performance.md

Cases
  train      DeepFM (K=10, 400-400-400), batch 4096, 2^20 rows, ids in memory: ours in bf16 and
             fp32, DeepCTR-Torch, plain PyTorch with three optimisers, FBGEMM, and the network alone
             in plain PyTorch, which bounds ours (see step.py)
  train-10m  the same at batch 1024 with 10 M rows: ours and PyTorch with dense Adam
  ingest     Kafka -> decode -> hash -> join, window 60 s, the broker on the same cores: ours with
             kafka-python, confluent-kafka and Arrow batches, Flink SQL's interval join, json.loads
             with a dict
  pipeline   Kafka -> learned and measured, FTRL on all examples, River on 1/16: ours, json.loads +
             dict + River, and the parts of ours alone: training on the same examples, everything
             up to the join, River on its share
  served     Kafka -> learned and measured, a snapshot every five seconds, with and without
             scoring a share of the impressions as they were served
  health     Kafka -> learned and measured, with and without the health of fields, and with that
             of all impressions instead of a share
  ftrl       exact FTRL-Proximal, ids in memory, one core: ours, Vowpal Wabbit, River
  join       watermarks, lateness and the join alone, a million impressions pending, one core
  memory     resident memory with a million impressions pending, compared with none
  flat       processor time an event as a stream grows to 20 M impressions
  start      `stream-ctr --help`
  pause      the time for which a snapshot of 4 M rows stops the learner
  gpu        train on a CUDA GPU: ours, eager PyTorch

`ingest` and `pipeline` use two streams: `simulated` has 14 fields and about 300 bytes of JSON an
event, `wide` has 39 fields and about 600 bytes.

Method
  Every contender is a separate process with as many threads as the machine has cores. All
  contenders of a case are set up and warmed up first, which is not counted. Then each is measured
  once, in turn, for --rounds rounds. Tables show medians. Ratios are taken within a round.
  The JSON file keeps every repetition with the machine, the commit and the command. Cases that are
  not measured stay in it. Peers get their own virtual environments in --cache when they are first
  needed. A contender that cannot run is in the table with the reason.

Needs Java and an Apache Kafka in KAFKA_HOME or ../shared/kafka; without it, the embedded broker is
used. Flink needs its Kafka connector, a jar in FLINK_KAFKA_JAR or ../shared/flink. Run it on an
otherwise idle machine.
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
from bench.contest import (  # noqa: E402
    Absent,
    Call,
    Contender,
    Measurement,
    Program,
    Result,
    compare,
    ratio,
)
from bench.environments import NotRun, Own, Peer  # noqa: E402
from bench.streams import Topic, filled_topic  # noqa: E402

CACHE = Path.home() / ".cache" / "stream-ctr-bench"
TORCH = f"torch=={version('torch').partition('+')[0]}"
REQUIREMENTS = {
    "deepctr": (TORCH, "deepctr-torch==0.3.0", "requests"),  # not among its requirements
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
    """The options that all cases share."""

    directory: Path
    cache: Path
    rounds: int
    quick: bool
    offline: bool
    only: str
    against: Path | None = None

    def size(self, full: int, quick: int) -> int:
        """Return the size for this run: `full`, or `quick` in a quick run."""
        return quick if self.quick else full

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
        """Measure the contenders that --only selects."""
        say(f"\n{name}: {title}")
        selected = [contender for contender in contenders if self.only in contender.name]
        selected += self.earlier(selected)
        results = compare(selected, rounds=rounds or self.rounds, say=say)
        by_name = {result.name: result for result in results}
        for result in results:
            if before := by_name.get(f"{result.name}, earlier"):
                say(against_line(result, before))
        selected_goals = [goal for goal in goals if self.only in goal.contender]
        return Comparison(name, title, unit, results, selected_goals, peer)

    def earlier(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Return the same programs of the other checkout, if there is one to compare with."""
        if self.against is None:
            return []
        environment = Own(self.against)
        return [
            replace(program, name=f"{program.name}, earlier", environment=environment)
            for program in contenders
            if isinstance(program, Program) and isinstance(program.environment, Own)
        ]


def against_line(now: Result, earlier: Result) -> str:
    """Format the median ratio, within rounds, of this checkout to the earlier one."""
    if now.reason or earlier.reason:
        return f"{now.name}: no ratio ({now.reason or earlier.reason})"
    found = ratio(now, earlier)
    return f"{now.name}: {found:.3f} times the earlier checkout (median of the rounds' ratios)"


Case = Callable[[Bench], Iterator[Comparison]]


def train(bench: Bench) -> Iterator[Comparison]:
    batch = bench.size(4096, 256)
    bits = bench.size(20, 14)
    data = zipf.write(bench.directory / "train", rows=1 << bits, examples=32 * batch)
    common = ["--data", data, *network(bench), "--batch", batch]

    def torch(name: str, optimizer: str) -> Program:
        return Program(name, "torch_deepfm", [*common, "--optimizer", optimizer])

    contenders = [
        *by_precision("ours", "learner", common),
        Program("deepctr-torch", "deepctr_deepfm", common, bench.peer("deepctr")),
        torch("torch, dense Adam", "dense-adam"),
        torch("torch, SparseAdam", "sparse-adam"),
        torch("torch, sparse Adagrad", "sparse-adagrad"),
        Program("FBGEMM, 39 tables", "fbgemm_deepfm", common, bench.peer("fbgemm")),
        Program("FBGEMM, one table", "fbgemm_deepfm", [*common, "--shared"], bench.peer("fbgemm")),
        *by_precision("the network alone", "mlp", common),
    ]
    goals = [
        Goal("ours, bf16", least=4.5, times="deepctr-torch"),
        Goal("ours, fp32", least=2.0, times="deepctr-torch"),
    ]
    title = f"Training only: DeepFM, batch {batch:,}, {1 << bits:,} rows"
    yield bench.compare("train", title, "examples/s", contenders, *goals, peer="deepctr-torch")


def train_10m(bench: Bench) -> Iterator[Comparison]:
    batch = bench.size(1024, 256)
    rows = bench.size(10_000_000, 100_000)
    data = zipf.write(bench.directory / "train-10m", rows=rows, examples=64 * batch)
    common = ["--data", data, *network(bench), "--batch", batch]
    peer = "torch, dense Adam"
    contenders = [
        *by_precision("ours", "learner", common),
        Program(peer, "torch_deepfm", [*common, "--optimizer", "dense-adam"]),
    ]
    title = f"Training only: DeepFM, batch {batch:,}, {rows:,} rows"
    goal = Goal("ours, bf16", least=8.0, times=peer)
    yield bench.compare("train-10m", title, "examples/s", contenders, goal, peer=peer)


def by_precision(name: str, script: str, common: Sequence[object]) -> list[Program]:
    """Return the program in bf16 and in fp32."""
    return [
        Program(f"{name}, {precision}", script, [*common, "--precision", precision])
        for precision in ("bf16", "fp32")
    ]


def each_topic(bench: Bench, **events: int) -> Iterator[tuple[str, Topic, Path]]:
    """Yield (stream, a topic with about so many of its events, a directory for the case)."""
    for stream, count in events.items():
        with (
            tempfile.TemporaryDirectory(dir=bench.directory) as name,
            filled_topic(stream, count, Path(name)) as topic,
        ):
            yield stream, topic, Path(name)


def ingest(bench: Bench) -> Iterator[Comparison]:
    simulated = bench.size(1_000_000, 20_000)
    wide = bench.size(400_000, 10_000)
    for stream, topic, _ in each_topic(bench, simulated=simulated, wide=wide):
        ours = [
            joined("ours, kafka-python", topic),
            joined("ours, confluent-kafka", topic, client="confluent"),
            arrow("ours, Arrow batches", topic),
        ]
        peers = [
            flink(bench, topic),
            json_pipeline("json.loads + dict", topic, bench.size(100_000, 5_000), model="none"),
        ]
        goals = [
            Goal(ours[0].name, least=100_000),
            Goal(ours[0].name, least=2.0, times="Flink SQL"),
            Goal(ours[1].name, least=250_000),
            Goal(ours[2].name, least=1_000_000),
        ]
        title = f"Kafka -> decode -> hash -> join: {described(topic, stream)}"
        contenders = [*ours, *peers]
        name = f"ingest-{stream}"
        yield bench.compare(name, title, "events/s", contenders, *goals, peer="Flink SQL")


def pipeline(bench: Bench) -> Iterator[Comparison]:
    batch = bench.size(4096, 256)
    learning = ["-X", f"learn.batch_size={batch}", "-X", "baseline.sample_rate=0.0625", *JOIN]
    if bench.quick:
        learning += ["-X", "model.hidden=16"]
    simulated = bench.size(1_200_000, 20_000)
    wide = bench.size(600_000, 10_000)
    for stream, topic, directory in each_topic(bench, simulated=simulated, wide=wide):
        arguments = [*topic.options, "--", *learning, *topic.run_options]
        ours = [
            Program("ours", "stream_run", arguments),
            Program("ours, confluent-kafka", "stream_run", [*arguments, "--client", "confluent"]),
        ]
        parts = [
            *on_examples(directory / "examples", topic, batch, bench),
            joined("ours, to the join only", topic),
        ]
        events = bench.size(50_000, 2_000)
        peer = json_pipeline("json.loads + dict + River", topic, events, model="river")
        goals = [Goal("ours", least=40_000), Goal("ours", least=0.6, times=parts[0].name)]
        title = (
            f"Kafka -> learned and measured, FTRL on all, River on 1/16: {described(topic, stream)}"
        )
        contenders = [*ours, *parts, peer]
        name = f"pipeline-{stream}"
        compared = bench.compare(name, title, "events/s", contenders, *goals, peer=peer.name)
        combined = together("the parts, one after the other", compared.results, parts)
        yield replace(compared, results=[*compared.results, combined])


def served(bench: Bench) -> Iterator[Comparison]:
    batch = bench.size(4096, 256)
    learning = ["-X", f"learn.batch_size={batch}", "-X", "baseline.sample_rate=0.0625", *JOIN]
    learning += ["-X", "schedule.snapshot_every=5s"]
    if bench.quick:
        learning += ["-X", "model.hidden=16"]
    for stream, topic, _ in each_topic(bench, simulated=bench.size(1_200_000, 20_000)):
        arguments = [*topic.options, "--", *learning, *topic.run_options]
        without = Program(
            "ours, not scored as served",
            "stream_run",
            [*arguments, "-X", "metrics.served_share=0"],
        )
        title = f"Kafka -> learned and measured, a snapshot each 5 s: {described(topic, stream)}"
        goal = Goal("ours", least=0.85, times=without.name)
        contenders = [Program("ours", "stream_run", arguments), without]
        yield bench.compare("served", title, "events/s", contenders, goal, peer=without.name)


def health(bench: Bench) -> Iterator[Comparison]:
    batch = bench.size(4096, 256)
    learning = ["-X", f"learn.batch_size={batch}", "-X", "baseline.sample_rate=0.0625", *JOIN]
    learning += ["-X", "metrics.window=10s"]
    if bench.quick:
        learning += ["-X", "model.hidden=16"]
    for stream, topic, _ in each_topic(bench, simulated=bench.size(1_200_000, 20_000)):
        arguments = [*topic.options, "--", *learning, *topic.run_options]
        without = Program(
            "ours, without field health",
            "stream_run",
            [*arguments, "-X", "metrics.field_health=false"],
        )
        contenders = [
            Program("ours", "stream_run", arguments),
            Program(
                "ours, all impressions",
                "stream_run",
                [*arguments, "-X", "metrics.field_share=1"],
            ),
            without,
        ]
        title = f"Kafka -> learned and measured, the health of fields: {described(topic, stream)}"
        goal = Goal("ours", least=0.98, times=without.name)
        yield bench.compare("health", title, "events/s", contenders, goal, peer=without.name)


def ftrl(bench: Bench) -> Iterator[Comparison]:
    bits = bench.size(20, 14)
    count = bench.size(1 << 19, 1 << 13)
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
    goal = Goal("ours", least=2.0, times=peer)
    yield bench.compare("ftrl", title, "examples/s", contenders, goal, peer=peer)


def join(bench: Bench) -> Iterator[Comparison]:
    pending = bench.size(1_000_000, 30_000)
    impressions = bench.size(2_000_000, 30_000)
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
    count = bench.size(20_000_000, 150_000)
    block = bench.size(1_000_000, 20_000)
    ours = Program("ours", "growth", ["--impressions", count, "--block", block])
    title = f"Processor time an event: the last quarter of {count:,} impressions against the first"
    yield bench.compare("flat", title, "ratio", [ours], Goal("ours", most=1.1), rounds=1)


def start(bench: Bench) -> Iterator[Comparison]:
    command = [sys.executable, "-m", "stream_ctr", "--help"]

    def show_help() -> Measurement:
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        return {"value": time.perf_counter() - began}

    show_help()  # reads the files into the page cache
    ours = Call("ours", show_help)
    goal = Goal("ours", most=0.3)
    rounds = bench.size(7, 1)
    yield bench.compare("start", "`stream-ctr --help`", "s", [ours], goal, rounds=rounds)


def pause(bench: Bench) -> Iterator[Comparison]:
    bits = bench.size(22, 12)
    count = bench.size(120_000, 4_000)
    every = bench.size(25_000, 1_000)
    arguments = ["--table-bits", bits, "--impressions", count, "--every", every]
    ours = Program("ours", "snapshot_pause", arguments)
    title = f"How long a snapshot of {1 << bits:,} rows stops the learner"
    yield bench.compare("pause", title, "ms", [ours], Goal("ours", most=100.0))


def gpu(bench: Bench) -> Iterator[Comparison]:
    for batch, least in ((4096, 5e6), (65_536, 10e6)):
        name = f"gpu-{batch}"
        title = f"Training only on a GPU: DeepFM, batch {batch:,}, {1 << 20:,} rows"
        contenders = gpu_contenders(bench, name, batch)
        if shutil.which("nvidia-smi") is None:
            contenders = [Absent(contender.name, "no GPU here") for contender in contenders]
        goal = Goal("ours, bf16", least=least)
        peer = "torch, SparseAdam"
        yield bench.compare(name, title, "examples/s", contenders, goal, peer=peer)


def gpu_contenders(bench: Bench, name: str, batch: int) -> list[Contender]:
    data = bench.directory
    if shutil.which("nvidia-smi") is not None:
        data = zipf.write(bench.directory / name, rows=1 << 20, examples=32 * batch)
    common = ["--data", data, *network(bench), "--batch", batch, "--device", "cuda"]
    return [
        *by_precision("ours", "learner", common),
        Program("torch, SparseAdam", "torch_deepfm", [*common, "--optimizer", "sparse-adam"]),
        Program("the network alone, bf16", "mlp", [*common, "--precision", "bf16"]),
    ]


CASES: dict[str, Case] = {
    "train": train,
    "train-10m": train_10m,
    "ingest": ingest,
    "pipeline": pipeline,
    "served": served,
    "health": health,
    "ftrl": ftrl,
    "join": join,
    "memory": memory,
    "flat": flat,
    "start": start,
    "pause": pause,
    "gpu": gpu,
}


def network(bench: Bench) -> list[object]:
    hidden = (16,) if bench.quick else (400, 400, 400)
    return ["--hidden", *hidden, "--seconds", 0.2 if bench.quick else 4.0]


def joined(name: str, topic: Topic, *, client: str = "", other_topic: str = "") -> Program:
    """Return our program up to the join, on this topic or another one of the same broker."""
    options = [*JOIN, *topic.run_options, *(("--client", client) if client else ())]
    source = ["--servers", topic.servers, "--topic", other_topic or topic.name]
    return Program(name, "stream_run", [*source, "--join-only", "--", *options])


def json_pipeline(name: str, topic: Topic, events: int, *, model: str) -> Program:
    window = ["--window-ms", 1000 * WINDOW_SECONDS]
    options = [*topic.options, *window, "--events", events, "--model", model]
    return Program(name, "json_pipeline", options)


def arrow(name: str, topic: Topic) -> Contender:
    """Replay the topic as Arrow batches, and return our program on that topic."""
    try:
        topic.replay("batches", "--wire", "arrow")
    except NotRun as error:
        return Absent(name, str(error))
    return joined(name, topic, other_topic="batches")


def flink(bench: Bench, topic: Topic) -> Contender:
    name = "Flink SQL"
    jars = sorted((ROOT.parent / "shared" / "flink").glob("*.jar"))
    jar = os.environ.get("FLINK_KAFKA_JAR") or next(iter(jars), None)
    if jar is None:
        missing = "set FLINK_KAFKA_JAR to flink-sql-connector-kafka-*.jar"
        return Absent(name, f"no Kafka connector of Flink: {missing}")
    kinds = {"categorical": "STRING", "numeric": "DOUBLE"}
    features = [f"{field.name}:{kinds[field.kind]}" for field in topic.fields]
    options = [*topic.options, "--jar", jar, "--events", topic.events]
    options += ["--window-seconds", WINDOW_SECONDS, "--parallelism", os.cpu_count() or 1]
    return Program(name, "flink_join", [*options, "--features", *features], bench.peer("flink"))


def on_examples(directory: Path, topic: Topic, batch: int, bench: Bench) -> list[Contender]:
    """Return our learner and River on the topic's examples, which our join writes first.

    Both count events, not examples.
    """
    names = ("ours, train only", "River alone, on 1/16")
    join_only = joined("examples", topic)
    saving = [Program("examples", "stream_run", ["--save", directory, *join_only.arguments])]
    (result,) = compare(saving, rounds=1)
    if result.reason:
        return [Absent(name, result.reason) for name in names]
    events = topic.events / result.repetitions[0]["examples"]
    options = [*network(bench), "--batch", batch, "--fields", len(topic.fields)]
    options += ["--table-bits", 20, "--precision", "auto", "--events-per-example", events]
    river = ["--examples", bench.size(30_000, 1_000), "--events-per-example", 16 * events]
    return [
        Program(names[0], "learner", ["--data", directory, *options]),
        Program(names[1], "river_ftrl", ["--data", directory, *river], note="on one core"),
    ]


def together(name: str, results: Sequence[Result], parts: Sequence[Contender]) -> Result:
    """Return the throughput, round by round, if the cores did the parts one after the other.

    The parts are training, River and the join. River keeps one core busy, the others all cores. The
    result is not quite a bound: in the real pipeline, one part may use cores that another leaves
    idle.
    """
    by_name = {result.name: result for result in results}
    values = [by_name[part.name].values if part.name in by_name else [] for part in parts]
    if not all(values):
        return Result(name, reason="a part was not measured")
    cores = os.cpu_count() or 1
    rates = [
        1 / (1 / training + 1 / (cores * river) + 1 / joining)
        for training, river, joining in zip(*values, strict=True)
    ]
    times = statistics.median(
        rate / training for rate, training in zip(rates, values[0], strict=True)
    )
    note = (
        f"computed from the three rows; {times:.2f} x {parts[0].name}, "
        "where no part uses what another leaves idle"
    )
    return Result(name, rates, note=note)


def described(topic: Topic, stream: str) -> str:
    events = f"{topic.events:,} {stream} events of {len(topic.fields)} fields"
    return f"{events}, {topic.event_bytes} bytes of JSON, {topic.broker}"


def say(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def record(case: dict[str, Any], command: str, seconds: float) -> dict[str, Any]:
    """Return the case with the machine, the commit, the command and all versions."""
    return case | {
        "machine": machine(),
        "commit": commit(),
        "command": command,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in VERSIONS if _installed(name)},
        "peers": REQUIREMENTS,
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


def keep(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Write cases into the file, replacing those with the same names."""
    before = json.loads(path.read_text())["cases"] if path.exists() else []
    merged = {case["name"]: case for case in (*before, *cases)}
    path.write_text(json.dumps({"cases": list(merged.values())}, indent=1) + "\n")


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, one round: does it run?")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only contenders with this in their name"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="measure our programs from another checkout too, in the same rounds",
    )
    add_common_options(parser)
    parser.add_argument(
        "--read",
        type=Path,
        metavar="FILE",
        help="measure nothing; print the tables of a file that --json has written",
    )
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this script and of systems.py on peers and output."""
    parser.add_argument(
        "--offline",
        action="store_true",
        help="install nothing: do not run peers whose environment is not in the cache",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        help="directory of the peers' environments (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all repetitions to this file"
    )
    parser.add_argument(
        "--page",
        type=Path,
        help="put each table into the block of this page that has the name of its case",
    )


def main() -> None:
    parser = arguments_parser()
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}: there are {', '.join(CASES)}")
    if arguments.page and not arguments.page.exists():
        blocks = "with a block <!-- CASE --> <!-- /CASE --> for each table"
        parser.error(f"no page {arguments.page}: write it, {blocks}")
    if arguments.read:
        measured = json.loads(arguments.read.read_text())["cases"]
    else:
        measured = list(measure(arguments))
    for case in measured:
        print(table(case), end="\n\n")
    if arguments.page:
        text = arguments.page.read_text()
        for case in measured:
            text = fill(text, case["name"], table(case))
        arguments.page.write_text(text)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the cases and yield each comparison after it is written to the JSON file."""
    command = f"python tests/bench/speed.py {shlex.join(sys.argv[1:])}".strip()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(
            directory=Path(name),
            cache=arguments.cache,
            rounds=1 if arguments.quick else arguments.rounds,
            quick=arguments.quick,
            offline=arguments.offline,
            only=arguments.only,
            against=arguments.against and arguments.against.resolve(),
        )
        for case in arguments.cases or CASES:
            began = time.perf_counter()
            for comparison in CASES[case](bench):
                seconds = time.perf_counter() - began
                measured = record(comparison.as_json(), command, seconds)
                began = time.perf_counter()
                if arguments.json:
                    keep([measured], arguments.json)
                yield measured


if __name__ == "__main__":
    main()
