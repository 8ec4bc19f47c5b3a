"""The endpoint's client against a real server in a thread that says what a test tells it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest

from pertoken import endpoint as module
from pertoken.endpoint import Endpoint, Reply
from pertoken.errors import PertokenError

ASK: list[dict[str, str]] = [{"role": "user", "content": "hello"}]


def good(text: str = "hi", logprobs: list[float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    choice["finish_reason"] = "stop"
    if logprobs is not None:
        rows = [{"token": f"t{place}", "logprob": value} for place, value in enumerate(logprobs)]
        choice["logprobs"] = {"content": rows}
    return {"choices": [choice]}


def with_logprobs(value: Any) -> dict[str, Any]:
    body = good("hi")
    body["choices"][0]["logprobs"] = value
    return body


class Server(ThreadingHTTPServer):
    """`script`: (status, headers, body) of the next answers; the last one stays. body: a callable
    of the request, bytes, or what becomes JSON; None answers nothing for a second."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str], Any]] = [(200, {}, good())]
        self.seen: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.lock = Lock()
        self.now = self.most = 0

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no trouble of ours."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        own = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with own.lock:
            own.seen.append({"path": self.path, **request})
            own.headers.append(self.headers)
            own.now += 1
            own.most = max(own.most, own.now)
            status, headers, body = own.script.pop(0) if len(own.script) > 1 else own.script[0]
        if body is None:
            time.sleep(1)
        body = body(request) if callable(body) else body
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with own.lock:
            own.now -= 1
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    own = Server()
    Thread(target=own.serve_forever, args=(0.01,), daemon=True).start()
    yield own
    own.shutdown()
    own.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(module, "sleep", found.append)
    return found


def ask(server: Server, **options: Any) -> Reply:
    return Endpoint(server.url, model="m", **options).reply(ASK, max_new_tokens=5)


def test_a_request_says_what_was_asked_and_the_reply_what_was_answered(server: Server) -> None:
    server.script = [(200, {}, good("hi", [-0.5, -1e-9, 1e-9]))]
    found = Endpoint(server.url, model="m", key="k3y").reply(
        ASK, max_new_tokens=7, temperature=0.5, seed=3, logprobs=True, stop=["\n"]
    )
    assert found == Reply("hi", ("t0", "t1", "t2"), (-0.5, -1e-9, 0.0), "stop")
    assert server.headers[0]["authorization"] == "Bearer k3y"
    assert server.seen == [
        {
            "path": "/v1/chat/completions",
            "model": "m",
            "messages": ASK,
            "max_tokens": 7,
            "temperature": 0.5,
            "seed": 3,
            "logprobs": True,
            "stop": ["\n"],
        }
    ]


def test_the_key_comes_from_the_environment_and_is_never_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTOKEN_API_KEY", "s3cret")
    shown = repr(Endpoint(server.url, model="m"))
    for status in (400, 401, 404):
        server.script = [(status, {}, {"error": {"message": "the key s3cret is bad"}})]
        with pytest.raises(PertokenError) as caught:
            ask(server)
        shown += str(caught.value)
    assert server.headers[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in shown
    assert len(server.seen) == 3  # none of them is tried again
    monkeypatch.delenv("PERTOKEN_API_KEY")
    server.script = [(200, {}, good())]
    ask(server)
    assert server.headers[-1]["authorization"] is None


def test_a_busy_server_is_asked_again_when_it_says_so(server: Server, pauses: list[float]) -> None:
    server.script = [(429, {"retry-after": "7"}, {}), (503, {}, b"oops"), (200, {}, good("late"))]
    assert ask(server).text == "late"
    assert pauses == [7.0, 1.0]


BROKEN = (200, {"content-length": "999"}, b'{"choices": [')

TROUBLE = [
    ((429, {}, {}), {}, 2, r"asked too often \(429\), 2 times"),
    ((429, {"retry-after": "3600"}, {}), {}, 1, "asks to wait 3600 s: run it again"),
    ((500, {}, {}), {}, 2, r"failed \(500 Internal Server Error\), 2 times"),
    (
        (200, {}, None),
        {"timeout": 0.1},
        2,
        r"silent for 0.1 s, 2 times: .*\(timeout=…, .* --timeout\)",
    ),
    (BROKEN, {"timeout": 0.5}, 2, "IncompleteRead|silent"),
    ((200, {}, b"<html> hello"), {}, 1, "sent no JSON but '<html> hello'"),
    ((200, {}, {"choices": []}), {}, 1, r"without choices\[0\].message.content"),
    ((200, {}, [1]), {}, 1, r"without choices\[0\].message.content"),
    ((200, {}, good(None)), {}, 1, r"without choices\[0\].message.content"),  # type: ignore[arg-type]
    ((401, {}, {}), {}, 1, r"refuses the key \(401\): give key=… or set PERTOKEN_API_KEY"),
    ((404, {}, {}), {}, 1, r"no model 'm' \(404\)"),
    ((422, {}, {"error": {"message": "too long"}}), {}, 1, r"refuses the request \(422: too long"),
    ((307, {"location": "http://x/v1"}, {}), {}, 1, r"elsewhere \(307\): .* http://x/v1"),
]


@pytest.mark.parametrize(("answer", "options", "asked", "message"), TROUBLE)
def test_trouble_is_one_line(
    server: Server,
    pauses: list[float],
    answer: Any,
    options: dict[str, Any],
    asked: int,
    message: str,
) -> None:
    server.script = [answer]
    with pytest.raises(PertokenError, match=message) as caught:
        ask(server, tries=2, **options)
    assert len(server.seen) == asked
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_is_one_line(pauses: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(PertokenError, match=r"\(Connection refused\), 4 times: is it run"):
        Endpoint(url, model="m").reply(ASK, max_new_tokens=1)
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (good(), "sent no log-probabilities: model 'm' must be served with them"),
        (good("hi", []), "sent no log-probabilities"),
        (good("hi", [0.7]), "log-probabilities that are none"),
        (good("hi", [float("nan")]), "log-probabilities that are none"),
        (good("hi", [None]), "log-probabilities that are none"),  # type: ignore[list-item]
        (good("hi", [10**400]), "log-probabilities that are none"),
        (with_logprobs([-0.5]), "log-probabilities that are none"),
        (with_logprobs("x"), "log-probabilities that are none"),
        (with_logprobs(True), "log-probabilities that are none"),
        (with_logprobs({"content": True}), "log-probabilities that are none"),
    ],
)
def test_log_probabilities_must_be_some(server: Server, body: Any, message: str) -> None:
    server.script = [(200, {}, body)]
    with pytest.raises(PertokenError, match=message):
        Endpoint(server.url, model="m").reply(ASK, max_new_tokens=1, logprobs=True)


def test_many_replies_keep_their_order_and_few_are_under_way(server: Server) -> None:
    def echo(request: dict[str, Any]) -> dict[str, Any]:
        place = int(request["messages"][0]["content"])
        time.sleep(0.02 if place % 2 else 0.06)  # the later one is done before the earlier
        return good(f"{place}:{request['seed']}")

    server.script = [(200, {}, echo)]
    talks = [[{"role": "user", "content": str(place)}] for place in range(9)]
    told: list[int] = []
    found = Endpoint(server.url, model="m").replies(
        talks, max_new_tokens=1, seed=5, threads=3, progress=lambda _, done, __: told.append(done)
    )
    assert [each.text for each in found] == [f"{place}:{5 + place}" for place in range(9)]
    assert told == list(range(1, 10))
    assert 1 < server.most <= 3


def test_the_first_error_ends_the_work(server: Server) -> None:
    server.script = [(400, {}, {})]
    with pytest.raises(PertokenError, match="refuses the request"):
        Endpoint(server.url, model="m").replies([ASK] * 40, max_new_tokens=1, threads=2)
    assert len(server.seen) < 40


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000", {}, "an endpoint is an address such as"),
        ("file:///etc/passwd", {}, "an endpoint is an address such as"),
        ("http://[abc/v1", {}, "an endpoint is an address such as"),
        ("http://a..b/v1", {}, "an endpoint is an address such as"),
        ("http://host:port/v1", {}, "an endpoint is an address such as"),
        ("http://host/a b", {}, "an endpoint is an address such as"),
        ("http://host/v1/modèle", {}, "an endpoint is an address such as"),
        ("http://me:s3cret@host/v1", {}, "may hold no key"),
        ("http://host/v1", {"timeout": 0}, "timeout must be above 0 .* got 0"),
        ("http://host/v1", {"timeout": float("nan")}, "timeout must be above 0 .* got nan"),
        ("http://host/v1", {"timeout": float("inf")}, "at most 1,000,000 seconds, got inf"),
        ("http://host/v1", {"tries": 0}, "tries must be 1 or more, got 0"),
        ("http://host/v1", {"key": "a\nb"}, "a line's end"),
    ],
)
def test_settings_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PertokenError, match=message) as caught:
        Endpoint(url, model="m", **options)
    assert "s3cret" not in str(caught.value)
