"""A headless Chromium that is driven through a pipe, by the DevTools protocol: no driver, no socket, no package beside the browser.

with Browser() as browser:
    tab = browser.open(path.as_uri())
    tab.js("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The browser reads commands from file descriptor 3 and answers on 4, one JSON text after the other, each ended by a zero byte.
_START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def found() -> str | None:
    """The browser's program, if there is one; `scripts/browser.sh` installs it."""
    given = os.environ.get("KVSIEVE_BROWSER")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page.

    Attributes:
        said: what its console, its exceptions and the browser's log said.
        asked: addresses that it tried to load.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self.session = browser, session
        self.said: list[str] = []
        self.asked: list[str] = []
        self._listening: dict[str, Callable[[dict[str, Any]], object]] = {}

    def listen(self, method: str, hear: Callable[[dict[str, Any]], object]) -> None:
        """From now on ``hear`` is told what comes with these events."""
        self._listening[method] = hear

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol."""
        return self._browser.call(method, self.session, **params)

    def js(self, code: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description", str(answer)))
        return answer["result"].get("value")

    def wait(self, code: str, seconds: float = 60.0) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.js(code):
            if time.monotonic() > end:
                raise AssertionError(f"{code} did not come true in {seconds:g} s; the console said {self.said}")
            time.sleep(0.02)

    def key(self, key: str) -> None:
        """Press a key, as a user does."""
        codes = {"Tab": 9, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def media(self, **features: str) -> None:
        """Preferences such as ``prefers_color_scheme="dark"``."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=told)

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> None:
        """What can be seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Runtime.exceptionThrown":
            detail = params["exceptionDetails"]
            self.said.append(detail.get("exception", {}).get("description", detail["text"]))
        elif method == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method in self._listening:
            self._listening[method](params)


class Browser:
    """A browser of its own, with a profile that is thrown away."""

    def __init__(self) -> None:
        program = found()
        assert program is not None
        self._profile = tempfile.mkdtemp(prefix="kvsieve-browser-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "--no-first-run", "about:blank",
                   "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
                   "--no-sandbox"]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(to_read), str(to_write), program, *options],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest = 0, b""
        self._tabs: dict[str, Tab] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(20)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._write)
            os.close(self._read)
            shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, address: str) -> Tab:
        """A tab that shows ``address``."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.navigate", url=address)
        return tab

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """One command, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            tab = self._tabs.get(answer.get("sessionId", ""))
            if tab is not None:
                tab.hear(answer["method"], answer["params"])

    def _next(self, seconds: float = 120.0) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], seconds)
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise AssertionError(f"the browser {'went' if ready else f'said nothing for {seconds:g} s'}")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
