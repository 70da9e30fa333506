"""The page and its JSON API, only for this machine.

GET  /          the page
GET  /about     {name, objectives: [{name, low, high, step}], max_new_tokens}
POST /generate  {page, prompt, condition: {objective: level}, max_new_tokens} -> {answer, read, seconds}

An error is {error: text}. The server listens on 127.0.0.1. It answers only requests that name this machine as their
host (against DNS rebinding) and that do not come from another page.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from cpo_kernels.data.template import PromptTemplate
from cpo_kernels.evaluation.generate import greedy_answers

LARGEST = 64 * 1024  # bytes of a request
LOCAL = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; connect-src 'self'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Superseded(Exception):
    """A newer request of the same page has arrived."""


class Player:
    """Greedy answers of one model, one at a time. Of one page's requests only the newest is finished."""

    def __init__(self, name: str, model: Any, template: PromptTemplate, max_new_tokens: int):
        self.name, self.model, self.template, self.max_new_tokens = name, model, template, max_new_tokens
        self.lock = threading.Lock()
        self.newest: dict[str, object] = {}

    def about(self) -> dict[str, Any]:
        objectives = []
        for o in self.template.tags.objectives:
            whole = float(o.low).is_integer() and float(o.high).is_integer()
            step = 1 if whole else (o.high - o.low) / 20
            objectives.append({"name": o.name, "low": o.low, "high": o.high, "step": step})
        return {"name": self.name, "objectives": objectives, "max_new_tokens": self.max_new_tokens}

    def generate(self, page: str, prompt: str, condition: Mapping[str, float], max_new_tokens: int) -> dict[str, Any]:
        read = self.template.text(prompt, condition)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        length = len(self.template.prompt_ids(prompt, condition))
        if limit and length >= limit:
            raise ValueError(f"the prompt has {length} tokens; this model takes {limit} for prompt and answer together")
        tokens = min(max_new_tokens, limit - length) if limit else max_new_tokens
        ticket = self.newest[page] = object()

        def stop() -> bool:
            return self.newest.get(page) is not ticket

        with self.lock:
            try:
                if stop():
                    raise Superseded
                start = time.perf_counter()
                (answer,) = greedy_answers(self.model, self.template, [(prompt, condition)], tokens, stop=stop)
                if stop():
                    raise Superseded
                return {"answer": answer, "read": read, "seconds": time.perf_counter() - start}
            finally:
                if not stop():
                    del self.newest[page]


def make_server(player: Player, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0 picks a free one. `serve_forever()` runs it."""
    page = resources.files("cpo_kernels.play").joinpath("page.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds without a byte of a request
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not self.is_ours():
                return
            if self.path == "/":
                self.reply(200, page, "text/html; charset=utf-8")
            elif self.path == "/about":
                self.json(200, player.about())
            else:
                self.fail(404, "there is no such page")

        def do_POST(self) -> None:
            if not self.is_ours():
                return
            if self.path != "/generate":
                return self.fail(404, "there is no such page")
            if self.headers.get_content_type() != "application/json":
                return self.fail(415, "Content-Type must be application/json")
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                return self.fail(411, "Content-Length is missing")
            if int(length) > LARGEST:
                return self.fail(413, f"a request may have at most {LARGEST} bytes")
            try:
                self.json(200, player.generate(**_request(self.rfile.read(int(length)), player.max_new_tokens)))
            except Superseded:
                self.json(409, {"error": "a newer request has arrived"})
            except (ValueError, TypeError) as error:
                self.json(400, {"error": str(error)})
            except Exception as error:  # shown on the page; the server keeps running
                self.json(500, {"error": f"{type(error).__name__}: {error}"})

        def is_ours(self) -> bool:
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
                self.fail(403, f"this page is only served as {LOCAL[0]} and {LOCAL[1]}, not as {host!r}")
            elif origin is not None and origin != f"http://{host}":
                self.fail(403, "this request comes from another site")
            else:
                return True
            return False

        def fail(self, status: int, text: str) -> None:
            self.close_connection = True  # the body stays unread
            self.json(status, {"error": text})

        def json(self, status: int, value: Any) -> None:
            self.reply(status, json.dumps(value).encode(), "application/json")

        def reply(self, status: int, data: bytes, kind: str) -> None:
            try:
                self.send_response(status)
                headers = {"Content-Type": kind, "Content-Length": str(len(data))} | HEADERS
                if self.close_connection:
                    headers["Connection"] = "close"
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:  # the page did not wait for it
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def _request(data: bytes, most: int) -> dict[str, Any]:
    """The fields of a request, with their types checked."""
    body = json.loads(data)
    if not isinstance(body, dict):
        raise ValueError("the request must be a JSON object")
    page, prompt, condition = body.get("page", ""), body.get("prompt"), body.get("condition", {})
    tokens = body.get("max_new_tokens", most)
    if not isinstance(page, str) or len(page) > 100:
        raise ValueError("page must be a short text")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("write a prompt first")
    if not isinstance(condition, dict) or not all(type(level) in (int, float) for level in condition.values()):
        raise ValueError("condition must be an object of numbers")
    if type(tokens) is not int or not 1 <= tokens <= most:
        raise ValueError(f"max_new_tokens must be an integer from 1 to {most}, got {tokens!r}")
    return {"page": page, "prompt": prompt, "condition": condition, "max_new_tokens": tokens}
