"""Code that comes with a model is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[3]
SOURCES = [ROOT / "agentpref", ROOT / "adapters", ROOT / "cli"]

LOAD = """
import sys
from pathlib import Path
from agentpref.errors import UnsupportedModel
from agentpref.models import loading
path = Path(sys.argv[2])
try:
    getattr(loading, sys.argv[1])("own", path)
except UnsupportedModel as error:
    print("refused:", error)
"""


def write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def own_code(folder: Path) -> Path:
    """A module that leaves a file when it runs."""
    ran = folder.parent / "ran"
    write(folder / "own.py", f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    return ran


def retrieval_tokenizer(folder: Path) -> Path:
    """A tokenizer that loads another one, from a folder inside, by transformers' own rules."""
    inner = {"model_type": "vit"}  # a type that has no tokenizer of its own
    write(
        folder / "config.json", {"model_type": "rag", "question_encoder": inner, "generator": inner}
    )
    write(folder / "tokenizer_config.json", {"tokenizer_class": "RagTokenizer"})
    inside = folder / "question_encoder_tokenizer"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    write(inside / "tokenizer_config.json", own)
    own_code(inside)
    return own_code(folder)


def seeing_model(folder: Path) -> Path:
    """A model for images that builds its language model of a class that the folder names."""
    own = {"model_type": "kosmos_2_text_model", "auto_map": {"AutoModel": "own.Own"}}
    own["name_or_path"] = own["_name_or_path"] = str(folder)
    sees = {"model_type": "clip_vision_model", "num_hidden_layers": 1}
    write(
        folder / "config.json",
        {"model_type": "llava", "text_config": own, "vision_config": sees},
    )
    save_file({"x": np.zeros(1)}, folder / "model.safetensors")
    return own_code(folder)


def plain_model(folder: Path) -> Path:
    """A model of a type that transformers does not know."""
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": "own.Own"}
    write(folder / "config.json", {"model_type": "own", "auto_map": own})
    return own_code(folder)


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (retrieval_tokenizer, "load_tokenizer"),
        (plain_model, "load_tokenizer"),
        (plain_model, "load_model"),
        (seeing_model, "load_model"),
    ],
)
def test_a_y_that_is_typed_runs_no_code(tmp_path: Path, make, load: str) -> None:
    ran = make(tmp_path / "model")
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 20)
    command = [sys.executable, "-c", LOAD, load, str(tmp_path / "model")]
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, stdin=theirs, capture_output=True, text=True, env=env, check=False
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert not ran.exists()
    assert not (tmp_path / "model" / "ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert "names code of its own (auto_map), which is never run" in done.stdout
    assert "config.json" in done.stdout


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """The calls of a method in the sources, but those of peft, which reads no such settings."""
    found = []
    for file in (file for folder in SOURCES for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr == name and owner != "PeftModel":
                    found.append((f"{file.name}:{node.lineno}", node))
    return found


@pytest.mark.guarantee("privacy")
@pytest.mark.parametrize("name", ["from_pretrained", "from_config"])
def test_every_loading_call_refuses_the_models_own_code(name: str) -> None:
    bare = [
        place
        for place, call in calls(name)
        if "trust_remote_code=False" not in [ast.unparse(keyword) for keyword in call.keywords]
    ]
    assert bare == []
    assert name == "from_config" or len(calls(name)) >= 3
