"""A chat model behind an OpenAI-compatible address: replies with their tokens' log-probabilities.

`Endpoint.reply` posts one conversation to ``URL/chat/completions`` and reads the answer. What can
pass (a time-out, a connection that breaks or is refused, 429, 5xx) is tried again: after the time
that the server names in ``retry-after``, else after 0.5, 1, 2 … seconds. What cannot pass (a wrong
key, no such model, a reply that is none) ends at once. Either way one `PertokenError` says what was
wrong and what to do.

The standard library does the talking (`urllib`), so nothing has to be installed; proxies of the
environment count. Redirects are not followed: the key would go to another address.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from threading import Lock
from time import sleep, time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pertoken.errors import PertokenError

__all__ = ["KEY", "Endpoint", "Reply"]

KEY = "PERTOKEN_API_KEY"
"""The environment variable that holds the key where none is given."""

LONGEST_SILENCE = 1_000_000  # seconds; sockets take no endless ones
LONGEST_WAIT = 60.0  # seconds; a server that asks for more is told to the user instead
_LONGER = "give it longer (timeout=…, on the command line --timeout)"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    tokens, logprobs: its tokens as text and their natural log-probabilities, both None where they
    were not asked for. Whether the token that ends the answer is among them is the server's choice.
    reason: why it ended, "stop" or "length" as a rule.
    """

    text: str
    tokens: tuple[str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    reason: str = ""


class Endpoint:
    """A model behind an OpenAI-compatible chat interface (OpenAI, vLLM, llama.cpp, Ollama …).

    url: up to the version, such as ``http://localhost:8000/v1``. model: the name that the server
    has for it. key: sent as a bearer token; None for that of the environment variable
    `PERTOKEN_API_KEY`, and no key where that is not set. It is shown nowhere. timeout: seconds
    that the server may be silent. tries: how often a request is sent at most.

    >>> Endpoint("http://localhost:8000/v1", model="small", key="secret")
    Endpoint('http://localhost:8000/v1', model='small')

    Raises PertokenError for an address that is none, and settings out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key: str | None = None,
        timeout: float = 60.0,
        tries: int = 4,
    ) -> None:
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").encode("idna"), parts.port
        except ValueError:  # a bracket or a port that is none, a dot too many in the name
            parts, host = urlsplit(""), b""
        sendable = parts.path.isascii() and parts.path.isprintable() and " " not in parts.path
        if parts.scheme not in ("http", "https") or not host or not sendable:
            raise PertokenError(
                "an endpoint is an address such as http://localhost:8000/v1, got "
                f"{url.rpartition('@')[2]!r}"
            )
        if parts.username or parts.password or parts.query:
            raise PertokenError("the endpoint's address may hold no key: give it as key=…")
        if not 0 < timeout <= LONGEST_SILENCE:
            raise PertokenError(
                f"timeout must be above 0 and at most {LONGEST_SILENCE:,} seconds, got {timeout:g}"
            )
        if tries < 1:
            raise PertokenError(f"tries must be 1 or more, got {tries}")
        key = os.environ.get(KEY) if key is None else key
        if key and not (key.isascii() and key.isprintable()):
            raise PertokenError("the key holds a character that no header can: a line's end?")
        self.url, self.model = url.rstrip("/"), model
        self.timeout, self.tries = timeout, tries
        self._key = key
        self._opener = build_opener(_NoRedirect)

    def __repr__(self) -> str:
        given = [f"model={self.model!r}"]
        given += [] if self.timeout == 60.0 else [f"timeout={self.timeout}"]
        given += [] if self.tries == 4 else [f"tries={self.tries}"]
        return f"Endpoint({self.url!r}, {', '.join(given)})"

    def reply(
        self,
        messages: Messages,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        logprobs: bool = False,
        stop: Sequence[str] = (),
    ) -> Reply:
        """The model's answer to a conversation of {"role", "content"} messages.

        temperature: 0 takes the best token. seed: for the server's draws, where it knows it.
        logprobs: also the log-probability of each token, in nats. stop: texts that end the answer.

        Raises PertokenError, one line: the server is down, silent or busy after all tries; it
        refuses the key, the model or the request; the reply is malformed or has no
        log-probabilities.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
        }
        if seed is not None:
            body["seed"] = seed
        if logprobs:
            body["logprobs"] = True
        if stop:
            body["stop"] = list(stop)
        return self._read(self._ask(json.dumps(body).encode()), logprobs)

    def replies(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        logprobs: bool = False,
        stop: Sequence[str] = (),
        threads: int = 4,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Reply]:
        """The answers to many conversations in their order, `threads` requests at a time.

        The conversation at place i has the seed `seed + i`, so that the same question asked often
        is not answered alike. The first error ends the work and is raised; requests that wait are
        not sent.
        """
        if threads < 1:
            raise PertokenError(f"threads must be 1 or more, got {threads}")
        lock, done = Lock(), 0

        def one(place: int) -> Reply:
            nonlocal done
            found = self.reply(
                conversations[place],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=None if seed is None else seed + place,
                logprobs=logprobs,
                stop=stop,
            )
            with lock:
                done += 1
                if progress is not None:
                    progress("replies", done, len(conversations))
            return found

        with ThreadPoolExecutor(threads) as pool:
            work = [pool.submit(one, place) for place in range(len(conversations))]
            try:
                wait(work, return_when=FIRST_EXCEPTION)
            finally:
                for each in work:
                    each.cancel()
        failed = [each for each in work if not each.cancelled() and each.exception()]
        return [each.result() for each in failed or work]

    def _ask(self, body: bytes) -> bytes:
        """The body of the server's answer to one request, tried again where that may help."""
        ending = "/chat/completions"
        address = self.url if self.url.endswith(ending) else self.url + ending
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(1, self.tries + 1):
            pause = 0.5 * 2 ** (attempt - 1)
            try:
                request = Request(address, body, headers)
                with self._opener.open(request, timeout=self.timeout) as answer:
                    found: bytes = answer.read()
                    return found
            except HTTPError as error:
                with error:
                    trouble = self._refused(error)
                pause = _retry_after(error.headers.get("retry-after"), pause)
            except (URLError, OSError, HTTPException) as error:
                trouble = self._broken(error)
            if pause > LONGEST_WAIT:
                raise PertokenError(f"{trouble}; it asks to wait {pause:.0f} s: run it again then")
            if attempt < self.tries:
                sleep(pause)
        times = "once" if self.tries == 1 else f"{self.tries} times"
        mends = {"can't be reached": "is it running?", "was silent": _LONGER}
        mend = next((f": {mend}" for what, mend in mends.items() if what in trouble), "")
        raise PertokenError(f"{trouble}, {times}{mend}")

    def _refused(self, error: HTTPError) -> str:
        """What a status says that may pass; raises PertokenError for one that will not."""
        code, name = error.code, f"the endpoint {self.url}"
        if code == 429:
            return f"{name} is asked too often (429)"
        if code in (408, 409) or code >= 500:
            return f"{name} failed ({code} {error.reason})"
        if code in (401, 403):  # some servers quote the key in the body
            raise PertokenError(f"{name} refuses the key ({code}): give key=… or set {KEY}")
        if 300 <= code < 400:
            raise PertokenError(
                f"{name} is elsewhere ({code}): give the address "
                f"{error.headers.get('location', 'it has moved to')}"
            )
        said = _said(error)
        if self._key:
            said = said.replace(self._key, "…")
        if code == 404:
            raise PertokenError(
                f"{name} has no /chat/completions or no model {self.model!r} (404{said})"
            )
        raise PertokenError(f"{name} refuses the request ({code}{said})")

    def _broken(self, error: Exception) -> str:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError | socket.timeout):
            return f"the endpoint {self.url} was silent for {self.timeout:g} s"
        said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return f"the endpoint {self.url} can't be reached ({said})"

    def _read(self, body: bytes, logprobs: bool) -> Reply:
        """The reply in a body; PertokenError where it is none."""
        name = f"the endpoint {self.url}"
        try:
            value = json.loads(body)
        except ValueError:  # also bytes that are not UTF-8
            start = " ".join(body[:60].decode("utf-8", "replace").split())
            raise PertokenError(f"{name} sent no JSON but {start!r}") from None
        try:
            choice = value["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason") or ""
            if not isinstance(text, str) or not isinstance(reason, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise PertokenError(
                f"{name} sent JSON without choices[0].message.content: it is no chat endpoint, or "
                "the answer had no room (max_new_tokens)"
            ) from None
        if not logprobs:
            return Reply(text, reason=reason)
        given = choice.get("logprobs") or {}
        rows = given.get("content") if isinstance(given, dict) else [given]
        if rows is None or (not rows and text):
            raise PertokenError(
                f"{name} sent no log-probabilities: model {self.model!r} must be served with them"
            )
        try:
            tokens = tuple(str(row["token"]) for row in rows)
            values = tuple(float(row["logprob"]) for row in rows)
        except (KeyError, TypeError, ValueError, OverflowError):
            tokens, values = (), (math.nan,)
        if not all(math.isfinite(each) and each < 1e-3 for each in values):
            raise PertokenError(f"{name} sent log-probabilities that are none")
        return Reply(text, tokens, tuple(min(each, 0.0) for each in values), reason)


class _NoRedirect(HTTPRedirectHandler):
    """Leaves a redirect the error that it is."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a server asks to wait: a number, or a date.

    >>> _retry_after("3", 0.5), _retry_after("soon", 0.5)
    (3.0, 0.5)
    """
    if header is None:
        return otherwise
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time()
        except ValueError:
            return otherwise
    return max(seconds, 0.0) if math.isfinite(seconds) else otherwise


def _said(error: HTTPError) -> str:
    """ ": " and the message of an error's body, or nothing."""
    try:
        value = json.loads(error.read(10_000))
        found = value.get("error", value)
        message = found if isinstance(found, str) else found["message"]
        return f": {' '.join(str(message).split())[:200]}"
    except (ValueError, OSError, HTTPException, KeyError, TypeError, AttributeError):
        return ""
