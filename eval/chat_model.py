"""A chat model behind an OpenAI-compatible server, asked through the openai package.

The environment gives the server's address, OPENAI_BASE_URL, and the key, OPENAI_API_KEY. What the server says
and the text of exceptions may hold the key in any encoding, so no message quotes them: errors give the HTTP
status or the type of the exception.
"""
import asyncio
import json
import logging
import re
from os import environ

RETRIES = 5             # of a request: no connection, no answer in time, status 408, 409, 429 or 5xx
READ_SECONDS = 180      # without a byte from the server, until the connection is given up
TOTAL_SECONDS = 600     # for a request with all its retries, however slowly bytes arrive
MAX_REPLY_BYTES = 2**22

ADDRESS = r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^\s?#@]*)?"
STATUSES = {**dict.fromkeys((301, 302, 303, 307, 308),
                            "the server redirects; set OPENAI_BASE_URL to the final address"),
            400: "the server does not accept the request; it may be longer than the model's context, or the "
                 "model may not take a system message or temperature 0",
            **dict.fromkeys((401, 403), "the server rejects the key; check OPENAI_API_KEY"),
            404: "the server does not know the address or the model; check OPENAI_BASE_URL, which often ends "
                 "in /v1, and the model's name",
            429: "the rate limit is reached or the quota used up"}


class Failed(Exception):
    """A request got no usable reply, and why."""


class ChatModel:
    """name: the model's, as the server knows it. Nothing is sent yet. ValueError if the openai package is
    missing or the environment is wrong."""

    def __init__(self, name: str) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise ValueError(f"--judge {name}: openai is not installed; "
                             "pip install -r requirements-eval.txt") from None
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
        try:
            # No redirects: they could carry the key to another host.
            self.client = openai.AsyncOpenAI(
                api_key=key or "none", base_url=address or None, timeout=READ_SECONDS, max_retries=RETRIES,
                http_client=openai.DefaultAsyncHttpxClient(
                    follow_redirects=False, event_hooks={"response": [skip_error_body]}))
        except Exception as error:
            raise ValueError(f"--judge {name}: cannot set up a connection ({type(error).__name__}); check "
                             "OPENAI_BASE_URL and the environment's proxies and certificates") from None

    async def reply(self, messages: list[dict]) -> str:
        """The reply's text. Failed if no chat completion arrives within the limits above."""
        import openai
        body = bytearray()
        try:
            # Uncompressed, so that the bytes received are the bytes in memory.
            async with (asyncio.timeout(TOTAL_SECONDS),
                        self.client.chat.completions.with_streaming_response.create(
                            model=self.name, messages=messages, temperature=0,
                            extra_headers={"Accept-Encoding": "identity"}) as response):
                async for chunk in response.http_response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_REPLY_BYTES:
                        break
        except TimeoutError:
            raise Failed(f"no complete reply within {TOTAL_SECONDS} seconds") from None
        except openai.APIStatusError as error:
            reason = STATUSES.get(error.status_code, "the server reports an error")
            raise Failed(f"HTTP {error.status_code}: {reason}") from None
        except Exception as error:
            # openai's exceptions say "Connection error"; what caused them says more.
            name = type(error.__cause__ or error).__name__
            raise Failed(f"no reply from the server ({name}); check OPENAI_BASE_URL") from None
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Failed(f"the server's reply is not a chat completion of at most {MAX_REPLY_BYTES:,} bytes; "
                         "check OPENAI_BASE_URL") from None
        # JSON can hold lone surrogates, UTF-8 files cannot.
        return str(text or "").encode("utf-8", "replace").decode()


async def skip_error_body(response: object) -> None:
    """Close the response if it is an error: its body is never shown, and may be endless."""
    if not response.is_success:
        await response.aclose()
