"""Loads a model and its tokenizer, and refuses what would not be what was meant.

transformers loads much in silence: it fills missing weights with random numbers, drops weights that
have other names, gives a tokenizer without a vocabulary three tokens, and asks on the terminal
whether it may run a folder's code. Here each of these is an error that names the file or the weight
and the cure, before any work begins. Code of a model's own is never run, and nobody is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentpref.errors import AgentprefError, UnsupportedModel
from agentpref.home import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
_SHOWN = 3
"""How many names of weights or tokens an error lists."""

# What training, the examination and serving pass to a model. Those without a cache of keys and
# values (Mamba, RWKV, xLSTM) or without positions of their own choice (BLOOM, MPT) lack some of it.
_ASKED_OF_FORWARD = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}

# Buffers that old checkpoints hold and models compute by themselves today.
_COMPUTED = (
    "rotary_emb.inv_freq", "position_ids", ".masked_bias", ".attn.bias", ".attention.bias",
    ".causal_mask",
)  # fmt: skip


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder without safetensors, or with an adapter in it.

    transformers loads an adapter beside a model in silence, and training would start from both.

    Raises:
        UnsupportedModel: the folder is one of these.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise UnsupportedModel(
            f"{name!r} holds an adapter ({ADAPTER_CONFIG}), and a base must be a whole model; "
            f"merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload()"
            f".save_pretrained(…), for a revision `agentpref adapters export --merged`, or remove "
            f"the adapter's files"
        )
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{name!r} has no safetensors weights; convert it with save_pretrained first"
        )


def load_model(name: str, path: Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model; ``options`` are those of ``from_pretrained`` for a precision.

    A model that also takes images is loaded whole, as its configuration says, since engines name
    its layers so. Its language model alone is trained.

    Raises:
        UnsupportedModel: it needs code of its own, is quantized, cannot be generated with here, has
            damaged files, or its weights are not those of its configuration.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    with quiet(), translating_errors(name, path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        _refuse_foreign_kernels(name, config)
        options = _unpacking(name, config) | options
        seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        is_nested = config.get_text_config() is not config
        kind: Any = transformers.AutoModelForCausalLM
        if seeing and is_nested:
            kind = transformers.AutoModelForImageTextToText
        model, found = kind.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # below, they are an error that names them
            **options,
        )
    _check_weights(name, model, found)
    missing = _ASKED_OF_FORWARD - set(inspect.signature(model.forward).parameters)
    if missing:
        raise UnsupportedModel(
            f"{name!r} ({type(model).__name__}) takes no {', '.join(sorted(missing))} and cannot "
            f"be trained and served here; use a decoder-only transformer with attention"
        )
    return model  # type: ignore[no-any-return]


def own_memory(model: PreTrainedModel) -> None:
    """Copy the weights of a model on a CPU into memory of the process's own, one by one.

    Where a file has the precision that is asked for, transformers leaves the weights mapped: a
    write to the file would change the model, and a shorter file would end the process (SIGBUS).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _refuse_foreign_kernels(name: str, config: Any) -> None:
    """Refuse attention from elsewhere, which transformers would fetch and run."""
    for part in (config, config.get_text_config()):
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:
            raise UnsupportedModel(
                f"{name!r} asks for attention from {kernel!r}, which is code of others and never "
                f"run; remove attn_implementation from config.json"
            )


def _unpacking(name: str, config: Any) -> dict[str, Any]:
    """The option that unpacks MXFP4, in which gpt-oss comes; what else is packed is refused."""
    parts = (config, config.get_text_config())
    packed: Any = next(filter(None, (getattr(p, "quantization_config", 0) for p in parts)), None)
    if not packed:
        return {}
    method = (packed if isinstance(packed, dict) else vars(packed)).get("quant_method")
    if method == "mxfp4":
        import transformers

        known: Any = transformers
        return {"quantization_config": known.Mxfp4Config(dequantize=True)}
    raise UnsupportedModel(
        f"{name!r} is quantized ({method}); use the unquantized model, which precision '4bit' "
        f"quantizes as it loads"
    )


def _check_weights(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Require that the files hold each of the model's weights, in its shape, and no other."""
    unexpected = {key for key in found["unexpected_keys"] if not key.endswith(_COMPUTED)}
    misshapen = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    faults = [
        ("lacks", set(found["missing_keys"])),
        ("has in another shape", misshapen),
        ("has besides", unexpected),
    ]
    told = [f"{what} {_listed(keys)}" for what, keys in faults if keys]
    if told:
        raise UnsupportedModel(
            f"the weights of {name!r} are not those of a {type(model).__name__}: the folder "
            f"{'; it '.join(told)}; save the whole model again with save_pretrained, and without "
            f"torch.compile's or a trainer's wrapper around it"
        )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def load_tokenizer(name: str, path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer with its chat template; torch is not needed.

    Raises:
        UnsupportedModel: it needs code of its own, cannot be loaded, has no vocabulary, or has no
            chat template for plain conversations.
    """
    from transformers import AutoTokenizer

    with quiet(), translating_errors(name, path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False
        )
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        words = set(tokenizer.get_vocab()) - added - set(tokenizer.all_special_tokens)
    if not words:
        raise UnsupportedModel(
            f"{name!r} has a tokenizer of {len(tokenizer)} special tokens and no vocabulary; add "
            f"the files of the model's tokenizer, such as tokenizer.json"
        )
    template: Any = tokenizer.chat_template
    if isinstance(template, dict) and "default" not in template:
        raise UnsupportedModel(
            f"{name!r} has chat templates named {_listed(template) or 'nothing'}, but none named "
            f"'default'; save the one for conversations as chat_template.jinja"
        )
    if not template:
        raise UnsupportedModel(
            f"{name!r} has no chat template; use an instruct model, or add chat_template.jinja"
        )
    _check_template(name, tokenizer)
    return tokenizer


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot be parsed; one may refuse some conversations."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils import chat_template_utils

    found: Any = tokenizer.chat_template
    texts = [*found.values()] if isinstance(found, dict) else [found]
    if not all(isinstance(text, str) for text in texts):
        raise UnsupportedModel(f"{name!r} has a chat template that is {found!r}; make it text")
    try:
        for text in texts:
            chat_template_utils._compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise UnsupportedModel(
            f"{name!r} has a chat template that cannot be parsed (line {error.lineno}: {error}); "
            f"correct chat_template.jinja"
        ) from error


def check_tokens(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Require an embedding for each token that padding, an end of turn or the template may write.

    Tokens beyond the embeddings that none of these uses stay allowed: Gemma 3 1B has one, for the
    images that it does not see.

    Raises:
        UnsupportedModel: there is such a token.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    template: Any = tokenizer.chat_template
    text = "".join(template.values()) if isinstance(template, dict) else template
    used = {
        token
        for key, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and (key in ("pad_token", "eos_token") or key in text)
    }
    beyond = {
        f"{token!r} ({number})"
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (token in used or token in text)
    }
    if beyond:
        raise UnsupportedModel(
            f"{name!r} has embeddings for {rows} tokens, but its tokenizer or chat template uses "
            f"{_listed(beyond)}; call resize_token_embeddings(len(tokenizer)) on the model and "
            f"train the new rows, or use the tokenizer that belongs to the model"
        )


@contextmanager
def translating_errors(name: str, path: Path) -> Iterator[None]:
    """Raise what transformers raises while it loads as ``UnsupportedModel``."""
    try:
        yield
    except AgentprefError:
        raise
    except Exception as error:  # of transformers, tokenizers, safetensors, torch or the disk
        why = str(error).strip().partition("\n")[0].rstrip(" .:;") or type(error).__name__
        cure = "use a causal language model of transformers, with a tokenizer and whole safetensors"
        if code := _files_that_name_code(path):
            cure = (
                f"its {' and '.join(code)} names code of its own (auto_map), which is never run: "
                f"use a model that transformers has built in"
            )
        raise UnsupportedModel(f"{name!r} cannot be loaded: {why}; {cure}") from error


def _files_that_name_code(path: Path) -> list[str]:
    """The settings in a folder, and in those inside it, that name classes of the model's own."""

    def names_code(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(names_code, value))
        if not isinstance(value, dict):
            return False
        return bool(value.get("auto_map")) or any(map(names_code, value.values()))

    found: list[str] = []
    for file in sorted(path.rglob("*config.json")):
        with suppress(OSError, ValueError), reading(file) as stream:
            if names_code(orjson.loads(stream.read())):
                found.append(file.relative_to(path).as_posix())
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what transformers writes while it loads, and let it ask nobody for anything.

    A library must not write to a terminal; what it would report about weights is raised as an error
    instead. ``trust_remote_code=False`` reaches the model itself, but not every part: a tokenizer
    for retrieval loads two others, and a model that sees builds its language model, each without
    it. These ask on the terminal whether to run the folder's code, unless the time to answer is 0.
    """
    import transformers
    from transformers import dynamic_module_utils

    logging: Any = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    asking: Any = dynamic_module_utils
    seconds, asking.TIME_OUT_REMOTE_CODE = asking.TIME_OUT_REMOTE_CODE, 0
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        asking.TIME_OUT_REMOTE_CODE = seconds
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
