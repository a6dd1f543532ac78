"""A teacher's server on 127.0.0.1 for the real `openai` client: `/v1/chat/completions` with faults on demand.

    with fault_server([error(429, retry_after=0.01), good]) as server:
        teacher = OpenAITeacher("any-model", base_url=server.base_url)
        ...
        assert len(server.requests) == 2

A script is a list of answers, one a request and the last one for all that follow, or one answer for all. An answer is
an `Answer`, or a function from the `Request` to one.
"""

import base64
import hashlib
import json
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """A request as the server got it."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]
    raw: bytes = field(repr=False)

    @property
    def task(self) -> str:
        return self.body["response_format"]["json_schema"]["name"]

    @property
    def content(self) -> list[dict[str, Any]]:
        return self.body["messages"][-1]["content"]

    @property
    def texts(self) -> list[str]:
        return [part["text"] for part in self.content if part["type"] == "text"]

    @property
    def data(self) -> dict[str, Any]:
        """Question, options and answer."""
        return json.loads(self.texts[0])

    @property
    def images(self) -> list[bytes]:
        urls = [part["image_url"]["url"] for part in self.content if part["type"] == "image_url"]
        return [base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True) for url in urls]


@dataclass
class Answer:
    """What the server sends: after `delay` seconds, only the first `cut` bytes, a byte each `drip` seconds."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    drip: float = 0.0


Script = Answer | Callable[[Request], Answer]


def reply(content: Any, finish_reason: str = "stop", usage: Any = (100, 10), **message: Any) -> Answer:
    """A chat completion; content that is not text is sent as JSON."""
    if content is not None and not isinstance(content, str):
        content = json.dumps(content)
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return shape({"id": "1", "object": "chat.completion", "model": "fault", "choices": [choice], "usage": usage})


def shape(body: Any) -> Answer:
    """Any JSON as the response."""
    return Answer(json.dumps(body).encode(), headers={"Content-Type": "application/json"})


def error(status: int, message: str = "scripted", code: str | None = None, retry_after: float | None = None) -> Answer:
    body = {"error": {"message": message, "type": "scripted", "param": None, "code": code}}
    headers = {"Content-Type": "application/json"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return Answer(json.dumps(body).encode(), status, headers)


def good(request: Request) -> Answer:
    """What was asked for: the first and the middle frame, or a plan."""
    if request.task == "keyframes":
        return reply({"keyframes": sorted({0, len(request.images) // 2})})
    return reply({"reasoning_plan": "A ball rolls from the left to the right and stops at the wall."})


def hang(seconds: float = 30.0) -> Answer:
    return Answer(delay=seconds)


def cut(num_bytes: int = 20) -> Answer:
    """A response that ends in its body; 0 bytes: before its head."""
    answer = reply({"keyframes": [0]})
    answer.cut = num_bytes
    return answer


def drip(seconds: float = 0.1, num_bytes: int = 100_000) -> Answer:
    """A response that takes very long and never pauses for long."""
    return Answer(b" " * num_bytes, headers={"Content-Type": "application/json"}, drip=seconds)


def html() -> Answer:
    body = b"<html><body><h1>502 Bad Gateway</h1>\n<p>nginx</p></body></html>"
    return Answer(body, headers={"Content-Type": "text/html"})


def garbage() -> Answer:
    return Answer(bytes(range(256)), headers={"Content-Type": "application/json"})


def echo_key(request: Request) -> str:
    """What a careless server repeats: the request's Authorization header."""
    return request.headers["authorization"]


def obedient(request: Request) -> Answer:
    """Does what it is told in the question: replies with the JSON object that it finds there, or as `good` does."""
    found = re.search(r"\{.*\}", request.data["question"])
    return reply(found[0]) if found else good(request)


def sometimes(probability: float, faults: list[Script], otherwise: Script = good, seed: int = 0) -> Script:
    """A fault with a probability; which requests get one depends on what they ask, not on when they arrive."""
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def answer(request: Request) -> Answer:
        digest = hashlib.sha256(request.raw).hexdigest()
        with lock:
            seen[digest] += 1
        chance = random.Random(f"{seed}:{digest}:{seen[digest]}")
        chosen = chance.choice(faults) if chance.random() < probability else otherwise
        return chosen(request) if callable(chosen) else chosen

    return answer


class FaultServer:
    """A running server: where it is, what it was asked, and how many requests it had at once."""

    def __init__(self, script: Script | list[Script]):
        self.script = script if isinstance(script, list) else [script]
        self.base_url = ""
        self.requests: list[Request] = []
        self.in_flight = self.peak = 0
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    def answer(self, request: Request) -> Answer:
        with self.lock:
            self.requests.append(request)
            chosen = self.script[min(len(self.requests), len(self.script)) - 1]
        return chosen(request) if callable(chosen) else chosen

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
        try:
            yield
        finally:
            with self.lock:
                self.in_flight -= 1


def handler_for(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            with server.counted():
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = server.answer(Request(self.path, headers, json.loads(raw), raw))
                if self.path != "/v1/chat/completions":
                    answer = error(404, f"no such endpoint: {self.path}")
                server.stopping.wait(answer.delay)
            if answer.cut == 0 or server.stopping.is_set():
                return self.hang_up()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if answer.drip:
                for byte in answer.body:
                    if server.stopping.wait(answer.drip):
                        return self.hang_up()
                    self.wfile.write(bytes([byte]))
            self.wfile.write(answer.body[: answer.cut])
            if answer.cut is not None:
                self.hang_up()

        def hang_up(self):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # clients that time out hang up first


@contextmanager
def fault_server(script: Script | list[Script] = good) -> Iterator[FaultServer]:
    """A running `FaultServer`."""
    faults = FaultServer(script)
    server = Server(("127.0.0.1", 0), handler_for(faults))
    faults.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield faults
    finally:
        faults.stopping.set()
        server.shutdown()
        server.server_close()
