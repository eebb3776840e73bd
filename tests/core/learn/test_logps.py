"""Log-probs and gradients of every family equal those of single sequences, by every route."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from agentpref.learn import batch as layouts
from agentpref.learn import logps
from agentpref.learn.kernels.fuse import fuse
from tests.core.learn.families import (
    FAMILIES,
    ROWS,
    adapted_model,
    held_in,
    random_model,
    row,
    rows_of,
)

SHARED = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "olmo2",
    "granite", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen2.5, with images",
}  # fmt: skip
OWN_LOGITS = {"gemma2", "granite"}

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def one_by_one(model, prompt, completion, mask=None):
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(
        logits[len(prompt) + i - 1, token]
        for i, token in enumerate(completion)
        if mask is None or mask[i]
    )


def truth(model, rows=ROWS):
    return torch.stack(
        [
            torch.stack(
                [one_by_one(model, own.prompt, *side) for side in zip(*own[1:], strict=True)]
            )
            for own in rows
        ]
    )


def trusted(model, longest=40):
    return logps.choose_route(model, ROWS, pad=0, longest=longest).route


def gradients(model, total):
    names, leaves = zip(*((n, p) for n, p in model.named_parameters() if "lora_" in n), strict=True)
    return dict(zip(names, torch.autograd.grad(total, leaves), strict=True))


def check_rows(model, rows, route, expected, expected_gradients):
    batch = route.layout(rows, 0)
    found = batch.sums(route.read(route.states(model, batch), batch).logps)
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
    found_gradients = gradients(model, (found * weights(found)).sum())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=2e-4, rtol=1e-3)


def weights(sums):
    return torch.linspace(1.0, -0.5, sums.shape[1])


@pytest.mark.guarantee("learning")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_route_and_fused_modules_change_no_number(family):
    model = adapted_model(family)
    expected = truth(model)
    expected_gradients = gradients(model, (expected * weights(expected)).sum())
    fuse(model)
    check_rows(model, ROWS, trusted(model), expected, expected_gradients)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "olmo2"])
def test_rows_of_n_completions_equal_single_sequences_whether_plain_or_shared(family, n):
    model, rows = adapted_model(family), rows_of(n)
    expected = truth(model, rows)
    expected_gradients = gradients(model, (expected * weights(expected)).sum())
    fuse(model)
    route = trusted(model)
    assert route.name == "shared"
    for own in (route, logps.ORACLE):
        check_rows(model, rows, own, expected, expected_gradients)


@pytest.mark.parametrize("n", [1, 3])
def test_tokens_that_do_not_count_are_left_out(n):
    model = adapted_model("llama")
    rows = [
        row(own.prompt, *own.completions, masks=tuple(map(every_other, own.completions)))
        for own in rows_of(n)
    ]
    expected = truth(model, rows)
    expected_gradients = gradients(model, (expected * weights(expected)).sum())
    assert not torch.allclose(expected, truth(model, rows_of(n)))
    for route in (trusted(model), logps.ORACLE):
        check_rows(model, rows, route, expected, expected_gradients)


def every_other(ids):
    """The first token counts, the second does not, and so on; of some completions all count."""
    return None if ids == (14,) else tuple(at % 2 == 0 for at in range(len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_take_the_fastest_route_that_gives_their_numbers(family):
    route = trusted(adapted_model(family))
    assert (route.name == "shared") == (family in SHARED)
    assert (route.head is None) == (family in OWN_LOGITS)


def test_logits_are_computed_for_columns_that_predict_only():
    model = random_model("llama")
    batch, seen = logps.ORACLE.layout(ROWS, 0), []
    hook = model.lm_head.register_forward_hook(lambda *parts: seen.append(parts[2].shape[1]))
    logps.ORACLE.states(model, batch)
    hook.remove()
    predicting = {int(place) % batch.ids.shape[1] for place in batch.where}
    assert seen == [len(predicting)]
    assert len(predicting) < batch.ids.shape[1]


def test_a_model_without_logits_to_keep_gets_the_same_scores():
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


def test_the_shortest_and_the_longest_row_are_tried(monkeypatch):
    scored = []

    def noted(model, rows, *options):
        scored.append([own.width for own in rows])
        return passes(model, rows, *options)

    passes = logps.passes
    monkeypatch.setattr(logps, "passes", noted)
    trusted(random_model("llama"))
    widths = [own.width for own in ROWS]
    assert scored == [[min(widths), max(widths)]] * 2


def test_a_model_shares_prompts_where_its_window_exceeds_all_rows():
    model = adapted_model("mistral, wide window")
    assert trusted(model, longest=11).name != "shared"
    assert trusted(model, longest=10).name == "shared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_misreads_shared_rows_takes_plain_ones(monkeypatch, dtype):
    from agentpref.learn.kernels import attention

    right = attention.shared_attention
    wrong = lambda *tensors: right(*tensors[:-1], 1.1 * tensors[-1])  # noqa: E731
    monkeypatch.setattr(attention, "shared_attention", wrong)
    model = held_in("llama", dtype)
    choice = logps.choose_route(model, ROWS, pad=0, longest=40)
    assert choice.route.name == "plain, fused head"
    assert choice.reason.startswith("shared: wrong by ")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("part", ["prompt", "completions"])
def test_in_bfloat16_an_error_below_its_noise_is_still_found_in_float32(monkeypatch, part):
    """Positions that are off by one hardly change what a random model gives."""
    right = layouts.shared

    def wrong(rows, pad):
        batch = right(rows, pad)
        width = batch.mask.shape[-1]
        columns = slice(None, width) if part == "prompt" else slice(width, None)
        batch.positions[:, columns] += 1
        return batch

    model = held_in("llama", torch.bfloat16)
    monkeypatch.setattr(layouts, "shared", wrong)
    choice = logps.choose_route(model, ROWS, pad=0, longest=40)
    assert choice.route.name == "plain, fused head"
    assert "shared: wrong by" in choice.reason


def test_in_bfloat16_a_kernel_that_rounds_too_much_is_refused(monkeypatch):
    from agentpref.learn.kernels import attention

    right = attention.shared_attention

    def coarse(*tensors):
        out = right(*tensors)
        return out if out.dtype == torch.float32 else (out * 4).round() / 4

    monkeypatch.setattr(attention, "shared_attention", coarse)
    choice = logps.choose_route(held_in("llama", torch.bfloat16), ROWS, pad=0, longest=40)
    assert choice.route.name == "plain, fused head"
    assert "shared: rounds by" in choice.reason
    assert choice.errors["shared"] > 2 * choice.errors["plain"]


def fused(family):
    model = held_in(family, torch.bfloat16)
    fuse(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_families_take_the_routes_that_they_take_in_float32(family):
    model = fused(family)
    choice = logps.choose_route(model, ROWS, pad=0, longest=40)
    assert (choice.route.name == "shared") == (family in SHARED)
    assert choice.errors[choice.route.name] > 0
    wide = held_in(family, torch.bfloat16).float()
    expected = torch.tensor(logps.score(wide, ROWS, route=logps.ORACLE, pad=0))
    found = torch.tensor(logps.score(model, ROWS, route=choice.route, pad=0))
    torch.testing.assert_close(found, expected, atol=0.3, rtol=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_in_bfloat16_gradients_are_those_of_float32_to_rounding(family):
    model, wide = fused(family), held_in(family, torch.bfloat16).float()
    route = trusted(model)
    found, expected = (
        torch.cat([x.flatten() for x in gradients(own, score_sum(own, by)).values()])
        for own, by in ((model, route), (wide, logps.ORACLE))
    )
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


def score_sum(model, route):
    batch = route.layout(ROWS, 0)
    sums = batch.sums(route.read(route.states(model, batch), batch).logps)
    return (sums * weights(sums)).sum()


def test_in_float32_nothing_rounds():
    choice = logps.choose_route(random_model("llama"), ROWS, pad=0, longest=40)
    assert choice.errors == {}
    assert choice.reason == "it gives the log-probs of the model's own modules"


def test_rows_are_tried_until_enough_tokens_count(monkeypatch):
    tried = []
    probe = logps._probe
    monkeypatch.setattr(logps, "_probe", lambda *given: tried.append(probe(*given)) or tried[-1])
    model = held_in("llama", torch.bfloat16)
    lone = [row((5, 6), (7,)) for _ in range(40)]
    logps.choose_route(model, lone, pad=0, longest=40)
    long = [row((5, 6), (7,) * 20), row((5,), (8,) * 25), row((9,), (8,) * 21)]
    logps.choose_route(model, long, pad=0, longest=40)
    assert [len(rows) for rows in tried] == [logps._PROBED_ROWS, 2]


def test_a_model_that_cannot_mix_keeps_its_own_arithmetic(monkeypatch):
    """Here a module that multiplies by its weight in a way that autocast does not know."""
    model = held_in("llama", torch.bfloat16)
    norm = model.get_base_model().model.norm
    plain = norm.forward

    def narrow_only(x):
        if x.dtype != norm.weight.dtype:
            raise RuntimeError("expected BFloat16 but found Float")
        return plain(x)

    norm.forward = narrow_only
    choice = logps.choose_route(model, ROWS, pad=0, longest=40)
    assert choice.route is logps.UNMIXED
    assert "plain: RuntimeError: expected BFloat16 but found Float" in choice.reason
    assert logps.known_route(model, choice.route.name) is logps.UNMIXED
    assert len(logps.score(model, ROWS, route=choice.route, pad=0)) == len(ROWS)


def test_residual_and_norms_are_in_float32_and_products_in_bfloat16():
    model = fused("llama")
    decoder, seen = model.get_base_model().model, {}
    parts = {"norm": decoder.norm, "layer": decoder.layers[0], "product": decoder.layers[0].mlp}
    note = lambda name, *call: seen.update({name: call[2].dtype})  # noqa: E731
    hooks = [part.register_forward_hook(partial(note, name)) for name, part in parts.items()]
    route = trusted(model)
    seen.clear()
    route.states(model, route.layout(ROWS, 0))
    for hook in hooks:
        hook.remove()
    wide, narrow = torch.float32, torch.bfloat16
    assert seen == {"norm": wide, "layer": wide, "product": narrow}
    assert model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)
    assert not decoder.embed_tokens._forward_hooks, "a served model is as it was"


def test_a_model_with_our_attention_generates_as_before():
    model = random_model("llama")
    asked = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 6, "do_sample": False}
    before = model.generate(**asked)
    assert trusted(model).name == "shared"
    assert torch.equal(model.generate(**asked), before)


def test_scores_come_back_in_the_order_of_rows_that_differ_in_n():
    model = random_model("llama")
    rows = [own for many in zip(*map(rows_of, (3, 1, 2)), strict=True) for own in many]
    done = []
    found = logps.score(model, rows, route=trusted(model), pad=0, progress=done.append)
    for own, scores in zip(rows, found, strict=True):
        expected = truth(model, [own])[0]
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=1e-4)
    assert done == [3, 6, 9], "one pass for each n"


def test_a_plain_row_costs_its_prompt_once_per_completion():
    shared, plain = (logps.Route("", layout) for layout in (layouts.shared, layouts.plain))
    costs = [(shared.cost(own), plain.cost(own)) for own in (rows_of(n)[0] for n in (1, 2, 3))]
    assert costs == [(6, 6), (9, 13), (12, 20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_route_is_the_one_that_another_process_found(family):
    finder, follower = adapted_model(family), adapted_model(family)
    found = trusted(finder)
    route = logps.known_route(follower, found.name)
    assert (route.name, route.layout) == (found.name, found.layout)
    assert (route.head is None) == (found.head is None)
    assert follower.config._attn_implementation == finder.config._attn_implementation
    expected = logps.score(finder, ROWS, route=found, pad=0)
    assert logps.score(follower, ROWS, route=route, pad=0) == expected


# The token that decides


@pytest.mark.parametrize(
    ("own", "place"),
    [
        (row((1,), (2, 3), (2, 4)), 1),
        (row((1,), (5, 3), (2, 3)), 0),
        (row((1,), (2, 3), (2, 3, 4)), None),
        (row((1,), (2, 3)), None),
        (row((1,), (2,), (3,), (4,)), None),
    ],
)
def test_the_first_token_that_differs_decides(own, place):
    assert logps.deciding_place(own) == place


def test_a_deciding_token_that_does_not_count_is_none():
    own = row((1,), (2, 3, 4), (2, 5, 6))
    for masks, place in (
        (((True, False, True),) * 2, None),
        (((False, True, True),) * 2, 1),
        (((False, True, True), (True, True, True)), None),
    ):
        assert logps.deciding_place(own._replace(masks=masks)) == place


@pytest.mark.parametrize("route", ["plain", "shared"])
def test_log_probs_of_deciding_tokens_are_those_of_single_sequences(route):
    model = random_model("llama")
    rows = [
        row((1, 2, 3), (4, 5, 6), (4, 7)),
        row((1, 9), (8, 3), (6, 6, 6, 2)),
        row((3, 1, 2, 5), (7, 4, 2), (7, 4, 9, 9, 1)),
    ]
    chosen = logps.known_route(model, route) if route == "shared" else logps.ORACLE
    found = logps.score_whole(model, rows, route=chosen, pad=0)
    for own, scores in zip(rows, found, strict=True):
        place = logps.deciding_place(own)
        for ids, logp in zip(own.completions, scores.deciding, strict=True):
            only = tuple(at == place for at in range(len(ids)))
            expected = float(one_by_one(model, own.prompt, ids, only))
            assert logp == pytest.approx(expected, abs=1e-4)
    assert [one.sums for one in found] == logps.score(model, rows, route=chosen, pad=0)
