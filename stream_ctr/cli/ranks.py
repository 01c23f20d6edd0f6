"""A run on several ranks, which `torchrun` has started.

    every rank     joins the others, loads its configuration, compares code, configuration and state
    rank 0         holds the state directory, and runs the run as one process does, with learners
                   that all ranks make together
    the others     do what rank 0 announces, until it ends

Nothing is learned before all agree. Each error ends all ranks; the one that has it, or rank 0,
shows it, and `torchrun` repeats it with the exit code. A signal to any rank stops the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from stream_ctr.cli import launched, runs
from stream_ctr.cli.front import KIND, FrontMaker
from stream_ctr.cli.interrupts import signals
from stream_ctr.cli.start import Begun, Learn, Loaded, Start
from stream_ctr.cli.voice import say, say_error
from stream_ctr.config import Config, known_keys
from stream_ctr.distributed.agreement import SAME_CODE, code, failure, require_same, together
from stream_ctr.distributed.ranks import TIMEOUT_SECONDS, RankError, Ranks
from stream_ctr.distributed.team import Make, Team
from stream_ctr.errors import ConfigError, SnapshotError, StreamCtrError
from stream_ctr.learn.device import choose_precision
from stream_ctr.learn.learner import Learner
from stream_ctr.learn.sharded_learner import NETWORK_MAKER, make_sharded_learner
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.snapshots import files, lineage, places, snapshot
from stream_ctr.snapshots.manifest import RunIdentity
from stream_ctr.train.front_lead import Faces
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.source import Source

MOST_RANKS = 64
_ASK_SECONDS = 1.0
# A network file system may show an older state for as long.
_STATE_SECONDS = 10.0
# torchrun looks at its processes ten times a second, and shows the first that it finds ended.
_NOTICE_SECONDS = 5.0
# Rank 0 waits so long for the others to take its error. Later its end closes their connections.
_LISTEN_SECONDS = 10.0
_NONE = "none"


class RankEnding:
    """The end of a run, as an object of every rank.

    A rank asks for it when it has a signal, and rank 0 announces an error with it.
    """

    def __init__(self, ranks: Ranks, stop: runs.StopRequest) -> None:
        self._ranks = ranks
        self._stop = stop

    def ask(self) -> bool:
        """Return on every rank whether one of them asks the run to stop."""
        return not self._ranks.all_true(not self._stop.requested)

    def fail(self, exit_code: int, message: str) -> NoReturn:
        """Raise the error of rank 0 on the others."""
        raise _LeaderFailed(failure(exit_code, message))


class _LeaderFailed(Exception):
    """Rank 0 has ended the run with an error, which it shows itself."""

    def __init__(self, error: StreamCtrError) -> None:
        super().__init__(str(error))
        self.error = error


class _Others:
    """The other ranks, as the loop on rank 0 sees them. Each rank has so many `threads`.

    Without `front`, they neither read nor join.
    """

    def __init__(
        self, team: Team, *, threads: int, stop: runs.StopRequest, front: FrontMaker | None
    ) -> None:
        self._team = team
        self._front = front
        self._threads = threads
        self._stop = stop
        self._number, self._ending = team.make("ending")
        self._asked = time.monotonic()

    def make(self, spec: LearnerSpec) -> Learner:
        """Make a learner on all ranks."""
        return make_sharded_learner(self._team, spec, threads=self._threads)

    def front(self, identity: RunIdentity, inputs: Inputs) -> Faces | None:
        """Let all ranks read the topics and join, where the configuration does not forbid it."""
        return self._front.lead(self._team, identity, inputs) if self._front else None

    def ask_to_stop(self) -> bool:
        """Return whether a rank asks the run to stop; the others answer once a second."""
        if self._stop.requested:
            return True
        if time.monotonic() - self._asked < _ASK_SECONDS:
            return False
        self._team.announce(self._number, "ask")
        asked: bool = self._ending.ask()
        self._asked = time.monotonic()
        return asked

    def end(self, exit_code: int, message: str) -> bool:
        """End the others with this error; return false if they do not listen within seconds.

        They may have ended already. An error in the middle of a call leaves them in that call:
        they wait for this rank, and it for them.
        """

        def announce() -> None:
            with contextlib.suppress(RankError):
                self._team.announce(self._number, "fail", exit_code=exit_code, message=message)

        announcing = threading.Thread(target=announce, daemon=True, name="end of the ranks")
        announcing.start()
        announcing.join(_LISTEN_SECONDS)
        return not announcing.is_alive()


def run_on_ranks(start: Start, learn: Learn, options: Mapping[str, str]) -> None:
    """Run a run on the ranks that torchrun has started, of which this process is one.

    `options` are those of the command, which all ranks must have in common. Ends the process with
    the exit code of an error, once it is shown.
    """
    stop = runs.StopRequest()
    with signals(stop):
        try:
            ranks = _join(start)
        except StreamCtrError as error:
            _end(error, stop)
        try:
            _run(ranks, start, learn, options, stop)
        finally:
            ranks.leave()


def _run(
    ranks: Ranks, start: Start, learn: Learn, options: Mapping[str, str], stop: runs.StopRequest
) -> None:
    with contextlib.ExitStack() as stack:
        try:
            require_same(ranks, code(), way_out=SAME_CODE)
            begun = together(ranks, lambda: _opened(ranks, start, stack))
            loaded = _agreed(ranks, start, begun, options)
        except RankError as error:
            _end(error, stop)
        except Exception as error:  # noqa: BLE001 - all ranks have it
            _end_together(error, stop)
        front = _front(ranks, start, loaded, stack)
        team = _team(ranks, stop, front)
        try:
            if begun:
                threads = _threads(loaded.config)
                others = _Others(team, threads=threads, stop=stop, front=front)
                _lead(team, begun, loaded, learn, others)
            else:
                with runs.out_of_memory(start.state):
                    team.follow()
        except _LeaderFailed as error:
            _end_after_leader(error.error, stop)
        except StreamCtrError as error:
            _end(error, stop)


def _opened(ranks: Ranks, start: Start, stack: contextlib.ExitStack) -> Begun | None:
    """Return the state directory, which rank 0 holds, and None on the others."""
    return None if ranks.rank else stack.enter_context(start.open())


def _team(ranks: Ranks, stop: runs.StopRequest, front: FrontMaker | None) -> Team:
    makers: dict[str, Make] = {
        "network": NETWORK_MAKER,
        "ending": lambda ranks: RankEnding(ranks, stop),
    }
    if front:
        makers[KIND] = front
    return Team(ranks, makers)


def _front(
    ranks: Ranks, start: Start, loaded: Loaded, stack: contextlib.ExitStack
) -> FrontMaker | None:
    """Return what lets this rank read its partitions of topics, None where rank 0 reads all."""
    if ranks.size == 1 or not loaded.config.ranks.share_input:
        return None

    def open_source(until_end: bool) -> Source:
        return runs.open_topics(loaded.client, loaded.config, until_end=until_end)

    return FrontMaker(
        loaded.config, start.state, open_source, stack=stack, registry=loaded.registry
    )


def _join(start: Start) -> Ranks:
    """Join the other ranks. An error in the configuration is left until all have met."""
    timeout = TIMEOUT_SECONDS
    with contextlib.suppress(StreamCtrError):
        timeout = start.given().ranks.timeout.total_seconds()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks learn on the CPU, also where "auto" is a GPU
    if launched.private() and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return Ranks.launched(timeout_seconds=timeout)


# -- agreement -----------------------------------------------------------------------------------


def _agreed(ranks: Ranks, start: Start, begun: Begun | None, options: Mapping[str, str]) -> Loaded:
    """Return the configuration, once all ranks agree on it and on the state."""
    kept = _told(ranks, dict(begun.kept) if begun and begun.kept else None)

    def load() -> Loaded:
        loaded = start.load(kept)
        _require_possible(ranks.size, loaded.config)
        return loaded

    loaded = together(ranks, load)
    require_same(
        ranks,
        {**options, **_config_facts(loaded.config), **_client_facts(loaded)},
        way_out="start every rank with the same command, configuration file and environment",
    )
    _require_same_state(ranks, start.state)
    if begun:
        _say_who_is_there(ranks, _threads(loaded.config))
    return loaded


def _require_possible(size: int, config: Config) -> None:
    """Raise `ConfigError` for what ranks cannot do."""
    if size > MOST_RANKS:
        raise ConfigError(f"there are {size} ranks, and a run has {MOST_RANKS} at most")
    if config.learn.device.startswith("cuda"):
        raise ConfigError(
            f"learn.device = {config.learn.device!r}: ranks learn on the CPU; use --device cpu, "
            "or one process without torchrun on a GPU"
        )


def _config_facts(config: Config) -> dict[str, str]:
    """Return each key and its value, and the precision that is chosen here."""
    dumped = config.model_dump(mode="json")
    facts = {name: json.dumps(_value(dumped, name)) for name in known_keys()}
    facts["snapshots.url"] = places.shown(config.snapshots.url) if config.snapshots.url else '""'
    facts["the precision on this processor"] = choose_precision(
        config.learn.precision, torch.device("cpu")
    )
    return facts


def _value(dumped: Mapping[str, Any], name: str) -> Any:
    found: Any = dumped
    for part in name.split("."):
        found = found[part]
    return found


def _client_facts(loaded: Loaded) -> dict[str, str]:
    """Return the names of the client's properties. Their values may be secrets."""
    names = sorted({*loaded.client, *loaded.registry})
    return {"the names of the Kafka client properties": ", ".join(names)}


def _require_same_state(ranks: Ranks, state: Path) -> None:
    expected = _told(ranks, None if ranks.rank else state_facts(state))
    deadline = time.monotonic() + _STATE_SECONDS
    while (found := state_facts(state)) != expected and time.monotonic() < deadline:
        time.sleep(_STATE_SECONDS / 50)
    require_same(
        ranks,
        found,
        way_out=f"{state} must be one directory, on a file system that all ranks share",
    )


def state_facts(state: Path) -> dict[str, str]:
    """Return what this process sees of a state directory: its run, and its newest snapshot."""
    names = snapshot.snapshot_ids(state / "snapshots")
    newest = names[-1] if names else _NONE
    return {
        "the run of the state directory": _digest(lambda: files.read_document(state / _RUN_FILE)),
        "its newest snapshot": newest,
        "the digest of that snapshot's manifest": _digest(
            lambda: files.read_manifest(state / "snapshots" / newest)
        ),
    }


_RUN_FILE = lineage.RUN_FILE


def _digest(read: Callable[[], bytes]) -> str:
    with contextlib.suppress(SnapshotError):
        return hashlib.sha256(read()).hexdigest()[:16]
    return _NONE


def _told(ranks: Ranks, value: Any) -> Any:
    """Return the value, of plain types, that rank 0 has."""
    packed = None if ranks.rank else msgspec.msgpack.encode(value)
    return msgspec.msgpack.decode(ranks.broadcast_bytes(packed))


# -- rank 0 --------------------------------------------------------------------------------------


def _threads(config: Config) -> int:
    return config.learn.threads or launched.threads_of_a_rank(os.cpu_count() or 1)


def _say_who_is_there(ranks: Ranks, threads: int) -> None:
    hosts = launched.number("GROUP_WORLD_SIZE")
    say(
        f"{ranks.size} rank{'s' * (ranks.size > 1)} on {hosts} host{'s' * (hosts > 1)}, "
        f"{threads} thread{'s' * (threads > 1)} each"
    )
    if not launched.private():
        say(
            "warning: the ranks exchange examples and weights neither encrypted nor "
            "authenticated: use a private network, and name its interface in GLOO_SOCKET_IFNAME"
        )


def _lead(team: Team, begun: Begun, loaded: Loaded, learn: Learn, others: _Others) -> None:
    """Run the run, and let the others end with it."""
    try:
        learn(begun, loaded, others)
    except RankError:
        raise
    except Exception as error:
        if exit_code := _exit_code(error):
            _show(error)  # first, because the others may not listen any more
            if not others.end(exit_code, str(error)):
                _end_at_once(exit_code)
            sys.exit(exit_code)
        raise
    team.close()


# -- the end -------------------------------------------------------------------------------------


def _end_at_once(exit_code: int) -> NoReturn:
    """End while a thread still speaks to the others, whose connections end with this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _exit_code(error: Exception) -> int:
    """Return the exit code of an error that a command shows, 0 for one that has none."""
    found = getattr(error, "exit_code", 0)
    return found if isinstance(found, int) else 0


def _show(error: Exception) -> None:
    say_error(str(error))
    launched.record_error(str(error))


def _end_together(error: Exception, stop: runs.StopRequest) -> NoReturn:
    """End with an error that all ranks have, which one of each host shows."""
    exit_code = _exit_code(error)
    if not exit_code:
        raise error
    if not launched.speaks():
        _end_quietly(exit_code, stop)
    _show(error)
    sys.exit(exit_code)


def _end_after_leader(error: StreamCtrError, stop: runs.StopRequest) -> NoReturn:
    """End after rank 0, whose error it shows where it is."""
    beside_leader = launched.number("GROUP_RANK") == 0
    if beside_leader or not launched.speaks():
        _end_quietly(error.exit_code, stop)
    _show(StreamCtrError(f"rank 0 has ended the run: {error}"))
    sys.exit(error.exit_code)


def _end_quietly(exit_code: int, stop: runs.StopRequest) -> NoReturn:
    """End after another rank of this host; as one that has not failed, if torchrun noticed it."""
    sys.exit(0 if _wait_for_signal(stop) else exit_code)


def _end(error: StreamCtrError, stop: runs.StopRequest) -> NoReturn:
    """End with an error of this rank."""
    if isinstance(error, RankError):
        say_error(str(error))
        if not _wait_for_signal(stop):  # no rank has ended: one does not answer
            launched.record_error(str(error))
    elif number := launched.number("RANK"):
        if _is_of_another(error, number):
            _end_quietly(error.exit_code, stop)
        _show(StreamCtrError(f"rank {number}: {error}"))
    else:
        _show(error)
    sys.exit(error.exit_code)


def _is_of_another(error: StreamCtrError, number: int) -> bool:
    """Return whether an error names another rank, which shows it, as rank 0 does."""
    named = re.match(r"rank (\d+): ", str(error))
    return named is not None and named[1] != str(number)


def _wait_for_signal(stop: runs.StopRequest) -> bool:
    """Return whether torchrun ends this process because it has noticed the end of another."""
    deadline = time.monotonic() + _NOTICE_SECONDS
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.02)
    return stop.requested
