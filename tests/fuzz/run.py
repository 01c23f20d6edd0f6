"""Fuzz what reads bytes from outside: mutations of kept seeds, until the time is up.

    python tests/fuzz/run.py                             every target, ten minutes each
    python tests/fuzz/run.py arrow json --seconds 60     these targets

Each target runs in a process of its own, whose memory is limited. An input fails if a check of it
does, if it raises an exception that its reader does not document, takes more than 20 seconds of
CPU, or ends the process. It is written to `seeds/TARGET`: keep it there once it is mended. The
table shows inputs, outcomes and peak memory; the exit status is 1 if an input failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import machine, print_table  # noqa: E402

from fuzz.mutation import MOST_BYTES, Mutations  # noqa: E402
from fuzz.targets import SEEDS, TARGETS, Target  # noqa: E402

LONGEST_INPUT_SECONDS = 20
_MOST_KEPT = 1000  # inputs of new outcomes, to be mutated in turn
_MIB = 1 << 20


@dataclass(frozen=True)
class Fuzzed:
    """The result of a target: the number of inputs, of each outcome, resident memory, a failure."""

    inputs: int
    outcomes: dict[str, int]
    start_mib: int
    peak_mib: int
    failure: str = ""


def fuzz(target: Target, directory: Path, *, seconds: float, seed: int, latest: Path) -> Fuzzed:
    """Check the seeds and their mutations for so many seconds, or until one fails.

    `latest` holds the input that is being checked.
    """
    check = target.start(directory)
    seeds = target.seeds()
    mutations = Mutations(seeds, seed=seed, tokens=target.tokens)
    outcomes: Counter[str] = Counter()
    start_mib = peak_mib()
    waiting = seeds[::-1]
    ends = time.monotonic() + seconds
    with latest.open("wb", buffering=0) as file:
        while waiting or time.monotonic() < ends:  # at least every seed
            data = waiting.pop() if waiting else mutations.next()
            file.seek(0)
            file.truncate()
            file.write(data)
            signal.setitimer(signal.ITIMER_PROF, LONGEST_INPUT_SECONDS)
            try:
                outcome = check(data)
            except Exception:  # noqa: BLE001 - which is what is looked for
                return _fuzzed(outcomes, start_mib, traceback.format_exc())
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            outcomes[outcome] += 1
            if outcomes[outcome] == 1 and len(mutations.pool) < _MOST_KEPT:
                mutations.pool.append(data)
    return _fuzzed(outcomes, start_mib)


def _fuzzed(outcomes: Counter[str], start_mib: int, failure: str = "") -> Fuzzed:
    return Fuzzed(outcomes.total(), dict(outcomes), start_mib, peak_mib(), failure)


def peak_mib() -> int:
    """Return the most resident memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz_apart(target: str, *, seconds: float, seed: int, most_mib: int) -> Fuzzed:
    """Fuzz a target in a process of its own, and keep the input that failed."""
    with tempfile.TemporaryDirectory() as directory:
        latest = Path(directory) / "latest"
        latest.touch()
        options = [f"--seconds={seconds}", f"--seed={seed}", f"--most-mib={most_mib}"]
        program = [sys.executable, __file__, target, *options, "--directory", directory]
        done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            found = Fuzzed(**json.loads(done.stdout.splitlines()[-1]))
        else:
            hung = done.returncode == -signal.SIGPROF
            reason = (
                f"an input took more than {LONGEST_INPUT_SECONDS} s of CPU" if hung else "it died"
            )
            found = Fuzzed(0, {}, 0, 0, f"{reason}: exit status {done.returncode}")
        if found.failure:
            data = latest.read_bytes()[:MOST_BYTES]
            kept = SEEDS / target / hashlib.sha256(data).hexdigest()[:16]
            kept.write_bytes(data)
            print(f"{target}: {kept} failed\n{found.failure}", file=sys.stderr)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=600.0, help="for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the mutations")
    parser.add_argument("--most-mib", type=int, default=6000, help="of address space")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := {*options.targets} - {*TARGETS}:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.directory:
        logging.disable()
        most = options.most_mib * _MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        work = options.directory / "work"
        work.mkdir()
        found = fuzz(
            TARGETS[options.targets[0]],
            work,
            seconds=options.seconds,
            seed=options.seed,
            latest=options.directory / "latest",
        )
        print(json.dumps(asdict(found)))
        return 0
    print(f"seed {options.seed}, {options.seconds:g} s a target")
    results = {
        name: fuzz_apart(
            name, seconds=options.seconds, seed=options.seed, most_mib=options.most_mib
        )
        for name in options.targets or TARGETS
    }
    print_table(
        ["target", "inputs", "outcomes", "MiB at start", "peak MiB", "unexpected"],
        [
            [
                name,
                f"{found.inputs:,}",
                len(found.outcomes),
                found.start_mib,
                found.peak_mib,
                int(bool(found.failure)),
            ]
            for name, found in results.items()
        ],
    )
    print(machine())
    return int(any(found.failure for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
