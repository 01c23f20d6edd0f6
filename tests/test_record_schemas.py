"""Schemas of records: a folder, a registry that misbehaves, and a real one."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from support.avro import (
    EVENT,
    FEATURES,
    RegistryMissing,
    body,
    confluent,
    register,
    registry,
    single_object,
)
from support.event_records import FIELDS, T

from stream_ctr.cli.registry import open_schemas, registry_properties
from stream_ctr.config import load
from stream_ctr.connectors import record_schemas
from stream_ctr.connectors.errors import RegistryFailure, RegistryRefused, RegistryUnreachable
from stream_ctr.connectors.record_schemas import SchemaFolder, SchemaRegistry
from stream_ctr.errors import ConfigError
from stream_ctr.events.avro_schema import fingerprint
from stream_ctr.events.decoder import Decoder

SHOWN = {
    "kind": "impression",
    "impression_id": "a",
    "time": T,
    "label": None,
    "features": {"app": "maps", "age": 31.0},
}
Answer = tuple[int, object]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# -- a folder ------------------------------------------------------------------------------------


def test_a_folder_finds_schemas_by_id_and_by_fingerprint(tmp_path: Path) -> None:
    text = json.dumps(EVENT)
    (tmp_path / "17.avsc").write_text(text)
    folder = SchemaFolder(tmp_path, fingerprint=fingerprint)
    records = [
        confluent(17, body(EVENT, SHOWN)),
        single_object(fingerprint(text), body(EVENT, SHOWN)),
        confluent(18, body(EVENT, SHOWN)),
    ]
    events, rejections = Decoder(FIELDS, schemas=folder).decode(
        pa.array(records, pa.large_binary())
    )
    assert events.impressions.row.tolist() == [0, 1]
    assert rejections.message == [
        f"Confluent framing, schema id 18: the schema folder {tmp_path} has no such schema"
    ]


def test_a_schema_that_comes_later_is_found_after_half_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    folder = SchemaFolder(tmp_path, fingerprint=fingerprint, clock=clock)
    assert folder.by_id(3) is None
    (tmp_path / "3.avsc").write_text(json.dumps(EVENT))
    assert folder.by_id(3) is None
    clock.sleep(31)
    assert folder.by_id(3) is not None


def test_a_folder_that_is_missing_or_holds_something_else_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryFailure, match="cannot be read"):
        SchemaFolder(tmp_path / "none", fingerprint=fingerprint)
    (tmp_path / "1.avsc").write_text("{")
    with pytest.raises(RegistryFailure, match=r"1\.avsc is no Avro schema"):
        SchemaFolder(tmp_path, fingerprint=fingerprint)


# -- a registry that misbehaves ------------------------------------------------------------------


class Scripted:
    """A server that gives these answers in turn, the last one for ever, and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, str | None]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script.requests.append((self.path, self.headers.get("Authorization")))
                status, answer = script.answers[0]
                if len(script.answers) > 1:
                    script.answers.pop(0)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(*answers: Answer) -> Scripted:
        started.append(Scripted(*answers))
        return started[-1]

    yield start
    for script in started:
        script.server.shutdown()
        script.server.server_close()


FOUND: Answer = (200, {"schema": json.dumps(EVENT)})
UNKNOWN: Answer = (404, {"error_code": 40403, "message": "Schema not found"})


def test_a_schema_is_fetched_once_with_the_login(scripted: Callable[..., Scripted]) -> None:
    server = scripted(FOUND)
    asked = SchemaRegistry(server.url + "/", login="me:hidden")
    first = asked.by_id(5)
    assert first is not None
    assert (first.type, json.loads(first.text)) == ("AVRO", EVENT)
    assert asked.by_id(5) is first
    login = base64.b64encode(b"me:hidden").decode()
    assert server.requests == [("/schemas/ids/5", f"Basic {login}")]


def test_an_unknown_id_is_asked_for_again_after_half_a_minute(
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted(UNKNOWN, FOUND)
    clock = Clock()
    asked = SchemaRegistry(server.url, clock=clock)
    assert asked.by_id(5) is None
    assert asked.by_id(5) is None
    clock.sleep(31)
    assert asked.by_id(5) is not None


def test_a_registry_that_is_down_for_a_while_rejects_nothing(
    scripted: Callable[..., Scripted],
) -> None:
    clock = Clock()
    asked = SchemaRegistry(
        scripted((503, b"busy"), (429, b""), FOUND).url, clock=clock, sleep=clock.sleep
    )
    assert asked.by_id(5) is not None
    assert clock.now == 0.25 + 0.5


def test_a_registry_that_stays_down_ends_the_run_with_its_name() -> None:
    clock = Clock()
    asked = SchemaRegistry("http://127.0.0.1:9", clock=clock, sleep=clock.sleep)
    decoder = Decoder(FIELDS, schemas=asked)
    with pytest.raises(
        RegistryUnreachable, match=r"registry http://127\.0\.0\.1:9 does not answer"
    ):
        decoder.decode(pa.array([confluent(1, b"x")], pa.large_binary()))
    assert 10 < clock.now <= record_schemas.PATIENCE_SECONDS


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((401, b""), RegistryRefused, "refuses the login"),
        ((403, b""), RegistryRefused, "refuses the login"),
        ((404, b"<html>"), RegistryFailure, "Confluent interface"),
        ((404, {"error_code": 404}), RegistryFailure, "Confluent interface"),
        ((200, b"<html>"), RegistryFailure, "Confluent interface"),
        ((302, b""), RegistryFailure, "HTTP 302"),
    ],
)
def test_an_answer_that_is_no_schema_is_never_taken_for_an_unknown_id(
    answer: Answer,
    error: type[Exception],
    message: str,
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted(answer)
    with pytest.raises(error, match=message) as raised:
        SchemaRegistry(server.url, login="me:hidden").by_id(5)
    assert "hidden" not in str(raised.value)
    assert len(server.requests) == 1


def test_references_are_fetched_each_after_those_that_it_uses(
    scripted: Callable[..., Scripted],
) -> None:
    refers = {"name": "x", "subject": "a/b", "version": 3}
    server = scripted(
        (200, {"schema": "one", "references": [refers]}),
        (200, {"schema": "two", "references": [{**refers, "subject": "c"}]}),
        (200, {"schema": "three"}),
    )
    found = SchemaRegistry(server.url).by_id(5)
    assert found is not None
    assert found.references == ("three", "two")
    assert server.requests[1][0] == "/subjects/a%2Fb/versions/3"


# -- the configuration ---------------------------------------------------------------------------


def test_the_login_comes_from_the_properties_or_the_environment_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "client.properties"
    path.write_text("schema.registry.basic.auth.user.info=me:hidden\nacks=all\n")
    assert repr(registry_properties(path, {})) == "{'basic.auth.user.info': '***'}"
    monkeypatch.setenv("SCHEMA_REGISTRY_BASIC_AUTH_USER_INFO", "you:secret")
    assert "".join([registry_properties(None, {})["basic.auth.user.info"]]) == "you:secret"
    assert "".join([registry_properties(path, {})["basic.auth.user.info"]]) == "me:hidden"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schema_registry": "http://x", "schema_folder": "y"}, "exclude each other"),
        ({"schema_registry": "localhost:8081"}, "must be http"),
        ({"schema_registry": "http://me:hidden@x"}, "the value is not shown"),
        ({"format": "xml"}, "input.format"),
    ],
)
def test_a_wrong_configuration_says_what_to_do(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        open_schemas(load(environ={}, overrides={"input": given}))
    assert "hidden" not in str(raised.value)


# -- a real registry -----------------------------------------------------------------------------


@pytest.mark.slow
def test_records_are_read_with_the_schemas_of_a_real_registry(tmp_path: Path) -> None:
    try:
        with registry(tmp_path / "registry.log") as url:
            features = json.dumps({**FEATURES, "namespace": "ads"})
            register(url, "features", features)
            other = {"features": ["null", "ads.Features"]}
            fields = [
                {**field, "type": other.get(field["name"], field["type"])}
                for field in EVENT["fields"]
            ]
            text = json.dumps({**EVENT, "fields": fields})
            reference = {"name": "ads.Features", "subject": "features", "version": 1}
            id = register(url, "clicks-value", text, references=[reference])
            data = body(EVENT, SHOWN)  # the same bytes
            records = pa.array([confluent(id, data), confluent(id + 999, data)], pa.large_binary())
            decoder = Decoder(FIELDS, schemas=SchemaRegistry(url))
            events, rejections = decoder.decode(records)
            assert events.impressions.features["app"].to_pylist() == ["maps"]
            assert rejections.reason == ["unknown_schema"]
    except RegistryMissing as missing:
        pytest.skip(str(missing))
