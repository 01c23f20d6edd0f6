"""Connections of kafka-python: defaults, the user's options, and rules that no option changes.

The client is kafka-python, because it is plain Python (it installs wherever torch does and speaks
to every broker since 0.10), hands out raw bytes with position, time and headers, reads only
committed records if asked to, and writes idempotently. Its 3.0 line has traps, which is why this
package

- never gives it a deserializer: an exception inside one loses good records and hangs the next
  poll. A missing codec does the same, so codecs are checked before anything connects (`codecs`);
- decodes fetched records by itself (`record_batches`): the client makes an object for each record,
  which takes many times as long;
- bounds what a compressed batch may expand to, which no option of the client does (`codecs`);
- reads without a group: with one, every poll waits for the group's coordinator. Positions belong
  to the caller, and committed offsets are advisory;
- finds the end of a log by fetching there, since brokers exist whose list of end offsets runs
  behind (Tansu 0.6 reports the start of the last batch plus one);
- compares positions with ends and never counts records: control records and compaction leave gaps,
  and an empty poll is not the end;
- bounds the values that wait for their acknowledgement, which the client's producer does not;
- returns what the client sets aside for a paused partition, and takes over the errors that it
  keeps for later, because it can forget both. After an error it drops the rest of the fetch, which
  would keep the next poll busy forever;
- keeps passwords out of the client's DEBUG log.

`inside` holds everything that is taken of the client's private members, and checks them.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import kafka
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import (
    KafkaConfigurationError,
    KafkaError,
    KafkaTimeoutError,
    RetriableError,
)

from stream_ctr.connectors.errors import (
    KafkaFailure,
    KafkaOptionError,
    KafkaRefused,
    KafkaUnreachable,
)
from stream_ctr.connectors.kafka import inside, timeouts
from stream_ctr.connectors.kafka.codecs import CODECS
from stream_ctr.connectors.kafka.diagnosis import (
    explain_silence,
    listening_to_bootstrap,
    servers,
    warn_of_plaintext,
)

log = logging.getLogger(__name__)

# Tuned by measurement on two cores; every one can be set by the user.
_CONSUMER_DEFAULTS: dict[str, object] = {
    "client_id": "stream-ctr",
    "fetch_max_wait_ms": 100,
    "max_partition_fetch_bytes": 2 << 20,  # a poll of Arrow records is what one fetch brought
    "max_poll_records": 5000,
    "metrics_enabled": False,
    "reconnect_backoff_max_ms": 1000,
}
_ADMIN_DEFAULTS: dict[str, object] = {"client_id": "stream-ctr"}

# Exactness rests on these, so no option of the user changes them.
_CONSUMER_RULES: dict[str, object] = {
    "group_id": None,
    "enable_auto_commit": False,
    "auto_offset_reset": "none",
    "isolation_level": "read_committed",
    "check_crcs": True,
    "allow_auto_create_topics": False,
}

_TLS_SECONDS = (
    0.5  # more than the client's own limit, which a handshake with a silent peer outlasts
)


def open_consumer(client: Mapping[str, object], **ours: object) -> Any:
    """Return a connected consumer that creates no topics and bounds what batches expand to.

    A warning says once what the installed release of kafka-python does not allow.

    Raises `KafkaUnreachable` and `KafkaOptionError`.
    """
    consumer = connect(KafkaConsumer, client, _CONSUMER_DEFAULTS, {**_CONSUMER_RULES, **ours})
    inside.never_create_topics(consumer)
    not_bounded = inside.why_not_bounded(consumer)
    if not not_bounded:
        inside.bound_batches(consumer, CODECS)
    if reason := inside.why_not_columns(consumer) or not_bounded:
        _warn_of_release(reason, bounded=not not_bounded)
    return consumer


@functools.cache
def _warn_of_release(reason: str, *, bounded: bool) -> None:
    unbounded = "" if bounded else ", and a compressed batch may take any amount of memory"
    log.warning(
        "kafka-python %s differs inside from the releases that are known (%s): sources read "
        "through its public interface, which is slower%s",
        kafka.__version__,
        reason,
        unbounded,
    )


@contextmanager
def open_admin(client: Mapping[str, object]) -> Iterator[Any]:
    """Yield a connected admin client.

    Its errors are raised as `KafkaUnreachable` or `KafkaFailure`.
    """
    admin = connect_admin(client)
    try:
        yield admin
    except RetriableError as error:
        raise KafkaUnreachable(
            f"{servers(client)} answered, but the brokers that it names "
            f"(advertised.listeners) did not: {error}"
        ) from error
    except KafkaError as error:
        raise KafkaFailure(f"{servers(client)} refused: {error}") from error
    finally:
        admin.close()


def connect_admin(client: Mapping[str, object]) -> Any:
    """Return a connected admin client. Raises `KafkaUnreachable` and `KafkaOptionError`."""
    return connect(KafkaAdminClient, client, _ADMIN_DEFAULTS)


def connect(
    make: Any,
    client: Mapping[str, object],
    defaults: Mapping[str, object],
    rules: Mapping[str, object] | None = None,
) -> Any:
    """Return a connected client of kafka-python.

    Its options are our defaults, then those of the user's options that it knows, then our rules.

    Raises `KafkaUnreachable` when no broker answers, `KafkaRefused` when one refuses the
    connection, and `KafkaOptionError` for options that the client does not take.
    """
    inside.silence_secrets()
    warn_of_plaintext(client)
    networks: list[Any] = []

    def open_network(**network: object) -> Any:
        networks.append(make.DEFAULT_CONFIG["kafka_client"](**network))
        return networks[-1]

    seconds = timeouts.BOOTSTRAP_SECONDS
    limits = {"bootstrap_timeout_ms": timeouts.milliseconds(seconds), "kafka_client": open_network}
    options = {**defaults, **client, **limits}
    known = {name: value for name, value in options.items() if name in make.DEFAULT_CONFIG}
    options = {**known, **(rules or {})}  # a release that lacks a rule refuses it
    with listening_to_bootstrap() as heard:
        try:
            return in_time(lambda: make(**options), seconds + _TLS_SECONDS)
        except (KafkaTimeoutError, TimeoutError) as error:
            cause: BaseException = error
            failure: KafkaFailure = explain_silence(client, list(heard.reasons), seconds)
        except KafkaConfigurationError as error:
            cause = error
            failure = KafkaOptionError(f"the Kafka client does not take its options: {error}")
        except KafkaError as error:
            cause = error
            failure = KafkaRefused(f"{servers(client)} accepts connections, but answers: {error}")
    for network in networks:
        # The network of a producer cannot be closed while a thread that was given up uses it.
        with suppress(RuntimeError):
            network.close()
    raise failure from cause


def in_background(call: Callable[[], Any]) -> Future[Any]:
    """Return the future result of a call that a daemon thread of its own makes."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - the reader of the outcome gets it
            outcome.set_exception(error)

    threading.Thread(target=work, name="kafka-connect", daemon=True).start()
    return outcome


def in_time(call: Callable[[], Any], seconds: float) -> Any:
    """Return or raise what the call returns or raises.

    Raises `TimeoutError` when it takes longer; the daemon thread that makes it then stays behind.
    """
    return in_background(call).result(seconds)
