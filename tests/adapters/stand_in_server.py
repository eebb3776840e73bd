"""A minimal server: `python stand_in_server.py PORT FOLDER [HOW...]`.

It answers 200 to every GET, exits on `POST /die`, starts a helper process as vLLM starts its
engine, and writes both process ids to FOLDER/pids. HOW: `fails` ends it before it answers, after
two errors; `silent` never answers; `stubborn` ignores SIGTERM.
"""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        os._exit(9)


def main(port: str, folder: str, *how: str) -> None:
    print("starting up", flush=True)
    if "fails" in how:
        print("(EngineCore) ValueError: not enough memory for the weights")
        sys.exit("RuntimeError: the engine did not start; see the cause above")
    if "stubborn" in how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, "pids").write_text(f"{os.getpid()} {helper.pid}")
    if "silent" in how:
        time.sleep(600)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
