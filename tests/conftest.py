"""Brokers for end-to-end tests: the embedded one, and a real Apache Kafka where there is one. The report says which were spoken to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import ApacheBroker, KafkaMissing, find_kafka

from connectors.embedded import EmbeddedBroker, EmbeddedUnavailable, embedded_version

_SPOKEN_TO = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SPOKEN_TO] = []


def pytest_report_header() -> str:
    return f"brokers: {_describe_embedded()}; {_describe_apache()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    spoken_to = config.stash[_SPOKEN_TO]
    if spoken_to:
        terminalreporter.write_line(f"broker: the tests spoke to {'; '.join(spoken_to)}")


def _describe_embedded() -> str:
    try:
        return f"embedded Tansu {embedded_version()}"
    except EmbeddedUnavailable as error:
        return str(error)


def _describe_apache() -> str:
    try:
        return str(find_kafka())
    except KafkaMissing as error:
        return str(error)


@pytest.fixture(scope="session")
def embedded_broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """The bootstrap servers of an embedded broker."""
    try:
        version = embedded_version()
    except EmbeddedUnavailable as error:
        pytest.skip(str(error))
    with EmbeddedBroker() as broker:
        request.config.stash[_SPOKEN_TO].append(f"embedded Tansu {version}")
        yield broker.bootstrap_servers


@pytest.fixture(scope="session")
def apache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheBroker]:
    """A real Apache Kafka broker; tests that need it are skipped, with the reason, where there is none."""
    try:
        kafka = find_kafka()
    except KafkaMissing as error:
        pytest.skip(str(error))
    with ApacheBroker(kafka, Path(tmp_path_factory.mktemp("kafka"))) as broker:
        request.config.stash[_SPOKEN_TO].append(str(kafka))
        yield broker


@pytest.fixture(scope="session")
def kafka_broker(apache: ApacheBroker) -> str:
    """The bootstrap servers of a real Apache Kafka broker."""
    return apache.bootstrap_servers


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.slow)])
def broker(request: pytest.FixtureRequest) -> str:
    """The bootstrap servers of the embedded broker and of a real one, in turn."""
    servers: str = request.getfixturevalue({"embedded": "embedded_broker", "apache": "kafka_broker"}[request.param])
    return servers


@pytest.fixture
def topic() -> str:
    """The name of a topic that nobody has used."""
    return f"topic-{uuid.uuid4().hex[:12]}"
