"""A chat completions server for tests, in a thread: replies what a function says, records the requests."""
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """say(payload, how many requests with these messages came before) -> the reply's text, or
    (status, headers, body), or an iterator of all bytes to send, status line included.
    requests: [(path, headers, payload)]."""

    def __init__(self, say: Callable[[dict, int], str | tuple | Iterator[bytes]]) -> None:
        self.say, self.requests, lock = say, [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    before = sum(p["messages"] == payload["messages"] for _, _, p in outer.requests)
                    headers = {name.title(): value for name, value in self.headers.items()}
                    outer.requests.append((self.path, headers, payload))
                reply = outer.say(payload, before)
                if isinstance(reply, str):
                    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]}
                    reply = 200, {}, json.dumps(body)
                if not isinstance(reply, tuple):
                    with contextlib.suppress(ConnectionError):      # the client has hung up
                        for part in reply:
                            self.wfile.write(part)
                    return
                status, headers, body = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers), {}))
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def refusal(status: int, message: str, **headers: str) -> tuple:
    """An error in OpenAI's format; the pause before the next try is short."""
    return status, {"Retry-After-Ms": "1", **headers}, json.dumps({"error": {"message": message}})


def text_of(payload: dict) -> str:
    """All that the judge was told."""
    return "\n".join(message["content"] for message in payload["messages"])
