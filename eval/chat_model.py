"""A chat model behind an OpenAI-compatible server, asked through the openai package.

The environment names the server's address, OPENAI_BASE_URL, and the key, OPENAI_API_KEY. The server's words
and the text of exceptions may hold the key in any encoding, so no message quotes them: errors name the HTTP
status or the type of the exception, and say the rest in our own words.
"""
import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from os import environ

import openai

from eval.common import progress

RETRIES = 5             # of a request: no connection, no answer in time, status 408, 409, 429 or 5xx
READ_SECONDS = 180      # without a byte from the server, until the connection is given up
TOTAL_SECONDS = 600     # for a request with all its retries, however slowly bytes arrive
MAX_REPLY_BYTES = 2**22

ADDRESS = r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^\s?#@]*)?"
REDIRECT = "the server redirects; set OPENAI_BASE_URL to the final address"
STATUSES = {301: REDIRECT, 302: REDIRECT, 303: REDIRECT, 307: REDIRECT, 308: REDIRECT,
            400: "the server does not accept the request; it may be longer than the model's context, or the "
                 "model may not take a system message or temperature 0",
            401: "the server rejects the key; check OPENAI_API_KEY",
            403: "the key gives no access; check OPENAI_API_KEY",
            404: "the server does not know the address or the model; check OPENAI_BASE_URL, which often ends "
                 "in /v1, and the model's name",
            429: "the rate limit is reached or the quota used up"}
CAUSES = {"ConnectionRefusedError": "connection refused", "gaierror": "unknown host",
          "TimeoutError": "timeout", "SSLCertVerificationError": "its certificate is not trusted"}


class Failed(Exception):
    """Failed(reason, for_all): a request without a reply. for_all: the others would fail in the same way."""


class ChatModel:
    """name: the model's, as the server knows it. ValueError if the environment is wrong."""

    def __init__(self, name: str) -> None:
        address, key = environ.get("OPENAI_BASE_URL", ""), environ.get("OPENAI_API_KEY", "")
        if not address and not key:
            raise ValueError(f"--judge {name}: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server that "
                             "needs no key")
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("OPENAI_API_KEY: holds a space, a line break or a character outside ASCII; copy "
                             "the key again")
        if address and not re.fullmatch(ADDRESS, address):
            raise ValueError("OPENAI_BASE_URL: must be an address such as https://host:8000/v1, without user "
                             "name, password or query; a key belongs in OPENAI_API_KEY")
        for library in ("openai", "httpx2", "httpcore2"):
            # Below this level they log what the server says, which may hold the key.
            logging.getLogger(library).setLevel(logging.WARNING)
        self.name = name
        # Uncompressed, so that the bytes received are the bytes in memory. A server without a key gets none.
        self.headers = {"Accept-Encoding": "identity"} | ({} if key else {"Authorization": openai.omit})
        try:
            # No redirects: they could carry the key to another host.
            self.client = openai.AsyncOpenAI(
                api_key=key or "none", base_url=address or None, timeout=READ_SECONDS, max_retries=RETRIES,
                http_client=openai.DefaultAsyncHttpxClient(
                    follow_redirects=False, event_hooks={"response": [skip_error_body]}))
        except Exception as error:
            raise ValueError(f"--judge {name}: cannot set up a connection ({type(error).__name__}); check "
                             "OPENAI_BASE_URL and the environment's proxies and certificates") from None

    async def reply(self, messages: list[dict]) -> str | None:
        """The reply's text; None if what arrives is not a chat completion. Failed if nothing usable does."""
        body = bytearray()
        try:
            async with (asyncio.timeout(TOTAL_SECONDS),
                        self.client.chat.completions.with_streaming_response.create(
                            model=self.name, messages=messages, temperature=0,
                            extra_headers=self.headers) as response):
                async for chunk in response.http_response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_REPLY_BYTES:
                        raise Failed(f"the reply is longer than {MAX_REPLY_BYTES:,} bytes", False)
        except Exception as error:
            raise failure(error) from None
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        # JSON can hold lone surrogates, UTF-8 files cannot.
        return str(text or "").encode("utf-8", "replace").decode()


async def skip_error_body(response: object) -> None:
    """Close the response if it is an error: its body is never shown, and may be endless."""
    if not response.is_success:
        await response.aclose()


def failure(error: Exception) -> Failed:
    """What a request failed from, without the exception's own words."""
    if isinstance(error, Failed):
        return error
    if isinstance(error, TimeoutError):
        return Failed(f"no complete reply within {TOTAL_SECONDS} seconds", False)
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        reason = STATUSES.get(status, "the server reports an error")
        return Failed(f"HTTP {status}: {reason}", status in (401, 403, 404) or reason == REDIRECT)
    # openai says "Connection error"; the first error of the system behind it says more.
    name = type(error.__cause__ or error).__name__
    while error := error.__cause__ or error.__context__ or next(iter(getattr(error, "exceptions", ())), None):
        if isinstance(error, OSError):
            name = type(error).__name__
    return Failed(f"no reply from the server ({CAUSES.get(name, name)}); check OPENAI_BASE_URL", False)


async def ask_all(model: ChatModel, jobs: list, ask: Callable[..., Awaitable], workers: int) -> dict:
    """Run ask(job) for all jobs, `workers` at a time. Returns {job: reason} of the jobs that Failed. No more
    are started once a failure holds for all, or as many fail in a row as there are workers (at least three).
    """
    failed: dict = {}
    in_a_row, limit = 0, max(3, workers)
    remaining = iter(progress(jobs, len(jobs), "verdict"))

    async def work() -> None:
        nonlocal in_a_row
        # The workers share one iterator: each takes the next job when it has finished one.
        while in_a_row < limit and (job := next(remaining, None)):
            try:
                await ask(job)
                in_a_row = 0
            except Failed as error:
                failed[job], for_all = error.args
                in_a_row += limit if for_all else 1

    async with model.client:
        await asyncio.gather(*(work() for _ in range(workers)))
    return failed
