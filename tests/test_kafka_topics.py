"""The identity of topics, without any broker."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from stream_ctr.connectors.errors import KafkaUnreachable, TopicChanged
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.connectors.kafka.topics import FutureNews, KnownTopics, Topics, TopicWatch

CLICKS: Topics = {"clicks": ("a1", frozenset({0, 1}))}
OTHER_CLICKS: Topics = {"clicks": ("b2", frozenset({0, 1}))}


class Broker:
    """Describes topics when `answers` is called, and not before."""

    def __init__(self) -> None:
        self.asked: list[Future[Topics | None]] = []

    def describe(self) -> list[Future[Any]]:
        self.asked.append(Future())
        return [self.asked[-1]]

    def answers(self, topics: Topics | None) -> None:
        self.asked[-1].set_result(topics)

    def news(self) -> FutureNews:
        return FutureNews(self.describe, lambda futures: futures[0].result(), KafkaUnreachable)


class AnsweringBroker(Broker):
    """Describes its topics at once."""

    topics: Topics | None = CLICKS

    def describe(self) -> list[Future[Any]]:
        futures = super().describe()
        self.answers(self.topics)
        return futures


def test_a_topic_that_is_missing_for_a_while_is_no_change_before() -> None:
    known = KnownTopics(CLICKS, missing_seconds=5.0)
    known.compare({}, now=0.0)
    known.compare({}, now=5.0)
    known.compare(CLICKS, now=6.0)
    known.compare({}, now=7.0)
    with pytest.raises(TopicChanged, match="topic 'clicks' was deleted while it was read"):
        known.compare({}, now=12.1)


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ({0, 1, 2}, "partition 2 was added to topic 'clicks', which had 2"),
        ({0, 1, 2, 3}, "partitions 2, 3 were added to topic 'clicks', which had 2"),
    ],
)
def test_added_partitions_are_a_change(partitions: set[int], message: str) -> None:
    known = KnownTopics(CLICKS, missing_seconds=5.0)
    with pytest.raises(TopicChanged, match=message):
        known.compare({"clicks": ("a1", frozenset(partitions))}, now=0.0)


def test_fewer_partitions_and_other_topics_are_no_change() -> None:
    known = KnownTopics(CLICKS, missing_seconds=5.0)
    known.compare({"clicks": ("a1", frozenset({0})), "views": ("c3", frozenset({0}))}, now=0.0)


def test_brokers_without_ids_cannot_show_that_a_topic_was_created_again() -> None:
    for before, now in ((None, "b2"), ("a1", None), (None, None)):
        known = KnownTopics({"clicks": (before, frozenset({0}))}, missing_seconds=5.0)
        known.compare({"clicks": (now, frozenset({0}))}, now=0.0)
        assert known.ids == {"clicks": before}


def test_a_watch_asks_when_it_is_time_and_compares_when_the_answer_comes() -> None:
    broker = AnsweringBroker()
    watch = TopicWatch(broker.news(), check_seconds=3600.0)
    assert watch.ids == {"clicks": "a1"}
    broker.topics = OTHER_CLICKS
    watch.look()
    assert len(broker.asked) == 1, "it is not time yet"
    often = AnsweringBroker()
    TopicWatch(often.news(), check_seconds=0.0).look()
    assert len(often.asked) == 2

    slow = Broker()
    news = slow.news()
    news.ask()
    slow.answers(CLICKS)
    watch = TopicWatch(news, check_seconds=0.0)
    watch.look()
    watch.look()
    assert len(slow.asked) == 2, "it does not ask again while an answer is on its way"
    slow.answers(OTHER_CLICKS)
    with pytest.raises(TopicChanged, match="its id was a1 and is b2"):
        watch.look()


def test_silent_brokers_are_an_error_at_the_start_and_no_news_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeouts, "ANSWER_SECONDS", 0.1)
    with pytest.raises(KafkaUnreachable, match="no answer about topics"):
        TopicWatch(Broker().news(), check_seconds=0.0)
    broker = AnsweringBroker()
    watch = TopicWatch(broker.news(), check_seconds=3600.0)
    broker.topics = None
    watch.wait_for_news()
    assert len(broker.asked) == 2


def test_waiting_for_news_takes_no_answer_to_an_older_question() -> None:
    broker = Broker()
    news = broker.news()
    news.ask()
    broker.answers(CLICKS)
    watch = TopicWatch(news, check_seconds=0.0)
    watch.look()  # a question whose answer will be late
    late = broker.asked[-1]

    class Now(AnsweringBroker):
        topics = OTHER_CLICKS

    news._describe = Now().describe
    with pytest.raises(TopicChanged):
        watch.wait_for_news()
    assert not late.done()


def test_waiting_for_news_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    news = broker.news()
    news.ask()
    broker.answers(CLICKS)
    watch = TopicWatch(news, check_seconds=3600.0)
    monkeypatch.setattr(timeouts, "ANSWER_SECONDS", 0.2)
    begun = time.monotonic()
    watch.wait_for_news()
    assert time.monotonic() - begun >= 0.2
