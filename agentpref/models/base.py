"""Finds, loads and identifies the base model.

Two digests identify a base: one of its weights and shape, one of its tokenizer and chat template.
Cached log-probs, revisions and serving all name them, so nothing made for one base is used with
another.

A base is held in float32, in bfloat16 or in 4 bits. bfloat16 halves the memory. Where the processor
multiplies it natively, matrix products are more than twice as fast; elsewhere bfloat16 is emulated
and slower than float32. Adapters and optimizers are in float32 in every case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import orjson

from agentpref.config import Precision
from agentpref.errors import ConfigError, MissingDependency, ModelNotFound, UnsupportedModel
from agentpref.home import reading
from agentpref.models import loading
from agentpref.models.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Held: TypeAlias = Literal["float32", "bfloat16", "4bit", "stored"]
"""The number format of a loaded base; ``"stored"`` is the one that its files have."""

BUNDLED = "tiny"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "additional_chat_templates/*.jinja",
)
# What a tokenizer is made of where tokenizer.json does not hold all of it.
_VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "tekken.json")
_ADDED_TOKENS = "added_tokens.json"
# What configurations call the number of positions; transformers maps GPT-2's to the first.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base, in eval mode and without gradients, and its digests."""

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    template_digest: str
    precision: Held = "float32"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        template = ChatTemplate(self.tokenizer, self.chat_template_kwargs)
        object.__setattr__(self, "template", template)

    @property
    def numbers(self) -> str:
        """The key of cached log-probs: the base, its template, and its arithmetic."""
        key = f"{self.digest}:{self.template_digest}"
        if self.precision == "float32":
            return key
        # Scores of versions that also rounded what lies between products have the shorter key.
        return f"{key}:{self.precision}, float32 between products"

    @property
    def positions(self) -> int | None:
        """The most tokens, prompt and answer together, that the model takes; ``None``: any number.

        Of a model with several parts, such as one that also sees images, it is the text model's.
        """
        config: Any = self.model.config.get_text_config()
        bounds = (getattr(config, name, None) for name in _POSITIONS)
        return next((int(bound) for bound in bounds if bound), None)

    @property
    def embedded(self) -> int:
        """How many tokens have an embedding: the tokenizer may know more, which raise an error."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest stores about the base of a revision."""
        return identity(self.name, self.digest, self.template_digest, self.chat_template_kwargs)


def identity(
    name: str, digest: str, template_digest: str, chat_template_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What identifies a base: its files, and the arguments that its chat template is given."""
    found: dict[str, Any] = {"name": name, "digest": digest, "template_digest": template_digest}
    return found | ({"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {})


def load_base(
    name: str,
    *,
    precision: Precision | Literal["stored"] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> BaseModel:
    """Load a base model by the bundled name ``"tiny"``, a folder, or a model hub's name.

    Weights are read from safetensors only, and remote code is never run. They are in memory of the
    process's own, so that later changes of the files have no effect. Without ``precision``, the
    base is held in float32 on a CPU and in bfloat16 on a GPU; ``"stored"`` holds it as its files
    do. ``chat_template_kwargs`` are given to the chat template at every rendering; they are part of
    what identifies the base.

    Raises:
        ConfigError: the precision is none, or the chat template does not read one of
            ``chat_template_kwargs``.
        MissingDependency: torch, transformers or what a precision needs is not installed.
        ModelNotFound: the name resolves to nothing.
        UnsupportedModel: the model has no chat template or no safetensors, is not a causal language
            model with attention, needs code of its own, is quantized, has an adapter beside it, has
            damaged files, weights that are not its configuration's or tokens without embeddings,
            is asked for in 4 bits without a GPU, or its files changed while they were loaded.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"a model needs {error.name}; install it with: pip install 'agentpref[train]'"
        ) from error
    path = find_base(name)
    gpu = torch.cuda.is_available()
    chosen = choose_precision(precision or ("bfloat16" if gpu else "float32"), gpu=gpu)
    before = _versions(path)
    tokenizer = load_tokenizer(name, path)
    ChatTemplate(tokenizer).require_arguments(chat_template_kwargs or {})
    model: Any = loading.load_model(name, path, **precision_options(chosen))
    loading.check_tokens(name, model, tokenizer)
    if chosen != "4bit":  # 4-bit weights are on the GPU already, and cannot be moved
        model.to("cuda" if gpu else "cpu")
    loading.own_memory(model)
    model.eval().requires_grad_(False)
    digests = base_digests(path, chat_template_kwargs)
    if _versions(path) != before:
        raise UnsupportedModel(
            f"the files of {name!r} in {path} changed while they were loaded, so its digest may "
            f"not be of what was loaded; wait until they are copied, then load it again"
        )
    return BaseModel(name, path, model, tokenizer, *digests, chosen, chat_template_kwargs or {})


def load_tokenizer(name: str, path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model with its chat template, without torch.

    Raises:
        MissingDependency: transformers is not installed.
        UnsupportedModel: it cannot be loaded, has no vocabulary, or has no chat template.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"a tokenizer needs {error.name}; install it with: pip install 'agentpref[train]'"
        ) from error
    return loading.load_tokenizer(name, path)


def language_model(model: Any) -> Any:
    """The decoder inside a causal model, without towers for images or sound."""
    while (inner := model.get_decoder()) is not model:
        model = inner
    return model


def find_base(name: str) -> Path:
    """Find the folder of a model's files; a name that is not a folder is downloaded from the hub.

    Raises:
        MissingDependency: the name is not a folder, and huggingface-hub is not installed.
        ModelNotFound: the name resolves to nothing.
        UnsupportedModel: the model has no safetensors, or an adapter beside them.
    """
    if name == BUNDLED:
        return Path(str(resources.files("agentpref"))) / "bundled" / BUNDLED
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name)
    loading.check_folder(name, folder)
    return folder


def _download(name: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise MissingDependency(
            f"{name!r} is no folder here, and fetching it from the hub needs {error.name}; "
            f"install it with: pip install 'agentpref[train]'"
        ) from error
    tokenizer = [*_TOKENIZER_FILES, *_VOCABULARY_FILES, _ADDED_TOKENS]
    wanted = [*tokenizer, *_WEIGHT_FILES, "generation_config.json", loading.ADAPTER_CONFIG]
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


def base_digests(
    folder: Path, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """The digests that identify a base: that of its weights, and that of its tokenizer.

    The latter covers the arguments of the chat template, if there are any.
    """
    template = digest_files(folder, tokenizer_files(folder))
    if chat_template_kwargs:
        arguments = orjson.dumps(chat_template_kwargs, option=orjson.OPT_SORT_KEYS)
        template = hashlib.sha256(template.encode() + b"\0" + arguments).hexdigest()
    return digest_files(folder, _WEIGHT_FILES), template


def _versions(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes when somebody writes or replaces a file of a base: each one's inode and times.

    A second digest would read gigabytes again, and would miss what was changed and changed back.
    """
    patterns = (*_WEIGHT_FILES, *tokenizer_files(folder), "generation_config.json")
    found: dict[str, tuple[int, ...]] = {}
    for file in {file for pattern in patterns for file in folder.glob(pattern)}:
        now = file.stat()
        found[file.name] = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    return found


def tokenizer_files(folder: Path) -> list[str]:
    """Patterns of the files that transformers reads for a tokenizer.

    Where there is a tokenizer.json, it reads no vocabulary and no merges beside it, and
    added_tokens.json only if the settings do not list the added tokens. Files that are not read
    must not change the digest: revisions name it.
    """
    files = [*_TOKENIZER_FILES]
    if not (folder / "tokenizer.json").exists():
        files += _VOCABULARY_FILES
    try:
        with reading(folder / "tokenizer_config.json") as stream:
            settings = orjson.loads(stream.read())
    except (FileNotFoundError, ValueError):
        settings = {}
    if "added_tokens_decoder" not in settings:
        files.append(_ADDED_TOKENS)
    return files


def digest_files(folder: Path, patterns: Iterable[str]) -> str:
    """SHA-256 of the paths and bytes of the matching files in a folder, in order of path."""
    digest = hashlib.sha256()
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        path = file.relative_to(folder).as_posix()
        digest.update(path.encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        with reading(file) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def choose_precision(asked: Precision | Literal["stored"], *, gpu: bool) -> Held:
    """Choose a precision; ``"auto"`` is bfloat16 where that is native, else float32.

    Raises:
        ConfigError: it is none.
        MissingDependency: 4 bits need bitsandbytes.
        UnsupportedModel: 4 bits need a GPU.
    """
    if asked not in (*get_args(Precision), "stored"):
        allowed = ", ".join(get_args(Precision))
        raise ConfigError(f"precision is {asked!r}, but must be one of {allowed}")
    if asked == "auto":
        return "bfloat16" if native_bfloat16(gpu=gpu) else "float32"
    if asked == "4bit" and not gpu:
        raise UnsupportedModel(
            "precision is '4bit', which needs a GPU; use 'auto', 'bfloat16' or 'float32' here"
        )
    if asked == "4bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise MissingDependency(
                "precision is '4bit', which needs bitsandbytes; install it with: "
                "pip install 'agentpref[quantized]'"
            ) from error
    return asked


def native_bfloat16(*, gpu: bool) -> bool:
    """Whether this machine multiplies matrices of bfloat16 without emulation."""
    import torch

    if gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Any = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it, 2.8 does not
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("arm_bf16"))


def precision_options(held: Held) -> dict[str, Any]:
    """The arguments of transformers' ``from_pretrained`` for a precision."""
    import torch

    if held != "4bit":
        return {"dtype": "auto" if held == "stored" else getattr(torch, held)}
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"dtype": torch.bfloat16, "quantization_config": quantized}
