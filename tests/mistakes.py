"""Write docs/mistakes.md: what a newcomer does wrong, and what the commands answer.

python tests/mistakes.py            every mistake
python tests/mistakes.py URL        only those whose title contains this text
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from support.brokers import ApacheBroker, find_kafka
from support.mistakes import MISTAKES, PAGE, Brokers, page, run, section, send_clicks

from stream_ctr.connectors.embedded import EmbeddedBroker


def main(words: Sequence[str]) -> None:
    """Renew the sections whose titles contain one of the words, all without any."""
    chosen = [
        mistake
        for mistake in MISTAKES
        if not words or any(word.lower() in mistake.title.lower() for word in words)
    ]
    embedded = login = tls = ""
    with ExitStack() as stack:
        if any(mistake.broker for mistake in chosen):
            embedded = stack.enter_context(EmbeddedBroker()).bootstrap_servers
            send_clicks(embedded)
        if any(mistake.apache for mistake in chosen):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            broker = stack.enter_context(ApacheBroker(find_kafka(), folder))
            login, tls = broker.sasl_servers, broker.tls_servers
        sections = {}
        for mistake in chosen:
            with tempfile.TemporaryDirectory() as name:
                code, text = run(mistake, Path(name), Brokers(embedded, login, tls))
            if code != mistake.exit_code:
                print(f"{mistake.title}: exit code {code}, not {mistake.exit_code}\n{text}\n")
            sections[mistake.title] = section(mistake, text)
    PAGE.write_text(page(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
