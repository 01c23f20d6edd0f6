"""A prediction server ends gracefully, asks others for a token, and outlives a trainer."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support import forks
from support.commands import command
from support.finished_runs import TINY
from support.patience import PATIENCE_SECONDS, started, wait_until
from support.prediction_servers import ANY_PORT, PATIENT, Held, ask, serving
from support.served import publish, write_served

from stream_ctr.errors import ConfigError
from stream_ctr.http.access import Token
from stream_ctr.http.address import Address
from stream_ctr.logs.simulate import Simulation
from stream_ctr.serve.server import PredictionServer
from stream_ctr.snapshots.subscriber import Subscriber

ROW = {"app": "maps"}
SECRET = "a token of many letters"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    publish(write_served(tmp_path / "snapshots"))
    return tmp_path


@contextlib.contextmanager
def running(server: PredictionServer) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield thread
    finally:
        server.stop()
        thread.join(PATIENCE_SECONDS)


def refuses_connections(address: Address) -> bool:
    try:
        socket.create_connection((address.host, address.port), 60).close()
    except ConnectionRefusedError:
        return True
    return False


def test_requests_in_flight_are_answered_at_the_end_and_new_ones_refused(state: Path) -> None:
    subscriber = Subscriber(state)
    server = PredictionServer(subscriber, ANY_PORT, policy=PATIENT)
    url = f"http://{server.address}"
    with running(server) as thread, ThreadPoolExecutor(4) as pool:
        clients = [httpx.Client(base_url=url, timeout=PATIENCE_SECONDS) for _ in range(3)]
        wait_until(lambda: clients[0].get("/readyz").status_code == 200)
        held = Held(subscriber.scorer)
        asked = [pool.submit(ask, clients[0], [ROW])]
        assert held.entered.wait(PATIENCE_SECONDS)
        asked += [pool.submit(ask, client, [ROW] * 2) for client in clients[1:]]
        wait_until(lambda: len(server.waiting) == 2)
        server.stop()
        wait_until(lambda: refuses_connections(server.address))
        assert thread.is_alive()
        held.release.set()
        assert [each.result().status_code for each in asked] == [200] * 3
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
        for client in clients:
            client.close()
    assert held.sizes == [1, 4]


def test_an_address_that_others_reach_needs_a_token(state: Path) -> None:
    subscriber = Subscriber(state)
    with pytest.raises(ConfigError, match="--http-token-file"):
        PredictionServer(subscriber, Address("0.0.0.0", 0))
    server = PredictionServer(subscriber, Address("0.0.0.0", 0), token=Token(SECRET))
    with running(server), httpx.Client(timeout=PATIENCE_SECONDS) as client:
        url = f"http://127.0.0.1:{server.address.port}"
        wait_until(lambda: client.get(f"{url}/readyz").status_code == 200)
        document = {"rows": [ROW]}
        assert client.post(f"{url}/predict", json=document).status_code == 401
        assert client.get(f"{url}/metrics").status_code == 401
        shown = {"authorization": f"Bearer {SECRET}"}
        assert client.post(f"{url}/predict", json=document, headers=shown).status_code == 200


def test_an_address_in_use_is_a_configuration_error(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match="another process listens there"):
            PredictionServer(Subscriber(state), address)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--http", "9200"], 3, "has no port"),
        (["--http", "0.0.0.0:0"], 3, "--http-token-file"),
        (["--topic", "t"], 2, "--state and --topic are two ways to follow"),
        (["--model", "deepfn"], 3, "did you mean 'deepfm'"),
        (["--max-waiting", "0"], 2, "--max-waiting"),
    ],
)
def test_wrong_options_end_with_a_message(
    state: Path, arguments: list[str], code: int, message: str
) -> None:
    result = command("serve", "--state", state, *arguments)
    assert result.exit_code == code
    assert message in result.output


# -- real processes ------------------------------------------------------------------------------


def run_command(directory: Path, *arguments: object) -> subprocess.Popen[str]:
    log = (directory / f"{arguments[0]}.log").open("a")
    return started(forks.start(*arguments, stdout=subprocess.PIPE, stderr=log, text=True))


def address_of(server: subprocess.Popen[str]) -> str:
    """Return the URL that the command prints when it listens."""
    assert server.stdout
    words = server.stdout.readline().split()
    assert words[:2] == ["serving", "at"]
    return words[2]


@pytest.mark.slow
def test_a_signal_ends_the_command_with_0(state: Path) -> None:
    server = run_command(state, "serve", "--state", state, "--http", "127.0.0.1:0")
    with httpx.Client(base_url=address_of(server), timeout=PATIENCE_SECONDS) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert ask(client, [ROW]).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_SECONDS) == 0


@pytest.mark.slow
def test_no_request_fails_while_a_trainer_publishes_is_killed_and_resumes(tmp_path: Path) -> None:
    """Clients ask without a pause. The trainer is killed with SIGKILL once it has published."""
    log = tmp_path / "sim.jsonl"
    Simulation(60_000, seed=3).write_jsonl(log)
    state = tmp_path / "state"
    arguments = ["run", "--source", log, "--state", state, *TINY, "-X", "baseline.enabled=false"]
    stopped = threading.Event()
    seen: dict[str, int] = {}

    def ask_on(client: httpx.Client) -> int:
        count = 0
        while not stopped.is_set():
            response = ask(client, [{"app_id": f"a{count % 50}"}])
            assert response.status_code == 200, response.text
            seen[response.json()["snapshot"]] = count
            count += 1
        return count

    trainer = run_command(tmp_path, *arguments)
    with serving(state, ready=False) as (client, subscriber), ThreadPoolExecutor(4) as pool:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        asked = [pool.submit(ask_on, client) for _ in range(4)]
        try:
            wait_for_swaps(seen, 3, trainer)
            trainer.kill()
            assert trainer.wait(PATIENCE_SECONDS) == -signal.SIGKILL
            before = len(seen)
            trainer = run_command(tmp_path, *arguments)
            wait_for_swaps(seen, before + 1, trainer)
        finally:
            stopped.set()
        assert sum(each.result() for each in asked) > 0
        assert not subscriber.failures
    trainer.kill()


def wait_for_swaps(seen: dict[str, int], swaps: int, trainer: subprocess.Popen[str]) -> None:
    """Wait until that many snapshots have answered."""
    wait_until(lambda: len(seen) >= swaps, explain=lambda: (seen, trainer.poll()))
