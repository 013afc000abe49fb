"""Headless Chromium, driven over its debugging pipe: nothing to install beside the browser itself."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Without a sandbox, as containers have none; it only ever opens files that the tests wrote.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
# Seconds that one answer may take on a busy machine.
PATIENCE = 60


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab: what it logged and asked for, and ways to look at it."""

    def __init__(self, pipe: Pipe, session: str) -> None:
        self._pipe, self._session = pipe, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        return self._pipe.call(method, parameters, self._session)

    def open(self, path: Path, *, width: int = 1100, height: int = 900, scheme: str = "light") -> None:
        """Open a file at a window size, for a reader who prefers light or dark; a clean slate for what was logged."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._pipe.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._pipe.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """Console errors, warnings and uncaught exceptions since the page was opened."""
        found = []
        for event, data in self._pipe.events:
            if event == "Runtime.exceptionThrown":
                found.append(json.dumps(data["exceptionDetails"]))
            elif event == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(data["args"]))
            elif event == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
                found.append(data["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        return [data["request"]["url"] for event, data in self._pipe.events if event == "Network.requestWillBeSent"]

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


class Pipe:
    """Commands out, answers and events in: JSON with a zero byte behind each."""

    def __init__(self, out: int, into: int) -> None:
        self._out, self._in, self._rest, self._count = out, into, b"", 0
        self.events: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, parameters: Mapping[str, Any], session: str | None = None) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (found := self._read()).get("id") != self._count:
            self._keep(found)
        if "error" in found:
            raise AssertionError(f"{method}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    def wait(self, event: str) -> None:
        """Read until such an event has come."""
        while event not in (name for name, _ in self.events):
            self._keep(self._read())

    def _keep(self, message: dict[str, Any]) -> None:
        if "method" in message:
            self.events.append((message["method"], message["params"]))

    def _read(self) -> dict[str, Any]:
        import select

        ends = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, ends - time.monotonic()))
            piece = os.read(self._in, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError("the browser does not answer")
            self._rest += piece
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A headless Chromium with one tab, its profile in a folder of its own; ended on leaving."""
    path = chromium()
    assert path, "no Chromium on this machine"
    (child_in, out), (into, child_out) = os.pipe(), os.pipe()

    def third_and_fourth() -> None:
        # Moved up first: either pipe may lie on 3 or 4 already.
        a, b = os.dup(child_in), os.dup(child_out)
        high = [os.dup(a), os.dup(b)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    process = subprocess.Popen(
        [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"], close_fds=False, preexec_fn=third_and_fourth,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(child_in)
    os.close(child_out)
    try:
        pipe = Pipe(out, into)
        target = pipe.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        yield Page(pipe, session)
        pipe.call("Browser.close", {})
    finally:
        process.terminate()
        process.wait(10)
        os.close(out)
        os.close(into)
