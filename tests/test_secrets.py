"""Passwords must not appear in the output of any command, even at -vv, or in any file it writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest
from support import forks
from support.brokers import SASL_PASSWORD, SASL_USER, ApacheBroker
from support.commands import command
from support.lineage import SMALL
from support.patience import PATIENCE_SECONDS, wait_until
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
    "snapshots mirror": ["snapshots", "mirror", "{state}", "{mirror}"],
    "dlq ls": ["dlq", "ls", "--topic", "{topic}", "{login}"],
    "dlq show": ["dlq", "show", "--topic", "{topic}", "{login}"],
    "dlq replay": ["dlq", "replay", "--topic", "{topic}", "--all", "{login}"],
    "doctor": ["doctor", "--topic", "{topic}", "--state", "{state}", "{login}"],
    "serve": ["serve", "--topic", "{topic}.snapshots", "--http", "127.0.0.1:0", "{login}"],
    "score": ["score", "{log}", "--snapshot", "{state}"],
    "config": ["config", "{login}"],
    "simulate": ["simulate", "--impressions", "10", "--out", "{out}"],
}
PROPERTIES_FILE = "client.properties"
WITHOUT_PASSWORD = {
    "broker",
    "compact",
    "dashboard",
    "demo",
    "export",
    "init",
    "models",
    "paper",
    "top",
}


def test_every_command_is_tried() -> None:
    known = set()
    for name, known_command in main.commands.items():
        subcommands = getattr(known_command, "commands", {})
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
            "mirror": tmp_path / "mirror",
        }
        arguments = filled(template, login, places)
        arguments += topics if name in ("run", "doctor") else []
        output += (output_of_server if name == "serve" else output_of)(arguments)
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


def output_of_server(arguments: list[str]) -> bytes:
    """Run a server at -vv until it has a model, and return what it wrote."""
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    with forks.start("-vv", *arguments, stdout=pipe, stderr=merged, text=True) as process:
        assert process.stdout
        output = ""
        while not output.endswith("\n") or "serving at" not in output:
            output += process.stdout.readline()
        url = output.split()[-1]
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == httpx.codes.OK)
        process.terminate()
        output += process.stdout.read()
    assert process.returncode == 0, output
    return output.encode()


# -- what is given in a wrong way ----------------------------------------------------------------

MARKER = "Marker5ecret/abcdefghijklmnopqrstuvwxyz0123456789"
PEM = f"-----BEGIN PRIVATE KEY-----\n{MARKER}\n-----END PRIVATE KEY-----\n"
RUN = ["run", "--topic", "clicks", "--state", "{state}"]
# (arguments, what the message says)
GIVEN_WRONGLY = {
    "a colon for the equals sign": ([*RUN, "-X", f"sasl.password:{MARKER}"], "-X takes KEY=VALUE"),
    "a colon, and an equals sign in the password": (
        [*RUN, "-X", f"sasl.password:{MARKER}=="],
        "did you mean 'sasl.password'",
    ),
    "the password alone": ([*RUN, "-X", MARKER], "-X takes KEY=VALUE"),
    "two words": ([*RUN, "-X", "sasl.password", MARKER], "as one word"),
    "a blank after the equals sign": ([*RUN, "-X", "sasl.password=", MARKER], "as one word"),
    "a misspelt name": ([*RUN, "-X", f"sasl.pasword={MARKER}"], "did you mean 'sasl.password'"),
    "a key in PEM for its file": (
        [*RUN, "-X", "security.protocol=SSL", "-X", f"ssl.key.location={PEM}"],
        "must be a PEM file that can be read",
    ),
    "the body of a key for its file": (
        [*RUN, "-X", "security.protocol=SSL", "-X", f"ssl.key.location={MARKER}"],
        "must be a PEM file that can be read",
    ),
    "a signing key for its file": (
        [*RUN, "-X", f"snapshots.signing_key={PEM}"],
        "snapshots.signing_key: must be the name of a PEM file",
    ),
    "the body of a signing key for its file": (
        [*RUN, "-X", f"snapshots.signing_key={MARKER}"],
        "cannot read the private key",
    ),
    "a signing key where the configuration is printed": (
        ["config", "-X", f"snapshots.signing_key={PEM}"],
        "must be the name of a PEM file",
    ),
    "a private key for a public one": (
        ["subscribe", "--state", "{state}", "--public-key", PEM],
        "cannot read the public key",
    ),
    "a key in PEM for a number": ([*RUN, "-X", f"learn.batch_size={PEM}"], "learn.batch_size"),
    "a key in PEM for a choice": ([*RUN, "-X", f"input.client={PEM}"], "must be one of"),
    "a key in PEM for client properties": (
        [*RUN, "--kafka-config", "{pem}"],
        "Kafka option (not shown",
    ),
    "a key in PEM for a configuration": ([*RUN, "--config", "{pem}"], "is not TOML"),
    "a password of a registry without its name": (
        [*RUN, "-X", f"basic.auth.user.info:{MARKER}"],
        "-X takes KEY=VALUE",
    ),
    "a login in the address of a registry": (
        [*RUN, "-X", f"input.schema_registry=http://me:{MARKER}@host"],
        "basic.auth.user.info",
    ),
    "a token in the command of a hook": (
        ["subscribe", "--state", "{state}", "--exec", f"echo 'token={MARKER}"],
        "cannot be split into words",
    ),
    "a token in the command of a hook that has no program": (
        ["subscribe", "--state", "{state}", "--exec", f"nosuchprogram token={MARKER}"],
        "there is no program 'nosuchprogram'",
    ),
}


@pytest.mark.security(
    "secrets appear nowhere", how="a password or key given in the wrong way, in many ways"
)
@pytest.mark.parametrize("spoken", ["text", "json"])
@pytest.mark.parametrize("way", GIVEN_WRONGLY)
def test_a_secret_that_is_given_wrongly_is_not_shown(
    tmp_path: Path, way: str, spoken: str, outcome: Outcome
) -> None:
    template, message = GIVEN_WRONGLY[way]
    (tmp_path / "key.pem").write_text(PEM)
    places = {"{state}": tmp_path / "state", "{pem}": tmp_path / "key.pem"}
    arguments = [places.get(word, word) for word in template]
    result = command("--log-format", spoken, *arguments)
    assert result.exit_code in (2, 3), result.output
    said = " ".join(result.output.replace("\u2502", " ").split())
    assert message.replace('"', "") in said.replace('"', "").replace("\\", "")
    assert "5ecret" not in result.output
    assert not any("5ecret" in path.read_text() for path in tmp_path.glob("state/*"))
    outcome("the message says what is wrong and what to do, and does not show it")
