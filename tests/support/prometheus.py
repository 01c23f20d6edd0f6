"""The files of deploy/ for Prometheus and Grafana, and the metrics that they ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus-rules.yaml"
DASHBOARD = DEPLOY / "grafana-dashboard.json"


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:stream_ctr|process)_\w+|\bup\b", expression))


def expressions_of(node: object) -> Iterator[str]:
    """Yield every query of a dashboard, those of its variables too."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            else:
                yield from expressions_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions_of(value)
