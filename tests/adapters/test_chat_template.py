"""Both engines refuse templates that they would serve wrongly, and heed a request's arguments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import ConfigError, UnsupportedModel
from agentpref.models.base import load_base
from agentpref.serve.backend import GenerationRequest, encode_request
from agentpref_adapters.transformers import TransformersBackend
from agentpref_adapters.vllm import VllmBackend

ASKED: Any = ({"role": "user", "content": "The tide?"},)
CHANNEL = "{% if m.role == 'assistant' %}<|pad|>final{% endif %}"
TEMPLATE = """\
{%- if polite %}Please.{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}CHANNEL<|im_start|>{{ m.content }}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""


def base_with(template: str, random_base: Path, tmp_path: Path) -> str:
    folder = shutil.copytree(random_base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(folder)


def backend(kind: str, model: str, **options: Any) -> Any:
    """Make a backend; no server answers at the address."""
    if kind == "vllm":
        return VllmBackend("http://127.0.0.1:9", model=model, **options)
    return TransformersBackend(model, **options)


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_a_template_that_names_channels_is_refused(
    kind: str, random_base: Path, tmp_path: Path
) -> None:
    model = base_with(TEMPLATE.replace("CHANNEL", CHANNEL), random_base, tmp_path)
    with pytest.raises(UnsupportedModel, match="writes 'final' before its answers"):
        backend(kind, model)


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_an_argument_that_the_template_does_not_read_is_refused(
    kind: str, random_base: Path, tmp_path: Path
) -> None:
    model = base_with(TEMPLATE.replace("CHANNEL", ""), random_base, tmp_path)
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.politely has no effect"):
        backend(kind, model, chat_template_kwargs={"politely": True})


def test_a_request_is_rendered_with_its_own_arguments(random_base: Path, tmp_path: Path) -> None:
    model = base_with(TEMPLATE.replace("CHANNEL", ""), random_base, tmp_path)
    template = load_base(model).template

    def asked(**arguments: Any) -> str:
        request = GenerationRequest(ASKED, chat_template_kwargs=arguments)
        return str(template.tokenizer.decode(list(encode_request(request, template, "m"))))

    assert asked(polite=True) == f"Please.{asked()}"
    with pytest.raises(ConfigError, match="politely has no effect"):
        asked(politely=True)


def test_a_base_with_other_arguments_is_another_base(random_base: Path, tmp_path: Path) -> None:
    model = base_with(TEMPLATE.replace("CHANNEL", ""), random_base, tmp_path)
    plain, polite = load_base(model), load_base(model, chat_template_kwargs={"polite": True})
    assert plain.digest == polite.digest
    assert plain.template_digest != polite.template_digest
    assert polite.identity["chat_template_kwargs"] == {"polite": True}
    assert "chat_template_kwargs" not in plain.identity
    with pytest.raises(ConfigError, match="give it to load_base"):
        TransformersBackend(plain, chat_template_kwargs={"polite": True})
