"""The proxy that docs/vllm.md puts before vLLM, run by nginx: what it lets through, and what not.

Behind it is a server that answers everything, so that every refusal is the proxy's. Skipped where
nginx is not installed.
"""

from __future__ import annotations

import http.client
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agentpref_adapters._vllm_process import free_port

GUIDE = Path(__file__).parents[2] / "docs" / "vllm.md"
BEHIND = "http://127.0.0.1:8000"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
OPENSSL = shutil.which("openssl")

MAIN = """
daemon off;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{server}
}}
"""

pytestmark = pytest.mark.skipif(
    NGINX is None or OPENSSL is None, reason="needs nginx and openssl: apt-get install nginx-light"
)


class Open:
    """A server that answers everything; ``asked`` lists the paths.

    A stream waits after its first event until ``read`` is set; ``in_vain`` says that it was not.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.read = threading.Event()
        self.in_vain = False
        server = self

        class Handler(_Handler):
            server_of = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_of: Open

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        server = self.server_of
        server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"data: 1\n\n")
        if b"stream" in body:
            self.wfile.flush()
            server.in_vain = not server.read.wait(10)
        self.wfile.write(b"data: 2\n\n")


@pytest.fixture
def behind() -> Iterator[Open]:
    with closing(Open()) as server:
        yield server


@pytest.fixture
def port(behind: Open, tmp_path: Path) -> Iterator[int]:
    """Where nginx listens, with the guide's configuration and a certificate of its own."""
    port = free_port("127.0.0.1")
    (server,) = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    server = server.replace(BEHIND, behind.url).replace("/etc/nginx/", f"{tmp_path}/")
    server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    (tmp_path / "nginx.conf").write_text(MAIN.format(folder=tmp_path, server=server))
    _certify(tmp_path)
    with _running(tmp_path, port):
        yield port


def _certify(folder: Path) -> None:
    names = ["-subj", "/CN=llm.example.org", "-keyout", "llm.key", "-out", "llm.pem"]
    command = [str(OPENSSL), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@contextmanager
def _running(folder: Path, port: int) -> Iterator[None]:
    command = [str(NGINX), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as nginx:
        try:
            while not _answers(port):
                if nginx.poll() is not None:
                    raise AssertionError(nginx.communicate()[1])
            yield
        finally:
            nginx.terminate()
            nginx.communicate()


def _answers(port: int) -> bool:
    try:
        return ask(port, "GET", "/") == 404
    except OSError:
        return False


def _connection(port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)


def ask(port: int, method: str, path: str) -> int:
    """Send a path just as it is written, and say the status."""
    with closing(_connection(port)) as connection:
        connection.request(method, path, b"{}" if method == "POST" else None)
        return connection.getresponse().status


def test_the_three_allowed_paths_pass(behind: Open, port: int) -> None:
    passing = [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/health"),
    ]
    assert [ask(port, method, path) for method, path in passing] == [200] * 3
    assert behind.asked == [path for _, path in passing]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_passes_without_buffering(behind: Open, port: int, path: str) -> None:
    with closing(_connection(port)) as connection:
        connection.request("POST", path, b'{"stream": true}')
        answer = connection.getresponse()
        assert answer.readline() == b"data: 1\n"
        behind.read.set()
        assert answer.read() == b"\ndata: 2\n\n"
    assert not behind.in_vain


@pytest.mark.guarantee("vllm")
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_guides_proxy_refuses_other_paths_in_every_spelling(
    behind: Open, port: int, method: str
) -> None:
    refused = [
        "/invocations",
        "/adapters",
        "/adapters/rev-1",
        "//adapters",
        "/v1/../adapters",
        "/v1/completions/../../adapters",
        "/v1/completions/..%2f..%2fadapters",
        "/%61dapters",
        "/v1/completions/",
        "/v1/completions/x",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/models",  # it shows the home's path
        "/v1/models/../load_lora_adapter",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/kv_event_sources",
        "/ping",
        "/pause",
        "/scale_elastic_ep",
        "/tokenize",
    ]
    assert {path: ask(port, method, path) for path in refused} == dict.fromkeys(refused, 404)
    assert behind.asked == []


@pytest.mark.guarantee("vllm")
def test_the_guides_proxy_refuses_a_body_that_is_too_large(behind: Open, port: int) -> None:
    with closing(_connection(port)) as connection:
        connection.request("POST", "/v1/completions", b"x" * (3 << 20))
        assert connection.getresponse().status == 413
    assert behind.asked == []


@pytest.mark.parametrize("path", ["/adapters/../health", "/adapters%2f..%2fhealth", "/%68ealth"])
def test_the_server_gets_the_plain_spelling_of_a_path(behind: Open, port: int, path: str) -> None:
    """What nginx reads as one path, the server might read as another."""
    assert ask(port, "GET", path) == 200
    assert behind.asked == ["/health"]
