"""Brokers for end-to-end tests: the embedded one, and a real Apache Kafka where there is one. The report says which were spoken to."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.brokers import ApacheBroker, KafkaMissing, find_kafka
from support.fuzzing import served  # noqa: F401 - a fixture
from support.patience import end_of, end_what_was_started
from support.reliability import MATRIX, Outcome, Report
from support.trainers import stream  # noqa: F401 - a fixture

from stream_ctr.connectors import embedded
from stream_ctr.connectors.embedded import EmbeddedBroker, EmbeddedUnavailable, embedded_version
from stream_ctr.connectors.kafka import timeouts

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports Triton: the GPU's kernels then run on the CPU
    )

collect_ignore_glob = [
    "bench/contenders/*"
]  # programs of their own; some need what only a peer's environment has

_SPOKEN_TO = pytest.StashKey[list[str]]()
_REPORT = pytest.StashKey[Report]()
_OUTCOME = pytest.StashKey[Outcome]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        metavar="PAGE",
        help="run the long tests too, and write what the marked tests showed into PAGE",
    )

    parser.addoption(
        "--fault-rows",
        metavar="N,N",
        default="",
        help="with --faults: only the tests of these rows of the fault matrix",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SPOKEN_TO] = []
    config.stash[_REPORT] = Report()
    # The same examples each time, however long they take; with --faults others each time.
    patient: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("tests", derandomize=not config.getoption("--faults"), **patient)
    settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--faults"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: make faults runs it"))
    elif config.getoption("--fault-rows"):
        rows = set(_rows(config))
        chosen = [
            item for item in items if rows & {mark.args[0] for mark in item.iter_markers("fault")}
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def _rows(config: pytest.Config) -> list[int]:
    asked = config.getoption("--fault-rows")
    return [int(row) for row in asked.split(",")] if asked else list(MATRIX)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    result = yield
    if result.when == "call" or not result.passed:  # a setup that skips or fails has no call
        item.config.stash[_REPORT].add(item, result, item.stash.get(_OUTCOME, Outcome()))
    if result.failed:
        result.sections += _ends_of_logs(item)
    return result


def _ends_of_logs(item: pytest.Item) -> list[tuple[str, str]]:
    """What the processes of a test have written to files, with their names."""
    funcargs: dict[str, Any] = getattr(item, "funcargs", {})
    directory, apache = funcargs.get("tmp_path"), funcargs.get("apache")
    logs = (
        [*sorted(directory.glob("*.log")), *sorted(directory.glob("*/*.log"))] if directory else []
    )
    logs += [apache.log] if apache else []
    return [
        (f"end of {log.name}", end_of(log.read_text(errors="replace")))
        for log in logs
        if log.is_file()
    ]


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Of a long text that lacks something, pytest would show the two ends of a line."""
    if op == "in" and isinstance(left, str) and isinstance(right, str) and len(right) > 200:
        return [f"{left!r} in the text that ends with", *end_of(right).splitlines()]
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: what it spoke to belongs into the report."""
    spoken_to = node.config.stash[_SPOKEN_TO]
    spoken_to += [
        broker
        for broker in getattr(node, "workeroutput", {}).get("spoken_to", [])
        if broker not in spoken_to
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["spoken_to"] = session.config.stash[_SPOKEN_TO]
    page = session.config.getoption("--faults")
    if page and not session.config.getoption("collectonly"):
        report = session.config.stash[_REPORT]
        report.write(Path(page), _rows(session.config))
        if report.failing(_rows(session.config)):
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_report_header() -> str:
    return f"brokers: {_describe_embedded()}; {_describe_apache()}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    spoken_to = config.stash[_SPOKEN_TO]
    if spoken_to:
        terminalreporter.write_line(f"broker: the tests spoke to {'; '.join(spoken_to)}")
    if config.getoption("--faults") and (failing := config.stash[_REPORT].failing(_rows(config))):
        terminalreporter.write_line(
            f"faults: rows without evidence, or with a failure: {', '.join(map(str, failing))}"
        )


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


@pytest.fixture(scope="session", autouse=True)
def _patient_clients() -> Iterator[None]:
    """A broker that has a share of a busy machine answers, if late."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("BOOTSTRAP_SECONDS", "ANSWER_SECONDS", "TOPIC_MISSING_SECONDS"):
            patch.setattr(timeouts, limit, 30.0)
        patch.setattr(embedded, "START_SECONDS", 60.0)
        yield


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    end_what_was_started()


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
def apache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApacheBroker]:
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


@pytest.fixture(scope="session")
def kafka_version(apache: ApacheBroker) -> str:
    """What the report says of the real broker."""
    return f"Apache Kafka {find_kafka().version}"


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.slow)])
def broker(request: pytest.FixtureRequest) -> str:
    """The bootstrap servers of the embedded broker and of a real one, in turn."""
    servers: str = request.getfixturevalue(
        {"embedded": "embedded_broker", "apache": "kafka_broker"}[request.param]
    )
    return servers


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """What the reliability page says of this test when it passes."""
    request.node.stash[_OUTCOME] = Outcome()
    return request.node.stash[_OUTCOME]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the whole fault matrix runs: more rounds, longer waits."""
    return bool(request.config.getoption("--faults"))


@pytest.fixture
def topic() -> str:
    """The name of a topic that nobody has used."""
    return f"topic-{uuid.uuid4().hex[:12]}"
