"""The benchmark of ranks: what it computes and checks, and quick runs of all cases."""

from __future__ import annotations
