"""The files in deploy/ and the constraints must agree with the package."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stream_ctr.connectors.kafka.options import client_options, parse_properties

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


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
