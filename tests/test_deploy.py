"""What is shipped around the package: constraints, container files and the client.properties example speak of the package as it is."""

import os
import re
import shlex
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.brokers import KafkaMissing, find_kafka
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
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())  # type: ignore[no-any-return]


def instructions(name: str) -> list[str]:
    """The arguments of each `name` instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


# -- constraints ---------------------------------------------------------------------------------


def test_every_declared_dependency_is_pinned_to_a_version_in_its_declared_range() -> None:
    declared = [
        Requirement(text)
        for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for text in group
    ]
    for requirement in declared:
        if requirement.name != PROJECT["name"]:
            assert PINNED[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pins_are_exact_and_sorted_within_their_group_and_fit_any_build_of_torch() -> None:
    for group in (ROOT / "constraints.txt").read_text().split("\n\n"):
        pins = [line for line in group.splitlines() if not line.startswith("#")]
        assert pins == sorted(pins, key=lambda pin: pin.split("==")[0])
        assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)


# -- Dockerfile ----------------------------------------------------------------------------------


def test_the_image_starts_the_command_that_the_package_installs_and_not_as_root() -> None:
    assert instructions("ENTRYPOINT") == [f'["{next(iter(PROJECT["scripts"]))}"]']
    assert instructions("USER") == ["stream-ctr"]


def test_all_that_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
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


def test_the_trainer_is_started_with_options_that_the_command_line_knows() -> None:
    name, *options = compose()["services"]["trainer"]["command"]
    context = main.commands[name].make_context(name, options)  # parses, checks, and does not run
    assert context.params["topic"] == "clicks"
    assert context.params["state"] == Path("/state")
    listeners = compose()["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"CONTAINERS://{context.params['bootstrap_servers']}" in listeners.split(",")


def created_topics() -> dict[str, list[str]]:
    """The topics that the one-shot service creates, and the arguments of each."""
    lines = compose()["services"]["topics"]["command"][0].splitlines()
    created = [shlex.split(line)[1:] for line in lines if line.startswith("create ")]
    return {arguments[arguments.index("--topic") + 1]: arguments for arguments in created}


def test_the_topics_created_are_those_that_a_run_with_default_configuration_uses() -> None:
    config = Config()
    topic = config.input.topic
    assert set(created_topics()) == {
        topic,
        f"{topic}.dlq",
        config.metrics.topic,
        config.snapshots.topic,
    }
    assert "cleanup.policy=compact" in created_topics()[config.snapshots.topic]


@pytest.mark.slow
def test_apache_kafka_starts_with_the_settings_of_the_stack_and_creates_its_topics(
    tmp_path: Path,
) -> None:
    """Without a container: the settings as the image turns them into properties, on loopback, and the very commands of the one-shot."""
    try:
        kafka = find_kafka()
    except KafkaMissing as missing:
        pytest.skip(str(missing))
    services = compose()["services"]
    ports = {inside: str(free_port()) for inside in ("9092", "9093", "19092")}

    def here(text: str) -> str:
        named = (
            text.replace("://:", "://127.0.0.1:")
            .replace("kafka:", "127.0.0.1:")
            .replace("localhost:", "127.0.0.1:")
        )
        return re.sub(r"\b(19092|9092|9093)\b", lambda port: ports[port[0]], named)

    environment = {
        name: here(str(value))
        for name, value in services["kafka"]["environment"].items()
        if name != "KAFKA_HEAP_OPTS"
    }
    properties = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): value
        for name, value in environment.items()
    }
    properties["log.dirs"] = str(tmp_path / "data")
    configuration = tmp_path / "server.properties"
    configuration.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    storage = kafka.command(
        "kafka.tools.StorageTool",
        "format",
        "--cluster-id",
        "5L6g3nShT-eMCtK--X86sw",
        "--config",
        str(configuration),
    )
    subprocess.run(storage, check=True, capture_output=True, timeout=PATIENCE_SECONDS)
    with open(tmp_path / "server.log", "wb") as log:
        command = dies_with_parent(kafka.command("kafka.Kafka", str(configuration)))
        broker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while not answers_metadata(int(ports["9092"])):
            assert broker.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.05)
        topics = shlex.join(kafka.command("org.apache.kafka.tools.TopicCommand"))
        shell = [*services["topics"]["entrypoint"], *services["topics"]["command"]]
        script = here(
            shell[-1].replace("$$", "$").replace("/opt/kafka/bin/kafka-topics.sh", topics)
        )
        for _ in range(2):  # a second `up` runs it again
            subprocess.run(
                [*shell[:-1], script], check=True, capture_output=True, timeout=PATIENCE_SECONDS
            )
        describe = kafka.command(
            "org.apache.kafka.tools.TopicCommand",
            "--bootstrap-server",
            f"127.0.0.1:{ports['9092']}",
            "--describe",
        )
        described = subprocess.run(
            describe, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        ).stdout
    finally:
        broker.terminate()
        try:
            broker.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            broker.kill()
            broker.wait()
    found = dict(re.findall(r"Topic: (\S+)\tTopicId: \S+\tPartitionCount: (\d+)", described))
    assert found == {
        name: arguments[arguments.index("--partitions") + 1]
        for name, arguments in created_topics().items()
    }
    assert re.search(
        r"Topic: stream-ctr\.snapshots\t.*Configs: .*cleanup\.policy=compact", described
    )


# -- client.properties ---------------------------------------------------------------------------


def test_the_example_of_a_secure_connection_is_understood_and_checks_host_names(
    tmp_path: Path,
) -> None:
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
