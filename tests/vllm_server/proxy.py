"""A reverse proxy that makes a good server look like a bad one."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit


class Proxy:
    """Passes on to a server; attributes may be changed at any time.

    ``failing`` answers 500 to what generates and loads, ``delay`` holds each answer back for so
    many seconds, and ``cut_after`` breaks each answer off after so many bytes of it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.behind = (str(parts.hostname), int(parts.port or 0))
        self.failing = False
        self.delay = 0.0
        self.cut_after: int | None = None
        proxy = self

        class Handler(_Handler):
            server_of = proxy

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._http.shutdown()
        self._http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._pass_on(b"")

    def do_POST(self) -> None:
        self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

    def _pass_on(self, body: bytes) -> None:
        proxy = self.server_of
        time.sleep(proxy.delay)
        if proxy.failing and self.command == "POST":
            self.send_error(500)
            return
        behind = http.client.HTTPConnection(*proxy.behind, timeout=120)
        with suppress(OSError):  # either side may hang up
            behind.request(self.command, self.path, body, dict(self.headers))
            self._answer(behind.getresponse())
        behind.close()

    def _answer(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.end_headers()
        left = self.server_of.cut_after
        while data := answer.read1(65536):
            self.wfile.write(data[:left])
            left = None if left is None else left - len(data)
            if left is not None and left <= 0:
                return
