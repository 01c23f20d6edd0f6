"""Take the pictures of the live page and of `top` that docs/operations.md shows.

    python tests/screenshots.py

A real run learns a simulated stream from the embedded broker, with a few malformed records. The
pictures are taken while it learns, of its own port, in headless Chromium. They are made small: few
colours, and text of `top` as SVG without fonts from other hosts.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from support.browser import Browser

from stream_ctr.cli.on_call import OnCall
from stream_ctr.cli.replay import produce
from stream_ctr.cli.top import Port
from stream_ctr.connectors import kafka
from stream_ctr.connectors.embedded import EmbeddedBroker
from stream_ctr.logs.simulate import Simulation

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
TOPIC = "clicks"
IMPRESSIONS = 200_000
MALFORMED = {b'{"kind": "impression", "time"': 23, b'{"kind": "view"}': 5}
WINDOWS = 16  # final ones, before the pictures are taken
KEYS = (
    "metrics.window=5m",
    "model.beside=deepfm,fm",
    "schedule.report_every=1s",
    "schedule.snapshot_every=10s",
    "learn.batch_size=1024",
)
PATIENCE_SECONDS = 900.0
# Width and height in CSS pixels, device pixels in one of those, colours.
PAGES: dict[str, dict[str, Any]] = {
    "page-light": {"width": 1280, "height": 1420},
    "page-dark": {"width": 1280, "height": 1420, "is_dark": True},
    "page-phone": {"width": 390, "height": 1500, "scale": 2.0, "is_phone": True},
}
COLOURS = 256  # of a picture
TERMINALS = {"top": (100, 30), "top-small": (80, 24)}


def main() -> None:
    """Take all pictures."""
    IMAGES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedBroker() as broker,
        learning(broker.bootstrap_servers, Path(folder) / "state") as url,
    ):
        wait_for_windows(url)
        for name, (width, height) in TERMINALS.items():
            (IMAGES / f"{name}.svg").write_text(terminal(url, width, height))
        with Browser(Path(folder) / "profile") as browser:
            for name, look in PAGES.items():
                (IMAGES / f"{name}.png").write_bytes(page(browser, url, **look))
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes")


@contextlib.contextmanager
def learning(servers: str, state: Path) -> Iterator[str]:
    """Produce the stream, learn it in a process of its own, and yield the address of its port."""
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, TOPIC)
    sink = kafka.KafkaSink(client)
    try:
        for value, count in MALFORMED.items():
            for _ in range(count):
                sink.send(TOPIC, value)
        produce(Simulation(IMPRESSIONS, seed=1), sink, TOPIC, None)
    finally:
        sink.close()
    command = [sys.executable, "-m", "stream_ctr", "run", "--topic", TOPIC, "--state", str(state)]
    command += ["--bootstrap-servers", servers, "--http", "127.0.0.1:0"]
    command += ["--config", str(ROOT / "configs" / "demo.toml")]
    command += [word for key in KEYS for word in ("-X", key)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise SystemExit("the run ended before it had a port")
        yield found[0]
    finally:
        process.terminate()
        process.communicate()


def wait_for_windows(url: str) -> None:
    """Wait until enough windows of event time are final."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        answer = httpx.get(f"{url}/reports", timeout=60).json()
        if len(answer["windows"]) >= WINDOWS:
            return
        time.sleep(0.5)
    raise SystemExit(f"no {WINDOWS} windows after {PATIENCE_SECONDS:.0f} s")


def page(browser: Browser, url: str, *, width: int, height: int, **look: Any) -> bytes:
    """Return the top of the page as PNG, with few colours."""
    tab = browser.open(url, width=width, height=900, **look)
    tab.wait_for("document.body && document.body.dataset.drawn !== undefined")
    tab.run("new Promise((done) => setTimeout(done, 1000))")  # all charts have their size
    picture = Image.open(io.BytesIO(tab.screenshot(height=height))).convert("RGB")
    assert tab.complaints() == []
    tab.close()
    small = io.BytesIO()
    few = picture.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def terminal(url: str, width: int, height: int) -> str:
    """Return a frame of `top` on a terminal of this size as SVG."""
    console = Console(
        width=width, height=height, record=True, file=io.StringIO(), force_terminal=True
    )
    console.print(OnCall(Port(url).read(), url, now=datetime.now(UTC)))
    drawing = console.export_svg(title=f"stream-ctr top --url {url}")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)


if __name__ == "__main__":
    main()
