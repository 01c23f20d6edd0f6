"""Commands run in this process, and topics of their own."""

from __future__ import annotations

from click.testing import CliRunner, Result

from stream_ctr.cli.main import main
from stream_ctr.connectors import kafka


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = command(*arguments)
    assert result.exit_code == 0, result.output + (
        repr(result.exception) if result.exception else ""
    )
    return result


def own_topics(topic: str) -> list[str]:
    """Metrics and snapshots on topics of this test alone."""
    return ["-X", f"metrics.topic={topic}.metrics", "-X", f"snapshots.topic={topic}.snapshots"]


def read_records(servers: str, topic: str) -> list[kafka.StoredRecord]:
    return list(kafka.stored_records(kafka.client_options(servers, {}), topic))


def read_headers(servers: str, topic: str) -> list[tuple[bytes, dict[str, bytes]]]:
    return [(record.value or b"", dict(record.headers)) for record in read_records(servers, topic)]
