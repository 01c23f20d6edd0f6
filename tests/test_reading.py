"""Tests of `stream_ctr.paper.reading`: from a log to the dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.paper_data import SMALL, log_events, open_labelled, read_dataset, write_criteo_log
from support.sample_logs import shared_data

from stream_ctr import config
from stream_ctr.errors import DataError
from stream_ctr.events.features import Hasher
from stream_ctr.logs.open import open_log
from stream_ctr.logs.simulate import FIELDS, Simulation
from stream_ctr.paper import reading
from stream_ctr.paper.dataset import Dataset


def test_labels_are_those_of_a_dictionary_of_clicks(tmp_path: Path) -> None:
    simulation = Simulation(2000, seed=4)
    events = list(log_events(simulation))
    shown = [event for event in events if event["kind"] == "impression"]
    clicked = {event["impression_id"] for event in events if event["kind"] == "click"}

    data = read_dataset(simulation, tmp_path / "data")

    assert data.time.tolist() == [event["time"] for event in shown]
    assert data.labels.tolist() == [int(event["impression_id"] in clicked) for event in shown]
    assert data.true_probability.tolist() == [event["true_probability"] for event in shown]
    assert data.metadata["notes"] == list(simulation.notes)  # nothing was late or unmatched


def test_ids_are_those_of_the_hasher(tmp_path: Path) -> None:
    simulation = Simulation(300, seed=4)
    events = log_events(simulation)
    shown = [event["features"] for event in events if event["kind"] == "impression"]
    types = {"categorical": pa.string(), "numeric": pa.float64()}
    columns = {
        field.name: pa.array(
            [features.get(field.name) for features in shown], types[str(field.kind)]
        )
        for field in FIELDS
    }

    data = read_dataset(simulation, tmp_path / "data")

    edges = data.metadata["identity"]["hashing"]["bucket_edges"]
    assert edges.keys() == {"rating"}
    expected, _ = Hasher(FIELDS, table_bits=12, bucket_edges=edges).rows(columns)
    assert np.array_equal(data.ids, expected)
    unfitted = config.load(overrides={**SMALL, "features": {"fit_numbers": False}})
    plain = read_dataset(simulation, tmp_path / "plain", configured=unfitted)
    assert np.array_equal(plain.ids, Hasher(FIELDS, table_bits=12).rows(columns)[0])


def test_a_log_without_click_times_keeps_all_labels_and_counts_bad_lines(tmp_path: Path) -> None:
    bad = (7, 4000)
    path = write_criteo_log(tmp_path / "log.tsv", 5000, bad=bad)
    lines = path.read_text().splitlines()
    labels = [int(line[0]) for row, line in enumerate(lines) if row not in bad]

    data = read_dataset(open_labelled(path), tmp_path / "data")

    assert data.labels.tolist() == labels
    assert any(note.startswith("2 lines cannot be read") for note in data.metadata["notes"])


@pytest.mark.parametrize(
    ("name", "column", "delimiter"), [("criteo/train.csv", 0, "\t"), ("avazu/train.csv", 1, ",")]
)
def test_every_click_of_the_public_samples_is_found(
    name: str, column: int, delimiter: str, tmp_path: Path
) -> None:
    path = shared_data(name)
    clicks = sum(line.split(delimiter)[column] == "1" for line in path.read_text().splitlines())
    log = open_log(path, click_delay_seconds=reading.CLICK_DELAY_SECONDS)
    assert int(read_dataset(log, tmp_path / "data").labels.sum()) == clicks > 1000


def test_a_log_of_events_is_joined_as_configured_and_its_fields_are_inferred(
    tmp_path: Path,
) -> None:
    simulation = Simulation(1500, seed=4)
    path = tmp_path / "events.jsonl.gz"
    simulation.write_jsonl(path)

    def read_with(name: str, **join: str) -> Dataset:
        configured = config.load(overrides={**SMALL, "join": join})
        return read_dataset(open_log(path), tmp_path / name, configured=configured)

    direct = read_dataset(simulation, tmp_path / "direct")
    long = read_with("long", label_window="6h", allowed_lateness="0s")
    short = read_with("short", label_window="5s")
    assert np.array_equal(long.labels, direct.labels)
    assert np.array_equal(np.sort(long.ids), np.sort(direct.ids))  # the fields' order differs
    assert 0 < short.labels.sum() < direct.labels.sum()
    assert any("late clicks" in note for note in short.metadata["notes"])


def test_numbers_that_multiply_are_kept_with_the_ids(tmp_path: Path) -> None:
    configured = config.load(overrides={**SMALL, "features": {"numeric_encoding": "value"}})
    simulation = Simulation(300, seed=4)
    events = log_events(simulation)
    shown = [event["features"] for event in events if event["kind"] == "impression"]
    data = read_dataset(simulation, tmp_path / "data", configured=configured)
    scale = data.metadata["identity"]["hashing"]["value_scales"]["rating"]
    expected = [x["rating"] / scale if x.get("rating") else 1.0 for x in shown]
    assert data.values[:, 0].tolist() == pytest.approx(expected)


def test_the_dataset_is_reused_unless_the_log_or_the_hashing_differs(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    first = read_dataset(Simulation(300, seed=4), directory)
    written = (directory / "ids.bin").stat().st_mtime_ns
    assert np.array_equal(read_dataset(Simulation(300, seed=4), directory).ids, first.ids)
    assert (directory / "ids.bin").stat().st_mtime_ns == written
    other_log = "holds other data: it is of simulation-4, and this is simulation-5.*--restart"
    with pytest.raises(DataError, match=other_log):
        read_dataset(Simulation(300, seed=5), directory)
    other_hashing = config.load(overrides={"model": {"table_bits": 13}})
    with pytest.raises(DataError, match="holds other data: table_bits is 12 there and 13 here"):
        read_dataset(Simulation(300, seed=4), directory, configured=other_hashing)


def test_configured_fields_that_no_impression_has_are_named(tmp_path: Path) -> None:
    path = write_criteo_log(tmp_path / "log.tsv", 300)

    def read_fields(*names: str) -> Dataset:
        configured = config.load(overrides={**SMALL, "features": {"categorical": names}})
        directory = tmp_path / "-".join(names)
        return read_dataset(open_labelled(path), directory, configured=configured)

    note = read_fields("C1", "C1o").metadata["notes"][-1]
    assert note == "no impression has C1o: are these fields spelled as in the log?"
    assert not any("spelled" in note for note in read_fields("C1").metadata["notes"])
    none = "no impression has C1o, C2o: are these fields spelled as in the log"
    with pytest.raises(DataError, match=none):
        read_fields("C1o", "C2o")


def test_a_limit_takes_the_first_impressions(tmp_path: Path) -> None:
    every = read_dataset(Simulation(2000, seed=4), tmp_path / "every")
    few = read_dataset(Simulation(2000, seed=4), tmp_path / "few", limit=1234)
    assert len(few) == 1234
    assert np.array_equal(few.ids, every.ids[:1234])
