"""docs/mistakes.md shows what the commands answer to the mistakes of a newcomer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.brokers import ApacheBroker
from support.mistakes import (
    MISTAKES,
    PAGE,
    Brokers,
    Mistake,
    first_words,
    page,
    run,
    section,
    send_clicks,
    shown_section,
)

from stream_ctr.connectors.kafka import timeouts

HERE = [mistake for mistake in MISTAKES if not (mistake.broker or mistake.apache)]
WITH_BROKER = [mistake for mistake in MISTAKES if mistake.broker]
WITH_LOGIN = [mistake for mistake in MISTAKES if mistake.apache]


def title(mistake: Mistake) -> str:
    return mistake.title


def require_shown(mistake: Mistake, folder: Path, brokers: Brokers) -> None:
    code, text = run(mistake, folder, brokers)
    assert (code, section(mistake, text)) == (mistake.exit_code, shown_section(mistake.title)), (
        "python tests/mistakes.py renews the page"
    )


@pytest.fixture
def _short_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 2.0)


@pytest.mark.usefixtures("_short_bootstrap")
@pytest.mark.parametrize("mistake", HERE, ids=title)
def test_a_mistake_gets_the_message_that_the_page_shows(mistake: Mistake, tmp_path: Path) -> None:
    require_shown(mistake, tmp_path, Brokers())


@pytest.fixture(scope="module")
def with_clicks(embedded_broker: str) -> str:
    send_clicks(embedded_broker)
    return embedded_broker


@pytest.mark.parametrize("mistake", WITH_BROKER, ids=title)
def test_a_mistake_with_a_topic_gets_the_message_that_the_page_shows(
    mistake: Mistake, tmp_path: Path, with_clicks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Runs of other tests may hold the usual name on the usual topic.
    monkeypatch.setenv("STREAM_CTR_SNAPSHOTS__TOPIC", "snapshots-of-mistakes")
    require_shown(mistake, tmp_path, Brokers(embedded=with_clicks))


@pytest.mark.slow
@pytest.mark.usefixtures("_short_bootstrap")
@pytest.mark.parametrize("mistake", WITH_LOGIN, ids=title)
def test_a_mistake_with_a_login_gets_the_message_that_the_page_shows(
    mistake: Mistake, tmp_path: Path, apache: ApacheBroker
) -> None:
    brokers = Brokers(login=apache.sasl_servers, tls=apache.tls_servers)
    code, text = run(mistake, tmp_path, brokers)
    assert code == mistake.exit_code
    shown = first_words(section(mistake, text))
    assert shown == first_words(shown_section(mistake.title))
    assert "Three ways" not in text  # there is a broker


def test_the_page_has_these_sections_in_their_order_and_no_other() -> None:
    assert PAGE.read_text() == page({})
    assert all(shown_section(mistake.title) for mistake in MISTAKES)
