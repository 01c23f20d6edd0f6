"""Time limits of the Kafka clients.

They are read each time they are used, so that a program or a test may set other values.
"""

from __future__ import annotations

BOOTSTRAP_SECONDS = 5.0  # for the first answer of a broker
ANSWER_SECONDS = 5.0  # for an answer of a broker that has answered before
TOPIC_MISSING_SECONDS = 5.0  # a broker that has just started may not know a topic yet
TOPIC_CONFIRM_SECONDS = 1.0  # for records of a topic that was last known to be the same
TOPIC_NEWS_SECONDS = 2.0  # for news of a topic to reach every broker


def milliseconds(seconds: float) -> int:
    """Return the whole milliseconds in this many seconds.

    >>> milliseconds(2.5)
    2500
    """
    return int(seconds * 1000)
