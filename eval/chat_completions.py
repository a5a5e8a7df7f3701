"""A model behind an OpenAI-compatible chat completions address, asked by several threads at once.

The environment names the address, OPENAI_BASE_URL, and the key, OPENAI_API_KEY, which is neither printed
nor written. What the server refuses for the moment (429, 5xx, no connection, no reply in time) is tried
again, after pauses that double, or as long as its Retry-After says.
"""
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from os import environ
from urllib.error import HTTPError

from eval.common import progress

ADDRESS = "https://api.openai.com/v1"   # without OPENAI_BASE_URL, as OpenAI's own client has it
SECONDS = 180           # a reply may take
PAUSE = 1.0             # seconds before the second try, twice as many before each further one
LONGEST_PAUSE = 300     # who asks for a longer one has refused
TRIES = 6


class Refused(Exception):
    """A request that is not tried again; says why."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address is not given the key."""

    def redirect_request(self, *_: object) -> None:
        return None


class ChatModel:
    """name: the model's, for the server. ValueError if the environment does not say where that is."""

    def __init__(self, name: str) -> None:
        base, self.key = environ.get("OPENAI_BASE_URL", ""), environ.get("OPENAI_API_KEY", "")
        if not base and not self.key:
            raise ValueError(f"--judge {name}: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server that "
                             "needs no key")
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ValueError("OPENAI_API_KEY: holds a space, a line break or another character of no key")
        if base and not base.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL {base}: must begin with http:// or https://")
        self.name, self.stop = name, threading.Event()
        self.url = (base or ADDRESS).rstrip("/") + "/chat/completions"
        self.open = urllib.request.build_opener(NoRedirect).open

    def ask(self, messages: list[dict]) -> str:
        """The reply. Refused if it cannot be had; ValueError for what other requests would meet too."""
        body = json.dumps({"model": self.name, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "spantune"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        for tried in range(1, TRIES + 1):
            pause = PAUSE * 2 ** (tried - 1)
            try:
                request = urllib.request.Request(self.url, body, headers)
                with self.open(request, timeout=SECONDS) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except HTTPError as error:
                why = f"HTTP {error.code}: {self.message_of(error)}"
                if error.code in (401, 403, 404):
                    name = "OPENAI_BASE_URL" if error.code == 404 else "OPENAI_API_KEY"
                    raise ValueError(f"--judge {self.name}: {self.url} says {why}; check {name}") from None
                if error.code < 500 and error.code not in (408, 409, 429):
                    raise Refused(why) from None
                pause = max(pause, retry_after(error.headers.get("Retry-After", "")))
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                reason = getattr(error, "reason", error)
                why = f"no reply from {self.url} ({type(reason).__name__}: {reason})"
            if tried == TRIES or pause > LONGEST_PAUSE or self.stop.wait(pause):
                raise Refused(why)

    def message_of(self, error: HTTPError) -> str:
        """The server's words, in one line and without the key."""
        text = error.reason
        try:
            text = error.read(4096).decode("utf-8", "replace") or text
            text = json.loads(text)["error"]["message"]
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            pass    # not as OpenAI's servers say it: the text as it is
        text = str(text).replace(self.key, "***") if self.key else str(text)
        return " ".join(text.split())[:300]


def retry_after(value: str) -> float:
    """Seconds, of a header that gives them or a date; 0 if it gives neither."""
    try:
        return float(value) if re.fullmatch(r"[\d.]+", value) else max(
            0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def ask_all(model: ChatModel, jobs: list, ask: Callable, workers: int) -> dict:
    """ask(job) in `workers` threads; returns {job: why} of those that were refused. No more are begun after
    as many refusals in a row as there are workers, three at least, or after an exception, which is passed on.
    """
    refused: dict = {}
    pool, in_a_row = ThreadPoolExecutor(workers), 0
    futures = {pool.submit(ask, job): job for job in jobs}
    try:
        for future in progress(as_completed(futures), len(futures), "verdict"):
            try:
                future.result()
                in_a_row = 0
            except Refused as error:
                refused[futures[future]] = str(error)
                in_a_row += 1
            if in_a_row >= max(3, workers):
                break
    finally:    # those under way may still end well, but pause no more
        model.stop.set()
        pool.shutdown(cancel_futures=True)
    return refused
