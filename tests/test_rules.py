"Every rule fires where it should, and only there"
from types import NoneType
from typing import Literal, get_args, get_origin
import pytest, yaml
from tuneforge.document import ConfigError
from tuneforge.config import load_config
from tuneforge.derive import buffer_size, interval, strategy
from tuneforge.options import AllOptions
from tuneforge.rules import NEEDS, NOTES, ONE_OF, RULES
from tuneforge.schedules import schedule

BASE = dict(base_model="x", datasets=[dict(path="y", type="alpaca")], learning_rate=1e-4)
HAND = dict(datasets=[dict(path="z")], test_datasets=[dict(path="z")], pretraining_dataset=[dict(path="z")], gpu_memory_limit="1GiB", max_memory={0: "1GiB"}, lr_groups=[dict(name="a", modules=["b"], lr=1)],
    bf16=True, gradient_checkpointing_kwargs=dict(use_reentrant=True), fsdp=["full_shard"], warmup_ratio=0.1, val_set_size=0.1, lora_target_modules=["q"], optim_target_modules=["q"], peft_layer_replication=[[0, 2]], special_tokens=dict(pad_token="p"), batch_size=4, lora_dropout=0.1,
    eval_strategy="epoch", relora_prune_ratio=0.5, adam_beta3=0.5, dpo_label_smoothing=0.1, cosine_min_lr_ratio=0.1, cosine_constant_lr_ratio=0.5, save_steps=2, eval_steps=2, attn_implementation="sdpa", bench_split="test", eval_causal_lm_metrics=["chrf"], lora_rank_pattern=dict(a=2), lora_alpha_pattern=dict(a=2), peft=dict(loftq_config={}), relora_prune_method="random", tokenizer_verify=5, batch_flattening=True, temperature=0.5, top_p=0.5, top_k=5, min_p=0.1)


def sample(key):
    "A value that asks for something"
    if key in HAND: return HAND[key]
    options = [a for a in (get_args(AllOptions.model_fields[key].annotation) or [AllOptions.model_fields[key].annotation]) if a is not NoneType]
    if any(get_origin(a) is Literal for a in options) or get_origin(AllOptions.model_fields[key].annotation) is Literal:
        values = [v for a in options for v in (get_args(a) if get_origin(a) is Literal else [a])]
        return next(v for v in values if v not in (AllOptions.model_fields[key].default, "no", bool))
    kinds = [get_origin(a) or a for a in options]
    return {bool: True, int: 3, float: 0.5, str: "x", dict: {"a": "b"}, list: ["x"]}.get(kinds[0], "x") if kinds[0] is not list or get_args(options[0])[0] is not int else [1]


def said(rules=RULES, **kw):
    "Messages of the rules alone"
    try: cfg = load_config({k: v for k, v in (BASE | kw).items() if v is not ...}, planned=True)
    except ConfigError as e: return [p.message for p in e.problems] if rules is RULES else []
    return [] if rules is RULES else cfg.notes


@pytest.mark.parametrize("keys", ONE_OF)
def test_one_of(keys):
    keys = keys.split()
    for a, b in zip(keys, keys[1:]+keys[:1]):
        assert any("give only one of" in m and f"`{a}`" in m and f"`{b}`" in m for m in said(**{a: sample(a), b: sample(b)})), (a, b)
        assert not any("give only one of" in m for m in said(**{a: sample(a), b: None} | ({"datasets": []} if a=="pretraining_dataset" else {})))


def ways(condition):
    "Values with which a condition holds"
    for c in condition.split("|"):
        key, _, values = c.replace("!=", "=!").partition("=")
        yield {key: "linear" if key=="lr_scheduler" else "auto"} if values.startswith("!") else {key: values.split(",")[0] if values else sample(key)}


@pytest.mark.parametrize("condition", NEEDS)
def test_needs(condition):
    no_effect = lambda k, ms: any(m.startswith(f"`{k}` has no effect without") for m in ms)
    without = dict(lr_scheduler="constant") if condition.startswith("lr_scheduler") else dict(tokenizer_engine="hf") if condition.startswith("tokenizer_engine") else {}
    for k in NEEDS[condition].split():
        assert no_effect(k, said(**without, **{k: sample(k)})), k
        for way in ways(condition):
            fulfilled = {k: sample(k)} | way
            for c in [c for c, ks in NEEDS.items() if c!=condition and k in ks.split()]: fulfilled |= next(ways(c))
            assert not no_effect(k, said(**fulfilled)), (k, way)


CHAT = dict(path="y", type="chat_template")
CASES = { # rule -> (keys with which it fires, what it says, keys with which it doesn't)
    "spikes": (dict(spike_threshold=None, spike_window=20), "`spike_window` has no effect with `spike_threshold: null`", dict(spike_threshold=3, spike_window=20)),
    "some_data": (dict(datasets=[]), "nothing to train on", {}),
    "streams_end": (dict(streaming=True), "needs `max_steps`", dict(streaming=True, max_steps=5)),
    "texts_are_joined_one_way": (dict(datasets=[], max_steps=5, pretraining_dataset=[dict(path="a")], pretraining_sample_concatenation=True, sample_packing=True), "give only one of", dict(datasets=[], max_steps=5, pretraining_dataset=[dict(path="a")], pretraining_sample_concatenation=True, pretrain_multipack_attn=False)),
    "jinja_has_text": (dict(chat_template="jinja"), "needs `chat_template_jinja`", dict(chat_template="jinja", chat_template_jinja="{{ x }}")),
    "keys_of_the_type": (dict(datasets=[dict(path="y", type="completion", roles_to_train=["user"])]), "`roles_to_train` has no effect with `type: completion`", dict(datasets=[CHAT | dict(roles_to_train=["user"])])),
    "mixtures_are_whole": (dict(datasets=[dict(path="y", weight=1), dict(path="z")]), "give every dataset a `weight`", dict(datasets=[dict(path="y", weight=1), dict(path="z", weight=2)], mix_by="rows")),
    "a_part_has_a_number": (dict(dataset_shard_num=3, dataset_shard_idx=3), "the last of 3 parts is 2", dict(dataset_shard_num=3, dataset_shard_idx=0)),
    "warnings_come_first": (dict(dropped_rows_warn=0.6), "never be said", dict(dropped_rows_stop=0.01)),
    "batch_is_a_multiple": (dict(batch_size=3, micro_batch_size=2), "no multiple", dict(batch_size=4, micro_batch_size=2)),
    "steps_go_with_strategy": (dict(save_strategy="epoch", save_steps=3), "contradicts", dict(save_strategy="steps", save_steps=3)),
    "steps_are_whole": (dict(save_steps=2.5), "neither a number of steps", dict(save_steps=0.25)),
    "best_is_saved": (dict(load_best_model_at_end=True, val_set_size=0.1, save_strategy="no"), "goes back to a checkpoint", dict(load_best_model_at_end=True, val_set_size=0.1, save_strategy="best")),
    "loaders_choose_nothing": (dict(accelerator_config=dict(split_batches=True)), "planned before the first step", dict(accelerator_config=dict(non_blocking=True))),
    "samples_need_evaluations": (dict(generate_samples=True, val_set_size=0.1, eval_strategy="no"), "at each evaluation", dict(generate_samples=True, val_set_size=0.1)),
    "stopping_needs_evaluations": (dict(early_stopping_patience=2, val_set_size=0.1, eval_strategy="no"), "allows none", dict(early_stopping_patience=2, val_set_size=0.1)),
    "packing_gets_along": (dict(sample_packing=True, rl="dpo"), "cannot be packed", dict(rl="dpo")),
    "comet_is_another_model": (dict(do_causal_lm_eval=True, val_set_size=0.1, eval_causal_lm_metrics=["chrf", "comet"]), "a model of its own", dict(do_causal_lm_eval=True, val_set_size=0.1, eval_causal_lm_metrics=["chrf"])),
    "answers_need_whole_rows": (dict(do_causal_lm_eval=True, val_set_size=0.1, sample_packing=True, eval_sample_packing=True), "from packed rows", dict(do_causal_lm_eval=True, val_set_size=0.1)),
    "order_is_one": (dict(sample_packing=True, packing="tight", curriculum_sampling=True), "contradict each other", dict(sample_packing=True, curriculum_sampling=True)),
    "flattening_fills_rows": (dict(batch_flattening=True, micro_batch_size=2, pad_to_sequence_len=True), "undoes `batch_flattening`", dict(batch_flattening=True, micro_batch_size=2)),
    "quantised_base_needs_adapter": (dict(load_in_4bit=True), "needs an adapter", dict(load_in_4bit=True, adapter="qlora", lora_target_linear=True)),
    "adapter_has_targets": (dict(adapter="lora"), "say what to adapt", dict(adapter="lora", lora_target_modules=["q"])),
    "targets_are_a_pattern": (dict(adapter="lora", lora_target_modules="q_proj("), "no regular expression", dict(adapter="lora", lora_target_modules=".*(q|k)_proj")),
    "adapter_gets_along": (dict(adapter="lora", lora_target_linear=True, lisa_n_layers=2), "trains weights of the base", dict(lisa_n_layers=2)),
    "restarts_get_along": (dict(adapter="lora", lora_target_linear=True, relora_steps=12, deepspeed="z.json"), "spread over devices", dict(adapter="lora", lora_target_linear=True, relora_steps=12)),
    "adapter_begins": (dict(adapter="lora", lora_target_linear=True, peft_init_lora_weights="pisa"), "unknown `peft_init_lora_weights: pisa`", dict(adapter="lora", lora_target_linear=True, peft_init_lora_weights="pissa_niter_4")),
    "positions_are_skipped": (dict(use_pose=True), "needs `pose_max_context_len`", dict(use_pose=True, sequence_len=100, pose_max_context_len=200)),
    "rows_are_views": (dict(unfrozen_parameters=["a[3:]"], fp16=True), "names rows", dict(unfrozen_parameters=["a"], fp16=True, optimizer="galore_adamw", optim_target_modules=["b"])),
    "frozen_inputs_need_a_gradient": (dict(unfrozen_parameters=["a"], gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)), "must not be reentrant", dict(unfrozen_parameters=["a"], gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False))),
    "weights_are_safetensors": (dict(save_safetensors=False), "only written as safetensors", dict(save_safetensors=True)),
    "tokenizers_are_fast": (dict(tokenizer_use_fast=False), "only fast tokenizers", dict(tokenizer_use_fast=True)),
    "offloaded_states_are_whole": (dict(fsdp=["full_shard"], fsdp_config=dict(offload_params=True), optimizer="adamw_bnb_8bit"), "whole states", dict(fsdp=["full_shard"], fsdp_config=dict(offload_params=True))),
    "cut_loss_is_half_precision": (dict(cut_cross_entropy=True, float32=True), "remove `float32`", dict(cut_cross_entropy=True)),
    "arguments_of_checkpointing": (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrent=True)), "`use_reentrent` has no effect on checkpointing", dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False, debug=True))),
    "plugins_are_built_in": (dict(plugins=["axolotl.integrations.grokfast.GrokfastPlugin"]), "no plugin's code is run", dict(plugins=["axolotl.integrations.liger.LigerPlugin"])),
    "rows_are_whole": (dict(val_set_size=1.5), "neither a fraction", dict(val_set_size=2)),
    "keys_for_conversations": (dict(eot_tokens=["x"]), "no effect without conversations", dict(eot_tokens=["x"], datasets=[CHAT])),
    "one_resume": (dict(resume="auto", resume_from_checkpoint="x"), "give only one of `resume`, `resume_from_checkpoint`", dict(resume="auto", auto_resume_from_checkpoints=False)),
    "arguments_of_the_optimizer": (dict(optim_args="fused"), "`fused` is no `key=value`", dict(optim_args="betas=(0.9, 0.95),fused=true")),
    "whole_optimizers": (dict(optimizer="apollo_adamw"), "needs `optim_target_modules`", dict(optimizer="apollo_adamw", optim_target_modules="all_linear")),
    "patterns_of_names": (dict(lr_groups=[dict(name="a", modules=["b", "c("], lr=1)]), "`c(` is no regular expression", dict(lr_groups=[dict(name="a", modules=["b", "c.*"], lr=1)])),
    "arguments_of_the_schedule": (dict(lr_scheduler_kwargs=dict(power=2)), "`power` has no effect with `lr_scheduler: cosine`, which reads `num_cycles`", dict(lr_scheduler_kwargs=dict(power=2), lr_scheduler="polynomial")),
    "schedules_of_their_own": (dict(lr_scheduler="greedy"), "follows the evaluations", dict(lr_scheduler="greedy", val_set_size=0.1)),
    "teeth_have_room": (dict(jagged_restart_steps=11), "take 11 steps, and there are 11", dict(jagged_restart_steps=12)),
    "needs_moments": (dict(optimizer="adafactor", adam_beta1=0.8), "no effect with `optimizer: adafactor`", dict(adam_beta1=0.8)),
}
_LR = lambda **kw: dict(lr_scheduler_kwargs=kw)
ALSO = [ # further branches of the same rules
    (dict(spike_capsules=0, spike_weights="1MB"), "`spike_weights` has no effect with `spike_capsules: 0`"),
    (dict(optim_args=dict(weight_decay=1)), "has a key of its own: `weight_decay`"), (dict(optim_args="lr=1"), "`learning_rate`"), (dict(optimizer="lomo", gradient_accumulation_steps=2), "`gradient_accumulation_steps: 1`"),
    (dict(optimizer="adalomo", batch_size=4, micro_batch_size=2), "`gradient_accumulation_steps: 1`"), (dict(optimizer="lomo", auto_find_batch_size=True), "would add micro-batches"), (dict(optimizer="lomo", max_grad_norm=1), "never has all gradients"), (dict(optimizer="lomo", weight_decay=0.1), "treats all parameters alike"),
    (dict(optimizer="galore_adamw", optim_target_modules=["*"]), "no regular expression"), (dict(lr_scheduler="constant") | _LR(power=2), "takes no arguments"), (dict(lr_scheduler="polynomial") | _LR(lr_end=1e-3), "is not under `learning_rate` 0.0001"),
    (dict(lr_scheduler="cosine_with_min_lr"), "needs one of `min_lr` and `min_lr_rate`"), (dict(lr_scheduler="cosine_with_min_lr") | _LR(min_lr=1e-6, min_lr_rate=0.1), "needs one of"), (dict(lr_scheduler="one_cycle", lr_div_factor=5) | _LR(div_factor=5), "give one"),
    (dict(lr_scheduler="one_cycle", warmup_steps=5) | _LR(pct_start=0.3), "give one"), (dict(lr_scheduler="one_cycle") | _LR(pct_start=0.7, three_phase=True), "0.5 or less"), (dict(lr_scheduler="greedy", val_set_size=0.1, eval_strategy="no"), "follows the evaluations"),
    (dict(optimizer="schedule_free_adamw", lr_scheduler="linear"), "write `lr_scheduler: constant`"), (dict(optimizer="schedule_free_adamw", cosine_min_lr_ratio=0.1), "does without a schedule"), (dict(optimizer="schedule_free_radam", warmup_steps=3), "does without a schedule"),
    (dict(jagged_restart_steps=99, lr_scheduler="one_cycle"), "cannot be restarted"), (dict(optimizer="lion_8bit", adam_epsilon=1e-6), "no effect with `optimizer: lion_8bit`"),
    (dict(streaming=True, max_steps=5, val_set_size=0.1), "cannot be taken from a stream"), (dict(streaming=True, max_steps=5, dataset_exact_deduplication=True), "searched for duplicates"),
    (dict(streaming=True, max_steps=5, dataset_shard_num=2, dataset_shard_idx=0), "not cut into parts"), (dict(streaming=True, max_steps=5, on_bad_row="quarantine"), "write `on_bad_row: skip`"),
    (dict(streaming=True, max_steps=5, datasets=[dict(path="a", weight=1)], mix_until="all_exhausted"), "`max_steps` is its end"), (dict(streaming=True, max_steps=5, datasets=[dict(path="a", max_rows=5)]), "split: train[:1000]"),
    (dict(datasets=[], max_steps=5, pretraining_dataset=[dict(path="a", weight=1), dict(path="b")]), "give every dataset a `weight`"),
    (dict(datasets=[], max_steps=5, pretraining_dataset=[dict(path="a")], pretraining_sample_concatenation=True, batch_flattening=True), "are full already"),
    (dict(datasets=[], max_steps=5, pretraining_dataset=[dict(path="a")], pretrain_multipack_attn=False), "has no effect without `sample_packing`"), (dict(datasets=[CHAT | dict(chat_template="jinja")]), "needs `chat_template_jinja`"),
    (dict(chat_template="chatml", chat_template_jinja="x"), "contradicts"), (dict(datasets=[dict(path="y", type="alpaca", field="x")]), "`type: completion`"), (dict(save_strategy="steps"), "needs `save_steps`"), (dict(save_strategy="no", saves_per_epoch=2), "contradicts"),
    (dict(mix_until="all_exhausted"), "`mix_until` has no effect"), (dict(dataset_shard_num=2), "say which of the 2 parts"), (dict(test_datasets=[dict(path="z", weight=1)]), "no effect in `test_datasets`"),
    (dict(save_strategy="best"), "no checkpoint will ever be written"), (dict(save_strategy="best", val_set_size=0.1, eval_strategy="no"), "allows none"),
    (dict(metric_for_best_model="bleu", load_best_model_at_end=True, val_set_size=0.1), "is not measured in training"), (dict(greater_is_better=True, metric_for_best_model="loss", load_best_model_at_end=True, val_set_size=0.1), "less is better"),
    (dict(sample_packing=True, packing="fill", curriculum_sampling=True), "contradict each other"), (dict(sample_packing=True, curriculum_sampling=True, sample_packing_group_size=9), "no effect with `curriculum_sampling`"),
    (dict(dataloader_prefetch_factor=3), "no effect without `dataloader_num_workers`"), (dict(dataloader_num_workers=2, max_steps=5, pretraining_dataset=[dict(path="x")]), "a stream is read by"),
    (dict(flash_attention=True, xformers_attention=True), "give only one of `flash_attention`, `xformers_attention`"), (dict(attn_implementation="xformers", xformers_attention=True), "give only one of"), (dict(group_by_length=True, curriculum_sampling=True), "contradict"),
    (dict(sample_packing=True, sample_packing_sequentially=True, sample_packing_group_size=9), "no gap is closed"), (dict(sample_packing=True, packing="tight", sample_packing_group_size=9), "all samples"), (dict(eval_table_size=2, generate_samples=True, val_set_size=0.1), "ask for the same"),
    (dict(adapter="qlora", lora_target_linear=True), "needs `load_in_4bit: true`"), (dict(adapter="lora", lora_target_linear=True, unfrozen_parameters=["a"]), "remove it, the adapter freezes the base"), (dict(bfloat16=True, bf16=True, fp16=True), "give only one of `fp16`, `bfloat16`"),
    (dict(adapter="lora", lora_target_parameters=["e"], lora_dropout=0.1), "allows no `lora_dropout`"),
    (dict(gptq=True), "needs an adapter"), (dict(adapter="qlora", load_in_4bit=True, lora_target_parameters=["e"]), "add `quantize_moe_experts: false`"), (dict(adapter="lora", lora_target_linear=True, relora_steps=12, lr_scheduler="one_cycle"), "cannot be restarted"),
    *[(dict(adapter="lora", lora_target_linear=True, relora_steps=12) | kw, m) for kw, m in ((dict(peft_use_dora=True), "magnitudes belong to the old one"), (dict(peft_layer_replication=[[0, 2]]), "shares between copies"),
        (dict(lora_target_parameters=["e"]), "merges linear layers"), (dict(peft_init_lora_weights="pissa"), "begins each adapter with no effect"), (dict(optimizer="adamw_bnb_8bit", relora_prune_method="magnitude"), "write `relora_prune_method: reset`"), (dict(optimizer="adamw_bnb_8bit", relora_prune_ratio=0.5), "`relora_prune_method: reset`, without `relora_prune_ratio`"), (dict(optimizer="schedule_free_adamw", lr_scheduler="constant"), "remembers the old adapter"), (dict(relora_anneal_steps=2), "take 12 steps"),
        (dict(relora_prune_method="reset", relora_prune_ratio=0.5), "no effect with `relora_prune_method: reset`"), (dict(relora_steps=None, relora=True), "needs `relora_steps`"))],
    *[(dict(adapter="lora", lora_target_linear=True) | kw, m) for kw, m in ((dict(peft_init_lora_weights="eva"), "looks at data"), (dict(peft_init_lora_weights="loftq"), "needs its settings"),
        (dict(peft_init_lora_weights="pissa", peft=dict(loftq_config={})), "both say how"), (dict(load_in_4bit=True, peft=dict(loftq_config={})), "quantises the base itself"),
        (dict(load_in_8bit=True, peft_init_lora_weights="olora"), "must not be quantised"), (dict(peft_use_dora=True, peft_init_lora_weights="pissa"), "length of the base's columns"),
        (dict(peft_init_lora_weights="orthogonal", lora_r=3), "even rank"))],
    (dict(use_pose=True, pose_max_context_len=5), "leaves nothing to skip"), (dict(use_pose=True, pose_max_context_len=9999, sample_packing=True), "gives a row its own positions"), (dict(unfrozen_parameters=["a[3:]"], optimizer="adalomo"), "names rows"),
    (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True, debug=True)), "no effect with `use_reentrant: true`")]


def test_every_rule_has_a_case(): assert set(RULES)-{"one_of", "needs"}==set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    fires, says, sound = CASES[name]
    assert any(says in m for m in said(**fires)), said(**fires)
    assert not said(**sound)


@pytest.mark.parametrize("fires, says", ALSO)
def test_branch(fires, says): assert any(says in m for m in said(**fires)), said(**fires)


NOTED = {"remote_code_is_not_pinned": (dict(trust_remote_code=True, revision_of_model="main"), "runs no code that is not pinned", dict(trust_remote_code=True, revision_of_model="0"*40)), "adapter_left_blank": (dict(adapter=None, lora_r=64, lora_target_linear=True), "`lora_r`, `lora_target_linear` say nothing", dict(adapter=None)),
    "bfloat16_twice": (dict(bfloat16=True, bf16=True), "`bf16` says nothing beside `bfloat16: true`", dict(bfloat16=True)),
    "experts_in_8_bits": (dict(load_in_8bit=True, adapter="lora", lora_target_linear=True, quantize_moe_experts=True), "experts that are kept in one tensor stay whole", dict(load_in_4bit=True, adapter="qlora", lora_target_linear=True, quantize_moe_experts=True)),
    "packed_rows_are_alike": (dict(sample_packing=True, group_by_length=True), "fills rows whatever their order", dict(group_by_length=True)),
    "zeros": (dict(val_set_size=0.1, evals_per_epoch=0), "`evals_per_epoch: 0` switches evaluations off", dict(evals_per_epoch=0)),
    "evaluations_need_data": (dict(evals_per_epoch=4), "no effect without", dict(evals_per_epoch=4, val_set_size=0.1)), "pushed_when_saved": (dict(hub_model_id="a/b", save_strategy="no"), "once, at the end", dict(hub_model_id="a/b")),
    "streams_have_no_epochs": (dict(streaming=True, max_steps=5, saves_per_epoch=2), "counts over the whole run", dict(saves_per_epoch=2)),
    "shuffled_anyway": (dict(shuffle_before_merging_datasets=True), "has no effect while", dict(shuffle_before_merging_datasets=True, shuffle_merged_datasets=False)),
    "plugins_say_nothing": (dict(plugins=["axolotl.integrations.liger.LigerPlugin"]), "work by themselves", {}), "kernels_of_today": (dict(unsloth_rope=True), "`liger_rope` does it today", dict(liger_rope=True)),
    "flattening_one_row": (dict(batch_flattening=True), "has no effect with `micro_batch_size: 1`", dict(batch_flattening=True, micro_batch_size=2)),
    "a_mixture_of_one": (dict(datasets=[dict(path="y", weight=1)]), "no effect on the only dataset", dict(datasets=[dict(path="y", weight=1), dict(path="z", weight=2)])),
    "evaluated_is_trained": (dict(datasets=[dict(path="y"), dict(path="z", split="train")], test_datasets=[dict(path="z", type="alpaca")]), "has the rows of `datasets[1]`", dict(datasets=[dict(path="z")], test_datasets=[dict(path="z", split="test")])),
    "targets_beside_all": (dict(adapter="lora", lora_target_linear=True, lora_target_modules=["q_proj"]), "narrows nothing", dict(adapter="lora", lora_target_modules=["q_proj"])),
    "run_without_a_name": (dict(wandb_project="p", wandb_run_id="r"), "named after", dict(wandb_project="p", wandb_run_id="r", wandb_name="n"))}


@pytest.mark.parametrize("name", NOTES)
def test_note(name):
    fires, says, sound = NOTED[name]
    assert any(says in m for m in said(NOTES, **fires)) and not said(NOTES, **sound)


STREAM = dict(datasets=[], max_steps=5, pretraining_dataset=[dict(path="a")])


@pytest.mark.parametrize("data", [STREAM, dict(streaming=True, max_steps=5)], ids=["pretraining_dataset", "streaming"])
def test_either_name_of_the_buffer_serves_either_stream(data):
    for k in ("pretrain_multipack_buffer_size", "streaming_multipack_buffer_size"):
        assert buffer_size(load_config(BASE | data | {k: 77}))==77 and buffer_size(load_config(BASE | data | {k: None}))==10_000


def test_an_adapter_left_blank_is_none():
    with pytest.raises(ConfigError, match="`lora_r` has no effect without `adapter`"): load_config(BASE | dict(lora_r=64))
    for k in ("lora_model_dir", "relora_steps"): # these ask for more than settings of an adapter
        with pytest.raises(ConfigError, match=f"`{k}` has no effect without `adapter`"): load_config(BASE | {"adapter": None, k: 100 if k=="relora_steps" else "x"})
    cfg = load_config(BASE | dict(adapter=None, lora_target_modules="q_proj, v_proj", lora_target_linear=True, peft_use_dora=True, peft_init_lora_weights="pissa"))
    assert len(cfg.notes)==1 and "all weights are trained" in cfg.notes[0]
    assert load_config(BASE | dict(adapter="", lora_r=None, lora_alpha=None)).notes==[]
    assert ["blank" in n for n in load_config(BASE | dict(adapter="lora", lora_target_linear=True, lora_r=None)).notes]==[True]


def test_relora_forgets_what_can_be_forgotten():
    relora = BASE | dict(adapter="lora", lora_target_linear=True, relora_steps=100)
    for blank in ({}, dict(relora_prune_method=None)):
        cfg = load_config(relora | dict(optimizer="adamw_bnb_8bit") | blank)
        assert cfg.relora_prune_method=="reset" and cfg.where("relora_prune_method")=="derived: from `optimizer: adamw_bnb_8bit`"
        assert len(cfg.notes)==1 and "cannot be forgotten" in cfg.notes[0]
        assert cfg.replace(optimizer="adamw_torch").relora_prune_method=="magnitude"
    assert load_config(relora).relora_prune_method==load_config(BASE | dict(optimizer="adamw_bnb_8bit")).relora_prune_method=="magnitude"


def test_zero_is_off():
    data = BASE | dict(val_set_size=0.1)
    for k in ("eval_steps", "evals_per_epoch"):
        cfg = load_config(data | {k: 0})
        assert strategy(cfg, "eval")=="no" and interval(cfg, "eval", 100, 300) is None
        assert strategy(load_config(data | {k: 0, "eval_strategy": "epoch"}), "eval")=="epoch"
        with pytest.raises(ConfigError, match=f"`early_stopping_patience` needs evaluations: `{k}: 0` allows none"): load_config(data | {k: 0, "early_stopping_patience": 2})
    assert interval(load_config(data | dict(evals_per_epoch=0, eval_steps=7)), "eval", 100, 300)==7
    for k in ("save_steps", "saves_per_epoch"):
        cfg = load_config(BASE | {k: 0})
        assert strategy(cfg, "save")=="epoch" and interval(cfg, "save", 100, 300)==100 and "after each epoch" in cfg.notes[0]
    rates = [[schedule(load_config(BASE | dict(cosine_min_lr_ratio=0.1) | kw), 100)(s) for s in range(100)] for kw in ({}, dict(cosine_constant_lr_ratio=0), dict(cosine_constant_lr_ratio=0.5))]
    assert rates[0]==rates[1]!=rates[2]


def test_a_rule_points_at_the_key(tmp_path):
    (tmp_path/"c.yml").write_text(yaml.safe_dump(BASE)+"sample_packing: false\nlora_r: 8\n")
    with pytest.raises(ConfigError) as e: load_config(tmp_path/"c.yml")
    assert e.value.problems[0].mark.text=="lora_r: 8"
