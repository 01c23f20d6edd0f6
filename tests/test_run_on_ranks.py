"""A run on several ranks equals one in a single process, also after deaths and signals."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.commands import own_topics, succeed
from support.lineage import QUICK, Fingerprint, last_report, newest, published
from support.long import only_long
from support.patience import PATIENCE_SECONDS, wait_until
from support.rank_runs import RankRun, run_on_ranks, torchrun
from support.ranks import on_ranks
from support.reliability import Outcome

from stream_ctr.cli import ranks as cli_ranks
from stream_ctr.cli.start import Loaded
from stream_ctr.config import known_keys, load
from stream_ctr.connectors import kafka
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.errors import ConfigError
from stream_ctr.failpoint import EXIT_CODE, RANK_VARIABLE, VARIABLE
from stream_ctr.logs.simulate import Simulation

IMPRESSIONS = 4000
OPTIONS = [*QUICK, "-X", "schedule.snapshot_examples=1024", "-X", "ranks.timeout=60s"]
SAME = ("kind", "examples", "ledger", "models", "as_served", "counters", "window_curve")
# Where a rank dies, and which one.
DEATHS = [
    ("learn.after:20", 0),
    ("ranks.call:60", 1),
    *only_long(
        [
            *((name, 0) for name in ("snapshot.rename:2", "ranks.announced:60")),
            *((f"ranks.call:{time}", 1) for time in (1, 2, 3, 10, 20, 40, 80, 120)),
            *((name, 0) for name in ("poll.after", "cut.after:2", "snapshot.manifest:2")),
            *((name, 0) for name in ("snapshot.file:5", "pointer.before:2", "retain.after")),
        ]
    ),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(IMPRESSIONS, seed=5).write_jsonl(path)
    return path


@pytest.fixture(scope="module")
def clean(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("clean") / "state"
    succeed("run", "--source", log, "--state", state, *OPTIONS)
    return state


def arguments(log: Path, state: Path, *options: str) -> list[str]:
    return ["run", "--source", str(log), "--state", str(state), *OPTIONS, *options]


def taken(state: Path) -> Fingerprint:
    found = newest(state)
    assert found
    return found


def assert_equal_runs(state: Path, clean: Path, *but: str) -> None:
    assert taken(state) == taken(clean)
    ours, theirs = last_report(state), last_report(clean)
    for name in (name for name in SAME if name not in but):
        assert ours[name] == theirs[name], name
    pointed = published(state)
    assert pointed is not None
    assert pointed.examples == taken(state).examples


# -- the same model ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, *only_long([3, 4])])
def test_any_number_of_ranks_learns_what_one_process_learns(
    log: Path, clean: Path, tmp_path: Path, size: int
) -> None:
    run = run_on_ranks(tmp_path / "ranks", size, *arguments(log, tmp_path / "state"))
    assert_equal_runs(tmp_path / "state", clean)
    assert f"{size} rank{'s' * (size > 1)} on 1 host" in run.said(0)
    assert "final: 4,000 examples" in run.said(0)
    for rank in range(1, size):
        assert run.output[rank].read_text() == run.said(rank) == ""


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_with_one_process(
    log: Path, clean: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    half.write_text("".join(lines[: len(lines) // 2]))
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(lines[len(lines) // 2 :]))
    state = tmp_path / "state"
    succeed(*arguments(half, state, "--keep-open"))
    run = run_on_ranks(tmp_path / "ranks", 3, *arguments(rest, state, "--keep-open"))
    assert "resumed from snapshot" in run.said(0)
    succeed(*arguments(rest, state))  # closes the windows that are open
    # Two inputs have counts and positions of their own.
    ours, theirs = taken(state), taken(clean)
    assert (ours.ledger, ours.weights_sha256) == (theirs.ledger, theirs.weights_sha256)
    assert last_report(state)["models"] == last_report(clean)["models"]


@pytest.mark.slow
def test_ranks_begin_with_the_weights_of_another_state_as_one_process_does(
    log: Path, clean: Path, tmp_path: Path
) -> None:
    """The other state is one of ranks or of one process, and a model is learned beside."""
    options = ["--from", str(clean), "--model", "blend", "--model", "fm"]
    succeed(*arguments(log, tmp_path / "one", *options))
    run_on_ranks(tmp_path / "ranks", 2, *arguments(log, tmp_path / "two", *options))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
    assert taken(tmp_path / "two").weights_sha256 != taken(clean).weights_sha256
    options[1] = str(tmp_path / "two")
    succeed(*arguments(log, tmp_path / "from-ranks", *options))
    options[1] = str(tmp_path / "one")
    succeed(*arguments(log, tmp_path / "from-one", *options))
    assert_equal_runs(tmp_path / "from-ranks", tmp_path / "from-one")


@pytest.mark.slow
def test_ranks_learn_from_a_topic_what_one_process_learns(
    embedded_broker: str, log: Path, topic: str, tmp_path: Path
) -> None:
    _compare_on_a_topic(embedded_broker, log, topic, tmp_path)


@pytest.mark.long
def test_ranks_learn_from_apache_kafka_what_one_process_learns(
    kafka_broker: str, topic: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    Simulation(1_000_000, seed=7).write_jsonl(log)
    _compare_on_a_topic(kafka_broker, log, topic, tmp_path, sizes=(1, 2, 4))


def _compare_on_a_topic(
    servers: str, log: Path, topic: str, directory: Path, sizes: Sequence[int] = (2,)
) -> None:
    """Compare runs on ranks with one in a process, over a topic with 8 partitions."""
    kafka.ensure_topic(kafka.client_options(servers, {}), topic, partitions=8)
    succeed("replay", log, "--topic", topic, "--bootstrap-servers", servers)

    def options(name: str) -> list[object]:
        return [
            *("run", "--topic", topic, "--bootstrap-servers", servers, "--until-end"),
            *("--state", directory / name, *OPTIONS),
            *own_topics(f"{topic}.{name}"),
            # Ranks and partitions are read at different paces; served copies depend on it.
            *("-X", "metrics.served_share=0"),
        ]

    succeed(*options("one"))
    for size in sizes:
        run_on_ranks(directory / "ranks", size, *options(f"of-{size}"))
        ours, theirs = taken(directory / f"of-{size}"), taken(directory / "one")
        assert ours.ledger == theirs.ledger
        assert ours.weights_sha256 == theirs.weights_sha256
        assert ours.positions == theirs.positions
        assert (
            last_report(directory / f"of-{size}")["models"]
            == last_report(directory / "one")["models"]
        )


# -- deaths --------------------------------------------------------------------------------------


@pytest.mark.fault(37, injected="death of a rank at a failpoint; another number of ranks goes on")
@pytest.mark.slow
@pytest.mark.parametrize(("failpoint", "rank"), DEATHS)
def test_ranks_of_which_one_died_go_on_as_if_nothing_had_happened(
    log: Path, clean: Path, tmp_path: Path, failpoint: str, rank: int, outcome: Outcome
) -> None:
    state = tmp_path / "state"
    die = {VARIABLE: failpoint, RANK_VARIABLE: str(rank)}
    run = RankRun(tmp_path / "ranks", 2, *arguments(log, state), env=die)
    codes = run.wait()
    assert codes[rank] == EXIT_CODE
    assert codes[1 - rank] == 1
    [line] = [line for line in run.said(1 - rank).splitlines() if line.startswith("error:")]
    assert "another rank has ended" in line
    run_on_ranks(tmp_path / "ranks", 3 if rank else 1, *arguments(log, state))
    assert_equal_runs(state, clean)
    outcome("the others end with one line; resumed with another number, ledger and state equal")


@pytest.mark.fault(37, injected="kill -9 of a random rank at a random moment, torchrun restarts")
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("rounds", [1, *only_long([50])])
def test_torchrun_starts_killed_ranks_again(
    log: Path, clean: Path, tmp_path: Path, rounds: int, outcome: Outcome
) -> None:
    """In every second round torchrun restarts nothing, and another number of ranks goes on."""
    rng = random.Random(0)
    killed = 0
    for number in range(rounds):
        state = tmp_path / f"state-{number}"
        restarts = 1 - number % 2
        process = torchrun(2, *arguments(log, state), options=(f"--max-restarts={restarts}",))
        was_running, said = _kill_one(process, state, rng)
        killed += was_running
        if was_running and not restarts:
            assert process.returncode == 1, said
            assert f"exitcode  : -{signal.SIGKILL:d} " in said
            size = rng.choice([1, 3, 4])
            run_on_ranks(tmp_path / f"ranks-{number}", size, *arguments(log, state))
        else:
            assert process.returncode == 0, said
        assert_equal_runs(state, clean)
    assert killed
    outcome("resumed, ledger and all state equal", times=killed)


def _kill_one(process: subprocess.Popen[str], state: Path, rng: random.Random) -> tuple[bool, str]:
    """Kill a rank a moment after rank 0 has the state directory.

    Return whether the run was not over yet, and what torchrun wrote.
    """
    wait_until((state / "lock").exists)
    time.sleep(rng.uniform(0.0, 4.0))
    over = (state / "reports.jsonl").exists() and last_report(state)["kind"] == "final"
    ranks = ranks_of(process.pid)
    if ranks and not over:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    return bool(ranks) and not over, process.communicate(timeout=PATIENCE_SECONDS)[0]


def ranks_of(pid: int) -> list[int]:
    """Return the processes that torchrun, which is `pid`, has started, in the order of ranks."""
    found: dict[int, int] = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((each[5:] for each in environ if each.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = int(child)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.fault(38, injected="SIGSTOP of a rank")
@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_one_error(
    log: Path, clean: Path, tmp_path: Path, outcome: Outcome
) -> None:
    state = tmp_path / "state"
    pause = {VARIABLE: "ranks.call:60=sleep:600", RANK_VARIABLE: "1"}
    run = RankRun(
        tmp_path / "ranks", 2, *arguments(log, state, "-X", "ranks.timeout=5s"), env=pause
    )
    wait_until(lambda: "waiting, by" in run.said(1))
    run.processes[1].send_signal(signal.SIGSTOP)
    assert run.processes[0].wait(PATIENCE_SECONDS) == 1
    errors = [line for line in run.said(0).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "did not answer within 5 s" in errors[0]
    run.processes[1].kill()  # as torchrun does
    run_on_ranks(tmp_path / "again", 2, *arguments(log, state))
    assert_equal_runs(state, clean)
    outcome("rank 0 ends after ranks.timeout with one line; restarted, ledger and state equal")


@pytest.mark.fault(38, injected="an error of rank 0 while the others wait for it in a call")
@pytest.mark.slow
def test_an_error_of_rank_0_in_the_middle_of_a_call_ends_all_ranks_at_once(
    log: Path, clean: Path, tmp_path: Path, outcome: Outcome
) -> None:
    state = tmp_path / "state"
    fail = {VARIABLE: "ranks.announced:60=out-of-memory"}
    # The limit of the others is longer than the patience of this test.
    run = RankRun(tmp_path / "ranks", 2, *arguments(log, state, "-X", "ranks.timeout=1h"), env=fail)
    assert run.wait() == [1, 1]
    [line] = [line for line in run.said(0).splitlines() if line.startswith("error:")]
    assert "out of memory" in line
    assert "another rank has ended" in run.said(1)
    run_on_ranks(tmp_path / "again", 2, *arguments(log, state))
    assert_equal_runs(state, clean)
    outcome("all end within seconds, the error is shown; restarted, ledger and state equal")


# -- signals -------------------------------------------------------------------------------------


@pytest.mark.fault(3, injected="SIGTERM to a rank other than 0")
@pytest.mark.slow
def test_a_signal_to_any_rank_stops_the_run_with_a_last_snapshot(
    log: Path, clean: Path, tmp_path: Path, outcome: Outcome
) -> None:
    state = tmp_path / "state"
    pause = {VARIABLE: "learn.after:25=sleep:3"}
    run = RankRun(tmp_path / "ranks", 2, *arguments(log, state), env=pause)
    wait_until(lambda: "waiting, by" in run.said(0), explain=lambda: run.said(0))
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [0, 0]
    report = last_report(state)
    assert report["kind"] == "stopped"
    assert 0 < taken(state).examples < IMPRESSIONS
    assert taken(state).examples == report["examples"]
    succeed(*arguments(log, state))
    assert_equal_runs(state, clean)
    outcome("the run stops with a snapshot of all that it learned, all ranks exit with 0")


@pytest.mark.long
def test_torchrun_passes_a_signal_on_and_the_ranks_end_in_good_order(
    log: Path, clean: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    pause = {VARIABLE: "learn.after:25=sleep:3"}
    process = torchrun(2, *arguments(log, state), env=pause)
    wait_until(lambda: (state / "reports.jsonl").exists())
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert "error:" not in said
    assert last_report(state)["kind"] == "stopped"
    assert taken(state).examples == last_report(state)["examples"]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_that_differ_are_refused_before_the_first_step(log: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    secret = ["-X", "sasl.password=hunter2", "-X", "security.protocol=SASL_SSL"]
    secret += ["-X", "sasl.mechanism=PLAIN", "-X", "sasl.username=me"]
    run = RankRun(
        tmp_path / "ranks",
        2,
        *arguments(log, state),
        apart={1: ["-X", "learn.seed=2", "--keep-open", *secret]},
    )
    assert run.wait() == [3, 3]
    errors = run.said(0)
    assert "learn.seed is 0 on rank 0, 2 on rank 1" in errors
    assert "--keep-open is False on rank 0, True on rank 1" in errors
    assert "sasl_plain_password" in errors
    assert "hunter2" not in errors
    assert run.said(1) == ""
    assert not state.exists()


def _states_on_a_rank(ranks: Ranks, states: Sequence[Sequence[str]]) -> list[str]:
    """Return the errors of directories, of which each rank sees its own."""
    cli_ranks._STATE_SECONDS = 0.5
    found = []
    for state in states:
        try:
            cli_ranks._require_same_state(ranks, Path(state[ranks.rank]))
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


@pytest.mark.slow
def test_a_state_directory_that_is_not_shared_is_refused(clean: Path, tmp_path: Path) -> None:
    copy, empty = tmp_path / "copy", tmp_path / "empty"
    shutil.copytree(clean, copy)
    shutil.rmtree(sorted((copy / "snapshots").iterdir())[-1])
    states = [[str(clean), str(other)] for other in (clean, empty, copy)]
    found, on_rank_1 = on_ranks(2, _states_on_a_rank, states)
    shared, other, older = found
    assert shared == on_rank_1[0] == ""
    assert re.search(r"the run of the state directory is \w+ on rank 0, none on rank 1", other)
    assert re.search(r"newest snapshot is 0+4-\w+ on rank 0, 0+3-\w+ on rank 1", older)
    assert f"{clean} must be one directory, on a file system that all ranks share" in older
    assert all("must be one directory" in error for error in on_rank_1[1:])


def test_no_secret_is_among_what_ranks_compare() -> None:
    url = "https://models.example/run?token=hunter2"
    config = load(environ={}, overrides={"snapshots": {"url": url}})
    loaded = Loaded(config, {"sasl_plain_password": "hunter2"}, {"bearer.auth.token": "hunter2"})
    facts = {**cli_ranks._config_facts(config), **cli_ranks._client_facts(loaded)}
    assert "hunter2" not in repr(facts)
    assert "sasl_plain_password" in facts["the names of the Kafka client properties"]
    assert facts["snapshots.url"] == "https://models.example/run?..."
    assert facts["learn.seed"] == "0"
    assert set(known_keys()) <= set(facts)


def test_what_ranks_cannot_do_is_refused_with_the_way_out() -> None:
    on_a_gpu = load(environ={}, overrides={"learn": {"device": "cuda:1"}})
    with pytest.raises(ConfigError, match=r"'cuda:1': ranks learn on the CPU; use --device cpu"):
        cli_ranks._require_possible(1, on_a_gpu)
    with pytest.raises(ConfigError, match="there are 65 ranks, and a run has 64 at most"):
        cli_ranks._require_possible(65, load(environ={}))


@pytest.mark.slow
def test_torchrun_shows_the_error_and_its_exit_code_last(log: Path, tmp_path: Path) -> None:
    options = arguments(log, tmp_path / "state", "--device", "cuda")
    process = torchrun(2, *options)
    said = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert process.returncode == 1  # that of torchrun
    assert said.count("error: learn.device = 'cuda': ranks learn on the CPU") == 1
    end = said[said.index("Root Cause") :]
    assert "exitcode  : 3 " in end
    assert "traceback : learn.device = 'cuda': ranks learn on the CPU" in end
