"""The stack of compose.yaml agrees with itself and with the package, and its commands run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.brokers import Installation, KafkaMissing, find_kafka
from support.commands import succeed
from support.deployment import (
    DEPLOY,
    checked,
    compose,
    health_check,
    image_user,
    parsed,
    require_module,
    seconds_for_a_snapshot,
)
from support.patience import PATIENCE_SECONDS, started, wait_until

from stream_ctr.config import Config, duration
from stream_ctr.connectors.embedded import (
    EmbeddedBroker,
    answers_metadata,
    dies_with_parent,
    free_port,
)
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.logs.simulate import Simulation

SERVICES = compose()["services"]
OURS = ("trainer", "server")


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return the source of each volume of a service by its place in the container."""
    return {line.split(":")[1]: line.split(":")[0] for line in service.get("volumes", [])}


def command_of(name: str) -> dict[str, Any]:
    return parsed(SERVICES[name]["command"])


# -- the file ------------------------------------------------------------------------------------


def test_the_file_follows_the_compose_specification() -> None:
    require_module("check_jsonschema")
    schema = ["--builtin-schema", "vendor.compose-spec"]
    checked(sys.executable, "-m", "check_jsonschema", *schema, DEPLOY / "compose.yaml")


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports)
    assert len(ports) == len(set(ports))


def test_services_wait_for_services_and_use_volumes_and_secrets_that_exist() -> None:
    stack = compose()
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        named = {source for source in mounts(service).values() if not source.startswith("./")}
        assert named <= set(stack["volumes"])
        assert set(service.get("secrets", [])) <= set(stack["secrets"])
    used = {source for service in SERVICES.values() for source in mounts(service).values()}
    assert set(stack["volumes"]) <= used


def test_a_service_that_others_wait_for_to_be_healthy_has_a_check() -> None:
    for service in SERVICES.values():
        waits = service.get("depends_on", {})
        for name in waits if isinstance(waits, dict) else ():
            if waits[name]["condition"] == "service_healthy":
                # The image of the trainer has a check of its own.
                assert "healthcheck" in SERVICES[name] or SERVICES[name]["image"] == "stream-ctr"


def test_images_of_others_are_pinned_to_a_release() -> None:
    images = {service["image"] for service in SERVICES.values()} - {"stream-ctr"}
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image) for image in images), images


def test_secrets_are_files_that_git_ignores() -> None:
    for secret in compose()["secrets"].values():
        path = DEPLOY / secret["file"]
        assert path.parent == DEPLOY / "secrets"
        assert (path.parent / ".gitignore").read_text().split() == ["*", "!.gitignore"]


def test_files_that_are_mounted_exist() -> None:
    files = [
        source
        for service in SERVICES.values()
        for source in mounts(service).values()
        if source.startswith("./")
    ]
    assert files
    assert [file for file in files if not (DEPLOY / file).is_file()] == []


# -- our own services ----------------------------------------------------------------------------


def test_trainer_and_server_are_started_with_valid_options() -> None:
    trainer, server = command_of("trainer"), command_of("server")
    assert trainer["topic"] == Config().input.topic
    listeners = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"CONTAINERS://{trainer['bootstrap_servers']}" in listeners.split(",")
    assert trainer["state"] == server["state"]


@pytest.mark.parametrize("name", OURS)
def test_ports_token_and_folders_are_those_of_the_container(name: str) -> None:
    service, options = SERVICES[name], command_of(name)
    host, _, port = str(options["http"]).rpartition(":")
    assert host == "0.0.0.0"
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert str(options["http_token_file"]) == f"/run/secrets/{service['secrets'][0]}"
    assert str(options["state"]) in mounts(service)
    assert "/cache" in mounts(service)
    health = service.get("environment", {}).get("HEALTH_URL", "http://127.0.0.1:9100/healthz")
    assert health == f"http://127.0.0.1:{port}/healthz"


def test_the_server_cannot_write_to_the_state_of_the_trainer() -> None:
    assert "state:/state" in SERVICES["trainer"]["volumes"]
    assert "state:/state:ro" in SERVICES["server"]["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_no_rights_that_they_do_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    assert "no-new-privileges:true" in service["security_opt"]


def test_a_trainer_has_time_for_its_last_snapshot_on_a_slow_disk() -> None:
    grace = duration(SERVICES["trainer"]["stop_grace_period"]).total_seconds()
    assert grace > seconds_for_a_snapshot()


# -- Prometheus and Grafana ----------------------------------------------------------------------


def test_prometheus_scrapes_both_services_with_the_token() -> None:
    service = SERVICES["prometheus"]
    inside = {place: source for place, source in mounts(service).items() if "yaml" in place}
    [option] = [word for word in service["command"] if word.startswith("--config.file=")]
    path = option.removeprefix("--config.file=")
    configuration = yaml.safe_load((DEPLOY / inside[path]).read_text())
    for rules in configuration["rule_files"]:
        assert str(Path(path).parent / rules) in inside
    targets: set[str] = set()
    for job in configuration["scrape_configs"]:
        if job.get("job_name") == "prometheus":
            continue
        assert job["authorization"]["credentials_file"] == "/run/secrets/http-token"
        targets.update(target for group in job["static_configs"] for target in group["targets"])
    expected = {f"{name}:{str(command_of(name)['http']).rpartition(':')[2]}" for name in OURS}
    assert expected <= targets
    assert service["secrets"] == ["http-token"]
    assert service["group_add"] == [str(image_user())]


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    places = mounts(SERVICES["grafana"])
    provisioning = "/etc/grafana/provisioning"
    sources = yaml.safe_load((DEPLOY / "grafana" / "datasources.yaml").read_text())
    [source] = sources["datasources"]
    [port] = SERVICES["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{port.rpartition(':')[2]}"
    dashboards = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())
    [provider] = dashboards["providers"]
    folder = provider["options"]["path"]
    assert places[f"{folder}/stream-ctr.json"] == "./grafana-dashboard.json"
    assert places[f"{provisioning}/datasources/stream-ctr.yaml"] == "./grafana/datasources.yaml"
    assert places[f"{provisioning}/dashboards/stream-ctr.yaml"] == "./grafana/dashboards.yaml"


# -- Kafka ---------------------------------------------------------------------------------------


def created_topics() -> dict[str, list[str]]:
    """Return the arguments with which the one-shot service creates each topic."""
    lines = SERVICES["topics"]["command"][0].splitlines()
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
        self.services = SERVICES
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


# -- the commands as processes -------------------------------------------------------------------


class LocalService:
    """The command of a service of ours, run here with the folders and addresses of a test."""

    def __init__(self, name: str, folder: Path, broker: str) -> None:
        options = command_of(name)
        self.port = free_port()
        self.log = folder / f"{name}.log"
        self.grace = duration(SERVICES[name]["stop_grace_period"]).total_seconds()
        self.health = {"HEALTH_URL": f"http://127.0.0.1:{self.port}/healthz"}
        replaced = {
            str(options["http"]).rpartition(":")[2]: str(self.port),
            str(options["state"]): str(folder / "state"),
            str(options["http_token_file"].parent): str(folder),
            str(options.get("bootstrap_servers", "kafka:19092")): broker,
        }
        pattern = "|".join(map(re.escape, replaced))
        self.words = [
            re.sub(f"(?<=[=:])({pattern})", lambda found: replaced[found[0]], word)
            for word in SERVICES[name]["command"]
        ]

    def start(self) -> None:
        command = [sys.executable, "-m", "stream_ctr", *self.words]
        with self.log.open("wb") as log:
            self.process = started(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def is_healthy(self) -> bool:
        """Run the health check of the image; fail if the process has ended."""
        assert self.process.poll() is None, self.log.read_text()
        return health_check(self.health["HEALTH_URL"]) == 0

    def ask(self, path: str, token: str, rows: object = None) -> tuple[int, bytes]:
        body = None if rows is None else json.dumps({"rows": rows}).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(self.grace) == 0, self.log.read_text()


SMALL = {
    "STREAM_CTR_MODEL__TABLE_BITS": "12",
    "STREAM_CTR_MODEL__HIDDEN": "16",
    "STREAM_CTR_LEARN__BATCH_SIZE": "128",
    "STREAM_CTR_JOIN__LABEL_WINDOW": "30s",
    "STREAM_CTR_SCHEDULE__SNAPSHOT_EXAMPLES": "500",
}


@pytest.fixture
def own_broker() -> Iterator[str]:
    """The bootstrap servers of a broker without topics."""
    try:
        with EmbeddedBroker() as broker:
            yield broker.bootstrap_servers
    except EmbeddedUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_trainer_and_server_run_with_the_commands_of_the_stack(
    tmp_path: Path, own_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "http-token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    token.chmod(0o640)
    for variable, value in SMALL.items():
        monkeypatch.setenv(variable, value)
    log = tmp_path / "events.jsonl"
    Simulation(3000, seed=1).write_jsonl(log)
    succeed("replay", log, "--topic", "clicks", "--bootstrap-servers", own_broker)
    trainer, server = (LocalService(name, tmp_path, own_broker) for name in OURS)
    secret = token.read_text().strip()
    trainer.start()
    wait_until(trainer.is_healthy, explain=trainer.log.read_text)
    assert trainer.ask("/metrics", "a wrong token")[0] == 401
    assert trainer.ask("/metrics", secret)[0] == 200
    wait_until(lambda: trainer.ask("/readyz", "")[0] == 200, explain=trainer.log.read_text)
    server.start()
    wait_until(server.is_healthy, explain=server.log.read_text)
    wait_until(lambda: server.ask("/readyz", "")[0] == 200, explain=server.log.read_text)
    status, body = server.ask("/predict", secret, [{"app_id": "a1", "hour": "20"}, {"hour": "3"}])
    assert status == 200, body
    assert len(json.loads(body)["probabilities"]) == 2
    trainer.stop()
    server.stop()
