"""The files in deploy/ for a run on several hosts are valid and agree with the others."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import succeed
from support.deployment import (
    DEPLOY,
    checked,
    compose,
    parsed,
    require_module,
    require_tool,
    seconds_for_a_snapshot,
)
from support.lineage import last_report, newest
from support.patience import PATIENCE_SECONDS, started, wait_until
from support.rank_runs import free_port
from torch.distributed.run import get_args_parser

from stream_ctr.config import duration
from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.logs.simulate import Simulation

OVERLAY = DEPLOY / "compose.ranks.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(OVERLAY.read_text())["services"]
FOLDER = DEPLOY / "kubernetes-ranks"
TRAINERS = ("trainer", "trainer-1")
VERSION = "1.32"


def words_of(name: str) -> list[str]:
    service = SERVICES[name]
    return [*service["entrypoint"], *service["command"]]


def launcher(words: list[str]) -> argparse.Namespace:
    """Return the options of torchrun, parsed as it does; it starts the package as a module."""
    program, *rest = words
    assert program == "torchrun"
    options = get_args_parser().parse_args(rest)
    assert options.module
    assert options.training_script == "stream_ctr"
    return options


# -- compose -------------------------------------------------------------------------------------


def test_the_file_follows_the_compose_specification() -> None:
    require_module("check_jsonschema")
    schema = ["--builtin-schema", "vendor.compose-spec"]
    checked(sys.executable, "-m", "check_jsonschema", *schema, OVERLAY)


def test_every_trainer_runs_the_command_of_the_single_one() -> None:
    single = parsed(compose()["services"]["trainer"]["command"])
    for name in TRAINERS:
        assert parsed(launcher(words_of(name)).training_script_args) == single


def test_the_trainers_meet_at_the_first_which_has_the_port_and_rank_0() -> None:
    found = [launcher(words_of(name)) for name in TRAINERS]
    assert [each.local_addr for each in found] == sorted(TRAINERS) == list(TRAINERS)
    for each in found:
        assert each.nnodes == str(len(TRAINERS))
        assert each.rdzv_backend == "c10d"
        assert each.rdzv_endpoint.startswith(f"{TRAINERS[0]}:")
    assert SERVICES["trainer-1"]["healthcheck"] == {"disable": True}
    assert not any("ports" in service for service in SERVICES.values())


def test_the_second_trainer_has_the_volumes_secrets_and_rights_of_the_first() -> None:
    first, second = compose()["services"]["trainer"], SERVICES["trainer-1"]
    apart = {"build", "command", "entrypoint", "ports", "healthcheck"}
    assert {name: first[name] for name in first if name not in apart} == {
        name: second[name] for name in second if name not in apart
    }


def test_torchrun_waits_for_a_last_snapshot_and_compose_for_torchrun() -> None:
    for name in TRAINERS:
        grace = duration(SERVICES["trainer-1"]["stop_grace_period"]).total_seconds()
        assert seconds_for_a_snapshot() < launcher(words_of(name)).shutdown_timeout < grace


# -- Kubernetes ----------------------------------------------------------------------------------


def built() -> list[dict[str, Any]]:
    kubectl = require_tool("kubectl", "its kustomize builds the manifests")
    return [*yaml.safe_load_all(checked(kubectl, "kustomize", FOLDER))]


def one(kind: str, name: str) -> dict[str, Any]:
    [found] = [each for each in built() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def test_the_manifests_follow_the_schemas_of_kubernetes(tmp_path: Path) -> None:
    require_module("kubernetes_validate")
    path = tmp_path / "built.yaml"
    path.write_text(yaml.safe_dump_all(built()))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", VERSION, path]
    assert checked(*command).count("passed") == len(built())


def test_the_pods_run_torchrun_and_meet_in_pod_0() -> None:
    workload = one("StatefulSet", "stream-ctr-trainer")
    pod = workload["spec"]["template"]["spec"]
    [container] = pod["containers"]
    options = launcher(container["command"] + container["args"])
    single = yaml.safe_load_all((DEPLOY / "kubernetes" / "trainer.yaml").read_text())
    [single_args] = [
        each["spec"]["template"]["spec"]["containers"][0]["args"]
        for each in single
        if each["kind"] == "StatefulSet"
    ]
    assert options.training_script_args == single_args
    assert options.nnodes == str(workload["spec"]["replicas"])
    assert workload["spec"]["podManagementPolicy"] == "Parallel"
    service = one("Service", workload["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    host = f"{workload['metadata']['name']}-0.{service['metadata']['name']}"
    assert options.rdzv_endpoint.rpartition(":")[0] == host
    assert options.local_addr == f"$(POD_NAME).{service['metadata']['name']}"
    [name] = container["env"]
    assert (name["name"], name["valueFrom"]["fieldRef"]["fieldPath"]) == (
        "POD_NAME",
        "metadata.name",
    )
    grace = pod["terminationGracePeriodSeconds"]
    assert seconds_for_a_snapshot() < options.shutdown_timeout < grace
    assert not {"startupProbe", "livenessProbe", "readinessProbe"} & set(container)


def test_all_pods_and_the_servers_share_one_volume() -> None:
    workload = one("StatefulSet", "stream-ctr-trainer")["spec"]
    assert "volumeClaimTemplates" not in workload
    server = one("Deployment", "stream-ctr-server")["spec"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for each in (workload, server)
        for volume in each["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == ["state-stream-ctr-trainer-0"] * 2
    claim = one("PersistentVolumeClaim", claims[0])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_only_the_trainers_reach_the_ports_of_the_ranks() -> None:
    policy = one("NetworkPolicy", "stream-ctr-ranks")["spec"]
    labels = one("StatefulSet", "stream-ctr-trainer")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    [ranks, page] = policy["ingress"]
    assert ranks == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert page == {"ports": [{"protocol": "TCP", "port": 9100}]}


# -- the commands as processes -------------------------------------------------------------------


@pytest.mark.slow
def test_two_hosts_run_the_commands_of_the_stack(tmp_path: Path) -> None:
    """Both hosts are this machine, with one rank each."""
    state = tmp_path / "state"
    token = tmp_path / "http-token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    token.chmod(0o640)
    log = tmp_path / "events.jsonl"
    Simulation(3000, seed=1).write_jsonl(log)
    small = {
        "STREAM_CTR_MODEL__TABLE_BITS": "12",
        "STREAM_CTR_MODEL__HIDDEN": "16",
        "STREAM_CTR_LEARN__BATCH_SIZE": "128",
        "STREAM_CTR_JOIN__LABEL_WINDOW": "30s",
        "STREAM_CTR_SCHEDULE__SNAPSHOT_EXAMPLES": "500",
    }
    try:
        broker = EmbeddedBroker()
    except EmbeddedUnavailable as error:
        pytest.skip(str(error))
    with broker:
        succeed(
            *("replay", log, "--topic", "clicks"), "--bootstrap-servers", broker.bootstrap_servers
        )
        here = {
            "trainer:29400": f"127.0.0.1:{free_port()}",
            "kafka:19092": broker.bootstrap_servers,
            "/run/secrets/http-token": str(token),
            "0.0.0.0:9100": f"127.0.0.1:{free_port()}",
            "--state=/state": f"--state={state}",
            "--nproc-per-node=2": "--nproc-per-node=1",
        }
        processes = [_start(name, here, small, tmp_path) for name in TRAINERS]
        wait_until(lambda: (state / "latest.json").exists(), explain=lambda: _logs(tmp_path))
        # Compose and Kubernetes stop all hosts. If only one is stopped, torchrun on the other waits
        # 5 minutes for it, in its exit barrier.
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(PATIENCE_SECONDS)
    found = newest(state)
    assert found
    assert last_report(state)["kind"] == "stopped"
    assert last_report(state)["examples"] == found.examples
    assert "2 ranks on 2 hosts" in _logs(tmp_path)
    assert "error:" not in _logs(tmp_path)


def _start(
    name: str, here: dict[str, str], small: dict[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    pattern = "|".join(map(re.escape, here))
    words = [re.sub(pattern, lambda found: here[found[0]], word) for word in words_of(name)[1:]]
    words = [re.sub(r"^--local-addr=.*", "--local-addr=127.0.0.1", word) for word in words]
    with (folder / f"{name}.log").open("wb") as log:
        return started(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                env={**os.environ, **small},
                stdout=log,
                stderr=log,
            )
        )


def _logs(folder: Path) -> str:
    return "\n".join((folder / f"{name}.log").read_text() for name in TRAINERS)
