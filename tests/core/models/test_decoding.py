"""What ends an answer, how long it may be, and what it says, from a base's files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from agentpref.errors import GenerationFailed, UnsupportedModel
from agentpref.models.base import load_base
from agentpref.models.decoding import Decoding
from agentpref.models.template import ChatTemplate

END = 2  # <|im_end|>, the tokenizer's end token, which its template writes after each turn


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    assert tokenizer.eos_token_id == END
    return tokenizer


def write(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {END}),
        ({"generation_config": {"eos_token_id": 7}}, {END, 7}),
        ({"generation_config": {"eos_token_id": [7, 8]}}, {END, 7, 8}),
        ({"generation_config": {"eos_token_id": None}}, {END}),
        ({"generation_config": {}, "config": {"eos_token_id": 9}}, {END}),
        ({"config": {"eos_token_id": [9]}}, {END, 9}),
        ({"config": {"text_config": {"eos_token_id": 9}}}, {END, 9}),
        ({"config": {"eos_token_id": 7, "text_config": {"eos_token_id": 9}}}, {END, 7}),
    ],
)
def test_end_tokens_are_those_of_the_tokenizer_and_of_the_generation_settings(
    tokenizer: Any, tmp_path: Path, files: dict[str, object], ends: set[int]
) -> None:
    assert Decoding.read(ChatTemplate(tokenizer), write(tmp_path, **files)).end_tokens == ends


@pytest.mark.parametrize("missing", ["generation_config.json", None])
def test_transformers_reads_the_same_end_tokens(
    random_base: Path, tmp_path: Path, missing: str | None
) -> None:
    for file in random_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, ends in (("config.json", [5, 6]), ("generation_config.json", [7, 8])):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**settings, "eos_token_id": ends}))
    if missing:
        (tmp_path / missing).unlink()
    base = load_base(str(tmp_path))
    configured: Any = base.model.generation_config
    assert Decoding.of(base).end_tokens == {END, *configured.eos_token_id}


def test_the_turn_ends_with_the_token_of_the_template_too(
    random_base: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.eos_token = "<|pad|>"  # as Gemma's <eos>, which its template never writes
    ends = Decoding.read(ChatTemplate(tokenizer), tmp_path).end_tokens
    assert ends == {END, tokenizer.eos_token_id}
    assert tokenizer.eos_token_id != END


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], [True], -1, {"id": 2}, 2.0])
def test_end_tokens_that_are_no_token_ids_are_refused(
    tokenizer: Any, tmp_path: Path, value: object
) -> None:
    folder = write(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(UnsupportedModel, match=r"generation_config.json is .*; make it a token id"):
        Decoding.read(ChatTemplate(tokenizer), folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_damaged_settings_are_refused(tokenizer: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        UnsupportedModel, match=r"generation_config\.json .*; fetch the model again"
    ):
        Decoding.read(ChatTemplate(tokenizer), tmp_path)


def test_an_answer_has_the_room_that_the_positions_leave(tokenizer: Any) -> None:
    decoding = Decoding(tokenizer, frozenset({END}), positions=10)
    assert [decoding.room((1,) * length, 4) for length in (1, 6, 7, 9)] == [4, 4, 3, 1]
    with pytest.raises(GenerationFailed, match="has 10 tokens, the model takes 10; shorten it"):
        decoding.room((1,) * 10, 4)
    assert Decoding(tokenizer, frozenset()).room((1,) * 10**6, 4) == 4


def test_a_text_has_no_end_token_even_where_that_is_not_special(tokenizer: Any) -> None:
    said, after = tokenizer("glad", add_special_tokens=False)["input_ids"], END + 50
    assert after not in tokenizer.all_special_ids
    decoding = Decoding(tokenizer, frozenset({END, after}))
    assert decoding.text([*said, END]) == "glad"
    assert decoding.text([*said, after]) == "glad"
    assert decoding.decode([*said, after]) != "glad"
