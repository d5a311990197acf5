"""A headless Chromium, driven through its debugging pipe: JSON messages that end in a zero byte."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Self

KEYS = {"Enter": ("\r", 13), "Escape": ("", 27), "Tab": ("", 9)}


class Browser:
    """One page of one browser.

    Args:
        path: of the browser.
        folder: where it keeps its profile.
    """

    def __init__(self, path: str, folder: Path) -> None:
        to_read, self._to_browser = os.pipe()
        self._from_browser, to_write = os.pipe()
        # The browser wants to read from descriptor 3 and to write to 4.
        flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={folder}/profile --remote-debugging-pipe"
        script = f'exec "$0" {flags} about:blank 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, path], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._held = b""
        self._count = 0
        self._session: str | None = None

    def __enter__(self) -> Self:
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to_browser)
        os.close(self._from_browser)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState", "complete")

    def evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression)["result"].get("value")

    def wait_for(self, expression: str, value: object, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while (now := self.evaluate(expression)) != value:
            assert time.monotonic() < deadline, f"{expression} is {now!r}, not {value!r}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        text, code = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def texts(self, selector: str) -> list[str]:
        """Of the elements, without their notes."""
        found = f"[...document.querySelectorAll('{selector}')].map(e => e.firstChild.textContent)"
        return list(json.loads(self.evaluate(f"JSON.stringify({found})")))

    def _call(self, method: str, **params: object) -> Any:
        self._count += 1
        message: dict[str, object] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._held:
            piece = os.read(self._from_browser, 65536)
            assert piece, "the browser has gone"
            self._held += piece
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)
