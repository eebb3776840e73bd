"""Every family's log-probs and gradients are those of plain single passes, by whatever route."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn import logps
from agentpref.learn.kernels.fuse import fuse
from tests.core.learn.families import FAMILIES, adapted_model, random_model
from tests.core.learn.test_batch import ROWS

SHARED = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "olmo2",
    "granite",
}  # fmt: skip
OWN_LOGITS = {"gemma2", "granite"}

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def one_by_one(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(completion))


def truth(model):
    return [[one_by_one(model, row.prompt, ids) for ids in row.completions] for row in ROWS]


def trusted(model, longest=40):
    return logps.trusted_route(model, ROWS, pad=0, longest=longest)


def gradients(model, total):
    names, leaves = zip(*((n, p) for n, p in model.named_parameters() if "lora_" in n), strict=True)
    return dict(zip(names, torch.autograd.grad(total, leaves), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_route_and_the_fused_modules_change_no_number(family):
    model = adapted_model(family)
    expected = torch.stack([torch.stack(row) for row in truth(model)])
    expected_gradients = gradients(model, (expected * torch.tensor([1.0, -0.5])).sum())

    fuse(model)
    route = trusted(model)
    batch = route.layout(ROWS, 0)
    found = batch.sums(route.read(route.states(model, batch), batch).logps).reshape(2, -1).T
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
    found_gradients = gradients(model, (found * torch.tensor([1.0, -0.5])).sum())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_take_the_fastest_route_that_is_true_to_them(family):
    route = trusted(adapted_model(family))
    assert (route.name == "shared") == (family in SHARED)
    assert (route.head is None) == (family in OWN_LOGITS)


def test_logits_are_made_for_columns_of_completions_only():
    model = random_model("llama")
    batch, seen = logps.ORACLE.layout(ROWS, 0), []
    hook = model.lm_head.register_forward_hook(lambda *parts: seen.append(parts[2].shape[1]))
    logps.ORACLE.states(model, batch)
    hook.remove()
    predicting = {int(place) % batch.ids.shape[1] for place in batch.where}
    assert seen == [len(predicting)]
    assert len(predicting) < batch.ids.shape[1]


def test_a_model_that_cannot_be_told_which_logits_is_scored_alike():
    model = random_model("llama")
    expected = logps.score(model, ROWS, route=logps.ORACLE, pad=0)
    forward = model.forward

    def without_a_choice(input_ids, attention_mask, position_ids, use_cache):
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )

    model.forward = without_a_choice
    found = logps.score(model, ROWS, route=logps.ORACLE, pad=0)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_the_longest_and_the_shortest_row_decide(monkeypatch):
    scored = []

    def noted(model, rows, **options):
        scored.append([row.width for row in rows])
        return score(model, rows, **options)

    score = logps.score
    monkeypatch.setattr(logps, "score", noted)
    trusted(random_model("llama"))
    widths = [row.width for row in ROWS]
    assert scored == [[min(widths), max(widths)]] * 2


def test_a_window_that_is_long_enough_may_share():
    model = adapted_model("mistral, wide window")
    assert trusted(model, longest=11).name != "shared"
    assert trusted(model, longest=10).name == "shared"


def test_a_model_that_reads_shared_rows_wrongly_is_found_out(monkeypatch):
    from agentpref.learn.kernels import attention

    right = attention.shared_attention
    wrong = lambda *tensors: right(*tensors[:-1], 1.1 * tensors[-1])  # noqa: E731
    monkeypatch.setattr(attention, "shared_attention", wrong)
    model = adapted_model("llama")
    assert trusted(model).name == "plain, fused head"
    assert model.config._attn_implementation == "sdpa"


def test_generation_is_as_before_beside_shared_rows():
    model = random_model("llama")
    asked = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 6, "do_sample": False}
    before = model.generate(**asked)
    assert trusted(model).name == "shared"
    assert torch.equal(model.generate(**asked), before)


def test_scores_come_back_in_the_order_of_the_rows():
    model = random_model("llama")
    rows = ROWS[::-1] + ROWS
    found = logps.score(model, rows, route=trusted(model), pad=0)
    expected = torch.tensor(truth(model))
    expected = torch.cat([expected.flip(0), expected])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_route_is_set_up_by_its_name_as_it_was_where_it_was_found(family):
    finder, follower = adapted_model(family), adapted_model(family)
    found = trusted(finder)
    route = logps.known_route(follower, found.name)
    assert (route.name, route.layout) == (found.name, found.layout)
    assert (route.head is None) == (found.head is None)
    assert follower.config._attn_implementation == finder.config._attn_implementation
    expected = logps.score(finder, ROWS, route=found, pad=0)
    assert logps.score(follower, ROWS, route=route, pad=0) == expected
