"""The identity of topics: whether a topic is still the one that reading began with.

Nothing here knows a client; answers of brokers come through `TopicNews`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from stream_ctr.connectors.errors import KafkaUnreachable, TopicChanged
from stream_ctr.connectors.kafka import timeouts

# name: (id, partitions); the id is None for brokers that have no ids
Topics = Mapping[str, tuple[str | None, frozenset[int]]]

_BETWEEN_LOOKS_SECONDS = 0.02


class TopicNews(Protocol):
    """Descriptions of certain topics, as brokers give them."""

    def first(self) -> Topics:
        """Return the topics as they are now. Raises `KafkaUnreachable` when no broker answers."""

    def ask(self) -> None:
        """Request a description without waiting for it."""

    def forget(self) -> None:
        """Drop an answer that has come and one that is on its way."""

    def answer(self) -> Topics | None:
        """Return the topics that exist by the newest answer; None when there is no new answer."""

    @property
    def pending(self) -> bool:
        """True while an answer is on its way."""


class FutureNews:
    """`TopicNews` from a client that answers with futures.

    `describe` starts to ask and returns the futures; `read` makes topics of them, or None when
    brokers did not answer for all; `silent` makes an error of a reason.
    """

    def __init__(
        self,
        describe: Callable[[], Sequence[Future[Any]]],
        read: Callable[[Sequence[Future[Any]]], Topics | None],
        silent: Callable[[str], KafkaUnreachable],
    ) -> None:
        self._describe = describe
        self._read = read
        self._silent = silent
        self._asked: Sequence[Future[Any]] = ()

    def first(self) -> Topics:
        self.ask()
        wait(self._asked, timeouts.ANSWER_SECONDS)
        topics = self.answer()
        if topics is None:
            raise self._silent("no answer about topics")
        return topics

    def ask(self) -> None:
        if not self._asked:
            self._asked = self._describe()

    def forget(self) -> None:
        self._asked = ()

    def answer(self) -> Topics | None:
        if not self._asked or not all(future.done() for future in self._asked):
            return None
        asked = self._asked
        self._asked = ()
        return self._read(asked)

    @property
    def pending(self) -> bool:
        return bool(self._asked)


class KnownTopics:
    """Topics as they were when reading began.

    >>> known = KnownTopics({"clicks": ("a1", frozenset({0, 1}))}, missing_seconds=5.0)
    >>> known.compare({"clicks": ("a1", frozenset({0, 1}))}, now=0.0)
    >>> known.compare({"clicks": ("b2", frozenset({0, 1}))}, now=1.0)
    Traceback (most recent call last):
    stream_ctr.connectors.errors.TopicChanged: topic 'clicks' was deleted and created again: \
its id was a1 and is b2
    """

    def __init__(self, topics: Topics, *, missing_seconds: float) -> None:
        self._topics = dict(topics)
        self._missing_seconds = missing_seconds
        self._missing_since: dict[str, float] = {}

    @property
    def ids(self) -> dict[str, str | None]:
        """The id of each topic; None from brokers that have no ids."""
        return {name: id_ for name, (id_, _) in self._topics.items()}

    def compare(self, topics: Topics, *, now: float) -> None:
        """Compare with what the topics are now.

        Raises `TopicChanged` when a topic has another id, has more partitions, or has been missing
        for longer than `missing_seconds`.
        """
        for name, (id_, partitions) in self._topics.items():
            if name not in topics:
                self._miss(name, now)
                continue
            self._missing_since.pop(name, None)
            id_now, partitions_now = topics[name]
            if id_ and id_now and id_ != id_now:
                raise TopicChanged(
                    f"topic {name!r} was deleted and created again: "
                    f"its id was {id_} and is {id_now}"
                )
            if added := sorted(partitions_now - partitions):
                listed = ", ".join(map(str, added))
                were = f"partition {listed} was" if len(added) == 1 else f"partitions {listed} were"
                raise TopicChanged(f"{were} added to topic {name!r}, which had {len(partitions)}")

    def _miss(self, name: str, now: float) -> None:
        # A broker that has just started may not know the topic yet.
        if now - self._missing_since.setdefault(name, now) > self._missing_seconds:
            raise TopicChanged(f"topic {name!r} was deleted while it was read")


class TopicWatch:
    """Compares topics with what they were at the start, at least every `check_seconds`, and every
    second while records come.

    The silence of brokers is no news, but no confirmation either. Raises `KafkaUnreachable` when
    they do not describe the topics at the start.
    """

    def __init__(self, news: TopicNews, *, check_seconds: float) -> None:
        self._news = news
        self._check_seconds = check_seconds
        self._asked_at = time.monotonic()
        self._confirmed_at = self._asked_at  # when the newest question that was answered was asked
        self._known = KnownTopics(news.first(), missing_seconds=timeouts.TOPIC_MISSING_SECONDS)

    @property
    def ids(self) -> dict[str, str | None]:
        """The id of each topic when reading began."""
        return self._known.ids

    def look(self) -> None:
        """Compare if there is news, and ask for news if it is time. Raises `TopicChanged`."""
        now = time.monotonic()
        if now - self._asked_at >= self._check_seconds:
            self._ask(now)
        self._compare()

    def confirm(self) -> bool:
        """Return whether records that were just read are those of the known topics.

        They are if brokers confirmed the topics within `TOPIC_CONFIRM_SECONDS`: a topic is not
        deleted, created again and filled in that time without a failed fetch. After a longer gap,
        as that of a process that was stopped, this waits for brokers up to `ANSWER_SECONDS`. Raises
        `TopicChanged`.
        """
        self._compare()
        now = time.monotonic()
        age = now - self._confirmed_at
        if age < timeouts.TOPIC_CONFIRM_SECONDS / 2:
            return True
        if age < timeouts.TOPIC_CONFIRM_SECONDS:
            self._ask(now)  # the answer comes while reading goes on
            return True
        self.wait_for_news()
        return self._confirmed_at >= now

    def _ask(self, now: float) -> None:
        if not self._news.pending:
            self._asked_at = now
            self._news.ask()

    def wait_for_news(self) -> None:
        """Ask and compare with the answer, within `ANSWER_SECONDS`. Raises `TopicChanged`."""
        self._compare()
        self._news.forget()
        self._asked_at = time.monotonic()
        self._news.ask()
        deadline = self._asked_at + timeouts.ANSWER_SECONDS
        while not self._compare() and self._news.pending and time.monotonic() < deadline:
            time.sleep(_BETWEEN_LOOKS_SECONDS)

    def _compare(self) -> bool:
        """Compare if there is news; return whether there was."""
        topics = self._news.answer()
        if topics is None:
            return False
        self._known.compare(topics, now=time.monotonic())
        self._confirmed_at = self._asked_at
        return True
