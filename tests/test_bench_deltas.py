"""The benchmark of deltas: what it computes, and quick runs of all cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import delta_lag, delta_sizes, deltas
from bench.delta_chain_writer import ChainWriter
from support.long import only_long

SCRIPT = Path(__file__).parent / "bench" / "deltas.py"
PAGE = Path(__file__).parents[1] / "docs" / "deltas.md"


# -- sizes ---------------------------------------------------------------------------------------


def test_so_many_rows_are_touched_as_the_formula_says() -> None:
    law = delta_sizes.Law((40, 1000, 50_000))
    found = delta_sizes.touched_rows(law, bits=14, rate=5000, seconds=(1, 4))
    for length, counts in found["fields"].items():
        expected = law.expected_rows(rows=1 << 14, examples=5000 * length)
        assert np.mean(counts) == pytest.approx(expected, rel=0.02)
    assert len(found["fields"][1]) == 4
    assert len(found["fields"][4]) == 1
    assert np.mean(found["pairs"][4]) > np.mean(found["pairs"][1]) > np.mean(found["fields"][1])


def test_a_blend_has_the_bytes_of_all_its_tables_and_of_the_dense_part() -> None:
    touched = {"fields": {5: [10]}, "pairs": {5: [100]}}
    found = delta_sizes.sizes(touched, bits=20, width=10, dense=1000)
    whole = found[-1]
    assert whole["fp32"] == 10 * 48 + 2 * 10 * 8 + 2 * 100 * 8 + 1000
    assert whole["bf16"] == 10 * 26 + 2 * 10 * 6 + 2 * 100 * 6 + 1000


# -- lag -----------------------------------------------------------------------------------------


def test_each_example_counts_once_if_its_window_closed_in_real_time(tmp_path: Path) -> None:
    chain = ChainWriter.unattached(precision="fp32")
    followed = delta_lag.Followed(None, tmp_path)  # type: ignore[arg-type]
    for number, loaded_ms in enumerate((9_000, 12_000, 17_500)):
        closed = delta_lag.closings(5000 * (number + 1), 5.0, 1000)
        link = chain.link({}, b"", "0" * 64, closed, created_ms=5000 * (number + 1))
        followed.headers[link.header.rank.name] = link.header
        followed.at_ms[link.header.rank.name] = loaded_ms
    found = delta_lag.lags(followed, since_ms=5000)
    assert (found["deltas"], found["examples"]) == (2, 10_000)
    # Loaded 2 s and 2.5 s after the end of their intervals, whose windows closed over 5 s.
    assert found["p50"] == pytest.approx(4.7, abs=0.1)
    assert found["longest"] == pytest.approx(7.4, abs=0.01)
    assert found["since_created_p50"] == pytest.approx(2.25)


# -- pages and quick runs ------------------------------------------------------------------------


def test_the_page_has_a_block_for_every_table() -> None:
    text = PAGE.read_text()
    for case in deltas.TABLES:
        assert text.count(f"<!-- {case} -->\n") == text.count(f"<!-- /{case} -->") == 1


def test_an_unknown_case_is_an_error_that_lists_the_cases() -> None:
    done = ran("siezs")
    assert done.returncode == 2
    assert "no case siezs; the cases are sizes, parts" in done.stderr


def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def quick(case: str, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """Run a case with --quick; return the cases that it kept, and the page that it filled."""
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    done = ran(case, "--quick", "--json", str(kept), "--page", str(page))
    assert done.returncode == 0, done.stderr
    return json.loads(kept.read_text())["cases"], page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sizes", *only_long(["parts", "cost", "serving", "bf16"])])
def test_a_quick_run_of_a_case_fills_its_block(case: str, tmp_path: Path) -> None:
    cases, page = quick(case, tmp_path)
    assert [*cases] == [case]
    assert deltas.TABLES[case](cases[case]["results"]) in page


@pytest.mark.long
def test_a_quick_run_of_the_lag_goes_through_a_broker(tmp_path: Path) -> None:
    cases, page = quick("lag", tmp_path)
    results = cases["lag"]["results"]
    assert results["real"]["deltas"] > 2
    assert results["emulated"]["deltas"] == 4
    assert 0 < results["real"]["p50"] <= results["real"]["p99"]
    assert delta_lag.table(results) in page
