"""Layers of configuration, and messages that show the way out."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.config import Config, duration, format_duration, known_keys, load, parse_text
from stream_ctr.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_flags_go_before_environment_before_file_before_default(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[learn]\nbatch_size = 1\nseed = 1\nthreads = 1\n")
    environ = {"STREAM_CTR_LEARN__BATCH_SIZE": "2", "STREAM_CTR_LEARN__SEED": "2"}
    config = load(
        path,
        environ=environ,
        overrides={"learn": {"batch_size": "3"}},
        base={"learn": {"threads": 9, "precision": "bf16"}},
    )
    learn = config.learn
    assert (learn.batch_size, learn.seed, learn.threads, learn.precision, learn.device) == (
        3,
        2,
        1,
        "bf16",
        "auto",
    )


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
        ("join = 5", "join: Input should be a valid dictionary"),
        ("[features]\ncategorical=['a','b']\nnumeric=['b']", "a field is listed twice: b"),
        (
            "[features]\ncrosses=['age']",
            "a cross product is of two or more fields, \"age*category\", got 'age'",
        ),
        (
            "[features]\ncrosses=['age*']",
            "a cross product is of two or more fields, \"age*category\", got 'age*'",
        ),
        (
            "[features]\ncrosses=['age*age']",
            "features.crosses.0: a field is in it twice: 'age*age'",
        ),
        (
            "[features]\ncrosses=['a*b', 'b*c', ['b', 'a']]",
            "features.crosses: a cross product is listed twice: 'b*a'",
        ),
        ("[features]\ncrosses=[3]", "features.crosses.0: Input should be a valid tuple, got 3"),
        (
            "[features]\ncategorical=['age', 'category']\ncrosses=['age*categry']",
            "no field; did you mean 'category'?",
        ),
        (
            "[features]\ncategorical=['a']\nnumeric=['x']\nnumeric_encoding='value'\ncrosses=['a*x']",
            "features.crosses: 'a*x' has the number 'x', which has one row with numeric_encoding = 'value'; only buckets of it",
        ),
        ("[model]\nname='deepfn'", "model.name"),
        ("[model]\ntable_bits=40", "model.table_bits"),
        ("[baseline]\nsample_rate=0", "baseline.sample_rate"),
        ("[baseline]\nalpha=nan", "baseline.alpha"),
        ("not toml", "is not TOML"),
    ],
}


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        pytest.param(*case, marks=pytest.mark.bad_input(what, via="TOML file"))
        for what, cases in WRONG.items()
        for case in cases
    ],
)
def test_a_wrong_file_is_named_with_the_value_and_the_nearest_match(
    tmp_path, toml, message, outcome
):
    path = tmp_path / "c.toml"
    path.write_text(toml)
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
def test_a_login_among_the_servers_is_refused_and_not_shown(tmp_path, servers, outcome):
    path = tmp_path / "c.toml"
    path.write_text(f"[input]\nbootstrap_servers = {servers!r}\n")
    for sources in (
        {"path": path, "environ": {}},
        {"environ": {"STREAM_CTR_INPUT__BOOTSTRAP_SERVERS": servers}},
        {"environ": {}, "overrides": {"input": {"bootstrap_servers": servers}}},
    ):
        with pytest.raises(
            ConfigError, match=r"input\.bootstrap_servers.*sasl\.username"
        ) as caught:
            load(**sources)
        assert "5ecret" not in str(caught.value)
    outcome("refused; the value is not shown")


def test_a_section_that_is_no_table_is_an_error_also_where_another_layer_has_one(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("join = 5\n")
    for other in (
        {"base": {"join": {"label_window": "90s"}}},
        {"overrides": {"join": {"label_window": "90s"}}},
    ):
        with pytest.raises(ConfigError, match="join: Input should be a valid dictionary.*got 5"):
            load(path, environ={}, **other)


def test_a_wrong_environment_variable_is_an_error_too():
    with pytest.raises(
        ConfigError,
        match=r"STREAM_CTR_LEARN__BACH_SIZE.*did you mean 'STREAM_CTR_LEARN__BATCH_SIZE'",
    ):
        load(environ={"STREAM_CTR_LEARN__BACH_SIZE": "3"})
    assert load(
        environ={"STREAM_CTR_FEATURES__CATEGORICAL": "a, b", "OTHER": "x"}
    ).features.categorical == ("a", "b")


def test_cross_products_are_written_alike_in_a_file_and_on_the_command_line(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        "[features]\ncategorical = ['age', 'app', 'user', 'x*y']\ncrosses = ['age*app', 'user * app']\n"
    )
    crosses = (("age", "app"), ("user", "app"))
    assert load(path, environ={}).features.crosses == crosses
    assert (
        load(environ={"STREAM_CTR_FEATURES__CROSSES": "age*app, user*app"}).features.crosses
        == crosses
    )
    flag = {"crosses": parse_text("features", "crosses", "age*app,user*app")}
    assert load(environ={}, overrides={"features": flag}).features.crosses == crosses
    path.write_text(
        path.read_text().replace("'user * app'", "['user', 'x*y']")
    )  # a name with a star can only be listed
    kept = load(path, environ={}).model_dump(mode="json")
    assert kept["features"]["crosses"] == [["age", "app"], ["user", "x*y"]]
    assert load(environ={}, base=kept) == load(path, environ={})


def test_a_file_that_is_not_there_is_said_so():
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        load(Path("/nowhere"), environ={})


@given(st.integers(1, 10**9))
def test_a_duration_reads_back(milliseconds):
    length = timedelta(milliseconds=milliseconds)
    assert duration(format_duration(length)) == length


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_file_in_configs_loads_and_is_explained(path):
    load(path, environ={})
    assert path.read_text().startswith("#")
    assert "stream-ctr run" in path.read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_no_file_in_configs_gives_a_system_another_activation_than_its_own(path):
    assert load(path, environ={}).model.activation == "paper"


def test_a_network_has_at_most_64_layers():
    assert len(load(environ={}, overrides={"model": {"hidden": (8,) * 64}}).model.hidden) == 64
    with pytest.raises(ConfigError, match=r"model\.hidden: .*at most 64"):
        load(environ={}, overrides={"model": {"hidden": (8,) * 65}})


def test_the_annotated_file_shows_every_key_with_its_default():
    text = (CONFIGS / "events.toml").read_text()
    shown = tomllib.loads(text)
    listed = {f"{section}.{name}" for section, values in shown.items() for name in values}
    assert listed | {"features.categorical", "features.numeric"} == set(known_keys())
    assert load(CONFIGS / "events.toml", environ={}) == Config()
