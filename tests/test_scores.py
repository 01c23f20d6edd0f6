"""`score` checks what it scores, counts what it skips, and fails if nothing was scored."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest
from click.testing import CliRunner, Result
from support.served import served

from stream_ctr.cli.main import main
from stream_ctr.snapshots.scorer import Scorer

__all__ = ["served"]  # a fixture


def impression(number: int, **features: Any) -> dict[str, Any]:
    return {
        "kind": "impression",
        "impression_id": f"i{number}",
        "time": 1_735_689_600_000 + number,
        "features": features,
    }


GOOD = [impression(1, app="maps", age=31), impression(2, os="a"), impression(3, age=2)]


def score(snapshot: Path, events: list[Any], *options: str) -> Result:
    """Score these events; text stands for itself."""
    log = snapshot.parent / "events.jsonl"
    lines = (event if isinstance(event, str) else json.dumps(event) for event in events)
    log.write_text("".join(f"{line}\n" for line in lines))
    arguments = ["score", str(log), "--format", "events", "--snapshot", str(snapshot), *options]
    return CliRunner().invoke(main, arguments)


def printed(result: Result) -> dict[str, float]:
    lines = (line.split("\t") for line in result.stdout.splitlines())
    return {name: float(probability) for name, probability in lines}


def test_good_impressions_have_the_probabilities_of_predict(served: Path) -> None:
    result = score(served, GOOD)
    assert (result.exit_code, result.stderr) == (0, "")
    expected = Scorer(served).predict([event["features"] for event in GOOD])
    assert list(printed(result).items()) == list(zip(("i1", "i2", "i3"), expected, strict=True))


INVALID = [
    (impression(4, ap="maps"), "there is no field 'ap'; did you mean 'app'?", "unknown_field 1"),
    (impression(4, age="31"), "'age' must be a number, got '31' (str)", "wrong_type 1"),
    (impression(4, app=1.5), "'app' is categorical", "wrong_type 1"),
    (impression(4, features={"app": "maps"}), "a whole event", "wrapped_event 1"),
    (impression(4), "a value of at least one field is needed", "no_field 1"),
    (impression(4, app=None), "a value of at least one field is needed", "no_field 1"),
]


@pytest.mark.parametrize(("event", "problem", "count"), INVALID)
def test_an_invalid_impression_ends_the_command_or_is_scored_as_missing(
    served: Path, event: dict[str, Any], problem: str, count: str
) -> None:
    events = [GOOD[0], "oops", event, impression(5, os="a")]
    refused = score(served, events)
    assert refused.exit_code == 5
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: impression 'i4': ")
    assert problem in last
    assert last.endswith("(--on-invalid score scores it as missing)")

    scored = score(served, events, "--on-invalid", "score")
    assert scored.exit_code == 0
    assert list(printed(scored)) == ["i1", "i4", "i5"]
    assert printed(scored)["i1"] == Scorer(served).predict(GOOD[0]["features"])
    assert count in scored.stderr.splitlines()[-1]
    assert "1 malformed record was not scored: JSON is malformed" in scored.stderr


@pytest.mark.parametrize(("change", "reason"), [({"age": "x"}, "age"), ({"ap": 1}, "ap")])
def test_one_invalid_impression_among_complete_ones_is_found(
    served: Path, change: dict[str, Any], reason: str
) -> None:
    complete = {"app": "maps", "age": 31, "os": "a"}
    events = [impression(1, **complete), impression(2, **{**complete, **change})]
    refused = score(served, events)
    assert refused.exit_code == 5
    assert f"impression 'i2': {reason!r}" in refused.stderr or f"no field {reason!r}" in (
        refused.stderr
    )


def test_other_members_and_missing_values_are_no_reason_to_stop(served: Path) -> None:
    events = [{**impression(4, app="maps", ap=None), "shop": 7}, *GOOD]
    result = score(served, events)
    assert (result.exit_code, result.stderr) == (0, "")
    assert printed(result)["i4"] == Scorer(served).predict({"app": "maps"})


@pytest.mark.parametrize("reaction", ["error", "score"])
@pytest.mark.parametrize(
    ("events", "last"),
    [
        (
            ["oops", "{}"],
            "no impression was scored: 2 malformed records, the first: JSON is malformed",
        ),
        ([{**GOOD[0], "time": "soon"}], "no impression was scored: 1 malformed record"),
    ],
)
def test_a_log_without_one_good_record_ends_with_exit_code_5(
    served: Path, reaction: str, events: list[Any], last: str
) -> None:
    result = score(served, events, "--on-invalid", reaction)
    assert result.exit_code == 5
    assert result.stdout == ""
    assert last in result.stderr.splitlines()[-1]


def test_a_log_of_another_model_ends_with_exit_code_5_even_if_it_is_scored(served: Path) -> None:
    events = [impression(1, x="maps"), impression(2, y=1)]
    result = score(served, events, "--on-invalid", "score")
    assert result.exit_code == 5
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.splitlines()[-1] == (
        "error: no impression has any of the fields that this snapshot was trained on"
    )


def test_clicks_alone_are_nothing_to_score(served: Path) -> None:
    click = {"kind": "click", "impression_id": "i1", "time": 1_735_689_600_000}
    result = score(served, [click])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "warning: there is no impression to score\n"


# -- tables, whose columns the run named ---------------------------------------------------------

NAMED = """
[input]
time_zone = "UTC"

[input.columns]
time = "at"
id = "request"
label = "bought"
"""
TABLE = """request,at,app,age,os,bought
r1,2025-01-01 10:00:00,maps,31,,1
r2,2025-01-02 10:00:00,,2,a,0
"""
TABLE_FEATURES = [{"app": "maps", "age": 31}, {"age": 2, "os": "a"}]


def score_log(snapshot: Path, log: Path) -> Result:
    config = snapshot.parent / "my.toml"
    config.write_text(NAMED)
    given = ["score", str(log), "--snapshot", str(snapshot), "--config", str(config)]
    return CliRunner().invoke(main, given)


@pytest.mark.parametrize("without", ["", "bought", "at", "at,bought"])
def test_a_table_is_read_by_the_columns_of_the_run_and_needs_no_label(
    served: Path, tmp_path: Path, without: str
) -> None:
    table = pa.csv.read_csv(io.BytesIO(TABLE.encode()))
    pa.csv.write_csv(table.drop_columns(without.split(",") if without else []), tmp_path / "a.csv")
    result = score_log(served, tmp_path / "a.csv")
    assert (result.exit_code, result.stderr) == (0, "")
    expected = Scorer(served).predict(TABLE_FEATURES)
    assert list(printed(result).items()) == list(zip(("r1", "r2"), expected, strict=True))


def test_rows_without_an_id_are_scored_under_the_names_of_the_file(
    served: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("app,age,os\nmaps,31,\n,2,a\n")
    result = score_log(served, tmp_path / "a.csv")
    assert list(printed(result).values()) == Scorer(served).predict(TABLE_FEATURES).tolist()
    assert all(name.startswith("a.csv#") for name in printed(result))


def test_events_are_scored_whatever_columns_are_named(served: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text("".join(f"{json.dumps(event)}\n" for event in GOOD))
    assert list(printed(score_log(served, log))) == ["i1", "i2", "i3"]
    log.write_text(f"{json.dumps(impression(4, ap='maps'))}\n")
    assert "there is no field 'ap'; did you mean 'app'?" in score_log(served, log).stderr


def test_a_table_without_a_field_of_the_model_is_refused(served: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ap,age,os\nmaps,31,\n")
    result = score_log(served, tmp_path / "a.csv")
    assert result.exit_code == 3
    assert "did you mean 'ap'?" in result.stderr
