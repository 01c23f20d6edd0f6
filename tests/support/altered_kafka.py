"""kafka-python with other private names: it works, and code that relies on the names fails."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import kafka.cluster
import kafka.consumer.fetcher
import kafka.consumer.subscription_state

# Private members of the fetcher that this package uses.
FETCHER_NAMES = {
    "PartitionRecords": "RecordsOfPartition",
    "_completed_fetches": "_finished_fetches",
    "_create_fetch_requests": "_make_fetch_requests",
    "_handle_fetch_response": "_take_fetch_response",
    "_next_in_line_exception_metadata": "_kept_error",
    "_next_partition_records": "_records_in_hand",
    "_paused_partition_records": "_waiting_records",
    "_subscriptions": "_subscribed",
}


def renamed(module: ModuleType, names: Mapping[str, str]) -> ModuleType:
    """Return a copy of the module in which each name is another one."""
    assert module.__file__
    text = Path(module.__file__).read_text()
    for name, other in names.items():
        assert re.search(rf"\b{name}\b", text), f"{module.__name__} has no {name}"
        text = re.sub(rf"\b{name}\b", other, text)
    copy = ModuleType(module.__name__)
    exec(compile(text, f"{module.__file__} with other names", "exec"), copy.__dict__)
    return copy


def altered_fetcher(names: Mapping[str, str] = FETCHER_NAMES) -> Any:
    """Return the client's class of fetchers with other private names."""
    return renamed(kafka.consumer.fetcher, names).Fetcher


def altered_cluster(names: Mapping[str, str]) -> Any:
    """Return the client's class of cluster metadata with other private names."""
    return renamed(kafka.cluster, names).ClusterMetadata
