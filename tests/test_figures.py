"""Tests of `stream_ctr.paper.figures`; those of whole pictures are in test_paper_report.py."""

from __future__ import annotations

from itertools import pairwise

from stream_ctr.paper import figures


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    places = figures.spread_out([0.5] * 7, gap=0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in pairwise(places))
    assert 0 <= places[0] <= places[-1] <= 1


def test_the_same_data_gives_the_same_picture() -> None:
    values = {"relu": {"FNN": {"auc": 0.71}}, "tanh": {"FNN": {"auc": 0.70}}}
    assert figures.study("figure7", values, ["auc"]) == figures.study("figure7", values, ["auc"])
