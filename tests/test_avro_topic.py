"""A topic of Avro records, from the command line to the model."""

from __future__ import annotations

import json
import uuid
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.avro import EVENT, body, confluent
from support.commands import command, own_topics, read_headers, succeed
from support.lineage import QUICK, last_report, newest

from stream_ctr.connectors.kafka import KafkaSink, client_options, ensure_topic

T = 1_735_689_600_000


def events(n: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(1)
    return [
        {
            "kind": "example",
            "impression_id": index,
            "time": T + 100 * index,
            "label": int(rng.random() < 0.3),
            "features": {"app": f"a{rng.integers(20)}", "age": float(rng.integers(60))},
        }
        for index in range(n)
    ]


def send(servers: str, topic: str, records: list[bytes]) -> None:
    client = client_options(servers, {})
    ensure_topic(client, topic)
    with closing(KafkaSink(client)) as sink:
        sink.send_batch(topic, pa.array(records, pa.large_binary()))


@pytest.mark.slow
def test_avro_teaches_the_same_model_as_json_with_fields_inferred_from_either(
    embedded_broker: str, tmp_path: Path
) -> None:
    name = f"avro-{uuid.uuid4().hex[:8]}"
    examples = events(1500)
    schemas = tmp_path / "schemas"
    schemas.mkdir()
    (schemas / "7.avsc").write_text(json.dumps(EVENT))
    formats = {
        "avro": [
            *(confluent(7, body(EVENT, event)) for event in examples),
            confluent(8, b"x"),
        ],
        "json": [json.dumps(event).encode() for event in examples],
    }
    learned = {}
    for format, records in formats.items():
        topic = f"{name}-{format}"
        send(embedded_broker, topic, records)
        state = tmp_path / format
        succeed(
            *("run", "--bootstrap-servers", embedded_broker, "--topic", topic, "--until-end"),
            *("--state", state, *QUICK, *own_topics(topic)),
            *("-X", f"input.schema_folder={schemas}"),
        )
        learned[format] = newest(state)
    assert learned["avro"] is not None
    assert learned["json"] is not None
    assert learned["avro"].weights_sha256 == learned["json"].weights_sha256
    assert learned["avro"].ledger == learned["json"].ledger
    counters = last_report(tmp_path / "avro")["counters"]
    assert counters["labelled"] == 1500
    assert counters["rejected.unknown_schema"] == 1
    ((value, headers),) = read_headers(embedded_broker, f"{name}-avro.dlq")
    assert value == confluent(8, b"x")
    message = headers["__stream_ctr.errors.message"].decode()
    assert message.startswith("Confluent framing, schema id 8: the schema folder")


@pytest.mark.slow
def test_a_registry_that_is_down_ends_the_run_and_rejects_nothing(
    embedded_broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_ctr.connectors.record_schemas.PATIENCE_SECONDS", 0.3)
    topic = f"avro-{uuid.uuid4().hex[:8]}"
    send(embedded_broker, topic, [confluent(7, body(EVENT, event)) for event in events(50)])
    result = command(
        *("run", "--bootstrap-servers", embedded_broker, "--topic", topic, "--until-end"),
        *("--state", tmp_path / "state", *QUICK, *own_topics(topic)),
        *("-X", "input.schema_registry=http://127.0.0.1:9"),
        *("-X", "basic.auth.user.info=me:hidden"),
    )
    assert result.exit_code == 4, result.output
    assert "the schema registry http://127.0.0.1:9 does not answer" in result.output
    assert "hidden" not in result.output
    assert read_headers(embedded_broker, f"{topic}.dlq") == []
