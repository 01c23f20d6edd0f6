"""The errors of sources and sinks. Their messages are for the person who runs the program.

ConnectorFailure
|-- EmbeddedUnavailable      there is no embedded broker, or it did not start
|-- PositionLost             the source does not hold the records to continue with
|   |-- TopicChanged         the topic is not the one that reading began with
|   `-- LogTruncated         the log lost records that were read
|-- RegistryFailure          schemas cannot be read, or the answer is not that of a registry
|   |-- RegistryUnreachable  the schema registry does not answer
|   `-- RegistryRefused      the schema registry refuses the login
`-- KafkaFailure
    |-- KafkaOptionError     an option does not exist, cannot be read or would break exactness
    |-- KafkaCodecMissing    a library for compressed records is not installed
    |-- KafkaUnreachable     no broker answers
    |   `-- KafkaRefused     something answers, but refuses the connection
    |-- KafkaTopicMissing    the topic does not exist
    |-- KafkaReadFailed      reading failed, and a retry would not help
    `-- KafkaDeliveryFailed  records were not acknowledged
"""

from __future__ import annotations


class ConnectorFailure(Exception):
    """The base of all errors that connectors raise on purpose."""


class EmbeddedUnavailable(ConnectorFailure):
    """There is no embedded broker on this machine, or it did not start."""


class PositionLost(ConnectorFailure):
    """The next records are not in the source: retention removed them, or it is another log."""


class TopicChanged(PositionLost):
    """The topic was deleted, recreated or given more partitions: its old positions are invalid."""


class LogTruncated(PositionLost):
    """The log lost records that were read, and holds others at their offsets."""


class RegistryFailure(ConnectorFailure):
    """Schemas cannot be read, or what answers is no schema registry."""


class RegistryUnreachable(RegistryFailure):
    """The schema registry does not answer."""


class RegistryRefused(RegistryFailure):
    """The schema registry refuses the login."""


class KafkaFailure(ConnectorFailure):
    """The base of the errors of Kafka sources and sinks."""


class KafkaOptionError(KafkaFailure):
    """A Kafka option that does not exist, cannot be read or would break exactness."""


class KafkaCodecMissing(KafkaFailure):
    """A library for compressed records is not installed."""


class KafkaUnreachable(KafkaFailure):
    """No broker answers."""


class KafkaRefused(KafkaUnreachable):
    """A server accepts connections but refuses the client: login, TLS, or it is no Kafka broker."""


class KafkaTopicMissing(KafkaFailure):
    """The topic does not exist."""


class KafkaReadFailed(KafkaFailure):
    """Reading failed, and a retry would not help."""


class KafkaDeliveryFailed(KafkaFailure):
    """Records were not acknowledged. The message has their number and the first reason."""
