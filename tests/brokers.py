"""Starts a real Apache Kafka broker (KRaft, one node, loopback) from the jars of any Kafka installation, for tests."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from connectors.embedded import answers_metadata, dies_with_parent, free_port

START_SECONDS = 60.0
SASL_USER, SASL_PASSWORD = "tester", "marker-secret-5f2c"
_JAVA_OPTIONS = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


class KafkaMissing(Exception):
    """No Apache Kafka can be started here; the message is the reason to skip."""


@dataclass(frozen=True, slots=True)
class Installation:
    """A Kafka installation: `home/libs` holds its jars, `java` runs them."""

    home: Path
    java: str
    version: str

    def __str__(self) -> str:
        return f"Apache Kafka {self.version} from {self.home}"

    def command(self, main: str, *arguments: str) -> list[str]:
        return [self.java, *_JAVA_OPTIONS, "-cp", f"{self.home}/libs/*", main, *arguments]


@dataclass(frozen=True, slots=True)
class ApacheBroker:
    """A running broker: a plain listener, and one where clients log in (SASL_PLAINTEXT, PLAIN, `SASL_USER` and `SASL_PASSWORD`)."""

    bootstrap_servers: str
    sasl_servers: str
    process: subprocess.Popen[bytes]


def find_kafka() -> Installation:
    """The installation in `KAFKA_HOME`, else in `../shared/kafka` beside the checkout; `KafkaMissing` says what is lacking."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "kafka"
    home = Path(os.environ.get("KAFKA_HOME") or beside)
    server_jar = next(iter(sorted(home.glob("libs/kafka_2.*.jar"))), None)
    if server_jar is None:
        raise KafkaMissing(f"no Apache Kafka in {home}: set KAFKA_HOME to a distribution that has libs/*.jar")
    java = shutil.which("java")
    if java is None:
        raise KafkaMissing("Apache Kafka needs java on the PATH")
    version = re.fullmatch(r"kafka_[\d.]+-(.+)\.jar", server_jar.name)
    return Installation(home, java, version[1] if version else "of unknown version")


@contextlib.contextmanager
def apache_broker(kafka: Installation, directory: Path | None = None) -> Iterator[ApacheBroker]:
    """A broker on free ports with its data in `directory` (a temporary one unless given), killed at the end or when this process dies."""
    with contextlib.ExitStack() as stack:
        home = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kafka-")))
        plain, sasl, controller = free_port(), free_port(), free_port()
        configuration = home / "server.properties"
        configuration.write_text(_server_properties(home / "data", plain, sasl, controller))
        _format(kafka, configuration)
        with open(home / "server.log", "ab") as log:
            process = subprocess.Popen(
                dies_with_parent(kafka.command("kafka.Kafka", str(configuration))),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(_kill, process)
        _wait_until_ready(process, plain, home / "server.log")
        yield ApacheBroker(f"127.0.0.1:{plain}", f"127.0.0.1:{sasl}", process)


def _server_properties(data: Path, plain: int, sasl: int, controller: int) -> str:
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{SASL_USER}="{SASL_PASSWORD}";'
    properties = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "log.dirs": data,
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": f"PLAIN://127.0.0.1:{plain},LOGIN://127.0.0.1:{sasl},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAIN://127.0.0.1:{plain},LOGIN://127.0.0.1:{sasl}",
        "listener.security.protocol.map": "PLAIN:PLAINTEXT,LOGIN:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAIN",
        "controller.listener.names": "CONTROLLER",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.login.plain.sasl.jaas.config": login,
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 1,
        "group.initial.rebalance.delay.ms": 0,
        "log.cleaner.dedupe.buffer.size": 4 << 20,
    }
    return "".join(f"{key}={value}\n" for key, value in properties.items())


def _format(kafka: Installation, configuration: Path) -> None:
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    command = kafka.command("kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", str(configuration))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    if done.returncode:
        raise KafkaMissing(f"{kafka} cannot format its storage: {done.stderr or done.stdout}")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers_metadata(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise KafkaMissing(f"Apache Kafka did not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
