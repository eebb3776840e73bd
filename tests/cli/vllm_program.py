"""Stands in for vLLM's server program: `python vllm_program.py … --model BASE … --port PORT …`.

It writes down what it is asked to load and unload, ends with a complaint if told `--fail`, never
answers if told `--slow`, and refuses to load what the file after `--refused` names.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

from vllm_stand_in import StandIn


def main(words: list[str]) -> None:
    """Serve until the end, and say on standard output what comes in."""
    if "--fail" in words:
        sys.exit("ValueError: this GPU is too small")
    print("pid", os.getpid(), flush=True)
    if "--slow" in words:
        time.sleep(600)
    server = StandIn(words[words.index("--model") + 1], port=int(words[words.index("--port") + 1]))
    said = 0
    while True:
        server.refused = refused(words)
        time.sleep(0.01)
        for path, body in server.asked[said:]:
            if "lora" in path:
                print(path, body["lora_name"], flush=True)
        said = len(server.asked)


def refused(words: list[str]) -> set[str]:
    """What is not to be loaded at the moment."""
    if "--refused" not in words:
        return set()
    file = Path(words[words.index("--refused") + 1])
    return set(file.read_text().split()) if file.exists() else set()


if __name__ == "__main__":
    main(sys.argv)
