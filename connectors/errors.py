"""What can go wrong with sources and sinks, in words for the person who runs the program."""

from __future__ import annotations


# ConnectorFailure
#   EmbeddedUnavailable    there is no embedded broker, or it did not start
#   PositionLost           the source does not hold the records to continue with
#     TopicChanged         it is another topic than the one that reading began with
#   KafkaFailure
#     KafkaOptionError     an option that does not exist, cannot be read or would break exactness
#     KafkaCodecMissing    a library for compressed records is not installed
#     KafkaUnreachable     no broker answers
#       KafkaRefused       something does, but does not let us in
#     KafkaTopicMissing
#     KafkaReadFailed      the broker or the bytes say no, and trying again would not help
#     KafkaDeliveryFailed  records were not acknowledged
class ConnectorFailure(Exception):
    """The root of all that connectors raise by themselves."""


class EmbeddedUnavailable(ConnectorFailure):
    """There is no embedded broker on this machine, or it did not start."""


class PositionLost(ConnectorFailure):
    """The source does not hold the records that come next: deleted by retention, or another log."""


class TopicChanged(PositionLost):
    """The topic was deleted, created again or given more partitions: what was read of it says nothing about where to go on."""


class KafkaFailure(ConnectorFailure):
    """Something about Kafka."""


class KafkaOptionError(KafkaFailure):
    """A Kafka option that does not exist, cannot be read or would break exactness."""


class KafkaCodecMissing(KafkaFailure):
    """A library that compressed records need is not installed."""


class KafkaUnreachable(KafkaFailure):
    """No broker answers."""


class KafkaRefused(KafkaUnreachable):
    """Something accepts connections, but does not let us in: login, TLS, or it is no Kafka broker."""


class KafkaTopicMissing(KafkaFailure):
    """The topic does not exist."""


class KafkaReadFailed(KafkaFailure):
    """Reading failed for a reason that trying again does not cure."""


class KafkaDeliveryFailed(KafkaFailure):
    """Records were not acknowledged; the message has how many and the first reason."""
