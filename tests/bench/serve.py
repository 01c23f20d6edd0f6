r"""The speed, the swaps and the memory of `stream-ctr serve`; docs/serving-performance.md.

    python tests/bench/serve.py                    # all cases, an hour and a half on two cores
    python tests/bench/serve.py speed --seconds 5  # some cases
    python tests/bench/serve.py --quick            # small and once, to see that it runs
    python tests/bench/serve.py --json docs/performance-serve.json \
        --page docs/serving-performance.md

Cases
  speed      requests/s and latency at 1, 32 and 512 rows a request, in JSON and in Arrow, by 1 and
             by 8 connections: ours with the blend, the default; the same with onnxruntime in place
             of torch; ours with its DeepFM alone; the same DeepFM in plain torch behind the same
             server (see serve_plain.py)
  together   one row a request by 32 connections: waiting requests are predicted together, or alone
  swaps      clients ask without a pause while a real `stream-ctr run` publishes about once a
             second, is killed with SIGKILL, and resumes; until 10 swaps were seen before
             and 10 after that
  memory     resident memory while --requests requests are answered at full rate

Method
  Servers and the load (see serve_load.py) are processes of their own and share the machine's cores.
  The load is a closed loop: a connection sends its next request when it has the answer to the last.
  Latencies are those that the client sees. All contenders are started and asked first, which is not
  counted. Then each is measured in turn, for --rounds rounds, and tables show medians over rounds.
  The JSON file keeps every repetition with the machine, the commit and the command. Cases that are
  not measured stay in it. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import commit, fill, formatted, machine  # noqa: E402

from stream_ctr.logs.simulate import Simulation  # noqa: E402
from stream_ctr.serve.answers import ARROW, JSON  # noqa: E402

BENCH = Path(__file__).parent
CASES = ("speed", "together", "swaps", "memory")
ROWS = (1, 32, 512)
CONNECTIONS = (1, 8)
BODIES = 256
SWAPPED = (1_000_000, 10, 10)  # impressions, swaps before the kill and after it
TOGETHER_CONNECTIONS = 32
READY_SECONDS = 120.0
STREAM_CTR = [sys.executable, "-m", "stream_ctr"]
LOOPBACK = ["--http", "127.0.0.1:0", "--timeout", "60"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    name: str
    process: subprocess.Popen[str]
    address: str

    @property
    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (kib,) = (line.split()[1] for line in status if line.startswith("VmRSS"))
        return round(int(kib) / 1024, 1)


@contextlib.contextmanager
def serving(name: str, command: Sequence[str]) -> Iterator[Server]:
    """Start a server and wait until it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout
        address = process.stdout.readline().rpartition("//")[2].strip()
        deadline = time.monotonic() + READY_SECONDS
        while not ready(address):
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{name} does not become ready: {shlex.join(command)}")
            time.sleep(0.1)
        yield Server(name, process, address)
    finally:
        process.terminate()
        process.wait()


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=10):
            return True
    except OSError:
        return False


def ours(name: str, state: Path, *options: str) -> contextlib.AbstractContextManager[Server]:
    return serving(name, [*STREAM_CTR, "serve", "--state", str(state), *LOOPBACK, *options])


def contender(
    name: str, state: Path, model: str, *, together: int = 64
) -> contextlib.AbstractContextManager[Server]:
    script = str(BENCH / "serve_plain.py")
    return serving(name, [sys.executable, script, str(state), model, str(together)])


# -- requests ------------------------------------------------------------------------------------


def features(log: Path, most: int) -> list[dict[str, Any]]:
    """Return the features of the first impressions of a log."""
    found = []
    with log.open() as lines:
        for line in lines:
            event = json.loads(line)
            if event["kind"] == "impression":
                found.append(event["features"])
            if len(found) == most:
                break
    return found


def write_requests(path: Path, rows: Sequence[dict[str, Any]], size: int, form: str) -> Path:
    """Write requests of `size` rows each, as bytes of HTTP, and return the path."""
    requests = []
    for index in range(BODIES):
        chosen = [rows[(index * size + offset) % len(rows)] for offset in range(size)]
        body = msgspec.json.encode({"rows": chosen}) if form == "JSON" else arrow(chosen)
        kind = JSON if form == "JSON" else ARROW
        head = (
            f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    path.write_bytes(msgspec.msgpack.encode(requests))
    return path


def arrow(rows: Sequence[dict[str, Any]]) -> bytes:
    names = sorted(set().union(*rows))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def load_command(server: Server, requests: Path, *options: object) -> list[str]:
    script = str(BENCH / "serve_load.py")
    return [sys.executable, script, server.address, str(requests), *map(str, options)]


def ask(server: Server, requests: Path, *options: object) -> Result:
    """Run the load, and return what it has measured."""
    done = subprocess.run(
        load_command(server, requests, *options), stdout=subprocess.PIPE, text=True, check=True
    )
    result: Result = json.loads(done.stdout)
    result.pop("snapshots")
    return result


# -- cases ---------------------------------------------------------------------------------------


class Bench:
    """The cases, on a run of the default configuration."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.directory = directory
        self.options = options
        self.state = directory / "state"
        self.log = directory / "events.jsonl"
        impressions = 5_000 if options.quick else 200_000
        Simulation(impressions, seed=1).write_jsonl(self.log)
        self.rows = features(self.log, 20_000)
        self.learn(self.state, "--until-end", "-X", "snapshots.onnx=true")

    def learn(self, state: Path, *options: str) -> None:
        command = [*STREAM_CTR, "run", "--source", str(self.log), "--state", str(state), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

    def requests(self, size: int, form: str) -> Path:
        return write_requests(self.directory / f"{form}-{size}.msgpack", self.rows, size, form)

    def measure(
        self, servers: Sequence[Server], requests: Path, connections: int
    ) -> dict[str, list[Result]]:
        """Return the repetitions of each server, which take turns."""
        seconds = self.options.seconds
        for server in servers:
            ask(server, requests, "--connections", connections, "--seconds", min(seconds, 2.0))
        results: dict[str, list[Result]] = {server.name: [] for server in servers}
        for _ in range(self.options.rounds):
            for server in servers:
                found = ask(server, requests, "--connections", connections, "--seconds", seconds)
                results[server.name].append(found)
        return results

    def speed(self) -> Result:
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(ours("blend", self.state)),
                stack.enter_context(ours("blend in onnxruntime", self.state, "--runtime", "onnx")),
                stack.enter_context(ours("deepfm", self.state, "--model", "deepfm")),
                stack.enter_context(contender("deepfm in plain torch", self.state, "plain")),
            ]
            return {
                f"{size} rows, {form}, {connections} connections": self.measure(
                    servers, self.requests(size, form), connections
                )
                for form in ("JSON", "Arrow")
                for size in ROWS
                for connections in CONNECTIONS
            }

    def together(self) -> Result:
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(contender("blend, together", self.state, "blend")),
                stack.enter_context(contender("blend, alone", self.state, "blend", together=1)),
            ]
            return {
                f"{connections} connections": self.measure(
                    servers, self.requests(1, "JSON"), connections
                )
                for connections in (1, TOGETHER_CONNECTIONS)
            }

    def swaps(self) -> Result:
        """Ask while a trainer publishes, is killed and resumes; return what the clients saw."""
        impressions, before, after = (30_000, 1, 0) if self.options.quick else SWAPPED
        log, state = self.directory / "long.jsonl", self.directory / "swapped"
        Simulation(impressions, seed=2).write_jsonl(log)
        command = [*STREAM_CTR, "run", "--source", str(log), "--state", str(state)]
        command += ["-X", "schedule.snapshot_every=1s"]
        with training(command) as trainer, ours("blend", state) as server:
            load = subprocess.Popen(
                load_command(server, self.requests(1, "JSON"), "--connections", 8),
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                before = wait_for_swaps(server, before, trainer)
                trainer.kill()
                trainer.wait()
                with training(command) as trainer:
                    after = wait_for_swaps(server, after, trainer)
            finally:
                load.send_signal(signal.SIGTERM)
            result: Result = json.loads(load.communicate()[0])
        result["answering_snapshots"] = len(result.pop("snapshots"))
        return {**result, "swaps_before_the_kill": before, "swaps_after_it": after}

    def memory(self) -> Result:
        """Return the resident memory after each tenth of the requests."""
        count = 2_000 if self.options.quick else self.options.requests
        requests = self.requests(1, "JSON")
        points: list[Result] = []
        with ours("blend", self.state) as server:
            ask(server, requests, "--connections", 8, "--requests", max(count // 50, 100))
            points.append({"requests": 0, "resident_mib": server.resident_mib})
            for tenth in range(1, 11):
                found = ask(server, requests, "--connections", 8, "--requests", count // 10)
                points.append(
                    {
                        "requests": tenth * count // 10,
                        "resident_mib": server.resident_mib,
                        "failed": found["failed"],
                        "requests_per_second": found["requests_per_second"],
                    }
                )
        return {"points": points}


@contextlib.contextmanager
def training(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a trainer, which is killed at the end."""
    trainer = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield trainer
    finally:
        trainer.kill()
        trainer.wait()


def wait_for_swaps(server: Server, swaps: int, trainer: subprocess.Popen[bytes]) -> int:
    """Wait until the server has changed its model so many times; return the times."""
    seen: set[str] = set()
    while True:
        ended = trainer.poll() is not None
        with urllib.request.urlopen(f"http://{server.address}/model", timeout=60) as answer:
            seen.add(json.loads(answer.read())["snapshot"])
        if len(seen) > swaps:
            return len(seen) - 1
        if ended:
            raise SystemExit(f"the trainer ended after {len(seen) - 1} swaps of {swaps}")
        time.sleep(0.05)


# -- the page ------------------------------------------------------------------------------------


def median(results: Sequence[Result], key: str) -> float:
    return statistics.median(result[key] for result in results)


def speed_table(cases: Result) -> str:
    rows: list[list[object]] = []
    for setting, results in cases.items():
        for name, repetitions in results.items():
            rows.append(
                [
                    setting,
                    name,
                    f"{median(repetitions, 'requests_per_second'):,.0f}",
                    f"{median(repetitions, 'p50_ms'):.2f}",
                    f"{median(repetitions, 'p99_ms'):.2f}",
                    sum(result["failed"] for result in repetitions),
                ]
            )
    header = ["request", "model", "requests/s", "p50, ms", "p99, ms", "failed"]
    return formatted(header, rows)


def swaps_table(found: Result) -> str:
    header = ["requests", "failed", "swaps before the kill", "after it", "p50, ms", "p99, ms"]
    row = [
        f"{found['requests']:,}",
        found["failed"],
        found["swaps_before_the_kill"],
        found["swaps_after_it"],
        found["p50_ms"],
        found["p99_ms"],
    ]
    return formatted(header, [row])


def memory_table(found: Result) -> str:
    rows: list[list[object]] = [
        [f"{point['requests']:,}", point["resident_mib"]] for point in found["points"]
    ]
    return formatted(["requests answered", "resident, MiB"], rows)


TABLES = {
    "speed": speed_table,
    "together": speed_table,
    "swaps": swaps_table,
    "memory": memory_table,
}


def write(options: argparse.Namespace, results: dict[str, Result]) -> None:
    """Add the results to the JSON file, and fill the blocks of the page."""
    document: Result = {"cases": {}}
    if options.json and options.json.exists():
        document = json.loads(options.json.read_text())
    for case, found in results.items():
        document["cases"][case] = {
            "machine": machine(),
            "commit": commit(),
            "command": shlex.join(["python", "tests/bench/serve.py", *sys.argv[1:]]),
            "results": found,
        }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.page:
        text = options.page.read_text()
        for case, kept in document["cases"].items():
            block = f"{TABLES[case](kept['results'])}\n\n{kept['machine']}"
            text = fill(text, f"serve {case}", block)
        options.page.write_text(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="small and once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument(
        "--requests", type=int, default=2_000_000, help="requests of the case `memory`"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if options.quick:
        options.rounds, options.seconds = 1, 0.5
    return options


def main() -> None:
    options = parse()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options)
        for case in options.cases or CASES:
            results[case] = getattr(bench, case)()
            print(f"{case}\n{TABLES[case](results[case])}\n", flush=True)
            write(options, {case: results[case]})
    print(machine())


if __name__ == "__main__":
    main()
