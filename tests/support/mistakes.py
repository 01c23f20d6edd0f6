"""Mistakes that a newcomer makes: a command, the message that it gets, and the exit code.

`MISTAKES` is the table. A case is a title, the arguments of the command, and what `prepare` does in
an empty folder first, in which the command then runs, in this process. `broker` cases get a running
broker, whose address the page shows as localhost:9092.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from click.testing import CliRunner

from stream_ctr.cli.main import main
from stream_ctr.connectors import kafka
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease
from support.keys import write_keys
from support.lineage import QUICK
from support.manifests import make_newer

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
_SERVER = "localhost:9092"
_INTRODUCTION = """# Mistakes and their messages

Each section is a command that does not do what was meant, with the message that it prints and its
exit code. The page is made by `python tests/mistakes.py`, and a test compares it.

Exit codes: 2 wrong usage, 3 wrong configuration, 4 the broker, 5 the data, 6 no valid snapshot.
"""

Prepare = Callable[[Path], object]


def _nothing(folder: Path) -> None:
    """Leave the folder empty."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake: a command, run in a folder that `prepare` fills, and its exit code.

    `hold` opens a context that lasts while the command runs. The `options` make it quick and are
    not shown. `broker` and `apache` name the broker that it needs.
    """

    title: str
    command: str
    exit_code: int
    prepare: Prepare = _nothing
    environment: Mapping[str, str] = field(default_factory=dict)
    broker: bool = False
    apache: bool = False
    hold: Callable[[], AbstractContextManager[object]] = nullcontext
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Brokers:
    """The addresses of running brokers, "" where there is none."""

    embedded: str = ""
    login: str = ""
    tls: str = ""


# -- what is prepared ----------------------------------------------------------------------------


def _write(name: str, text: str | bytes) -> Prepare:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def _config(text: str) -> Prepare:
    return _write("my.toml", text)


def _events(impressions: int = 2000, **changes: object) -> Iterator[dict[str, object]]:
    for batch in Simulation(impressions, seed=1).batches():
        for value in batch.value.to_pylist():
            yield {**json.loads(value), **changes}


def _log(
    change: Callable[[dict[str, object]], dict[str, object]] = dict,
    name: str = "events.jsonl",
    impressions: int = 2000,
) -> Prepare:
    def write(folder: Path) -> None:
        lines = (json.dumps(change(event)) + "\n" for event in _events(impressions))
        (folder / name).write_text("".join(lines))

    return write


def _in_seconds(event: dict[str, object]) -> dict[str, object]:
    return {**event, "time": int(str(event["time"])) // 1000}


def _other_ids(event: dict[str, object]) -> dict[str, object]:
    return {**event, "impression_id": f"{event['kind']}-{event['impression_id']}"}


def _without_age(event: dict[str, object]) -> dict[str, object]:
    features = event.get("features")
    if not isinstance(features, dict):
        return event
    return {**event, "features": {"age": "unknown", "app_id": features["app_id"]}}


def _state(folder: Path) -> None:
    """Leave a log and the state of a run on it."""
    _log()(folder)
    template = _trained()
    shutil.copytree(template, folder / "state")


_TRAINED: list[Path] = []


def _trained() -> Path:
    """Return the state of a run, which is made once."""
    if not _TRAINED:
        folder = Path(tempfile.mkdtemp(prefix="mistakes-"))
        _log()(folder)
        with _inside(folder):
            done = CliRunner().invoke(
                main, ["run", "--source", "events.jsonl", "--state", "state", *QUICK]
            )
        assert done.exit_code == 0, done.output
        _TRAINED.append(folder / "state")
    return _TRAINED[0]


def _newer_state(folder: Path) -> None:
    _state(folder)
    newest = snapshot.newest(folder / "state" / "snapshots")
    assert newest
    make_newer(newest / "manifest.json")
    make_newer(folder / "state" / "latest.json")


def _state_and_key(folder: Path) -> None:
    _state(folder)
    write_keys(folder, "other")


def _other_fields(folder: Path) -> None:
    _state(folder)
    record = {
        "kind": "impression",
        "impression_id": "a",
        "time": 1_735_689_600_000,
        "features": {"colour": "red"},
    }
    (folder / "request.jsonl").write_text(json.dumps(record) + "\n")


def _letters(folder: Path) -> None:
    (folder / "state").mkdir()
    letter = {
        "topic": "events.jsonl",
        "partition": "0",
        "offset": "7",
        "reason": "not_json",
        "message": "x",
        "value_base64": "eA==",
    }
    (folder / "state" / "dead_letters.jsonl").write_text(json.dumps(letter) + "\n")


@contextmanager
def _held() -> Iterator[None]:
    with Lease(Path("state")):
        yield


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# -- the table -----------------------------------------------------------------------------------

_RUN = "stream-ctr run --source events.jsonl --state state"
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_TABLE = "at,clicked,app\n" + "".join(
    f"2025-01-01 00:00:{second:02}Z,{second % 7 == 0:d},a{second % 5}\n" for second in range(60)
)
_QUICK = tuple(QUICK)

MISTAKES = (
    # the command line
    Mistake("A misspelt option", "stream-ctr run --sorce events.jsonl", 2),
    Mistake("A misspelt command", "stream-ctr subscrib --state state", 2),
    Mistake("A command that does not exist", "stream-ctr train", 2),
    Mistake(
        "A model that does not exist",
        "stream-ctr run --source events.jsonl --model depfm",
        3,
        _log(),
    ),
    Mistake(
        "A format that does not exist",
        "stream-ctr run --source events.jsonl --format cvs",
        3,
        _log(),
    ),
    Mistake("A device that does not exist", "stream-ctr run --device gpu", 2),
    Mistake("-X without a value", "stream-ctr run -X learn.batch_size", 2),
    Mistake("A misspelt key in -X", "stream-ctr run -X learn.bach_size=512", 3),
    Mistake("A duration without a unit", "stream-ctr config -X join.label_window=600", 3),
    Mistake("A size without a unit", "stream-ctr config -X join.max_memory=1000000000", 3),
    Mistake("A negative duration", "stream-ctr config -X join.label_window=-5m", 3),
    Mistake("A negative number", "stream-ctr simulate --impressions -5 --out events.jsonl", 2),
    Mistake("An empty path", "stream-ctr run --source events.jsonl --state ''", 2, _log()),
    Mistake("A full disk", "stream-ctr simulate --impressions 10 --out /dev/full", 5),
    # the configuration
    Mistake("A configuration file that is not there", "stream-ctr run --config my.toml", 3),
    Mistake(
        "A configuration that is not TOML",
        "stream-ctr config --config my.toml",
        3,
        _config("learn:\n  batch_size: 512\n"),
    ),
    Mistake(
        "A misspelt section",
        "stream-ctr config --config my.toml",
        3,
        _config("[lern]\nbatch_size = 512\n"),
    ),
    Mistake(
        "A misspelt key",
        "stream-ctr config --config my.toml",
        3,
        _config("[learn]\nbatchsize = 512\n"),
    ),
    Mistake(
        "A value of the wrong type",
        "stream-ctr config --config my.toml",
        3,
        _config('[learn]\nbatch_size = "large"\n'),
    ),
    Mistake(
        "A value out of range",
        "stream-ctr config --config my.toml",
        3,
        _config("[learn]\nbatch_size = 0\n"),
    ),
    Mistake(
        "A value instead of a section",
        "stream-ctr config --config my.toml",
        3,
        _config("learn = 3\n"),
    ),
    Mistake(
        "A text instead of a list",
        "stream-ctr config --config my.toml",
        3,
        _config('[features]\ncategorical = "age"\n'),
    ),
    Mistake(
        "A field listed twice",
        "stream-ctr config --config my.toml",
        3,
        _config('[features]\ncategorical = ["age"]\nnumeric = ["age"]\n'),
    ),
    Mistake(
        "A misspelt environment variable",
        "stream-ctr config",
        3,
        environment={"STREAM_CTR_LEARN_BATCH_SIZE": "512"},
    ),
    Mistake(
        "An environment variable that means nothing",
        "stream-ctr config",
        3,
        environment={"STREAM_CTR_FOO": "1"},
    ),
    # logs
    Mistake("A log that is not there", _RUN, 2),
    Mistake("An empty log", _RUN, 5, _write("events.jsonl", "")),
    Mistake(
        "A file that is no log",
        "stream-ctr run --source cat.png --state state",
        5,
        _write("cat.png", _PNG),
    ),
    Mistake("Text that is no log", _RUN, 5, _write("events.jsonl", "hello\nworld\n")),
    Mistake(
        "A folder without logs",
        "stream-ctr run --source logs --state state",
        5,
        lambda folder: (folder / "logs").mkdir(),
    ),
    Mistake(
        "Times in another unit than the one that is given",
        f"{_RUN} -X input.time_unit=ms",
        5,
        _log(_in_seconds),
        options=_QUICK,
    ),
    Mistake(
        "A column that does not exist",
        "stream-ctr run --source ads.csv -X input.columns.label=clickd --state state",
        3,
        _write("ads.csv", _TABLE),
    ),
    Mistake(
        "A table without labels",
        "stream-ctr init ads.csv",
        5,
        _write("ads.csv", "at,price\n2025-01-01T00:00:00Z,3\n2025-01-01T00:00:01Z,4\n"),
    ),
    Mistake("A picture instead of a table", "stream-ctr init cat.png", 5, _write("cat.png", _PNG)),
    Mistake(
        "A time without a zone",
        "stream-ctr run --source ads.csv -X input.columns.label=clicked"
        " -X input.columns.time=at --state state",
        5,
        _write("ads.csv", _TABLE.replace("Z,", ",")),
    ),
    Mistake("Clicks without impressions", _RUN, 5, _log(_other_ids), options=_QUICK),
    Mistake(
        "A text in a numeric field",
        f"{_RUN} -X features.categorical=app_id -X features.numeric=age",
        5,
        _log(_without_age),
        options=_QUICK,
    ),
    Mistake(
        "A label that is neither 0 nor 1",
        "stream-ctr run --source day_0.tsv --format criteo --state state",
        5,
        _write("day_0.tsv", "".join("2" + "\t1" * 39 + "\n" for _ in range(20))),
        options=_QUICK,
    ),
    Mistake(
        "A separator that is not the format's",
        "stream-ctr run --source day_0.csv --format criteo --state state",
        5,
        _write("day_0.csv", "".join("1" + ",1" * 39 + "\n" for _ in range(20))),
        options=_QUICK,
    ),
    # Kafka
    Mistake("No broker", "stream-ctr run --topic clicks --bootstrap-servers localhost:1", 4),
    Mistake("A URL as broker", "stream-ctr run --bootstrap-servers http://localhost:9092", 3),
    Mistake("A broker without a port", "stream-ctr run --bootstrap-servers localhost", 3),
    Mistake(
        "A login in the address",
        "stream-ctr run --bootstrap-servers me:secret@broker:9092",
        3,
    ),
    Mistake("A misspelt Kafka option", "stream-ctr run -X security.protcol=SSL", 3),
    Mistake("A login without a protocol", "stream-ctr run -X sasl.username=me", 3),
    Mistake(
        "A topic that does not exist",
        f"stream-ctr run --topic clickz --bootstrap-servers {_SERVER}",
        4,
        broker=True,
    ),
    Mistake(
        "A topic without impressions",
        f"stream-ctr run --topic clicks --until-end --bootstrap-servers {_SERVER}",
        5,
        broker=True,
    ),
    Mistake(
        "A wrong password",
        "stream-ctr run --bootstrap-servers broker:9093 -X security.protocol=SASL_PLAINTEXT "
        "-X sasl.mechanism=PLAIN -X sasl.username=tester -X sasl.password=wrong",
        4,
        apache=True,
    ),
    Mistake(
        "No TLS where the broker wants it",
        "stream-ctr run --bootstrap-servers broker:9094",
        4,
        apache=True,
    ),
    # the state directory
    Mistake("A state directory in use", _RUN, 3, _state, hold=_held),
    Mistake("The state of another configuration", f"{_RUN} -X model.embedding_dim=7", 3, _state),
    Mistake(
        "A log and a topic in one command",
        "stream-ctr run --source events.jsonl --topic clicks --state state",
        2,
        _log(),
    ),
    Mistake(
        "A file as state directory",
        "stream-ctr run --source events.jsonl --state events.jsonl",
        2,
        _log(),
    ),
    Mistake(
        "A state directory that cannot be written",
        "stream-ctr run --source events.jsonl --state events.jsonl/state",
        3,
        _log(),
    ),
    Mistake("A snapshot of a newer version", _RUN, 6, _newer_state),
    # serving
    Mistake(
        "A snapshot that is not there",
        "stream-ctr score --snapshot state events.jsonl",
        6,
        _log(),
    ),
    Mistake(
        "A public key of another run",
        "stream-ctr score --snapshot state --public-key other.pub.pem events.jsonl",
        6,
        _state_and_key,
    ),
    Mistake(
        "A model that the snapshot does not have",
        "stream-ctr score --snapshot state --model fm events.jsonl",
        6,
        _state,
    ),
    Mistake(
        "Fields that the model does not know",
        "stream-ctr score --snapshot state request.jsonl",
        5,
        _other_fields,
    ),
    Mistake(
        "A subscriber without a run",
        "stream-ctr subscribe --state state --once --timeout 0",
        6,
        lambda folder: (folder / "state").mkdir(),
    ),
    Mistake(
        "A reason that no dead letter has",
        "stream-ctr dlq show --state state --reason not_jsn",
        2,
        _letters,
    ),
)


# -- running and showing -------------------------------------------------------------------------


def run(mistake: Mistake, folder: Path, brokers: Brokers) -> tuple[int, str]:
    """Make the mistake in an empty folder; return the exit code and what it printed."""
    with _inside(folder):
        mistake.prepare(folder)
        addresses = {
            _SERVER: brokers.embedded,
            "broker:9093": brokers.login,
            "broker:9094": brokers.tls,
        }
        command = mistake.command
        if mistake.broker or mistake.apache:
            for shown, address in addresses.items():
                command = command.replace(shown, address)
        arguments = [*shlex.split(command)[1:], *mistake.options]
        with mistake.hold():
            done = CliRunner(env=mistake.environment).invoke(
                main, arguments, prog_name="stream-ctr"
            )
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    text = done.stderr.strip()
    for shown, address in addresses.items():
        if address:
            text = text.replace(address, shown)
    return done.exit_code, _without_accidents(text)


def _without_accidents(text: str) -> str:
    text = text.replace(f"process {os.getpid()} on {socket.gethostname()}", "process 4242 on host")
    text = re.sub(r"^note: (compiling|\d+ loops compiled).*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^final: .*\n(  .*\n)*", "", text, flags=re.MULTILINE)  # figures of the machine
    text = re.sub(r"^\d{4}-\d\d-\d\d [\d:,]+ ", "", text, flags=re.MULTILINE)
    within = f"within {timeouts.BOOTSTRAP_SECONDS:g} s"
    return text.replace(within, "within 5 s")


def first_words(text: str) -> str:
    """Return an error up to what a client says of it, which depends on what it heard in time."""
    return text.partition(" (")[0].partition("the login")[0]


def section(mistake: Mistake, text: str) -> str:
    """Return the section of the page."""
    shown = "".join(f"{name}={value} " for name, value in mistake.environment.items())
    return (
        f"## {mistake.title}\n\n```text\n$ {shown}{mistake.command}\n{text}\n```\n\n"
        f"Exit code {mistake.exit_code}.\n"
    )


def page(sections: Mapping[str, str]) -> str:
    """Return the page with these sections by title; those that are missing stay as they are."""
    before = PAGE.read_text() if PAGE.exists() else ""
    kept = dict(_sections(before))
    shown = [{**kept, **sections}.get(mistake.title, "") for mistake in MISTAKES]
    return "\n".join([_INTRODUCTION, *filter(None, shown)])


def shown_section(title: str) -> str:
    """Return a section of the page as it is, or "" if there is none."""
    return dict(_sections(PAGE.read_text() if PAGE.exists() else "")).get(title, "")


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        title = part.partition("\n")[0].removeprefix("## ")
        yield title, part.rstrip("\n") + "\n"


def send_clicks(servers: str) -> None:
    """Leave a topic `clicks` with clicks only."""
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, "clicks")
    sink = kafka.KafkaSink(client)
    for n in range(20):
        sink.send(
            "clicks",
            json.dumps(
                {"kind": "click", "impression_id": str(n), "time": 1_735_689_600_000}
            ).encode(),
        )
    sink.close()
