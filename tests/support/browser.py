"""Headless Chromium through its DevTools pipe: open a page, run JavaScript in it, take pictures. No package needed."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()
# the browser reads commands at file descriptor 3 and answers at 4
LAUNCH = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(high[0], 3), os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. `requests` are the URLs it asked for, `errors` what it wrote to its console as an error."""

    def __init__(self, writer: int, reader: int):
        self.writer, self.replies, self.events = os.fdopen(writer, "wb"), Queue(), []
        threading.Thread(target=self._read, args=(os.fdopen(reader, "rb"),), daemon=True).start()
        self.number, self.session = 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _read(self, file) -> None:
        buffer = b""
        while data := file.read1(65536):
            *messages, buffer = (buffer + data).split(b"\0")
            for message in map(json.loads, messages):
                self.replies.put(message) if "id" in message else self.events.append(message)

    def send(self, method: str, timeout: float = 60, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.writer.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.writer.flush()
        try:
            while (reply := self.replies.get(timeout=timeout))["id"] != self.number:
                pass
        except Empty:
            raise TimeoutError(method) from None
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, condition: str, timeout: float = 30) -> None:
        """Until the JavaScript expression is true."""
        end = time.monotonic() + timeout
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """A window of this size, on a light or dark desktop."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, whole: bool = True) -> None:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def requests(self) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    @property
    def errors(self) -> list[Any]:
        kinds = {"Runtime.exceptionThrown": "exceptionDetails", "Log.entryAdded": "entry"}
        found = [event["params"][kinds[event["method"]]] for event in self.events if event["method"] in kinds]
        return [error for error in found if error.get("level", "error") == "error"]


@contextmanager
def browser() -> Iterator[Page]:
    """A browser of its own, with a fresh profile."""
    assert PROGRAM, "no chromium installed"
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        ends = (to_browser[0], from_browser[1])
        launch = [sys.executable, "-c", LAUNCH, *map(str, ends), *command]
        process = subprocess.Popen(launch, pass_fds=ends, stderr=subprocess.DEVNULL)
        try:
            for end in ends:
                os.close(end)
            yield Page(to_browser[1], from_browser[0])
        finally:
            process.terminate()
            process.wait(10)
