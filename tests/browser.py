"""A headless Chromium over the WebDriver protocol, with nothing but the standard library."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    if CHROMIUM is None:
        return "no Chromium is installed (Debian: apt-get install chromium chromium-driver)"
    if DRIVER is None:
        return "Chromium is here, but chromedriver is not (Debian: apt-get install chromium-driver)"
    return None


class Browser:
    """One page. Close it when done."""

    def __init__(self, dark: bool = False) -> None:
        assert CHROMIUM is not None and DRIVER is not None
        self.profile = tempfile.mkdtemp(prefix="ktfx-browser-")
        self.process = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        line = next(found for text in self.process.stdout if (found := re.search(r"successfully on port (\d+)", text)))
        self.url = f"http://127.0.0.1:{line[1]}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
        arguments += [f"--user-data-dir={self.profile}", "--disable-dev-shm-usage"]
        arguments += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        answer = self._post("/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = f"/session/{answer['sessionId']}"

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url: str) -> None:
        self._post(self.session + "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """The value of a function body run in the page."""
        return self._post(self.session + "/execute/sync", {"script": script, "args": list(args)})

    def wait(self, condition: str, seconds: float = 20.0) -> Any:
        """The first true value of an expression; fails after ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.run(f"return ({condition});")
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}")

    def press(self, key: str) -> None:
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._post(self.session + "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def console(self) -> list[str]:
        """Everything the page wrote to its console, errors of the loader among them."""
        return [f"{e['level']} {e['message']}" for e in self._post(self.session + "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        import base64

        with urllib.request.urlopen(self.url + self.session + "/screenshot", timeout=60) as answer:
            path.write_bytes(base64.b64decode(json.loads(answer.read())["value"]))

    def close(self) -> None:
        try:
            request = urllib.request.Request(self.url + self.session, method="DELETE")
            urllib.request.urlopen(request, timeout=20).close()
        finally:
            self.process.terminate()
            self.process.wait(timeout=20)
            shutil.rmtree(self.profile, ignore_errors=True)
