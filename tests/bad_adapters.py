"""A catalogue of bad adapters: how to make each, and what its refusal must name.

Real peft saves what it can; the rest is edited by hand, as a broken disk, a careless script or an
attacker would. The base model may be any Llama-like model in a folder. Each adapter is refused by
``agentpref.serve.validate``; vLLM or peft accept most of them in silence.
"""

from __future__ import annotations

from typing import NamedTuple

from adapter_damage import (
    CONFIG,
    FIRST_A,
    FIRST_B,
    LAST_A,
    LAST_B,
    WEIGHTS,
    Make,
    add_kind,
    add_layer,
    base_weight,
    deep_settings,
    drop,
    drop_kind,
    edit_bytes,
    endless_table,
    files,
    halve_rank,
    huge_settings,
    huge_table,
    linked,
    linked_folder,
    one_number,
    only_a_pickle,
    other_tuner,
    padded_table,
    put,
    saved,
    saved_in_disguise,
    settings,
    swap_sides,
    table,
    tensors,
    twice_in_settings,
    twice_in_table,
    twice_within_settings,
    without_prefix,
)


class BadAdapter(NamedTuple):
    """``named`` is a regular expression; ``needs_layers`` if only the base shows the fault."""

    name: str
    make: Make
    named: str
    needs_layers: bool = False


NAN, INF = float("nan"), float("inf")

BAD_ADAPTERS: tuple[BadAdapter, ...] = (
    # Numbers.
    BadAdapter("nan", tensors(put(LAST_A, one_number(NAN))), r"up_proj\.lora_A.* not finite"),
    BadAdapter("infinity", tensors(put(LAST_B, one_number(INF))), r"up_proj\.lora_B.* not finite"),
    BadAdapter(
        "minus_infinity", tensors(put(FIRST_A, one_number(-INF))), r"q_proj\.lora_A.* not fin"
    ),
    BadAdapter("all_nan", tensors(put(FIRST_B, lambda t: t * NAN)), r"q_proj\.lora_B.* not finite"),
    # Shapes.
    BadAdapter(
        "half_width_a",
        tensors(put(FIRST_A, lambda t: t[:, : t.shape[1] // 2])),
        r"layers\.0\.self_attn\.q_proj adapts a layer of",
        needs_layers=True,
    ),
    BadAdapter(
        "half_width_b",
        tensors(put(LAST_B, lambda t: t[: t.shape[0] // 2])),
        r"mlp\.up_proj adapts a layer of",
        needs_layers=True,
    ),
    BadAdapter(
        "double_width",
        tensors(put(FIRST_B, lambda t: t.repeat(2, 1))),
        r"q_proj adapts a layer of",
        needs_layers=True,
    ),
    BadAdapter("rank_of_the_tensors", tensors(halve_rank), r"_proj has lora_A \(4,"),
    BadAdapter("rank_of_the_settings", settings(r=16), r"_proj has lora_A .* rank 16 asks for"),
    BadAdapter(
        "rank_of_one_pair", tensors(put(LAST_A, lambda t: t[:4])), r"up_proj has lora_A \(4,"
    ),
    BadAdapter("swapped_sides", tensors(swap_sides), r"layers\.0\.self_attn\.q_proj has lora_A"),
    BadAdapter(
        "flat", tensors(put(FIRST_A, lambda t: t.reshape(-1))), r"q_proj has lora_A \(\d+,\)"
    ),
    BadAdapter(
        "of_a_convolution",
        tensors(put(FIRST_A, lambda t: t[:, :, None, None])),
        r"q_proj has lora_A",
    ),
    BadAdapter("float64", tensors(put(FIRST_A, lambda t: t.double())), r"q_proj.*dtype F64"),
    BadAdapter("int8", tensors(put(FIRST_A, lambda t: t.char())), r"q_proj.*dtype I8"),
    # Tensors that are missing or superfluous.
    BadAdapter("no_a", tensors(drop(FIRST_A)), r"layers\.0\.self_attn\.q_proj has no lora_A"),
    BadAdapter("no_b", tensors(drop(LAST_B)), r"mlp\.up_proj has no lora_B"),
    BadAdapter(
        "no_pair_in_one_layer",
        tensors(drop(LAST_A, LAST_B)),
        r"mlp\.up_proj has no tensors",
        needs_layers=True,
    ),
    BadAdapter("no_layer_of_a_kind", tensors(drop_kind), r"no tensor adapts up_proj"),
    BadAdapter("no_tensor_at_all", tensors(dict.clear), r"no tensor adapts (q|up)_proj"),
    BadAdapter(
        "layer_too_many",
        tensors(add_layer),
        r"layers\.99\..* is not a linear layer",
        needs_layers=True,
    ),
    BadAdapter("kind_too_many", tensors(add_kind), r"o_proj is adapted, but the settings"),
    BadAdapter(
        "kind_that_is_not", settings(target_modules=["q_proj", "up_proj", "w_q"]), "adapts w_q"
    ),
    BadAdapter(
        "base_weights", tensors(base_weight), r"embed_tokens\.base_layer\.weight is not a LoRA"
    ),
    BadAdapter(
        "names_of_another_kind", tensors(without_prefix), r"model\.layers\.0.* is not a LoRA"
    ),
    # Layers that no engine serves alike.
    BadAdapter(
        "embedding",
        saved(target_modules=["q_proj", "embed_tokens"]),
        r"embed_tokens\.(lora_embedding_|base_layer)",
    ),
    BadAdapter(
        "output_layer", saved(target_modules=["q_proj", "lm_head"]), r"lm_head|embed_tokens"
    ),
    BadAdapter(
        "output_layer_alone",
        tensors(
            lambda held: held.update(
                {
                    name.replace("model.layers.0.self_attn.q_proj", "lm_head"): held[name].clone()
                    for name in list(held)
                }
            )
        ),
        r"lm_head\.lora_[AB]\.weight adapts the output layer",
    ),
    # What peft can do beyond LoRA, as it saves it.
    BadAdapter("dora", saved(use_dora=True), "use_dora is True"),
    BadAdapter("rank_pattern", saved(rank_pattern={"up_proj": 16}), "rank_pattern is"),
    BadAdapter("alpha_pattern", saved(alpha_pattern={"up_proj": 64}), "alpha_pattern is"),
    BadAdapter("bias_all", saved(bias="all"), "bias is 'all'"),
    BadAdapter("bias_lora_only", saved(bias="lora_only"), "bias is 'lora_only'"),
    BadAdapter("lora_bias", saved(lora_bias=True), "lora_bias is True"),
    BadAdapter("modules_to_save", saved(modules_to_save=["lm_head"]), "modules_to_save is"),
    BadAdapter(
        "trainable_tokens", saved(trainable_token_indices=[0, 1]), "trainable_token_indices is"
    ),
    BadAdapter("layers_to_transform", saved(layers_to_transform=[0]), "layers_to_transform is"),
    BadAdapter("exclude_modules", saved(exclude_modules=["k_proj"]), "exclude_modules is"),
    BadAdapter("regular_expression", saved(target_modules=r".*\.q_proj"), "target_modules is"),
    BadAdapter("alora", saved(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is"),
    BadAdapter("pissa", saved(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    BadAdapter("pissa_niter", saved(init_lora_weights="pissa_niter_2"), "is 'pissa_niter_2'"),
    BadAdapter("olora", saved(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    BadAdapter(
        "layer_replication", saved(layer_replication=[(0, 2), (1, 2)]), "layer_replication is"
    ),
    BadAdapter(
        "prefix_tuning", other_tuner("PrefixTuningConfig", num_virtual_tokens=4), "peft_type is"
    ),
    BadAdapter(
        "prompt_tuning", other_tuner("PromptTuningConfig", num_virtual_tokens=4), "peft_type is"
    ),
    BadAdapter(
        "ia3",
        other_tuner(
            "IA3Config", target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]
        ),
        "peft_type is 'IA3'",
    ),
    BadAdapter("loha", other_tuner("LoHaConfig", target_modules=["q_proj"]), "peft_type is 'LOHA'"),
    BadAdapter(
        "adalora",
        other_tuner("AdaLoraConfig", target_modules=["q_proj"], total_step=10),
        "peft_type is 'ADALORA'",
    ),
    # The same, with settings that do not say so.
    BadAdapter(
        "dora_denied",
        saved_in_disguise({"use_dora": False}, use_dora=True),
        r"lora_magnitude_vector.* is not a LoRA",
    ),
    BadAdapter(
        "lora_bias_denied",
        saved_in_disguise({"lora_bias": False}, lora_bias=True),
        r"lora_B\.bias is not a LoRA",
    ),
    BadAdapter(
        "modules_to_save_denied",
        saved_in_disguise({"modules_to_save": None}, modules_to_save=["lm_head"]),
        r"lm_head.*weight is not a LoRA",
    ),
    BadAdapter(
        "trainable_tokens_denied",
        saved_in_disguise({"trainable_token_indices": None}, trainable_token_indices=[0, 1]),
        r"trainable_tokens_delta is not a LoRA",
    ),
    BadAdapter(
        "rank_pattern_denied",
        saved_in_disguise({"rank_pattern": {}}, rank_pattern={"up_proj": 16}),
        r"up_proj has lora_A \(16,",
    ),
    BadAdapter(
        "layers_to_transform_denied",
        saved_in_disguise({"layers_to_transform": None}, layers_to_transform=[0]),
        r"layers\.\d+\..* has no tensors",
        needs_layers=True,
    ),
    # Settings by hand: inits that change the base model's weights, and empty values.
    BadAdapter("loftq", settings(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
    BadAdapter("loftq_config", settings(loftq_config={"loftq_bits": 4}), "loftq_config is"),
    BadAdapter("eva", settings(init_lora_weights="eva"), "init_lora_weights is 'eva'"),
    BadAdapter("eva_config", settings(eva_config={"rho": 2.0}), "eva_config is"),
    BadAdapter("corda", settings(init_lora_weights="corda"), "init_lora_weights is 'corda'"),
    BadAdapter("corda_config", settings(corda_config={}), "corda_config is {}"),
    BadAdapter("lora_ga", settings(init_lora_weights="lora_ga"), "init_lora_weights is 'lora_ga'"),
    BadAdapter("lora_ga_config", settings(lora_ga_config={}), "lora_ga_config is {}"),
    BadAdapter("mica", settings(init_lora_weights="mica"), "init_lora_weights is 'mica'"),
    BadAdapter("kasa", settings(kasa_config={}), "kasa_config is {}"),
    BadAdapter("velora", settings(velora_config={}), "velora_config is {}"),
    BadAdapter("monteclora", settings(monteclora_config={}), "monteclora_config is {}"),
    BadAdapter("arrow", settings(arrow_config={}), "arrow_config is {}"),
    BadAdapter("bdlora", settings(use_bdlora={}), "use_bdlora is {}"),
    BadAdapter("qalora", settings(use_qalora=True), "use_qalora is True"),
    BadAdapter(
        "alora_of_no_token", settings(alora_invocation_tokens=[]), "alora_invocation_tokens is"
    ),
    BadAdapter(
        "no_trainable_token", settings(trainable_token_indices={}), "trainable_token_indices is"
    ),
    BadAdapter("first_layer_only", settings(layers_to_transform=0), "layers_to_transform is 0"),
    BadAdapter(
        "target_parameters", settings(target_parameters=["mlp.up_proj.weight"]), "target_para"
    ),
    BadAdapter("weight_tying", settings(ensure_weight_tying=True), "ensure_weight_tying is True"),
    BadAdapter("megatron", settings(megatron_config={"a": 1}), "megatron_config is"),
    BadAdapter(
        "of_the_future", settings(a_setting_of_the_future="on"), "a_setting_of_the_future is"
    ),
    BadAdapter("bias_null", settings(bias=None), "bias is None"),
    BadAdapter("another_task", settings(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    BadAdapter("rslora_as_text", settings(use_rslora="false"), "use_rslora is 'false'"),
    BadAdapter("fan_in_fan_out_as_text", settings(fan_in_fan_out="no"), "fan_in_fan_out is 'no'"),
    BadAdapter("alpha_zero", settings(lora_alpha=0), "lora_alpha is 0"),
    BadAdapter("alpha_true", settings(lora_alpha=True), "lora_alpha is True"),
    BadAdapter("rank_4", settings(r=4), "r is 4"),
    BadAdapter("dropout_1", settings(lora_dropout=1.0), "lora_dropout is 1.0"),
    # Files.
    BadAdapter("same_setting_twice", files(twice_in_settings), "the key 'lora_alpha' twice"),
    BadAdapter("same_setting_twice_within", files(twice_within_settings), "the key 'a' twice"),
    BadAdapter("same_tensor_twice", files(twice_in_table), r"the key '.*lora_[AB]\.weight' twice"),
    BadAdapter("table_behind_a_space", files(padded_table), "not a safetensors file"),
    BadAdapter("table_without_end", files(endless_table), "not a safetensors file"),
    BadAdapter("table_of_65_megabytes", files(huge_table), "not a safetensors file"),
    BadAdapter(
        "shape_of_fractions",
        table(
            lambda held: held[FIRST_A(held)].update(shape=[8.0, held[FIRST_A(held)]["shape"][1]])
        ),
        r"entry of .*q_proj\.lora_A\.weight is malformed",
    ),
    BadAdapter(
        "shape_of_text",
        table(
            lambda held: held[FIRST_A(held)].update(shape=["8", held[FIRST_A(held)]["shape"][1]])
        ),
        r"entry of .*q_proj\.lora_A\.weight is malformed",
    ),
    BadAdapter(
        "dtype_of_a_list",
        table(lambda held: held[FIRST_A(held)].update(dtype=[])),
        r"entry of .*q_proj\.lora_A\.weight is malformed",
    ),
    BadAdapter(
        "shape_without_end",
        table(lambda held: held[FIRST_A(held)].update(shape=[1 << 60] * 1000)),
        r"entry of .*q_proj\.lora_A\.weight is malformed",
    ),
    BadAdapter(
        "overlap",
        table(
            lambda held: held[FIRST_A(held)].update(
                data_offsets=[
                    offset + 4 * (FIRST_A(held) != min(held))
                    for offset in held[FIRST_A(held)]["data_offsets"]
                ]
            )
        ),
        "is truncated or has gaps",
    ),
    BadAdapter(
        "cut_off", files(edit_bytes(WEIGHTS, lambda data: data[:-4])), "truncated or has gaps"
    ),
    BadAdapter(
        "something_behind", files(edit_bytes(WEIGHTS, lambda data: data + b"x")), "has gaps"
    ),
    BadAdapter("empty", files(edit_bytes(WEIGHTS, lambda data: b"")), "not a safetensors file"),
    BadAdapter(
        "settings_cut_off", files(edit_bytes(CONFIG, lambda data: data[:-3])), "not readable"
    ),
    BadAdapter(
        "settings_of_16_bits",
        files(edit_bytes(CONFIG, lambda data: data.decode().encode("utf-16"))),
        "not readable",
    ),
    BadAdapter(
        "settings_with_nan",
        files(
            edit_bytes(CONFIG, lambda data: data.replace(b'"lora_alpha": 16', b'"lora_alpha": NaN'))
        ),
        "not readable",
    ),
    BadAdapter("settings_too_deep", files(deep_settings), "not readable"),
    BadAdapter("settings_of_a_megabyte", files(huge_settings), "has more than"),
    BadAdapter("pickle_bin", files(only_a_pickle("adapter_model.bin")), f"has no {WEIGHTS}"),
    BadAdapter("pickle_pt", files(only_a_pickle("adapter_model.pt")), f"has no {WEIGHTS}"),
    BadAdapter("linked_weights", files(linked(WEIGHTS)), f"{WEIGHTS} is a symbolic link"),
    BadAdapter("linked_settings", files(linked(CONFIG)), f"{CONFIG} is a symbolic link"),
    BadAdapter("linked_folder", files(linked_folder), "is not a folder"),
)
