"""Passwords must not appear in the output of any command, even at -vv, or in any file it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import forks
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker
from support.lineage import SMALL
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome

from stream_ctr.cli.main import main
from stream_ctr.logs.simulate import Simulation

# Commands that contact no broker get the password too, if they accept client properties.
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
PROPERTIES_FILE = "client.properties"
WITHOUT_PASSWORD = {"demo", "broker", "models", "paper"}


def test_every_command_is_tried() -> None:
    known = set()
    for name, command in main.commands.items():
        subcommands = getattr(command, "commands", {})
        known |= {f"{name} {subcommand}" for subcommand in subcommands} or {name}
    assert known == set(COMMANDS) | WITHOUT_PASSWORD


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
    log = tmp_path / "log.jsonl"
    state = tmp_path / "state"
    Simulation(1000, seed=1).write_jsonl(log)
    with log.open("a") as file:
        file.write("no event\n")
    login = ["--bootstrap-servers", apache.sasl_servers, *password_options(where, tmp_path)]
    topics = ["-X", f"metrics.topic={topic}.metrics", "-X", f"snapshots.topic={topic}.snapshots"]
    output = b""
    for name, template in COMMANDS.items():
        places = {
            "log": log,
            "topic": topic,
            "state": state,
            "snapshot": oldest_snapshot(state),
            "out": tmp_path / "out.jsonl",
        }
        arguments = filled(template, login, places)
        output += output_of([*arguments, *topics] if name == "run" else arguments)
    assert b"DEBUG" in output
    assert SASL_PASSWORD.encode() not in output
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name != PROPERTIES_FILE
    ]
    assert len(written) > 10
    for path in written:
        assert SASL_PASSWORD.encode() not in path.read_bytes(), path
    outcome(f"0 found in {len(output):,} bytes of output and {len(written)} files, {where}")


def password_options(where: str, directory: Path) -> list[str]:
    """Return the options that give the login, as properties or as a file of them."""
    properties = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": SASL_USER,
        "sasl.password": SASL_PASSWORD,
    }
    pairs = [f"{name}={value}" for name, value in properties.items()]
    if where == "on the command line":
        return [word for pair in pairs for word in ("-X", pair)]
    file = directory / PROPERTIES_FILE
    file.write_text("".join(f"{pair}\n" for pair in pairs))
    return ["--kafka-config", str(file)]


def oldest_snapshot(state: Path) -> str:
    return min((path.name for path in (state / "snapshots").glob("0*")), default="")


def filled(template: list[str], login: list[str], places: dict[str, object]) -> list[str]:
    """Return the arguments of a command with its placeholders replaced."""
    arguments: list[str] = []
    for part in template:
        arguments += login if part == "{login}" else [part.format(**places)]
    return arguments


def output_of(arguments: list[str]) -> bytes:
    """Run a command at -vv and return its standard output and standard error."""
    done = forks.run("-vv", *arguments, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, (arguments[:2], done.stderr[-2000:])
    return (done.stdout + done.stderr).encode()
