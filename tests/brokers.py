"""Starts a real Apache Kafka broker (KRaft, one node, loopback) from the jars of any Kafka installation, for tests."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

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


class ApacheBroker:
    """A broker on free ports with its data in `directory`, as a context manager: formatted and started, and killed at the end.

    It has a plain listener, and one where clients log in (SASL_PLAINTEXT, PLAIN, `SASL_USER`, `SASL_PASSWORD`). `kill` and `start` restart
    it on the same data and ports. It dies with this process.
    """

    def __init__(self, kafka: Installation, directory: Path) -> None:
        self._kafka = kafka
        self._directory = directory
        self._plain, self._sasl, self._controller = free_port(), free_port(), free_port()
        self.bootstrap_servers = f"127.0.0.1:{self._plain}"
        self.sasl_servers = f"127.0.0.1:{self._sasl}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._format()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        log = self._directory / "server.log"
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                dies_with_parent(self._kafka.command("kafka.Kafka", str(self._configuration))),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not answers_metadata(self._plain):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self._kafka} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def _configuration(self) -> Path:
        return self._directory / "server.properties"

    def _format(self) -> None:
        self._configuration.write_text(self._properties())
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        command = self._kafka.command("kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", str(self._configuration))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{self._kafka} cannot format its storage: {done.stderr or done.stdout}")

    def _properties(self) -> str:
        login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{SASL_USER}="{SASL_PASSWORD}";'
        properties = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "log.dirs": self._directory / "data",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller}",
            "listeners": f"PLAIN://127.0.0.1:{self._plain},LOGIN://127.0.0.1:{self._sasl},CONTROLLER://127.0.0.1:{self._controller}",
            "advertised.listeners": f"PLAIN://127.0.0.1:{self._plain},LOGIN://127.0.0.1:{self._sasl}",
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
            "broker.session.timeout.ms": 2000,  # a killed broker may register again after that long
            "broker.heartbeat.interval.ms": 500,
            "log.cleaner.dedupe.buffer.size": 4 << 20,
        }
        return "".join(f"{key}={value}\n" for key, value in properties.items())
