"""The table: what it says, that it fits, and that it is silent when nobody watches."""

import io
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.odd_reports import altered
from support.patience import PATIENCE_SECONDS

from stream_ctr.cli.display import LiveTable, final_table


def metrics(logloss: float, auc: float, count: int) -> dict[str, Any]:
    return {
        "auc": auc,
        "auc_error_bound": 0.0002,
        "logloss": logloss,
        "ne": 0.8634,
        "pred_over_actual": 1.012,
        "ctr": 0.0312,
        "count": count,
    }


REPORT: dict[str, Any] = {
    "kind": "report",
    "examples": 1234567,
    "events": 1300000,
    "events_per_second": 15210.4,
    "event_time": "2025-01-01T10:15:00Z",
    "watermark": "2025-01-01T10:13:00Z",
    "pending": 12345,
    "lag": 7,
    "snapshot": "00000012-20250101T101500Z",
    "counters": {
        "impressions": 1250000,
        "clicks": 39012,
        "clicks_late": 12,
        "duplicates": 3,
        "rejected": 0,
    },
    "click_coverage": 0.9987,
    "constant_logloss": 0.14,
    "best_possible_logloss": 0.10,
    "models": {
        "deepfm": metrics(0.11, 0.7612, 1234567),
        "ftrl": metrics(0.12, 0.7512, 1234567),
        "river_ftrl": metrics(0.13, 0.7412, 1234567),
    },
    "rolling": {
        "models": {
            "deepfm": metrics(0.11812, 0.7812, 60000),
            "river_ftrl": metrics(0.12312, 0.7512, 60000),
        },
        "start": "2025-01-01T10:05:00Z",
        "end": "2025-01-01T10:15:00Z",
        "provisional": True,
    },
    "pairs": {
        "ftrl": {"logloss_difference": -0.0030, "low": -0.0034, "high": -0.0026, "count": 1234567},
        "river_ftrl": {
            "logloss_difference": -0.0040,
            "low": -0.0044,
            "high": -0.0036,
            "count": 1234567,
        },
    },
}


def drawn(report: Mapping[str, Any], width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(final_table(report))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def row(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))


def test_a_row_of_a_model_has_its_rolling_numbers_and_then_those_of_the_whole_run() -> None:
    assert row(drawn(REPORT), "deepfm ").split() == [
        "deepfm",
        "0.11812",
        "0.7812",
        "1.012",
        "0.8634",
        "60,000",
        "0.0312",
        "0.11000",
        "0.7612",
        "1.012",
        "0.8634",
        "1,234,567",
        "0.0312",
    ]


def test_the_constant_and_the_best_possible_stand_under_the_models_of_the_whole_run() -> None:
    lines = drawn(REPORT)
    order = [
        lines.index(row(lines, name))
        for name in ("deepfm", "ftrl", "river_ftrl", "constant", "best possible")
    ]
    assert order == list(range(order[0], order[0] + 5))
    where = row(lines, "deepfm ").rindex("0.11000")
    assert row(lines, "constant").index("0.14000") == where
    assert row(lines, "best possible").index("0.10000") == where
    assert not any(
        line.startswith(("constant", "best")) for line in drawn({"models": REPORT["models"]})
    )


def test_a_final_report_shows_the_last_half_in_place_of_the_rolling_window() -> None:
    last_half = {
        "models": {"deepfm": metrics(0.105, 0.79, 617000)},
        "constant_logloss": 0.145,
        "best_possible_logloss": 0.095,
    }
    lines = drawn({**REPORT, "kind": "final", "last_half": last_half})
    assert "last half" in "\n".join(lines)
    assert "rolling window" not in "\n".join(lines)
    assert row(lines, "deepfm ").split()[1] == "0.10500"
    assert row(lines, "constant").split() == ["constant", "0.14500", "0.14000"]
    assert (
        row(lines, "gap to best possible") == "gap to best possible closed (last half): deepfm 80%"
    )  # (145 - 105) / (145 - 95)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    lines = drawn(REPORT, width)
    assert max(len(line) for line in lines) <= width
    assert "…" not in "\n".join(lines)
    assert "0.11812" in row(lines, "deepfm ")
    assert "0.11000" in row(lines, "deepfm ")


def test_a_wider_terminal_shows_more_metrics_and_eighty_columns_show_calibration() -> None:
    counts = [len(row(drawn(REPORT, width), "deepfm ").split()) for width in (40, 60, 80, 120)]
    assert counts == [3, 5, 9, 13]


@pytest.mark.parametrize(
    ("difference", "low", "high", "words"),
    [
        (
            -0.0040,
            -0.0044,
            -0.0036,
            "deepfm beats river_ftrl by 0.00400 nats per impression (whole run, 95 % interval "
            "0.00360 to 0.00440)",
        ),
        (
            0.0040,
            0.0036,
            0.0044,
            "river_ftrl beats deepfm by 0.00400 nats per impression (whole run, 95 % interval "
            "0.00360 to 0.00440)",
        ),
        (
            -0.0010,
            -0.0030,
            0.0010,
            "deepfm and river_ftrl cannot be told apart: "
            "logloss differs by -0.00100 "
            "nats per impression (whole run, 95 % interval -0.00300 to +0.00100)",
        ),
        (
            -0.0010,
            -0.0020,
            0.0,
            "deepfm and river_ftrl cannot be told apart: "
            "logloss differs by -0.00100 "
            "nats per impression (whole run, 95 % interval -0.00200 to +0.00000)",
        ),
    ],
)
def test_the_paired_difference_is_said_in_words(
    difference: float, low: float, high: float, words: str
) -> None:
    pairs = {"river_ftrl": {"logloss_difference": difference, "low": low, "high": high, "count": 9}}
    assert words in drawn({"models": REPORT["models"], "pairs": pairs}, 200)


def test_every_model_is_compared_with_the_first_in_a_line_of_its_own() -> None:
    lines = [line for line in drawn(REPORT) if " beats " in line]
    assert [line.split(" by ")[0] for line in lines] == [
        "deepfm beats ftrl",
        "deepfm beats river_ftrl",
    ]


def with_models(count: int) -> dict[str, Any]:
    """REPORT with so many models, each a little worse than the one before."""
    names = ["deepfm", *(f"model_{number}" for number in range(1, count))]
    models = {
        name: metrics(0.11 + 0.002 * number, 0.76, 1234567) for number, name in enumerate(names)
    }
    pairs = {
        name: {
            "logloss_difference": -0.002 * number,
            "low": -0.002 * number - 0.003,
            "high": -0.002 * number + 0.003,
            "count": 9,
        }
        for number, name in enumerate(names[1:], 1)
    }
    return {
        **{key: value for key, value in REPORT.items() if key != "rolling"},
        "models": models,
        "pairs": pairs,
    }


def test_more_than_two_others_are_compared_with_the_first_in_a_table() -> None:
    lines = drawn(with_models(11))
    assert not any(" beats " in line or "gap to best" in line for line in lines)
    compared = lines[lines.index("whole run, logloss in nats per impression") :]
    assert row(compared, "deepfm ").split() == ["deepfm", "75%"]
    assert (
        " ".join(row(compared, "model_1 ").split())
        == "model_1 -0.00200 cannot be told apart -0.00500 to +0.00100 70%"
    )
    assert (
        " ".join(row(compared, "model_10 ").split())
        == "model_10 -0.02000 deepfm is better -0.02300 to -0.01700 25%"
    )
    worse = with_models(4)
    worse["pairs"]["model_3"] = {
        "logloss_difference": 0.004,
        "low": 0.001,
        "high": 0.007,
        "count": 9,
    }
    assert "model_3 is better" in row(drawn(worse)[-8:], "model_3 ")


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_eleven_models_fit_on_a_narrow_terminal_too(width: int) -> None:
    lines = drawn(with_models(11), width)
    assert max(map(len, lines)) <= width
    assert "…" not in "\n".join(lines)
    assert sum(line.startswith("model_") for line in lines) == 20
    assert ("25%" in "\n".join(lines)) == (width >= 80)


def test_the_share_of_the_gap_that_each_model_closed_is_said() -> None:
    assert "gap to best possible closed (whole run): deepfm 75%, ftrl 50%, river_ftrl 25%" in drawn(
        REPORT
    )  # (14 - 11) / (14 - 10)


def test_progress_and_counters_are_said_with_their_units() -> None:
    text = " ".join(drawn(REPORT, 300))
    for piece in [
        "1,234,567 examples",
        "15,210 events/s",
        "event time 2025-01-01T10:15:00Z",
        "12,345 pending",
        "7 lag",
        "12 clicks late",
        "snapshot 00000012-20250101T101500Z",
        "99.87% of clicks joined",
        "AUC exact to ±0.0002",
        "window 2025-01-01T10:05:00Z to 2025-01-01T10:15:00Z (provisional)",
    ]:
        assert piece in text
    assert "(provisional)" not in " ".join(
        drawn({**REPORT, "rolling": {**REPORT["rolling"], "provisional": False}})
    )


def test_unknown_numbers_are_dashes() -> None:
    report = {"models": {"deepfm": {"logloss": None, "auc": float("nan"), "count": 0}}}
    assert row(drawn(report), "deepfm").split() == ["deepfm", "–", "–", "–", "–", "0", "–"]


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [prefix]
    return [prefix, *(path for key in value for path in paths(value[key], (*prefix, key)))]


@settings(max_examples=60, deadline=None)
@given(
    lost=st.lists(st.sampled_from([path for path in paths(REPORT) if path]), max_size=4),
    put=st.sampled_from([None, "absent", float("nan"), True, "text", [], {}, -1]),
    width=st.integers(20, 160),
)
@pytest.mark.slow
def test_no_missing_or_odd_value_stops_the_drawing(
    lost: list[tuple[str, ...]], put: object, width: int
) -> None:
    report = altered(REPORT, lost, put)
    assert max(map(len, drawn(report, width)), default=0) <= width


def test_an_empty_report_can_be_drawn() -> None:
    assert "whole run" in " ".join(drawn({}))


def test_a_name_that_looks_like_markup_is_shown_as_it_is() -> None:
    assert row(drawn({"models": {"[red]x[/red]": metrics(0.1, 0.5, 1)}}), "[red]x[/red]")


def test_a_terminal_that_is_not_utf8_gets_plain_signs_and_no_encoding_error() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=120)
    console.print(final_table(REPORT))
    console.file.flush()
    assert b"AUC exact to +-" in raw.getvalue()


def terminal(no_color: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=100,
        force_terminal=True,
        color_system="standard",
        no_color=no_color,
        _environ={"TERM": "xterm"},
    )


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_on_a_terminal_each_update_is_drawn_over_the_last_and_the_end_clears_it() -> None:
    console = terminal()
    with LiveTable(console) as table:
        table.update(REPORT)
        before = len(written(console))
        table.update({**REPORT, "examples": 7654321})
        update = written(console)[before:]
        assert "7,654,321" in update
        height = written(console)[:before].count("\n")
        assert update.count("\x1b[1A") == height  # the cursor goes up over all that was drawn
    last_drawn = written(console).rpartition("7,654,321")[2]
    assert last_drawn.count("\x1b[2K") >= height  # and erases each line of it


def test_a_terminal_that_cannot_move_its_cursor_gets_nothing() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with LiveTable(console) as table:
        table.update(REPORT)
    assert written(console) == ""


def test_no_color_leaves_out_colours() -> None:
    colour = re.compile(r"\x1b\[[\d;]*3[0-7]")
    for no_color in (False, True):
        console = terminal(no_color)
        with LiveTable(console) as table:
            table.update(REPORT)
        assert bool(colour.search(written(console))) is not no_color


def test_nothing_is_written_when_the_output_is_piped() -> None:
    program = (
        "from stream_ctr.cli.display import LiveTable\n"
        "with LiveTable() as table:\n"
        "    table.update({'examples': 1})\n"
        "print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_what_keeps_a_run_from_learning_or_publishing_stands_in_the_table_and_only_then() -> None:
    quiet = "\n".join(drawn({**REPORT, "silent_seconds": 0.3, "stalled": [], "refused": []}))
    assert not re.search("answered|overdue|published", quiet)
    told = "\n".join(
        drawn(
            {
                **REPORT,
                "silent_seconds": 12.4,
                "stalled": ["clicks:0", "clicks:3"],
                "refused": ["its logloss is worse"],
            }
        )
    )
    assert "no broker has answered for 12 s" in told
    assert "learning waits: the clicks of clicks:0, clicks:3 are overdue" in told
    assert "snapshots are not published: its logloss is worse" in told
    assert "fm diverged and is left out" in "\n".join(
        drawn({**REPORT, "left_out": {"fm": "the model fm diverged"}})
    )
    since = "2025-01-01T00:00:00.000Z"
    alarm = {"name": "drift", "since": since, "text": "drift: missing rate of app"}
    shown = "\n".join(drawn({**REPORT, "alarms": [alarm]}))
    assert "missing rate of app (since 2025-01-01 00:00:00)" in shown


def test_what_seldom_happens_is_counted_in_the_table_once_it_has_happened() -> None:
    counters = {**REPORT["counters"], "impressions_spilled": 0, "clicks_evicted": 12}
    text = "\n".join(drawn({**REPORT, "counters": counters}))
    assert "spilled" not in text
    assert "12 clicks evicted" in text
    assert "0 rejected" in text


SERVED: dict[str, Any] = {
    "models": {
        "deepfm": metrics(0.1155, 0.7555, 4321),
        "ftrl": metrics(0.1255, 0.7455, 4321),
        "progressive": metrics(0.1144, 0.7444, 4321),
    },
    "pairs": {"progressive": {"logloss_difference": 0.0011, "low": 0.0007, "high": 0.0015}},
}


def test_what_was_served_stands_below_the_progressive_metrics_with_the_difference() -> None:
    report = {**REPORT, "last_half": REPORT["rolling"], "as_served": SERVED}
    lines = drawn({**report, "as_served_last_half": SERVED}, width=200)
    text = "\n".join(lines)
    row = next(line for line in lines if line.startswith("deepfm as served"))
    assert row.split().count("0.11550") == 2
    assert text.index("deepfm  ") < text.index("deepfm as served") < text.index("ftrl as served")
    assert "As served: a share of the impressions, by the snapshot that was published" in text
    assert "As served minus progressive on the same impressions: logloss +0.00110 nats" in text
    assert "progressive as served" not in text


def test_before_anything_was_served_nothing_is_said_about_it() -> None:
    empty = {"models": {"deepfm": {**metrics(0.1, 0.7, 0), "logloss": None}}}
    assert drawn({**REPORT, "as_served": empty}) == drawn(REPORT)
