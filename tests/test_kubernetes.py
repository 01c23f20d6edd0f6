"""The Kubernetes manifests are valid, agree with each other and with the image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.deployment import (
    DEPLOY,
    checked,
    image_user,
    parsed,
    require_module,
    require_tool,
    seconds_for_a_snapshot,
    snapshot_bytes,
)

from stream_ctr.cli.options import load_config
from stream_ctr.config import Config

FOLDER = DEPLOY / "kubernetes"
FILES = ("trainer.yaml", "server.yaml")
NAMES = ("trainer", "server")
VERSION = "1.32"


def documents() -> list[dict[str, Any]]:
    return [each for name in FILES for each in yaml.safe_load_all((FOLDER / name).read_text())]


def one(kind: str, name: str) -> dict[str, Any]:
    [found] = [
        each for each in documents() if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def workload(name: str) -> dict[str, Any]:
    kind = "StatefulSet" if name == "trainer" else "Deployment"
    return one(kind, f"stream-ctr-{name}")


def pod(name: str) -> dict[str, Any]:
    return workload(name)["spec"]["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    [only] = pod(name)["containers"]
    return only


def places(name: str) -> dict[str, str]:
    """Return the volume of each place in the container."""
    return {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}


# -- with the tools ------------------------------------------------------------------------------


def built(folder: Path) -> str:
    kubectl = require_tool("kubectl", "its kustomize builds the manifests")
    return checked(kubectl, "kustomize", folder)


def test_the_manifests_follow_the_schemas_of_kubernetes(tmp_path: Path) -> None:
    require_module("kubernetes_validate")
    path = tmp_path / "built.yaml"
    path.write_text(built(FOLDER))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", VERSION, path]
    assert checked(*command).count("passed") == len(documents()) + 1


def test_the_check_of_the_schemas_finds_a_mistake(tmp_path: Path) -> None:
    require_module("kubernetes_validate")
    text = (FOLDER / "trainer.yaml").read_text()
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace("terminationGracePeriodSeconds", "terminationGraceSeconds"))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", VERSION, str(path)]
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_what_is_built_selects_the_pods_that_it_makes() -> None:
    found = list(yaml.safe_load_all(built(FOLDER)))
    pods = [
        each["spec"]["template"]["metadata"]["labels"]
        for each in found
        if "template" in each.get("spec", {})
    ]
    assert len(pods) == len(NAMES)
    for each in found:
        if each["kind"] in ("Service", "PodDisruptionBudget", "StatefulSet", "Deployment"):
            selector = each["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert sum(selector.items() <= labels.items() for labels in pods) == 1, each
    for monitor in yaml.safe_load_all(built(FOLDER / "monitoring")):
        selector = monitor["spec"]["selector"]["matchLabels"]
        assert sum(selector.items() <= labels.items() for labels in pods) == 1, monitor


# -- without them --------------------------------------------------------------------------------


def test_every_manifest_is_a_resource() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert listed["resources"] == list(FILES)
    for generator in listed["configMapGenerator"]:
        assert all((FOLDER / name).is_file() for name in generator["files"])


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_options_that_exist(name: str) -> None:
    options = parsed(container(name)["args"])
    host, _, port = str(options["http"]).rpartition(":")
    assert host == "0.0.0.0"
    assert container(name)["ports"] == [{"name": "http", "containerPort": int(port)}]
    secret, key = options["http_token_file"].parent, options["http_token_file"].name
    [volume] = [each for each in pod(name)["volumes"] if each["name"] == places(name)[str(secret)]]
    # The token must be readable for the group of the pod, and for nobody else.
    assert volume["secret"] == {"secretName": "stream-ctr", "defaultMode": 0o440}
    assert f"--from-literal={key}=" in (FOLDER / "kustomization.yaml").read_text()


def test_trainer_and_servers_share_the_state() -> None:
    trainer, server = (parsed(container(name)["args"])["state"] for name in NAMES)
    assert trainer == server
    [claim] = workload("trainer")["spec"]["volumeClaimTemplates"]
    [state] = [each for each in pod("server")["volumes"] if each["name"] == "state"]
    trainer_pod = f"{workload('trainer')['metadata']['name']}-0"
    assert state["persistentVolumeClaim"] == {
        "claimName": f"{claim['metadata']['name']}-{trainer_pod}",
        "readOnly": True,
    }
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    [mount] = [each for each in container("server")["volumeMounts"] if each["name"] == "state"]
    assert mount["readOnly"] is True


def test_there_is_one_trainer() -> None:
    assert workload("trainer")["spec"]["replicas"] == 1
    assert "replicas" not in workload("server")["spec"]  # those of the autoscaler
    [scaled] = [each for each in documents() if each["kind"] == "HorizontalPodAutoscaler"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == workload("server")["metadata"]["name"]
    assert scaled["spec"]["minReplicas"] >= 2


def test_the_configuration_is_one_that_the_trainer_accepts() -> None:
    options = parsed(container("trainer")["args"])
    assert places("trainer")[str(options["config"].parent)] == "config"
    path = FOLDER / options["config"].name
    assert load_config(path, [])[0].input.topic == "clicks"


@pytest.mark.parametrize("name", NAMES)
def test_probes_ask_the_port_of_the_container(name: str) -> None:
    for probe, path in (
        ("startupProbe", "/healthz"),
        ("livenessProbe", "/healthz"),
        ("readinessProbe", "/readyz"),
    ):
        assert container(name)[probe]["httpGet"] == {"path": path, "port": "http"}
    [port] = one("Service", f"stream-ctr-{name}")["spec"]["ports"]
    assert port["targetPort"] == "http"
    assert port["port"] == container(name)["ports"][0]["containerPort"]


def test_a_trainer_has_time_for_its_last_snapshot_on_a_slow_disk() -> None:
    grace = pod("trainer")["terminationGracePeriodSeconds"]
    assert grace > seconds_for_a_snapshot()
    [claim] = workload("trainer")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "20Gi"
    assert (Config().snapshots.keep + 1) * snapshot_bytes() < 20 << 30


@pytest.mark.parametrize("name", NAMES)
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    context = pod(name)["securityContext"]
    user = image_user()
    assert context["runAsNonRoot"] is True
    assert {context[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {user}
    assert pod(name)["automountServiceAccountToken"] is False
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"/cache", "/tmp", "/state"} <= set(places(name))
    resources = container(name)["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert set(resources["limits"]) == {"memory"}
    named = {each["name"] for each in pod(name)["volumes"]} | {"state"}
    assert set(places(name).values()) <= named


def test_monitors_use_the_port_the_secret_and_the_jobs_of_the_alerts() -> None:
    path = FOLDER / "monitoring" / "pod-monitor.yaml"
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    jobs = {job["job_name"] for job in scraped}
    for monitor in yaml.safe_load_all(path.read_text()):
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "http"
        assert endpoint["path"] == "/metrics"
        secret = {"name": "stream-ctr", "key": "http-token"}
        assert endpoint["authorization"]["credentials"] == secret
        [relabeling] = endpoint["relabelings"]
        assert relabeling["targetLabel"] == "job"
        jobs.remove(relabeling["replacement"])
    assert jobs == set()
