"""The base model: finding it, loading it, and knowing it again.

A base is known by two digests, one of its weights and shape, one of its tokenizer and chat
template. Cached log-probs, revisions and serving all name them, so that nothing made for one base
is ever used with another. This module knows nothing of adapters, pairs or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.config import Precision
from agentpref.errors import MissingDependency, ModelNotFound, UnsupportedModel
from agentpref.models import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "tiny"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base: model in eval mode, gradients off, and what it is known by."""

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    template_digest: str
    precision: precision.Held = "float32"

    @property
    def numbers(self) -> str:
        """What cached log-probs stand under: the base, its template, and its precision."""
        key = f"{self.digest}:{self.template_digest}"
        return key if self.precision == "float32" else f"{key}:{self.precision}"

    @property
    def identity(self) -> dict[str, str]:
        """What manifests store about the base of a revision."""
        return {
            "name": self.name,
            "digest": self.digest,
            "template_digest": self.template_digest,
        }


def load_base(name: str, *, held_in: Precision | None = None) -> BaseModel:
    """Load a base model by the bundled name ``"tiny"``, a folder, or a model hub's name.

    Weights are read from safetensors only and remote code is never run. Unless a precision is asked
    for, the base is held in float32 on a CPU and in bfloat16 on a GPU.

    Raises:
        MissingDependency: torch, transformers or what a precision needs is not installed.
        ModelNotFound: the name resolves to nothing.
        UnsupportedModel: the model has no chat template or no safetensors, is no causal language
            model, or its files are not whole.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingDependency(
            f"a model needs {error.name}; install it with: pip install 'agentpref[train]'"
        ) from error
    path = find_base(name)
    with _quiet(transformers):
        return _load(name, path, held_in)


def _load(name: str, path: Path, asked: Precision | None) -> BaseModel:
    import torch
    import transformers

    tokenizer = load_tokenizer(name, path)
    gpu = torch.cuda.is_available()
    held = precision.choose(asked or ("bfloat16" if gpu else "float32"), gpu=gpu)
    with _refusing(name):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, **precision.loading(held)
        )
    if held != "4bit":  # whose weights are on the GPU already, and cannot be moved
        model.to("cuda" if gpu else "cpu")
    model.eval().requires_grad_(False)
    digest, template_digest = base_digests(path)
    return BaseModel(
        name=name,
        path=path,
        model=model,
        tokenizer=tokenizer,
        digest=digest,
        template_digest=template_digest,
        precision=held,
    )


def load_tokenizer(name: str, path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, chat template included; torch is not needed for that.

    Raises:
        MissingDependency: transformers is not installed.
        UnsupportedModel: it cannot be loaded, or has no chat template.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency(
            f"a tokenizer needs {error.name}; install it with: pip install 'agentpref[train]'"
        ) from error
    with _refusing(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise UnsupportedModel(
            f"{name!r} has no chat template; use an instruct model, or add chat_template.jinja"
        )
    return tokenizer


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Say of what transformers cannot load that it is not supported, and why."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"{name!r} cannot be loaded: {why}; use a causal language model of transformers, "
            f"with a tokenizer and whole safetensors"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bar of loading, which libraries must not write to a host's terminal."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def find_base(name: str) -> Path:
    """Resolve a model name to the folder of its files, downloading from the hub where allowed.

    Raises:
        MissingDependency: the name is no folder, and what downloads is not installed.
        ModelNotFound: the name resolves to nothing.
        UnsupportedModel: the model has no safetensors.
    """
    if name == BUNDLED:
        return Path(str(resources.files("agentpref"))) / "bundled" / BUNDLED
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name)
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{name!r} has no safetensors weights; convert it with save_pretrained first"
        )
    return folder


def _download(name: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise MissingDependency(
            f"{name!r} is no folder here, and fetching it from the hub needs {error.name}; "
            f"install it with: pip install 'agentpref[train]'"
        ) from error
    wanted = [*_TOKENIZER_FILES, *_WEIGHT_FILES, "generation_config.json", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise ModelNotFound(
            f"no model is named {name!r}: it is no folder here and could not be fetched from the "
            f"hub; use 'tiny', a folder of safetensors, or a hub name, and check the network"
        ) from error


def base_digests(folder: Path) -> tuple[str, str]:
    """What a base is known by: the digest of its weights, and that of its tokenizer."""
    return digest_files(folder, _WEIGHT_FILES), digest_files(folder, _TOKENIZER_FILES)


def digest_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """Sha256 over the names and bytes of the files in ``folder`` that match, in name order."""
    digest = hashlib.sha256()
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        digest.update(file.name.encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
