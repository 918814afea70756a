"""A real HTTP server that receives notices, and fails, stalls or refuses as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Answer = Callable[[Mapping[str, Any]], int]

# The part of its address that is a secret.
TOKEN = "T0K3N-0f-the-webhook"  # not a secret


class Receiver:
    """`got` holds the bodies that came, in order, and `keys` their `Idempotency-Key`.

    `answer` takes a body and gives the status to answer with; it may wait.
    """

    def __init__(self, port: int) -> None:
        self.got: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Answer = lambda body: 200
        self.headers: dict[str, str] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.got.append(body)
                receiver.keys.append(self.headers["Idempotency-Key"])
                status = receiver.answer(body)
                try:
                    self.send_response(status)
                    for name, value in receiver.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                except OSError:
                    # Who sent it has not waited.
                    return

            def log_message(self, *arguments: Any) -> None:
                """Nothing on the test's standard error."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/{TOKEN}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def by_machine(self) -> dict[str, list[tuple[str, str]]]:
        """(kind, start) of what came of each machine, in order; what came again is left out."""
        first = {body["id"]: body for body in reversed(self.got)}
        order = dict.fromkeys(body["id"] for body in self.got)
        found: dict[str, list[tuple[str, str]]] = {}
        for key in order:
            body = first[key]
            machine = body["machine"]["machine_id"]
            found.setdefault(machine, []).append((body["kind"], body["failure"]["start_time"]))
        return found


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    """A receiver during the block."""
    receiver = Receiver(port)
    try:
        yield receiver
    finally:
        receiver.stop()
