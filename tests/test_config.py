"""The layers of the configuration, its messages, and the example files."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.reliability import Outcome

from stream_ctr import config
from stream_ctr.config import (
    Config,
    duration,
    example,
    examples,
    format_duration,
    known_keys,
    load,
    parse_text,
    size,
)
from stream_ctr.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.toml"))


def toml(directory: Path, text: str) -> Path:
    path = directory / "c.toml"
    path.write_text(text)
    return path


def test_flags_precede_environment_file_base_and_defaults(tmp_path: Path) -> None:
    config = load(
        toml(tmp_path, "[learn]\nbatch_size = 1\nseed = 1\nthreads = 1\n"),
        environ={"STREAM_CTR_LEARN__BATCH_SIZE": "2", "STREAM_CTR_LEARN__SEED": "2"},
        overrides={"learn": {"batch_size": "3"}},
        base={"learn": {"threads": 9, "precision": "bf16"}},
    )
    learn = config.learn
    assert learn.batch_size == 3
    assert learn.seed == 2
    assert learn.threads == 1
    assert learn.precision == "bf16"
    assert learn.device == "auto"


WRONG = {
    "configuration: unknown key": [
        ("[modle]\nname='deepfm'", "unknown key 'modle'; did you mean 'model'?"),
        (
            "[model]\nembeding_dim=3",
            "unknown key 'model.embeding_dim'; did you mean 'model.embedding_dim'?",
        ),
        ("['\\u001b[2J']\nx=1".replace("'", '"'), r"unknown key '\x1b[2J'"),
    ],
    "configuration: a duration without unit": [
        (
            "[join]\nlabel_window='10'",
            "join.label_window: a duration needs a unit (ms, s, m, h, d), got '10'",
        ),
        ("[join]\nlabel_window=10", "a duration needs a unit"),
        ("[join]\nlabel_window='10 parsecs'", "a duration needs a unit"),
    ],
    "configuration: a negative or endless window": [
        (
            "[join]\nlabel_window='-5s'",
            "join.label_window: a duration cannot be negative, got '-5s'",
        ),
        ("[join]\nlabel_window=-5", "a duration cannot be negative, got -5"),
        ("[join]\nallowed_lateness='-1ms'", "join.allowed_lateness: a duration cannot be negative"),
        ("[join]\nlabel_window='0s'", "join.label_window: must be at least 1ms, got '0ms'"),
        ("[join]\nlabel_window='99999999999999d'", "a duration is at most 100 years"),
    ],
    "configuration: other values": [
        ("join = 5", "join: must be a table of keys, [join], got 5"),
        ("[features]\ncategorical=['a','b']\nnumeric=['b']", "a field is listed twice: b"),
        (
            "[features]\ncrosses=['age']",
            "a cross product needs two or more fields, \"age*category\", got 'age'",
        ),
        (
            "[features]\ncrosses=['age*']",
            "a cross product needs two or more fields, \"age*category\", got 'age*'",
        ),
        (
            "[features]\ncrosses=['age*age']",
            "features.crosses.0: a cross product has a field twice: 'age*age'",
        ),
        (
            "[features]\ncrosses=['a*b', 'b*c', ['b', 'a']]",
            "features.crosses: a cross product is listed twice: 'b*a'",
        ),
        ("[features]\ncrosses=[3]", "features.crosses.0: must be a list, got 3"),
        (
            "[features]\ncategorical=['age', 'category']\ncrosses=['age*categry']",
            "not a field; did you mean 'category'?",
        ),
        (
            "[features]\ncategorical=['a']\nnumeric=['x']\n"
            "numeric_encoding='value'\ncrosses=['a*x']",
            "features.crosses: 'a*x' has the number 'x', which has one row with "
            "numeric_encoding = 'value'; only buckets of it",
        ),
        (
            "[model]\nname='deepfn'",
            "model.name: there is no model 'deepfn'; did you mean 'deepfm'?",
        ),
        ("[model]\nbeside=['fn']", "model.beside.0: there is no model 'fn'; did you mean 'fnn'?"),
        ("[model]\nname='fm'\nbeside=['blend']", "model.beside: the blend is published or not"),
        ("[model]\nname='nets:'", "model.name: there is no model 'nets:'"),
        (
            "[model]\nname='deepfm'\nbeside=['fm', 'deepfm']",
            "model.beside: a model is listed twice (model.name counts too): deepfm",
        ),
        ("[join]\nmax_memory='100'", "join.max_memory: a size needs a unit (KB, MB, GB, KiB"),
        ("[join]\nmax_memory='0GB'", "a size must be at least one byte, got '0GB'"),
        (
            "[snapshots]\ndelta_every='50ms'",
            "snapshots.delta_every: must be 0s or at least 100ms, got '50ms'",
        ),
        ("[snapshots]\ndelta_precision='fp16'", "snapshots.delta_precision: "),
        ("[ranks]\ntimeout='4s'", "ranks.timeout: must be at least 5s, got '4s'"),
        (
            "[snapshots]\nurl='bucket/folder'",
            "snapshots.url: must be a URL with a scheme, such as s3://bucket/folder",
        ),
        ("[model]\ntable_bits=40", "model.table_bits: must be at most 31, got 40"),
        ("[baseline]\nsample_rate=0", "baseline.sample_rate: must be greater than 0, got 0"),
        ("[baseline]\nalpha=nan", "baseline.alpha"),
        ("not toml", "is not TOML"),
    ],
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(*case, marks=pytest.mark.bad_input(what, via="TOML file"))
        for what, cases in WRONG.items()
        for case in cases
    ],
)
def test_a_wrong_file_is_an_error_with_the_value_and_the_nearest_key(
    tmp_path: Path, text: str, message: str, outcome: Outcome
) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(path, environ={})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400 + len(str(path))
    outcome("exit 3; key, value and way out named")


@pytest.mark.bad_input("configuration: a secret in a URL", via="file, environment, flag")
@pytest.mark.parametrize(
    "servers",
    [
        "user:marker-5ecret@host:9092",
        "kafka://user:marker-5ecret@host",
        "a:1,sasl://marker-5ecret@b:2",
    ],
)
def test_a_login_among_the_servers_is_refused_and_not_shown(
    tmp_path: Path, servers: str, outcome: Outcome
) -> None:
    layers: tuple[dict[str, Any], ...] = (
        {"path": toml(tmp_path, f"[input]\nbootstrap_servers = {servers!r}\n"), "environ": {}},
        {"environ": {"STREAM_CTR_INPUT__BOOTSTRAP_SERVERS": servers}},
        {"environ": {}, "overrides": {"input": {"bootstrap_servers": servers}}},
    )
    for layer in layers:
        expected = r"input\.bootstrap_servers.*sasl\.username"
        with pytest.raises(ConfigError, match=expected) as caught:
            load(**layer)
        assert "5ecret" not in str(caught.value)
    outcome("refused; the value is not shown")


def test_a_login_in_the_url_of_a_mirror_is_refused_and_not_shown() -> None:
    for url in ("https://user:marker-5ecret@host/folder", "user:marker-5ecret@host/folder"):
        with pytest.raises(ConfigError, match=r"url: must have no login in it") as caught:
            load(environ={}, overrides={"snapshots": {"url": url}})
        assert "5ecret" not in str(caught.value)
    at = "https://host/folder@2"
    assert load(environ={}, overrides={"snapshots": {"url": at}}).snapshots.url == at


@pytest.mark.parametrize("layer", ["base", "overrides"])
def test_a_section_that_is_no_table_is_an_error_under_and_over_another_layer(
    tmp_path: Path, layer: str
) -> None:
    path = toml(tmp_path, "join = 5\n")
    other: dict[str, Any] = {layer: {"join": {"label_window": "90s"}}}
    with pytest.raises(ConfigError, match=r"join: must be a table of keys, \[join\], got 5"):
        load(path, environ={}, **other)


def test_an_error_says_where_the_wrong_value_was_given(tmp_path: Path) -> None:
    path = toml(tmp_path, "[learn]\nbatch_size = 0\n[join]\nlabel_windw = '5m'\n")
    with pytest.raises(ConfigError) as caught:
        load(path, environ={"STREAM_CTR_LEARN__SEED": "x"}, overrides={"model": {"hidden": "y"}})
    assert str(caught.value).split("; ") == [
        "unknown key 'join.label_windw'",
        f"did you mean 'join.label_window'? (in {path})",
        "model.hidden: must be a list, got 'y'",
        f"learn.batch_size: must be at least 1, got 0 (in {path})",
        "learn.seed: must be a whole number, got 'x' (in the environment)",
    ]
    kept = {"learn": {"batch_size": -1}}
    with pytest.raises(ConfigError, match=r"got -1 \(in the state directory\)"):
        load(environ={}, base=kept)


def test_a_variable_is_compared_without_the_prefix_that_all_share() -> None:
    with pytest.raises(ConfigError, match=r"'STREAM_CTR_FOO': STREAM_CTR_SECTION__KEY sets"):
        load(environ={"STREAM_CTR_FOO": "1"})
    with pytest.raises(ConfigError, match=r"did you mean 'STREAM_CTR_LEARN__SEED'"):
        load(environ={"STREAM_CTR_LEARN_SEED": "1"})


def test_the_help_does_not_print_the_environment() -> None:
    assert inspect.signature(load).parameters["environ"].default is None


def test_a_scheme_is_refused_without_a_word_of_a_login() -> None:
    with pytest.raises(ConfigError, match="without a scheme such as http://") as caught:
        load(environ={}, overrides={"input": {"bootstrap_servers": "http://b:9092"}})
    assert "login" not in str(caught.value)


def test_the_help_of_load_does_not_print_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect.signature(load).parameters["environ"].default is None
    monkeypatch.setenv("STREAM_CTR_LEARN__SEED", "7")
    assert (load().learn.seed, load(environ={}).learn.seed) == (7, 0)


def test_an_unknown_environment_variable_is_an_error_with_the_nearest_name() -> None:
    name = "STREAM_CTR_LEARN__BACH_SIZE"
    with pytest.raises(ConfigError, match=f"{name}.*did you mean 'STREAM_CTR_LEARN__BATCH_SIZE'"):
        load(environ={name: "3"})


def test_a_list_in_the_environment_is_separated_by_commas() -> None:
    config = load(environ={"STREAM_CTR_FEATURES__CATEGORICAL": "a, b", "OTHER": "x"})
    assert config.features.categorical == ("a", "b")


def test_cross_products_are_written_alike_in_a_file_and_on_the_command_line(
    tmp_path: Path,
) -> None:
    crosses = (("age", "app"), ("user", "app"))
    categorical = "[features]\ncategorical = ['age', 'app', 'user', 'x*y']\n"
    path = toml(tmp_path, categorical + "crosses = ['age*app', 'user * app']\n")
    assert load(path, environ={}).features.crosses == crosses
    environ = {"STREAM_CTR_FEATURES__CROSSES": "age*app, user*app"}
    assert load(environ=environ).features.crosses == crosses
    flag = {"crosses": parse_text("features.crosses", "age*app,user*app")}
    assert load(environ={}, overrides={"features": flag}).features.crosses == crosses


def test_a_cross_product_of_a_name_with_a_star_is_a_list(tmp_path: Path) -> None:
    categorical = "[features]\ncategorical = ['age', 'app', 'user', 'x*y']\n"
    path = toml(tmp_path, categorical + "crosses = ['age*app', ['user', 'x*y']]\n")
    dumped = load(path, environ={}).model_dump(mode="json")
    assert dumped["features"]["crosses"] == [["age", "app"], ["user", "x*y"]]
    assert load(environ={}, base=dumped) == load(path, environ={})


def test_a_file_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        load(Path("/nowhere"), environ={})


@given(st.integers(1, 10**9))
def test_a_duration_reads_back(milliseconds: int) -> None:
    length = timedelta(milliseconds=milliseconds)
    assert duration(format_duration(length)) == length


def test_a_size_is_at_most_an_exbibyte() -> None:
    assert size("2GB") == 2 * 10**9
    assert size("9999999999999GiB") == 2**60


def test_a_network_has_at_most_64_layers() -> None:
    assert len(load(environ={}, overrides={"model": {"hidden": (8,) * 64}}).model.hidden) == 64
    with pytest.raises(ConfigError, match=r"model\.hidden: .*at most 64"):
        load(environ={}, overrides={"model": {"hidden": (8,) * 65}})


def test_the_examples_are_the_files_in_configs() -> None:
    assert list(examples()) == [path.stem for path in EXAMPLES]
    for path in EXAMPLES:
        assert example(path.stem) == path.read_text()


@pytest.mark.parametrize("name", ["critoe", "../pyproject", "criteo.toml", "Criteo/criteo"])
def test_an_unknown_example_is_an_error_that_names_the_examples(name: str) -> None:
    expected = f"unknown example '{name}'.*; the examples are avazu, criteo, demo, events, obd"
    with pytest.raises(ConfigError, match=expected):
        example(name)
    with pytest.raises(ConfigError, match="did you mean 'criteo'"):
        example("critoe")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_and_shows_its_command(path: Path) -> None:
    load(path, environ={})
    text = path.read_text()
    assert text.startswith("#")
    assert "stream-ctr run" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_keeps_the_activation_of_the_paper(path: Path) -> None:
    assert load(path, environ={}).model.activation == "paper"


def dotted(tables: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_example_events_shows_every_key_with_its_default() -> None:
    shown = tomllib.loads(example("events"))
    listed = set(dotted(shown))
    assert listed | {"features.categorical", "features.numeric"} == set(known_keys())
    assert load(CONFIGS / "events.toml", environ={}) == Config()


def test_every_key_has_a_docstring() -> None:
    undocumented = []
    for section in ast.parse(Path(config.__file__).read_text()).body:
        if not isinstance(section, ast.ClassDef) or section.name == "Config":
            continue
        followers = [*section.body[1:], None]
        for statement, follower in zip(section.body, followers, strict=True):
            documented = isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and not documented:
                undocumented.append(f"{section.name}.{ast.unparse(statement.target)}")
    assert undocumented == []
