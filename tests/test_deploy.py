"""The files in deploy/ and the constraints must agree with the package."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.brokers import Installation, KafkaMissing, find_kafka
from support.patience import PATIENCE_SECONDS

from stream_ctr.cli.main import main
from stream_ctr.config import Config
from stream_ctr.connectors.embedded import answers_metadata, dies_with_parent, free_port
from stream_ctr.connectors.kafka.options import client_options, parse_properties

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def instructions(name: str) -> list[str]:
    """Return the arguments of each `name` instruction of the Dockerfile."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


# -- constraints ---------------------------------------------------------------------------------


def test_every_dependency_is_pinned_within_its_declared_range() -> None:
    declared = [
        Requirement(text)
        for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for text in group
    ]
    for requirement in declared:
        if requirement.name != PROJECT["name"]:
            assert PINNED[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pins_are_exact_sorted_and_without_local_versions() -> None:
    for group in (ROOT / "constraints.txt").read_text().split("\n\n"):
        pins = [line for line in group.splitlines() if not line.startswith("#")]
        assert pins == sorted(pins, key=lambda pin: pin.split("==")[0])
        assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)


# -- Dockerfile ----------------------------------------------------------------------------------


def test_the_image_starts_the_installed_command_and_not_as_root() -> None:
    assert instructions("ENTRYPOINT") == [f'["{next(iter(PROJECT["scripts"]))}"]']
    assert instructions("USER") == ["stream-ctr"]


def test_every_file_that_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in instructions("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert copied == sent
    assert [source for source in copied if not (ROOT / source).exists()] == []


# -- compose.yaml --------------------------------------------------------------------------------


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [
        port for service in compose()["services"].values() for port in service.get("ports", [])
    ]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)


def test_services_wait_for_services_and_use_volumes_that_exist() -> None:
    stack = compose()
    for service in stack["services"].values():
        assert set(service.get("depends_on", {})) <= set(stack["services"])
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(
            stack["volumes"]
        )


def test_the_trainer_is_started_with_valid_options() -> None:
    name, *options = compose()["services"]["trainer"]["command"]
    context = main.commands[name].make_context(name, options)  # parses and validates only
    assert context.params["topic"] == "clicks"
    assert context.params["state"] == Path("/state")
    listeners = compose()["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"CONTAINERS://{context.params['bootstrap_servers']}" in listeners.split(",")


def created_topics() -> dict[str, list[str]]:
    """Return the arguments with which the one-shot service creates each topic."""
    lines = compose()["services"]["topics"]["command"][0].splitlines()
    created = [shlex.split(line)[1:] for line in lines if line.startswith("create ")]
    return {arguments[arguments.index("--topic") + 1]: arguments for arguments in created}


def test_the_created_topics_are_those_of_the_default_configuration() -> None:
    config = Config()
    topic = config.input.topic
    assert set(created_topics()) == {
        topic,
        f"{topic}.dlq",
        config.metrics.topic,
        config.snapshots.topic,
    }
    assert "cleanup.policy=compact" in created_topics()[config.snapshots.topic]


CONTAINER_PORTS = ("9092", "9093", "19092")


class LocalStack:
    """Runs the broker of compose.yaml without a container.

    The settings become server properties as the image converts them. Host names and ports are
    replaced by free ports of the loopback interface.
    """

    def __init__(self, kafka: Installation, directory: Path) -> None:
        self.services = compose()["services"]
        self.kafka = kafka
        self.log = directory / "server.log"
        self.configuration = directory / "server.properties"
        self._ports = {inside: str(free_port()) for inside in CONTAINER_PORTS}
        self._data = directory / "data"

    @property
    def port(self) -> int:
        return int(self._ports["9092"])

    def localized(self, text: str) -> str:
        """Return the text with the stack's host names and ports replaced."""
        text = text.replace("://:", "://127.0.0.1:")
        text = text.replace("kafka:", "127.0.0.1:").replace("localhost:", "127.0.0.1:")
        return re.sub(r"\b(19092|9092|9093)\b", lambda port: self._ports[port[0]], text)

    def format_storage(self) -> None:
        properties = {}
        for name, value in self.services["kafka"]["environment"].items():
            if name != "KAFKA_HEAP_OPTS":
                key = name.removeprefix("KAFKA_").lower().replace("_", ".")
                properties[key] = self.localized(str(value))
        properties["log.dirs"] = str(self._data)
        lines = (f"{key}={value}\n" for key, value in properties.items())
        self.configuration.write_text("".join(lines))
        cluster = ["--cluster-id", "5L6g3nShT-eMCtK--X86sw"]
        self.run("kafka.tools.StorageTool", "format", *cluster, "--config", str(self.configuration))

    @contextmanager
    def running(self) -> Iterator[None]:
        command = dies_with_parent(self.kafka.command("kafka.Kafka", str(self.configuration)))
        with open(self.log, "wb") as log:
            broker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while not answers_metadata(self.port):
                assert broker.poll() is None, self.log.read_text()
                time.sleep(0.05)
            yield
        finally:
            broker.terminate()
            try:
                broker.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                broker.kill()
                broker.wait()

    def create_topics(self) -> None:
        """Run the commands of the one-shot service."""
        topics = self.services["topics"]
        words: list[str] = [*topics["entrypoint"], *topics["command"]]
        script = words.pop()
        tool = shlex.join(self.kafka.command("org.apache.kafka.tools.TopicCommand"))
        script = script.replace("$$", "$").replace("/opt/kafka/bin/kafka-topics.sh", tool)
        subprocess.run(
            [*words, self.localized(script)],
            check=True,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
        )

    def describe_topics(self) -> str:
        servers = ["--bootstrap-server", f"127.0.0.1:{self.port}"]
        return self.run("org.apache.kafka.tools.TopicCommand", *servers, "--describe")

    def run(self, main_class: str, *arguments: str) -> str:
        """Run a tool of Kafka and return its standard output."""
        done = subprocess.run(
            self.kafka.command(main_class, *arguments),
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        return done.stdout


@pytest.mark.slow
def test_kafka_starts_with_the_settings_of_the_stack_and_creates_its_topics(
    tmp_path: Path,
) -> None:
    try:
        stack = LocalStack(find_kafka(), tmp_path)
    except KafkaMissing as missing:
        pytest.skip(str(missing))
    stack.format_storage()
    with stack.running():
        stack.create_topics()
        stack.create_topics()  # a second `up` runs it again
        described = stack.describe_topics()
    found = dict(re.findall(r"Topic: (\S+)\tTopicId: \S+\tPartitionCount: (\d+)", described))
    assert found == {
        name: arguments[arguments.index("--partitions") + 1]
        for name, arguments in created_topics().items()
    }
    compacted = r"Topic: stream-ctr\.snapshots\t.*Configs: .*cleanup\.policy=compact"
    assert re.search(compacted, described)


# -- the project's description -------------------------------------------------------------------


def workflow() -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    return yaml.safe_load(text)


def test_the_hosted_ci_calls_ci_run_for_each_python_that_the_project_names() -> None:
    job = workflow()["jobs"]["test"]
    prefix = "Programming Language :: Python :: "
    named = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if prefix in line]
    assert job["strategy"]["matrix"]["python"] == named
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_every_url_of_the_project_has_the_same_base() -> None:
    base = PROJECT["urls"]["Repository"]
    contact = (ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text()
    urls = [*PROJECT["urls"].values(), *re.findall(r"https://\S+", contact)]
    assert [url for url in urls if not url.startswith(base)] == []
    assert base in (ROOT / "CONTRIBUTING.md").read_text()


def test_issue_templates_have_a_name_and_questions() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for path in set(folder.glob("*.yml")) - {folder / "config.yml"}:
        template = yaml.safe_load(path.read_text())
        assert template["name"]
        assert template["description"]
        assert all(question["attributes"]["label"] for question in template["body"])


def test_pre_commit_runs_the_tools_of_the_development_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = [hook["entry"].split()[0] for repo in hooks for hook in repo["hooks"]]
    assert {repo["repo"] for repo in hooks} == {"local"}
    assert set(tools) == {"ruff", "mypy"}
    assert set(tools) <= PINNED.keys()


def test_the_changelog_has_a_section_for_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## \[{re.escape(PROJECT['version'])}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M
    )
    assert "\n## [Unreleased]\n" in changelog


# -- client.properties ---------------------------------------------------------------------------


def test_the_example_of_a_secure_connection_checks_host_names(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("-----BEGIN CERTIFICATE-----\n")
    properties = parse_properties((DEPLOY / "client.properties").read_text())
    assert os.path.isabs(properties["ssl.truststore.location"])
    options = client_options(
        "kafka-1.example.com:9093", {**properties, "ssl.truststore.location": str(authority)}
    )
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert options["sasl_plain_username"] == "stream-ctr"
    assert options["ssl_check_hostname"] is True
    assert options["ssl_cafile"] == str(authority)
    assert "change-me" not in str(options)
