"""Layers of configuration, and messages that show the way out."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_ctr.config import Config, duration, format_duration, known_keys, load
from stream_ctr.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_flags_go_before_environment_before_file_before_default(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[learn]\nbatch_size = 1\nseed = 1\nthreads = 1\n")
    environ = {"STREAM_CTR_LEARN__BATCH_SIZE": "2", "STREAM_CTR_LEARN__SEED": "2"}
    config = load(path, environ=environ, overrides={"learn": {"batch_size": "3"}}, base={"learn": {"threads": 9, "precision": "bf16"}})
    learn = config.learn
    assert (learn.batch_size, learn.seed, learn.threads, learn.precision, learn.device) == (3, 2, 1, "bf16", "auto")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[modle]\nname='deepfm'", "unknown key 'modle'; did you mean 'model'?"),
        ("[model]\nembeding_dim=3", "unknown key 'model.embeding_dim'; did you mean 'model.embedding_dim'?"),
        ("[join]\nlabel_window='10'", "join.label_window: a duration needs a unit (ms, s, m, h, d), got '10'"),
        ("[join]\nlabel_window=10", "a duration needs a unit"),
        ("[join]\nlabel_window='-5s'", "a duration needs a unit"),
        ("[join]\nlabel_window='0s'", "join.label_window: must be at least 1ms, got '0ms'"),
        ("[features]\ncategorical=['a','b']\nnumeric=['b']", "a field is listed twice: b"),
        ("[model]\nname='deepfn'", "model.name"),
        ("[model]\ntable_bits=40", "model.table_bits"),
        ("[baseline]\nsample_rate=0", "baseline.sample_rate"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_value_and_the_nearest_match(tmp_path, toml, message):
    path = tmp_path / "c.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(path, environ={})


def test_a_wrong_environment_variable_is_an_error_too():
    with pytest.raises(ConfigError, match=r"STREAM_CTR_LEARN__BACH_SIZE.*did you mean 'STREAM_CTR_LEARN__BATCH_SIZE'"):
        load(environ={"STREAM_CTR_LEARN__BACH_SIZE": "3"})
    assert load(environ={"STREAM_CTR_FEATURES__CATEGORICAL": "a, b", "OTHER": "x"}).features.categorical == ("a", "b")


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


def test_the_annotated_file_shows_every_key_with_its_default():
    text = (CONFIGS / "events.toml").read_text()
    shown = tomllib.loads(text)
    listed = {f"{section}.{name}" for section, values in shown.items() for name in values}
    assert listed | {"features.categorical", "features.numeric"} == set(known_keys())
    assert load(CONFIGS / "events.toml", environ={}) == Config()
