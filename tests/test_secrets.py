"""A password is in nothing that a command says, at the highest level of detail, and in nothing that it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker
from support.lineage import SMALL
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome

from stream_ctr.cli.main import main
from stream_ctr.logs.simulate import Simulation

# Those that speak to no broker are given the password all the same where they take client properties.
COMMANDS = {
    "replay": ["replay", "{log}", "--topic", "{topic}", "{login}"],
    "run": ["run", "--topic", "{topic}", "--state", "{state}", "--until-end", "{login}", *SMALL],
    "subscribe": ["subscribe", "--topic", "{topic}.snapshots", "--once", "{login}"],
    "snapshots ls": ["snapshots", "ls", "{state}"],
    "snapshots show": ["snapshots", "show", "{state}"],
    "snapshots verify": ["snapshots", "verify", "{state}"],
    "snapshots rollback": [
        "snapshots",
        "rollback",
        "{state}",
        "{snapshot}",
        "--topic",
        "{topic}.snapshots",
        "{login}",
    ],
    "dlq ls": ["dlq", "ls", "--topic", "{topic}", "{login}"],
    "dlq show": ["dlq", "show", "--topic", "{topic}", "{login}"],
    "dlq replay": ["dlq", "replay", "--topic", "{topic}", "--all", "{login}"],
    "score": ["score", "{log}", "--snapshot", "{state}"],
    "config": ["config", "{login}"],
    "simulate": ["simulate", "--impressions", "10", "--out", "{out}"],
}
UNTRIED = {"demo", "broker", "models", "paper"}  # they take no password


def test_every_command_is_tried() -> None:
    groups = {name: getattr(command, "commands", {}) for name, command in main.commands.items()}
    known = {
        f"{name} {sub}" if subs else name for name, subs in groups.items() for sub in (subs or [""])
    }
    assert {" ".join(name.split()) for name in known} == set(COMMANDS) | UNTRIED


@pytest.mark.security(
    "secrets appear nowhere",
    how="every command at -vv with a marker password; all output and every file searched",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["on the command line", pytest.param("in a properties file", marks=pytest.mark.long)]
)
def test_a_password_is_found_nowhere(
    apache: ApacheBroker, topic: str, tmp_path: Path, where: str, outcome: Outcome
) -> None:
    log, state = tmp_path / "log.jsonl", tmp_path / "state"
    Simulation(1000, seed=1).write_jsonl(log)
    with log.open("a") as file:
        file.write("no event\n")
    properties = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": SASL_USER,
        "sasl.password": SASL_PASSWORD,
    }
    login = ["--bootstrap-servers", apache.sasl_servers]
    if where == "on the command line":
        login += [part for name, value in properties.items() for part in ("-X", f"{name}={value}")]
    else:
        secret = tmp_path / "client.properties"
        secret.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        login += ["--kafka-config", str(secret)]
    own = ["-X", f"metrics.topic={topic}.metrics", "-X", f"snapshots.topic={topic}.snapshots"]
    said = b""
    for name, arguments in COMMANDS.items():
        held = (
            sorted(path.name for path in (state / "snapshots").glob("0*"))
            if state.exists()
            else [""]
        )
        places = {
            "log": log,
            "topic": topic,
            "state": state,
            "snapshot": held[0],
            "out": tmp_path / "out.jsonl",
        }
        line = [
            word
            for part in arguments
            for word in (login if part == "{login}" else [part.format(**places)])
        ]
        command = [
            sys.executable,
            "-m",
            "stream_ctr",
            "-vv",
            *line,
            *(own if name == "run" else []),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert done.returncode == 0, (name, done.stderr[-2000:])
        said += done.stdout + done.stderr
    assert b"DEBUG" in said
    assert SASL_PASSWORD.encode() not in said
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name != "client.properties"
    ]
    assert len(written) > 10
    for path in written:
        assert SASL_PASSWORD.encode() not in path.read_bytes(), path
    outcome(f"0 found in {len(said):,} bytes of output and {len(written)} files, {where}")
