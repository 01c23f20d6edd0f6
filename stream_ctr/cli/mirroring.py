"""The mirror of a run, by its configuration: at a URL, or on a topic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from stream_ctr.config import Config
from stream_ctr.connectors import kafka
from stream_ctr.errors import ConfigError
from stream_ctr.snapshots.base_topic import topic_of
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.mirror import SNAPSHOT_SECONDS, Mirror, TopicMirror, Work, mirror_at


@contextlib.contextmanager
def mirrored(
    config: Config, lease: Lease, client: Mapping[str, object] | None = None
) -> Iterator[Mirror | None]:
    """Keep the mirror that `snapshots.url` asks for, None without one, while the block runs.

    `client` has the options of the Kafka client of a run on Kafka. Raises `ConfigError` for a URL
    that cannot be written to, and at the end `SnapshotError` if something could not be sent.
    """
    url = config.snapshots.url
    topic = topic_of(url)
    if not url:
        yield None
    elif not topic:
        with mirror_at(url, lease.directory, run=lease.run, check=lease.check) as mirror:
            yield mirror
    elif client is None:
        raise ConfigError(
            f"snapshots.url = {url!r:.200}: only a run on Kafka sends snapshots to a topic; give "
            "the URL of a directory or of an object store"
        )
    else:
        kafka.ensure_topic(client, topic, compacted=True)
        with contextlib.ExitStack() as stack:
            sink = kafka.KafkaSink(client)  # for the thread that sends
            stack.callback(_close, sink)
            work = TopicMirror(
                lease.directory,
                topic,
                sink,
                model_name=config.snapshots.model_name,
                unavailable=(kafka.KafkaFailure,),
                check=lease.check,
            )
            works = {"snapshots": Work(work, SNAPSHOT_SECONDS)}
            yield stack.enter_context(Mirror(url, lease.directory, works))


def _close(sink: kafka.KafkaSink) -> None:
    with contextlib.suppress(kafka.KafkaFailure):  # the mirror has judged what was lost
        sink.close()
