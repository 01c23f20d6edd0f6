"""Check that a change of the code leaves every bit of the results alone.

    python tests/bits.py record before.json --checkout ../old    run the code of another checkout
    python tests/bits.py record after.json                       run this one
    python tests/bits.py compare before.json after.json          exit 1 and print any differences

There are six runs: the demo, three samples of real logs, three models at once, and a run that is
killed and resumed. For each, `record` keeps `weights_sha256`, the ledger, the SHA-256 of every file
of the last snapshot, and the final report without its wall-clock fields. A run whose data is absent
is left out, and `compare` says so. The samples are those in `STREAM_CTR_DATA`, or in `shared/data`
next to the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("STREAM_CTR_DATA", ROOT.parent / "shared" / "data"))
# Fields of a report that depend on the wall clock or on where the run stands, its id, and the
# number of the report's format, which says nothing about what it learned.
LEFT_OUT = (
    "seconds",
    "events_per_second",
    "profile",
    "snapshot",
    "silent_seconds",
    "notes",
    "format",
    "run",
    "time",
)
KILLED = 137

SAMPLES = {
    "criteo": ("criteo/train.csv", "criteo"),
    "avazu": ("avazu/train.csv", "avazu"),
    "obd": ("obd/impressions.csv", "obd"),
}


def stream_ctr(checkout: Path, folder: Path, *arguments: object, failpoint: str = "") -> int:
    """Run `stream-ctr` from `checkout` in `folder`, and check its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "STREAM_CTR_FAILPOINT": failpoint}
    command = [sys.executable, "-m", "stream_ctr", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != (KILLED if failpoint else 0):
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode


def compared(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in LEFT_OUT}


def results(state: Path) -> dict[str, Any]:
    """Return the compared results of the run in `state`."""
    newest = max((state / "snapshots").glob("[0-9]*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    lines = [json.loads(line) for line in (state / "reports.jsonl").read_text().splitlines()]
    final = [line for line in lines if line["kind"] == "final"][-1]
    return {
        "weights_sha256": manifest["weights_sha256"],
        "ledger": manifest["ledger"],
        "files": {name: entry["sha256"] for name, entry in sorted(manifest["files"].items())},
        "windows": [compared(line) for line in lines if line["kind"] == "window"],
        "report": compared(final),
    }


def record(checkout: Path, wanted: list[str]) -> dict[str, Any]:
    """Return the results of each run by name."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log = folder / "simulated.jsonl"
        stream_ctr(checkout, folder, "simulate", "--impressions", 60_000, "--seed", 3, "--out", log)
        runs: dict[str, list[object]] = {
            "three-models": [
                *("--source", log, "--model", "deepfm", "--model", "fm", "--model", "lr"),
                *("-X", "schedule.snapshot_examples=20000"),
            ],
        }
        for name, (path, log_format) in SAMPLES.items():
            if (DATA / path).exists():
                config = ROOT / "configs" / f"{name}.toml"
                runs[name] = [
                    "--source",
                    DATA / path,
                    "--format",
                    log_format,
                    "--config",
                    config,
                    "-X",
                    "model.table_bits=18",
                ]

        for name, arguments in runs.items():
            if name in wanted:
                state = folder / name
                stream_ctr(checkout, folder, "run", *arguments, "--state", state)
                found[name] = results(state)
        if "demo" in wanted:
            state = folder / "demo"
            stream_ctr(checkout, folder, "demo", "--impressions", 100_000, "--state", state)
            found["demo"] = results(state)
        if "resumed" in wanted:
            state = folder / "resumed"
            arguments = ["--source", log, "--state", state, "-X", "schedule.snapshot_examples=8000"]
            stream_ctr(checkout, folder, "run", *arguments, failpoint="learn.after:70")
            stream_ctr(checkout, folder, "run", *arguments)
            found["resumed"] = results(state)
    return found


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return a line for each difference of two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted({*before, *after})
        return [
            line
            for name in names
            for line in differences(before.get(name), after.get(name), f"{path}.{name}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [
            line
            for index, (one, other) in pairs
            for line in differences(one, other, f"{path}[{index}]")
        ]
    return (
        []
        if before == after
        else [f"{path.lstrip('.')}: {str(before)[:200]} -> {str(after)[:200]}"]
    )


RUNS = ["demo", "criteo", "avazu", "obd", "three-models", "resumed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--checkout", type=Path, default=ROOT)
    recording.add_argument("--runs", nargs="*", choices=RUNS, default=RUNS)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        found = record(given.checkout.resolve(), given.runs)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} runs: {', '.join(found)}")
        return
    before, after = (json.loads(path.read_text()) for path in (given.before, given.after))
    different = [
        line for name in before for line in differences(before[name], after.get(name), name)
    ]
    left_out = [name for name in RUNS if name not in before or name not in after]
    print("\n".join(different) or f"equal: {', '.join(before)}")
    if left_out:
        print(f"not compared: {', '.join(left_out)}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
