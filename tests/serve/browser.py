"""A headless Chromium that is told what to do over a pipe, by its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)


class Browser:
    """One page. `logged` are the console's errors and warnings, `asked` the URLs it loaded."""

    def __init__(self, folder: Path) -> None:
        theirs, self._out = os.pipe()
        self._in, their_out = os.pipe()

        def place() -> None:  # the protocol's two ends are 3 and 4
            os.dup2(theirs, 13)
            os.dup2(their_out, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_out)
        self._held, self._number, self._loaded = b"", 0, 0
        self.logged: list[str] = []
        self.asked: list[str] = []
        targets = self.tell("Target.getTargets", session=None)["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        given = {"targetId": page, "flatten": True}
        self._session = self.tell("Target.attachToTarget", given, session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, given: dict[str, Any] | None = None, session: Any = ...) -> Any:
        """What a command gives."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._message()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]
            self._note(told)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        told = self.tell("Runtime.evaluate", given)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition holds; a minute at most."""
        script = f"""new Promise((done, failed) => {{ let n = 0; const look = () => ({condition}) ? done(1)
            : n++ > 600 ? failed(new Error("never")) : setTimeout(look, 100); look(); }})"""
        self.run(script)

    def show(self, width: int, scheme: str, url: str) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.tell("Emulation.setEmulatedMedia", {"features": [feature]})
        before = self._loaded
        self.tell("Page.navigate", {"url": url})
        while self._loaded == before:
            self._note(self._message())

    def picture(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot")["data"]))
        return path

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            some = os.read(self._in, 1 << 20)
            assert some, "the browser has ended"
            self._held += some
        one, _, self._held = self._held.partition(b"\0")
        return json.loads(one)

    def _note(self, told: dict[str, Any]) -> None:
        given = told.get("params", {})
        if told["method"] == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])
        elif told["method"] == "Page.loadEventFired":
            self._loaded += 1
        elif told["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.logged.append(json.dumps(given))
        elif told["method"] == "Runtime.consoleAPICalled":
            self.logged.append(json.dumps(given["args"]))
