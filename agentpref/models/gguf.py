"""Reads a model out of a GGUF file, and writes it as safetensors in bfloat16.

GGUF is the packed format of llama.cpp: weights of 2 to 8 bits, the tokenizer and the chat template
in one file. Such weights can be served, but no adapter can be trained on them, so they are unpacked
once and written down. What the packing rounded off stays lost.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from agentpref.errors import MissingDependency
from agentpref.models import loading


def unpack(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file into ``folder``, as ``agentpref update --model`` reads it.

    In memory it is in bfloat16; transformers reads and unpacks tensor after tensor.

    Raises:
        MissingDependency: torch, transformers or gguf is not installed.
        UnsupportedModel: the file cannot be read as a model that transformers has built in, or has
            no chat template.
    """
    require_gguf()
    import torch
    import transformers

    known: Any = transformers
    # The progress bar of the conversion is the one thing that quiet() cannot turn off.
    hidden = redirect_stderr(io.StringIO())
    with hidden, loading.quiet(), loading.translating_errors(file.name, file.parent):
        tokenizer = known.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        model = known.AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            trust_remote_code=False,
            # Without this, it stays packed and cannot be saved.
            quantization_config=known.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    loading.check_tokens(file.name, model, loading.load_tokenizer(file.name, folder))


def require_gguf() -> None:
    """Refuse at once where what :func:`unpack` needs is not installed."""
    from importlib.util import find_spec

    if missing := [name for name in ("torch", "transformers", "gguf") if find_spec(name) is None]:
        raise MissingDependency(
            f"reading a GGUF file needs {', '.join(missing)}; install with: "
            "pip install 'agentpref[demo]'"
        )
