"""Real Apache Kafka brokers for tests, one or a cluster of three.

They run in KRaft mode on the loopback interface, from the jars of any Kafka installation.
"""

from __future__ import annotations

import base64
import datetime
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faults.proxy import Proxy
from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from stream_ctr.connectors.embedded import answers_metadata, dies_with_parent, free_port

START_SECONDS = 180.0
STOP_SECONDS = 120.0
SASL_USER = "tester"
SASL_PASSWORD = "marker-secret-5f2c"
READER = "reader"  # a user with the rights alone that access lists give it, and SASL_PASSWORD
_HEAP = "-Xmx384m"
_HEAP_OF_THREE = "-Xmx256m"
_JAVA_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


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

    def command(self, main: str, *arguments: str, heap: str = _HEAP) -> list[str]:
        """Return the command line that runs a main class of Kafka's."""
        return [self.java, heap, *_JAVA_OPTIONS, "-cp", f"{self.home}/libs/*", main, *arguments]


def find_kafka() -> Installation:
    """Return the installation in `KAFKA_HOME`, or else in `../shared/kafka` next to the checkout.

    Raises `KafkaMissing` with what is missing.
    """
    next_to_checkout = Path(__file__).resolve().parents[3] / "shared" / "kafka"
    home = Path(os.environ.get("KAFKA_HOME") or next_to_checkout)
    server_jar = next(iter(sorted(home.glob("libs/kafka_2.*.jar"))), None)
    if server_jar is None:
        raise KafkaMissing(
            f"no Apache Kafka in {home}: set KAFKA_HOME to a distribution that has libs/*.jar"
        )
    java = shutil.which("java")
    if java is None:
        raise KafkaMissing("Apache Kafka needs java on the PATH")
    version = re.fullmatch(r"kafka_[\d.]+-(.+)\.jar", server_jar.name)
    return Installation(home, java, version[1] if version else "of unknown version")


@dataclass(frozen=True, slots=True)
class Quorum:
    """The id of a cluster, and the ports of its controllers by node; every broker is one."""

    cluster: str
    controllers: Mapping[int, int]

    @classmethod
    def of(cls, nodes: int) -> Self:
        """Return a new quorum of nodes 1, 2, ... on free ports."""
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        return cls(cluster, {node: free_port() for node in range(1, nodes + 1)})


class ApacheBroker:
    """A broker on free ports with its data in `directory`, as a context manager.

    Entering formats the data and starts the broker; leaving kills it. `stop` or `kill` and `start`
    restart it on the same data and ports. It dies with this process.

    | listener | protocol | login |
    |---|---|---|
    | `bootstrap_servers` | PLAINTEXT | |
    | `sasl_servers` | SASL_PLAINTEXT | PLAIN, `SASL_USER` or `READER`, `SASL_PASSWORD` |
    | `tls_servers` | SASL_SSL | SCRAM-SHA-256, the same user |
    | `proxied_servers` | PLAINTEXT, through `proxy` | |

    The certificate is for localhost alone, and `ca` holds its authority.
    """

    def __init__(
        self,
        kafka: Installation,
        directory: Path,
        *,
        node: int = 1,
        quorum: Quorum | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.installation = kafka
        self.node = node
        self.data = directory / "data"
        self._directory = directory
        self._quorum = quorum or Quorum.of(1)
        self._settings = settings or {}
        self._ports = {
            name: free_port() for name in ("PLAIN", "LOGIN", "TLS", "PROXIED", "INTERNAL")
        }
        self._proxy_port = free_port()
        self.bootstrap_servers = f"127.0.0.1:{self._ports['PLAIN']}"
        self.sasl_servers = f"127.0.0.1:{self._ports['LOGIN']}"
        self.tls_servers = f"localhost:{self._ports['TLS']}"
        self.proxied_servers = f"127.0.0.1:{self._proxy_port}"
        self.ca = directory / "ca.pem"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.format()
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start the broker and wait until it answers."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start the broker."""
        heap = _HEAP if len(self._quorum.controllers) == 1 else _HEAP_OF_THREE
        command = self.installation.command("kafka.Kafka", str(self._configuration), heap=heap)
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                dies_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until the broker answers. Raises `RuntimeError` with the end of its log."""
        deadline = time.monotonic() + START_SECONDS
        while not answers_metadata(self._ports["PLAIN"]):
            ended = self.process is None or self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.kill()
                end_of_log = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.installation} did not start: {end_of_log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the broker with SIGTERM, so that it closes its logs."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(STOP_SECONDS)
            self.process = None

    def kill(self) -> None:
        """End the broker with SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Stop the process: its ports stay open and it answers nothing until it is thawed."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def proxy(self) -> Iterator[Proxy]:
        """Yield the proxy between the broker and clients that connect to `proxied_servers`."""
        with Proxy(self._proxy_port, self._ports["PROXIED"]) as proxy:
            yield proxy

    def segments(self, topic: str, partition: int = 0) -> list[Path]:
        """Return the files that hold the records of a partition, in order."""
        return sorted((self.data / f"{topic}-{partition}").glob("*.log"))

    def lose_records(self, topic: str, first: int, partition: int = 0) -> None:
        """Cut the log of a partition before the batch that holds this offset, and restart.

        A partition of one segment ends as if the disk had lost its last writes, or a follower that
        was behind had become its leader.
        """
        self.stop()
        (segment,) = self.segments(topic, partition)
        stored = segment.read_bytes()
        end = 0
        while end < len(stored):
            base_offset, length = struct.unpack_from(">qi", stored, end)
            if base_offset >= first:
                break
            end += struct.calcsize(">qi") + length
        segment.write_bytes(stored[:end])
        for pattern in ("*.index", "*.timeindex", "*.snapshot"):  # made anew at the start
            for derived in segment.parent.glob(pattern):
                derived.unlink()
        self.start()

    def format(self) -> None:
        """Write certificates, configuration and an empty storage."""
        self._directory.mkdir(parents=True, exist_ok=True)
        make_certificates(self._directory)
        self._configuration.write_text(
            "".join(f"{key}={value}\n" for key, value in self._properties().items())
        )
        user = f"SCRAM-SHA-256=[name={SASL_USER},password={SASL_PASSWORD}]"
        arguments = (
            "format",
            f"--cluster-id={self._quorum.cluster}",
            "--add-scram",
            user,
            "--config",
            str(self._configuration),
        )
        command = self.installation.command("kafka.tools.StorageTool", *arguments)
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"{self.installation} cannot format its storage: {done.stderr or done.stdout}"
            )

    @property
    def _configuration(self) -> Path:
        return self._directory / "server.properties"

    @property
    def log(self) -> Path:
        """The log file of the broker's process."""
        return self._directory / "server.log"

    def _properties(self) -> dict[str, object]:
        replicas = min(3, len(self._quorum.controllers))
        voters = [f"{node}@127.0.0.1:{port}" for node, port in self._quorum.controllers.items()]
        return {
            "process.roles": "broker,controller",
            "node.id": self.node,
            "log.dirs": self.data,
            "controller.quorum.voters": ",".join(voters),
            **self._listeners(),
            "auto.create.topics.enable": "false",
            "default.replication.factor": replicas,
            "min.insync.replicas": min(2, replicas),
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": min(2, replicas),
            "transaction.state.log.num.partitions": 1,
            "group.initial.rebalance.delay.ms": 0,
            # A killed broker may register again after that long; one that starves is cut off.
            "broker.session.timeout.ms": 6000,
            "broker.heartbeat.interval.ms": 500,
            "log.cleaner.dedupe.buffer.size": 4 << 20,
            # Half a minute after its start a broker deletes old records, and tests write times of
            # 1970.
            "log.retention.ms": -1,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:{SASL_USER}",
            **self._settings,
        }

    def _listeners(self) -> dict[str, object]:
        jaas = "org.apache.kafka.common.security"
        controller = self._quorum.controllers[self.node]
        advertised = {
            **{name: f"127.0.0.1:{port}" for name, port in self._ports.items()},
            "TLS": self.tls_servers,
            "PROXIED": self.proxied_servers,
        }
        protocols = {
            "PLAIN": "PLAINTEXT",
            "LOGIN": "SASL_PLAINTEXT",
            "TLS": "SASL_SSL",
            "PROXIED": "PLAINTEXT",
            "INTERNAL": "PLAINTEXT",
            "CONTROLLER": "PLAINTEXT",
        }
        users = " ".join(f'user_{user}="{SASL_PASSWORD}"' for user in (SASL_USER, READER))
        plain_login = f"{jaas}.plain.PlainLoginModule required {users};"
        return {
            "listeners": ",".join(
                f"{name}://127.0.0.1:{port}"
                for name, port in {**self._ports, "CONTROLLER": controller}.items()
            ),
            "advertised.listeners": ",".join(
                f"{name}://{server}" for name, server in advertised.items()
            ),
            "listener.security.protocol.map": ",".join(
                f"{name}:{protocol}" for name, protocol in protocols.items()
            ),
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256",
            "listener.name.login.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.login.plain.sasl.jaas.config": plain_login,
            "listener.name.tls.sasl.enabled.mechanisms": "SCRAM-SHA-256",
            "listener.name.tls.scram-sha-256.sasl.jaas.config": (
                f"{jaas}.scram.ScramLoginModule required;"
            ),
            "listener.name.tls.ssl.keystore.type": "PEM",
            "listener.name.tls.ssl.keystore.location": self._directory / "server.pem",
        }


class Cluster:
    """Three brokers that hold every record three times, as a context manager."""

    def __init__(self, kafka: Installation, directory: Path) -> None:
        quorum = Quorum.of(3)
        self.brokers = {
            node: ApacheBroker(kafka, directory / f"node-{node}", node=node, quorum=quorum)
            for node in quorum.controllers
        }
        self.bootstrap_servers = ",".join(
            broker.bootstrap_servers for broker in self.brokers.values()
        )

    def __enter__(self) -> Self:
        with ThreadPoolExecutor() as pool:
            list(pool.map(ApacheBroker.format, self.brokers.values()))
        try:
            for broker in self.brokers.values():
                broker.launch()
            for broker in self.brokers.values():
                broker.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for broker in self.brokers.values():
            broker.kill()

    def leader_of(self, topic: str, partition: int = 0) -> ApacheBroker:
        """Return the broker that leads the partition."""
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                with closing(
                    KafkaAdminClient(bootstrap_servers=self.bootstrap_servers.split(","))
                ) as admin:
                    (described,) = admin.describe_topics([topic])
                leaders = {
                    each["partition_index"]: each["leader_id"] for each in described["partitions"]
                }
                return self.brokers[leaders[partition]]
            except (KafkaError, KeyError):  # the broker that was asked is down, or none leads yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


class _Authority:
    """A new authority, whose certificates are valid for `days`; below 0, they have expired."""

    def __init__(self, days: float) -> None:
        self._now = datetime.datetime.now(datetime.UTC)
        self._end = self._now + datetime.timedelta(days=days)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])

    def own_certificate(self) -> bytes:
        identity = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        return self._sign(self._name, self._key.public_key(), constraints, identity)

    def certificate_of_localhost(self, key: ec.EllipticCurvePublicKey) -> bytes:
        host = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        return self._sign(
            host,
            key,
            x509.BasicConstraints(ca=False, path_length=None),
            x509.SubjectAlternativeName([x509.DNSName("localhost")]),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
        )

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(self._now, self._end - datetime.timedelta(days=1)))
            .not_valid_after(self._end)
        )
        for extension in extensions:
            critical = isinstance(extension, x509.BasicConstraints)
            builder = builder.add_extension(extension, critical=critical)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def make_certificates(directory: Path, *, days: float = 2) -> None:
    """Write `ca.pem`, the certificate of a new authority, and `server.pem`.

    `server.pem` holds a key and its certificate, for localhost and not for 127.0.0.1. Both are
    valid for `days`; below 0, they have expired.
    """
    authority = _Authority(days)
    ca = authority.own_certificate()
    server = ec.generate_private_key(ec.SECP256R1())
    key = server.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    signed = authority.certificate_of_localhost(server.public_key())
    (directory / "ca.pem").write_bytes(ca)
    (directory / "server.pem").write_bytes(key + signed + ca)
