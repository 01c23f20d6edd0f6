"""Brokers for end-to-end tests, and the options that run the fault matrix.

Tests use the embedded broker, and a real Apache Kafka where one is installed. The summary says
which brokers were used.
"""

from __future__ import annotations

import signal
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support import (
    forks,
    interpreter,  # noqa: F401 - before Triton is imported
)
from support.brokers import ApacheBroker, KafkaMissing, find_kafka
from support.compiling import share_compiling
from support.patience import end_of, kill_started
from support.reliability import MATRIX, Outcome, Report
from support.served import served  # noqa: F401 - a fixture
from support.trainers import stream  # noqa: F401 - a fixture

from stream_ctr.connectors import embedded
from stream_ctr.connectors.embedded import EmbeddedBroker, embedded_version
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.learn import baseline

# These are separate programs. Some need packages that only a peer's environment has.
collect_ignore_glob = ["bench/contenders/*"]

_BROKERS_USED = pytest.StashKey[list[str]]()
_REPORT = pytest.StashKey[Report]()
_OUTCOME = pytest.StashKey[Outcome]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        metavar="PAGE",
        help="run the long tests too, and write the results of the marked tests into PAGE",
    )
    parser.addoption("--long", action="store_true", help="run the long tests too")
    parser.addoption(
        "--fault-rows",
        metavar="N,N",
        default="",
        help="with --faults: only the tests of these rows of the fault matrix",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BROKERS_USED] = []
    config.stash[_REPORT] = Report()
    # A shell starts what runs in the background with this signal ignored, and so would what the
    # tests start. Once it is caught here, it is not ignored there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    share_compiling()
    if config.pluginmanager.has_plugin("xdist"):
        config.option.loadscopereorder = False  # it would put those with the most tests first
    # Hypothesis draws the same examples in every run, and without deadlines; with --faults it draws
    # more and different ones.
    anew = bool(config.getoption("--faults"))
    patient: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile(
        "tests", derandomize=not anew, max_examples=100 if anew else 40, **patient
    )
    settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--faults"):
        for item in items:
            if item.get_closest_marker("long") and not config.getoption("--long"):
                item.add_marker(pytest.mark.skip(reason="long: make long and make faults run it"))
    elif config.getoption("--fault-rows"):
        rows = set(_rows(config))
        selected = [
            item for item in items if rows & {mark.args[0] for mark in item.iter_markers("fault")}
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected
    items.sort(key=_order_of_files(items))


def _order_of_files(items: Sequence[pytest.Item]) -> Callable[[pytest.Item], float]:
    """Return a key that sorts files by how long they take, the longest first.

    Processes that take a file each then end at about the same time.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        if not item.get_closest_marker("skip"):
            seconds[item.path] += 50 if item.get_closest_marker("slow") else 1  # tenths
    return lambda item: -seconds[item.path]


def _rows(config: pytest.Config) -> list[int]:
    """Return the rows of the fault matrix to run."""
    rows = config.getoption("--fault-rows")
    return [int(row) for row in rows.split(",")] if rows else list(MATRIX)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure no coverage in slow tests, which tracing makes up to twice as slow.

    Nor in those of Hypothesis: its own code is traced too, and other tests run the same lines.
    """
    measuring: Any = item.config.pluginmanager.get_plugin("_cov")
    drawn = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    if measuring is None or not (drawn or item.get_closest_marker("slow")):
        return (yield)
    measuring.cov_controller.pause()
    try:
        return (yield)
    finally:
        measuring.cov_controller.resume()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    result = yield
    if result.when == "call" or not result.passed:  # without a call, the setup skipped or failed
        item.config.stash[_REPORT].add(item, result, item.stash.get(_OUTCOME, Outcome()))
    if result.failed:
        result.sections += _ends_of_logs(item)
    return result


def _ends_of_logs(item: pytest.Item) -> list[tuple[str, str]]:
    """Return (title, last lines) of each log file that a process of the test has written."""
    fixtures: dict[str, Any] = getattr(item, "funcargs", {})
    directory = fixtures.get("tmp_path")
    apache = fixtures.get("apache")
    logs: list[Path] = []
    if directory:
        logs += [*sorted(directory.glob("*.log")), *sorted(directory.glob("*/*.log"))]
    if apache:
        logs.append(apache.log)
    return [
        (f"end of {log.name}", end_of(log.read_text(errors="replace")))
        for log in logs
        if log.is_file()
    ]


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Show the end of a long text that lacks something, which pytest would shorten."""
    if op == "in" and isinstance(left, str) and isinstance(right, str) and len(right) > 200:
        return [f"{left!r} in the text that ends with", *end_of(right).splitlines()]
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the brokers that a worker of pytest-xdist has used."""
    brokers_used = node.config.stash[_BROKERS_USED]
    brokers_used += [
        broker
        for broker in getattr(node, "workeroutput", {}).get("brokers_used", [])
        if broker not in brokers_used
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["brokers_used"] = session.config.stash[_BROKERS_USED]
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
    brokers_used = config.stash[_BROKERS_USED]
    if brokers_used:
        terminalreporter.write_line(f"broker: the tests used {'; '.join(brokers_used)}")
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
def _long_timeouts() -> Iterator[None]:
    """Raise the timeouts of clients and brokers: on a busy machine answers come late."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("BOOTSTRAP_SECONDS", "ANSWER_SECONDS", "TOPIC_MISSING_SECONDS"):
            patch.setattr(timeouts, limit, 30.0)
        patch.setattr(embedded, "START_SECONDS", 60.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_baselines() -> Iterator[None]:
    """Fork the processes of baselines, which take two seconds to start by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "Popen", forks.Process)
        yield


@pytest.fixture(autouse=True)
def _kill_processes() -> Iterator[None]:
    yield
    kill_started()


@pytest.fixture(scope="session")
def embedded_broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """The bootstrap servers of an embedded broker."""
    try:
        version = embedded_version()
    except EmbeddedUnavailable as error:
        pytest.skip(str(error))
    with EmbeddedBroker() as broker:
        request.config.stash[_BROKERS_USED].append(f"embedded Tansu {version}")
        yield broker.bootstrap_servers


@pytest.fixture(scope="session")
def apache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApacheBroker]:
    """A real Apache Kafka broker. Tests that need it are skipped where none is installed."""
    try:
        installation = find_kafka()
    except KafkaMissing as error:
        pytest.skip(str(error))
    with ApacheBroker(installation, Path(tmp_path_factory.mktemp("kafka"))) as broker:
        request.config.stash[_BROKERS_USED].append(str(installation))
        yield broker


@pytest.fixture(scope="session")
def kafka_broker(apache: ApacheBroker) -> str:
    """The bootstrap servers of a real Apache Kafka broker."""
    return apache.bootstrap_servers


@pytest.fixture(scope="session")
def kafka_version(apache: ApacheBroker) -> str:
    """The name and version of the real broker, for the report."""
    return f"Apache Kafka {find_kafka().version}"


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.slow)])
def broker(request: pytest.FixtureRequest) -> str:
    """The bootstrap servers of the embedded broker and of a real one, in turn."""
    fixture = {"embedded": "embedded_broker", "apache": "kafka_broker"}[request.param]
    servers: str = request.getfixturevalue(fixture)
    return servers


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """The outcome that the reliability page shows for this test if it passes."""
    request.node.stash[_OUTCOME] = Outcome()
    return request.node.stash[_OUTCOME]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True when the whole fault matrix runs, with more rounds and longer waits."""
    return bool(request.config.getoption("--faults"))


@pytest.fixture
def topic() -> str:
    """The name of a new topic."""
    return f"topic-{uuid.uuid4().hex[:12]}"
