"""Tests of `stream_ctr.paper.published`: the paper's own numbers."""

from __future__ import annotations

import pytest
from support.paper_runs import TITLES

from stream_ctr.models import MODELS
from stream_ctr.paper import published


def test_the_models_have_the_properties_of_the_papers_table_1() -> None:
    by_title = {system.title: system for system in MODELS.values()}
    for title, properties in published.TABLE1.items():
        system = by_title[title]
        assert system.pretraining == properties.pretraining, title
        assert system.high_order == properties.high_order, title
        assert system.low_order == properties.low_order, title
        assert system.engineering == properties.engineering, title


@pytest.mark.parametrize(
    ("data", "auc", "logloss"), [("company", 0.86, 1.15), ("criteo", 4.18, 5.60)]
)
def test_the_papers_percentages_follow_from_its_table_2(
    data: str, auc: float, logloss: float
) -> None:
    """Section 3.2 states how much DeepFM improves on LR."""
    rows = published.TABLE2[data]
    assert list(rows) == TITLES
    assert 100 * (rows["DeepFM"].auc / rows["LR"].auc - 1) == pytest.approx(auc, abs=0.02)
    improvement = 100 * (1 - rows["DeepFM"].logloss / rows["LR"].logloss)
    assert improvement == pytest.approx(logloss, abs=0.03)
