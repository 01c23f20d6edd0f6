"""Headless Chromium, driven through its DevTools protocol over a pipe: no port, no library.

The browser reads commands from its file descriptor 3 and writes answers and events to 4, each a
JSON object that ends in a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.patience import PATIENCE_SECONDS

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# Moves the pipes to the two descriptors that the browser looks at.
_MOVE_PIPES = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "ArrowDown": 40}


class BrowserFailure(Exception):
    """The browser ended, refused a command, or a script in it threw an exception."""


class Browser:
    """A browser with a profile of its own, which ends with the context."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MOVE_PIPES, str(commands), str(answers), *command],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._last_id = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._commands)  # the browser ends with its pipe
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def open(
        self,
        url: str,
        *,
        width: int = 1280,
        height: int = 900,
        scale: float = 1.0,
        is_dark: bool = False,
        is_phone: bool = False,
    ) -> Tab:
        """Open a page in a window of this size in CSS pixels, and return its tab."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        made = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        target = made["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=is_phone,
        )
        if is_phone:
            tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
        tab.set_colours(is_dark=is_dark)
        tab.call("Page.navigate", url=url)
        return tab

    def call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        """Send a command and return its result. Raises `BrowserFailure` if it is refused."""
        self._last_id += 1
        message: dict[str, object] = {"id": self._last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") != self._last_id:
                self.events.append(answer)
            elif "error" in answer:
                raise BrowserFailure(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _read(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise BrowserFailure(f"{method}: no answer")
            if not (more := os.read(self._answers, 1 << 20)):
                raise BrowserFailure(f"{method}: the browser has ended")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Tab:
    """A page in a browser."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command to this page."""
        return self._browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            details = done["exceptionDetails"]
            raise BrowserFailure(details.get("exception", {}).get("description") or str(details))
        return done["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until an expression is true in the page, and return its value."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise BrowserFailure(f"never true: {script}; the page says: {self.run(_BODY)[:2000]}")

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that match."""
        found = f"document.querySelectorAll({json.dumps(selector)})"
        return self.run(f"[...{found}].map((each) => each.innerText)")

    def press(self, key: str) -> None:
        """Press a key and release it."""
        known = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "code": key.strip() or "Space"}
        text = {" ": " ", "Enter": "\r"}.get(key)
        typed: Mapping[str, object] = {"text": text} if text else {}
        kind = "keyDown" if text else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, **known, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def move_to(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def set_colours(self, *, is_dark: bool) -> None:
        """Let the system prefer dark or light colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, height: float | None = None) -> bytes:
        """Return a picture of the page as PNG, of this height from its top."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"]}
        clip["scale"] = 1
        taken = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def complaints(self) -> list[str]:
        """Return what the page's console says, exceptions included, and which loads failed."""
        return [
            words
            for event in self._browser.events
            if event.get("sessionId") == self._session
            for words in _complaint(event["method"], event["params"])
        ]

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("sessionId") == self._session
            and event["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        """Close the page."""
        self._browser.call("Target.closeTarget", targetId=self._target)


_BODY = "document.body.innerText"


def _complaint(method: str, params: Mapping[str, Any]) -> list[str]:
    if method == "Runtime.consoleAPICalled":
        return [" ".join(str(each.get("value", each)) for each in params["args"])]
    if method == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        return [details.get("exception", {}).get("description") or details["text"]]
    if method == "Log.entryAdded":
        return [params["entry"]["text"]]
    return []
