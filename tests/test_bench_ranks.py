"""The benchmark of ranks: what it computes and checks, and quick runs of all cases."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench import (
    hosts,
    rank_memory,
    rank_network,
    rank_resharding,
    rank_runs,
    rank_stages,
    rank_throughput,
    rank_torchrec,
    ranks,
)
from bench.contest import Program, compare
from bench.environments import Installed, NotRun
from bench.hosts import Link
from bench.rank_runs import Run

SCRIPT = Path(__file__).parent / "bench" / "ranks.py"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RUN = Run(examples=100, examples_per_second=50.0, weights_sha256="ab" * 32, ledger=(100, 7))
FASTER = replace(RUN, examples_per_second=100.0)


# -- equality ------------------------------------------------------------------------------------


def test_runs_with_other_weights_or_another_ledger_are_refused_with_their_digests() -> None:
    rank_runs.require_same({"one process": RUN, "2 ranks": FASTER}, "round 1")
    for other in (replace(RUN, weights_sha256="cd" * 32), replace(RUN, ledger=(100, 8))):
        with pytest.raises(RuntimeError, match="round 1: weights or ledgers differ.*2 ranks"):
            rank_runs.require_same({"one process": RUN, "2 ranks": other}, "round 1")


def test_a_run_that_fails_is_not_run_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(NotRun, match=r"one process ended with status 2: Error: .*nothing\.jsonl"):
        rank_runs.run(0, tmp_path / "state", ["--source", tmp_path / "nothing.jsonl"])


# -- tables --------------------------------------------------------------------------------------


def test_throughput_is_a_ratio_within_each_round_to_one_process() -> None:
    names = list(map(str, rank_throughput.CONTENDERS))
    assert names == ["one process, 1 thread", "one process, 2 threads", "1 rank, 2 threads",
                     "2 ranks, 1 thread each"]  # fmt: skip
    twice = {name: (FASTER if "2 ranks" in name else RUN).as_json() for name in names}
    slower = {name: each | {"examples_per_second": 10.0} for name, each in twice.items()}
    results = {"stream": "simulated", "impressions": 100, "models": {"DeepFM": [twice, slower]}}
    found = rank_throughput.table(results)
    assert "| DeepFM | 2 ranks, 1 thread each | 55 | 10..100 | 1.50 | 1.50 |" in found
    assert "`weights_sha256` abababababababab..., in 2 rounds" in found


def test_memory_of_a_rank_is_compared_with_its_share_of_the_table() -> None:
    whole = 64 << 20

    def sizes(*extra: float) -> dict[str, Any]:
        n = len(extra)
        large = [1e8 + 2 * whole / n * (1 + each) for each in extra]
        return {
            "large": {"resident": large, "peak": [2 * size for size in large]},
            "small": {"resident": [1e8] * n, "peak": [1e8] * n},
        }

    besides = {"joiner": 3e6, "river": 4e6}
    results = {
        "bits": 20,
        "table": {"1": sizes(0.05), "2": sizes(0.0, 0.2)},
        "besides": {
            rank_memory.ALONE: {"resident": [2e8], **besides},
            rank_memory.BLEND: {"resident": [5e8], **besides},
        },
        "bound": [100.0, 300.0, 200.0],
    }
    found = rank_memory.table(results)
    assert rank_memory.shares(results) == {1: [pytest.approx(1.05)], 2: pytest.approx([1.0, 1.2])}
    assert "+5.0% (met)" in found
    assert "+20.0% (missed)" in found
    assert "| the default blend, less DeepFM alone | 300 |" in found
    assert "200 examples/s (median)" in found


def test_bytes_of_a_step_stand_beside_those_of_the_formula() -> None:
    limit, free = str(Link(1e9)), str(Link())
    measured = {"bytes_a_step": 2.2e6, "examples_per_second": 5000.0}
    results = {
        "batch": 4096,
        "impressions": 100,
        "steps": {
            "online": {
                "formula": {"bytes_a_step": 2e6, "examples_per_second": {limit: 6000.0}},
                "links": {free: measured, limit: "tc: no tbf"},
            }
        },
        "runs": {free: 1234.0, limit: "tc: no tbf"},
    }
    found = rank_network.table(results)
    assert "| online | not limited | 2.20 MB | 2.00 MB (+10.0%) | 5,000 |  |" in found
    assert "| online | 1 Gbit/s | not measured: tc: no tbf |" in found
    assert "| not limited | 1,234 |" in found


def test_cases_that_cannot_run_say_why() -> None:
    for table in (rank_network.table, rank_resharding.table):
        assert table({"not_run": "there is none"}) == "not measured: there is none"


def test_digests_of_all_runs_stand_in_full() -> None:
    runs = {"one process": RUN.as_json(), "2, then 4, then 1 ranks": RUN.as_json()}
    results = {"broker": "Apache Kafka 4", "impressions": 100, "runs": runs}
    assert rank_resharding.table(results).count("ab" * 32) == 2


def test_the_peer_is_found_through_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = Program("peer", "torchrec_deepfm", [], Installed(rank_torchrec.VARIABLE))
    monkeypatch.delenv(rank_torchrec.VARIABLE, raising=False)
    (missing,) = compare([contender], rounds=1)
    assert missing.reason == "TORCHREC_VENV names no virtual environment"
    monkeypatch.setenv(rank_torchrec.VARIABLE, str(tmp_path))
    (empty,) = compare([contender], rounds=1)
    assert empty.reason == f"TORCHREC_VENV: there is no {tmp_path}/bin/python"


# -- processes and hosts -------------------------------------------------------------------------


def test_the_processes_of_ranks_are_found_with_their_memory(tmp_path: Path) -> None:
    starts = (
        "import os, subprocess, sys, time\n"
        "for rank in ('1', '0'):\n"
        "    held = int(rank) * 50_000_000\n"
        "    code = f'held = bytes({held}); print(1, flush=True); import time; time.sleep(60)'\n"
        "    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE,\n"
        "                             env={**os.environ, 'RANK': rank})\n"
        "    child.stdout.readline()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout
        launcher.stdout.readline()
        pids = rank_memory.rank_pids(launcher.pid)
        try:
            first, second = (rank_memory.status_bytes(pid, "VmSize") for pid in pids)
            assert second - first > 40_000_000
        finally:
            launcher.kill()
            for pid in pids:
                os.kill(pid, 9)


def transferred(hosts: hosts.TwoHosts, size: int) -> float:
    """Send so many bytes to the other host, and return the seconds until all have arrived."""
    receive = (
        "import socket, sys\n"
        "served = socket.create_server((sys.argv[1], 0))\n"
        "print(served.getsockname()[1], flush=True)\n"
        "taken, left = served.accept()[0], int(sys.argv[2])\n"
        "while left: left -= len(taken.recv(1 << 16))\n"
        "taken.send(b'.')\n"
    )
    far = hosts.machine.far
    receiver = hosts.machine.start(sys.executable, "-c", receive, far, size, stdout=subprocess.PIPE)
    assert receiver.stdout
    port = int(receiver.stdout.readline())
    with socket.create_connection((far, port)) as connection:
        began = time.monotonic()
        threading.Thread(target=connection.sendall, args=(bytes(size),), daemon=True).start()
        connection.recv(1)
        seconds = time.monotonic() - began
    receiver.wait()
    return seconds


@pytest.mark.slow
def test_a_link_between_two_hosts_is_limited_and_counted() -> None:
    size = 4_000_000
    with ExitStack() as stack:
        try:
            both = stack.enter_context(hosts.two_hosts())
        except NotRun as error:
            pytest.skip(str(error))
        before = both.bytes_carried()
        transferred(both, size)
        assert size < both.bytes_carried() - before < 1.2 * size
        with both.limited(Link(1e7)):
            assert transferred(both, size) > 0.8 * size * 8 / 1e7
        assert transferred(both, size) < 0.5 * size * 8 / 1e7  # the limit is gone


# -- pages and quick runs ------------------------------------------------------------------------


def test_the_page_has_a_block_for_every_table() -> None:
    text = PAGE.read_text()
    for case in (*ranks.TABLES, "capacity"):
        assert text.count(f"<!-- {case} -->\n") == text.count(f"<!-- /{case} -->") == 1


def test_an_unknown_case_is_an_error_that_lists_the_cases() -> None:
    done = ran("throughpt")
    assert done.returncode == 2
    assert "no case throughpt; the cases are throughput, torchrec" in done.stderr


def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def quick(case: str, tmp_path: Path) -> dict[str, Any]:
    """Run a case with --quick, and return its results once they stand in its block."""
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    done = ran(case, "--quick", "--json", str(kept), "--page", str(page))
    assert done.returncode == 0, done.stderr
    cases = json.loads(kept.read_text())["cases"]
    assert [*cases] == [case]
    results: dict[str, Any] = cases[case]["results"]
    assert ranks.TABLES[case](results) in page.read_text()
    return results


@pytest.mark.slow
def test_stages_are_parts_of_a_step(tmp_path: Path) -> None:
    seconds = quick("stages", tmp_path)["seconds"]
    whole = seconds.pop(rank_stages.WHOLE)
    assert {*seconds} == {*rank_stages.STAGES.values()}
    assert 0 < sum(seconds.values()) < whole


@pytest.mark.long
@pytest.mark.parametrize("case", ["throughput", "torchrec", "network", "memory", "resharding"])
def test_a_quick_run_of_a_case_fills_its_block(case: str, tmp_path: Path) -> None:
    assert quick(case, tmp_path)
