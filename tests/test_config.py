"Mistakes in configs are found, placed and explained; sound configs are read as written"
import copy, json, pickle, re
import pytest, yaml
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter
from tuneforge.config import *
from tuneforge.document import ConfigError, Document, UserError
from tuneforge.options import *
from tuneforge.options import HARMLESS, MEANT, MOVED, NOT_YET, REFUSED, RENAMED
from tuneforge.rules import OFF
from tests.tools import ROOT, permissions_hold

GOOD = """base_model: tiny:llama
datasets:
  - path: train.jsonl
    type: alpaca
learning_rate: 1e-4
"""
KEYS, ENTRY = field_names(AllOptions), field_names(DatasetOptions)
OLD = [k.split(".")[-1] for k in RENAMED]


def problems(text, tmp_path, *overrides):
    (tmp_path/"c.yml").write_text(text)
    with pytest.raises(ConfigError) as e: load_config(tmp_path/"c.yml", list(overrides))
    return e.value.problems


def load(text, tmp_path, *overrides, **kw):
    (tmp_path/"c.yml").write_text(text)
    return load_config(tmp_path/"c.yml", list(overrides), **kw)


@pytest.mark.parametrize("line, line_no, column, says", [
    ("lora_rr: 8", 6, 1, "did you mean `lora_r`"),
    ("  - pth: x", 5, 5, "did you mean `path`"),
    ("sequence_len: long", 6, 15, "'long', but should be a whole number over 1"),
    ("sequence_len: 0", 6, 15, "should be a whole number over 1"),
    ("sequence_len: 1.5", 6, 15, "should be a whole number"),
    ("sample_packing: maybe", 6, 17, "should be true or false"),
    ("learning_rate: 2", 6, 1, "given twice, first in line 5"),
    ("deepspeed: zero3.json", 6, 1, "known, but not supported yet"),
    ("gradient_checkpointing: offload_disk", 6, 1, "`gradient_checkpointing: offload_disk` is Axolotl's, and tuneforge does not serve it"),
    ("attn_implementation: flash_atention_3", 6, 22, "did you mean `flash_attention_3`"),
    ("attn_implementation: kernels-community/flash-attn3", 6, 22, "should be one of `flash_attention_2`, `flash_attention_3`, `flash_attention_4`, `xformers`, `flex_attention`, `sdpa`, `eager`"),
    ("s2_attention: true", 6, 1, "tuneforge does not serve it: shifted sparse attention"),
    ("flex_attn_compile_kwargs: {dynamic: false}", 6, 1, "tuneforge does not serve it: transformers compiles"),
    ("lr_scheduler_kwargs: {num_cycels: 2}", 6, 23, "did you mean `num_cycles`"),
    ("lr_scheduler_kwargs: {num_cycles: -2}", 6, 35, "over 0"),
    ("optimizer: adamw_torh", 6, 12, "did you mean `adamw_torch`"),
    ("do_causal_lm_eval: true\neval_causal_lm_metrics: chrf", 7, 25, "should be a list of"),
    ("save_strategy: evry", 6, 16, "one of `no`, `steps`, `epoch`, `best`"),
    ("special_tokens: {pad_tokn: x}", 6, 18, "did you mean `pad_token`"),
    ("special_tokens: <pad>", 6, 17, "should be a block of keys"),
    ("model_type: X\ntype_of_model: X", 6, 1, "another name of `type_of_model`"),
    ("rope_scaling: {type: linear}", 6, 1, "`rope_scaling` is no more"),
    ("trl: {beta: 1}", 6, 1, "tuneforge does not serve it"),
    ("base_model:", 6, 1, "given twice"),
    ("field_messages: x", 6, 1, "valid under `datasets[]`"),
    ("pad_token: x", 6, 1, "valid under `special_tokens`"),
    ("lora_target_modules: [q_proj, [3]]", 6, 31, "`lora_target_modules[1]` is [3], but should be text"),
    ("lora_target_modules: {q: 1}", 6, 22, "should be text or a list of texts"),
    ("gpu_memory_limit: 20 gigs", 6, 19, "should be"),
    ("test_datasets: x.jsonl", 6, 16, "should be a list of blocks"),
    ("test_datasets:\n  - x.jsonl", 7, 5, "should be a block of `key: value` lines"),
    ("test_datasets: {path: x.jsonl}", 6, 16, "a list entry begins with `- `"),
    ("kind: x", 6, 1, "unknown key `kind`"),
    ("lora_alpha: true", 6, 13, "`lora_alpha` is true, but should be a whole number over 0"),
    ("1: 2", 6, 1, "unknown key `1`"),
    ("num_epochs: .inf", 6, 13, "should be a number over 0"),
    ("seed: -1", 6, 7, "should be a whole number 0 or more"),
    ("val_set_size: 1.5", 6, 1, "neither a fraction nor a number of rows"),
    ("adapter: lora\nlora_target_modules: q_proj, v_proj", 7, 1, "write [q_proj, v_proj]"),
    ("max_seq_length: 5", 6, 1, "did you mean `sequence_len`"),
    ("scaling_softmax: true", 6, 1, "tuneforge does not serve it: it changes what attention computes"),
    ("tensor_parallel_size: 2", 6, 1, "known, but not supported yet"),
    ("swanlab_project: x", 6, 1, "tuneforge does not serve it: use TensorBoard"),
    ("kd_temperature: 2", 6, 1, "let the teacher write the answers"),
    ("attention: flash", 6, 1, "today it is `attn_implementation`"),
    ("tokens: {pad_token: x}", 6, 9, "special tokens with their names belong under `special_tokens`"),
    ("  - {path: x, kind: kto}", 5, 15, "unknown key `kind`"),
])
def test_problem_has_its_place(line, line_no, column, says, tmp_path):
    text = GOOD.replace("learning_rate", line+"\nlearning_rate") if line.startswith("  -") else GOOD+line+"\n"
    found = [p for p in problems(text, tmp_path) if says in p.message]
    assert found, [str(p) for p in problems(text, tmp_path)]
    assert (found[0].mark.line, found[0].mark.column)==(line_no, column)
    assert found[0].mark.text==text.splitlines()[line_no-1] and str(found[0]).endswith("^")


def test_a_typo_in_a_block_is_the_only_problem():
    with pytest.raises(ConfigError) as e: Config(base_model="x", learning_rate=1, datasets=[dict(path="y", type=dict(feild_instruction="q"))])
    assert [p.message for p in e.value.problems]==["unknown key `feild_instruction` under `datasets[0].type`, did you mean `field_instruction`?"]


@pytest.mark.parametrize("line", ["adapter: lora\nlora_target_linear: true\nlora_r: 4", "val_set_size: 0.1\neval_steps: 5", "deepspeed:", "wandb_project: ''", "wandb_mode: ''", "adapter: qlora\nload_in_4bit: yes\nlora_target_modules: [q_proj]",
    "lora_fan_in_fan_out:", "bf16: true", "flash_attention: on", "save_strategy: no", "save_strategy: \"no\"", "group_by_length: false", "evals_per_epoch: 4", "hf_use_auth_token: false", "loraplus_lr_embedding:", "save_steps: 0.25", "num_epochs: 2", "save_strategy: off", "eval_strategy: false", "x-defaults: &d {lora_r: 4}", "x-more:"])
def test_sound_configs_pass(line, tmp_path): assert load(GOOD+line+"\n", tmp_path).base_model=="tiny:llama"


def test_all_problems_at_once(tmp_path):
    found = problems("base_modl: x\ndatasets: []\nlearning_rate: -1\nfoo: 1\nmicro_batch_size: x\n", tmp_path, "--lora-rr", "1")
    assert [p.mark.line for p in found if p.mark.column]==[1, 3, 4, 5] and "argument 1" in str(found[-1]) # the missing base_model is the misspelt one


def test_types_first_then_rules(tmp_path):
    assert "nothing to train on" in str(problems(GOOD.replace("  - path: train.jsonl\n    type: alpaca\n", "").replace("datasets:", "datasets: []"), tmp_path)[0])
    assert "`learning_rate` is missing: peak learning rate" in str(problems(GOOD.replace("learning_rate: 1e-4\n", ""), tmp_path)[0])


# ---- each mutation of each key

def mutants(key):
    "The key with one letter dropped, or two neighbours swapped"
    dropped = {key[:i]+key[i+1:] for i in range(len(key))}
    swapped = {key[:i]+key[i+1]+key[i]+key[i+2:] for i in range(len(key)-1)}
    return sorted(m for m in dropped | swapped if m and not m[0].isdigit())


@pytest.mark.parametrize("keys, path, every", [(KEYS, (), 4), (ENTRY, ("datasets", 0), 1), pytest.param(KEYS, (), 1, marks=pytest.mark.slow)], ids=["top, a fourth", "datasets", "top"])
def test_every_slip_is_refused_with_the_right_suggestion(keys, path, every, tmp_path):
    for key in keys:
        typos = [m for m in mutants(key) if m not in keys and m not in OLD and m not in KEYS and m not in ENTRY][::every]
        lines = [("    " if path else "")+f"{m}: 1" for m in typos]
        text = GOOD.replace("learning_rate", "\n".join([*lines, "learning_rate"])) if path else GOOD+"\n".join(lines)+"\n"
        first = 5 if path else 6
        found = {p.mark.line: p.message for p in problems(text, tmp_path) if p.mark} if typos else {}
        for i, m in enumerate(typos):
            said = found[first+i]
            assert f"unknown key `{m}`" in said and (f"`{key}`" in said or any(f"did you mean `{o}`" in said for o in OLD)), (key, said)


@pytest.mark.parametrize("path", [(), ("datasets", 0)], ids=["top", "datasets"])
def test_every_wrong_type_is_refused(path, tmp_path):
    group = DatasetOptions if path else AllOptions
    for key in field_names(group):
        if key in ("extends", "base_model") or (path and key=="path"): continue
        f = group.model_fields[key]
        check = TypeAdapter(f.annotation)
        def fits(v):
            try: check.validate_python(v)
            except Exception: return False
            return True
        wrong = next(v for v in ("no way", [[1]], dict(a=1), 1.5) if not fits(v))
        text = f"{key}: {json.dumps(wrong)}\n"
        if key=="datasets": whole = "base_model: x\nlearning_rate: 1\n"+text
        elif path: whole = GOOD.replace("    type: alpaca\n", "    "+text) if key=="type" else GOOD.replace("learning_rate", "    "+text+"learning_rate")
        else: whole = "\n".join(l for l in GOOD.splitlines() if not l.startswith(f"{key}:"))+"\n"+text
        line = whole.splitlines().index(("    " if path else "")+text.rstrip())+1
        found = [p for p in problems(whole, tmp_path) if p.mark and p.mark.line==line and "should be" in p.message]
        assert found, (key, wrong)


def test_every_wrong_nesting_is_refused(tmp_path):
    for key in [k for k in KEYS if k not in ENTRY]:
        text = GOOD.replace("learning_rate", f"    {key}: 1\nlearning_rate") if key!="learning_rate" else GOOD.replace("type: alpaca\n", "type: alpaca\n    learning_rate: 1\n")
        assert any(p.mark and p.mark.line==5 and "valid at the top level" in p.message for p in problems(text, tmp_path)), key
    for key in [k for k in ENTRY if k not in KEYS]:
        assert any(p.mark and p.mark.line==6 and "valid under `datasets[]`" in p.message for p in problems(GOOD+f"{key}: 1\n", tmp_path)), key


def test_every_axolotl_key_is_known(tmp_path):
    "Each alone, with a value of its type: whatever rules say of it, it is neither unknown nor of a wrong type"
    lines = [l for l in (ROOT/"tests"/"axolotl_keys.yml").read_text().splitlines() if l and l[0]!="#"]
    assert len(lines)>250
    base = yaml.safe_load(GOOD)
    for l in lines:
        key = l.split(":")[0]
        try: load_config(base | Document(l).value, planned=True)
        except ConfigError as e: assert not any(w in str(e) for w in ("unknown", "should be", "is blank", "missing")), (key, str(e))


def test_what_is_not_built_is_refused_and_what_is_off_is_not(tmp_path):
    for key in [k for k in (*NOT_YET, *REFUSED) if "=" not in k and "." not in k]:
        assert load_config(yaml.safe_load(GOOD) | {key: None}), key
        f = AllOptions.model_fields[key]
        if f.default in OFF and not isinstance(f.default, list): load_config(yaml.safe_load(GOOD) | {key: f.default})
    text = GOOD+"fsdp: [full_shard]\ntensor_parallel_size: 2\nrl: dpo\n"
    assert all("not supported yet" in p.message for p in problems(text, tmp_path)) and len(problems(text, tmp_path))==3
    assert load(text, tmp_path, planned=True).rl=="dpo"
    for key in [k for k in REFUSED if "." not in k]:
        name, _, value = key.partition("=")
        with pytest.raises(ConfigError, match=f"`{name}{f': {value}' if value else ''}` is Axolotl's, and tuneforge does not serve it: "): load_config(yaml.safe_load(GOOD) | {name: value or (dict(layers=2) if name=="peft_adapter" else "AutoProcessor" if name=="processor_type" else True)})
    with pytest.raises(ConfigError, match=r"`pretraining_dataset\[0\].trust_remote_code` is Axolotl's, and tuneforge does not serve it: `datasets` itself runs no such code"):
        load_config(dict(base_model="x", learning_rate=1, max_steps=3, pretraining_dataset=[dict(path="x", trust_remote_code=True)]))


def test_words_of_other_tools_are_answered_with_ours():
    for word, here in MEANT.items():
        key, value = word.split("=")
        with pytest.raises(ConfigError, match=re.escape(f"`{key}` is {value!r}: here, that is {here}")): load_config(yaml.safe_load(GOOD) | {key: value})
        cfg = yaml.safe_load(GOOD) | (dict(lora_target_linear=True) if "lora" in here else {})
        for o in map(yaml.safe_load, re.findall("`(.*?)`", here)): cfg |= o if isinstance(o, dict) else {} if o==key else {o: 100} if o in KEYS else {key: o}
        assert load_config(cfg), here # what is said instead works


def test_refused_values_are_not_offered():
    with pytest.raises(ConfigError) as e: load_config(yaml.safe_load(GOOD) | dict(adapter="foo"))
    assert str(e.value).endswith("should be one of `lora`, `qlora`")


def test_what_is_not_done_here_may_be_switched_off():
    from tuneforge.options import ELSEWHERE
    for key in ELSEWHERE:
        for off in (None, False, ""): assert load_config(yaml.safe_load(GOOD) | {key: off}), key
        with pytest.raises(ConfigError, match=f"`{key}` is Axolotl's, and tuneforge does not serve it"): load_config(yaml.safe_load(GOOD) | {key: True})
    assert not set(ELSEWHERE) & set(KEYS)


def test_tables_name_keys_that_exist():
    assert any("says nothing here" in n for n in load_config(dict(base_model="x", learning_rate=1, datasets=[dict(path="y", type=dict(field="z"))])).notes)
    names = {k.split("=")[0].split(".")[-1] for k in (*NOT_YET, *REFUSED, *HARMLESS)} | {v for k, v in RENAMED.items()}
    assert names <= set(KEYS) | set(ENTRY) | set(SpecialTokens.model_fields) | set(CustomFormat.model_fields)
    assert not (set(RENAMED) | set(MOVED)) & set(KEYS)


# ---- meaning

def test_texts_stay_as_written(tmp_path):
    cfg = load(GOOD+"output_dir: 010\nrevision_of_model: 1e5\ntokenizer_type: no\nwandb_name: 2024-01-01\nwandb_project: p\n", tmp_path, planned=True)
    assert (cfg.output_dir, cfg.revision_of_model, cfg.tokenizer_type, cfg.wandb_name)==("010", "1e5", "no", "2024-01-01")


def test_null_is_not_absent(tmp_path):
    cfg = load(GOOD.replace("type: alpaca", "type: chat_template\n    roles_to_train:"), tmp_path)
    assert cfg.datasets[0].roles_to_train is None and cfg.datasets[0].explicit()["roles_to_train"] is None
    assert load(GOOD, tmp_path).datasets[0].roles_to_train==["assistant"]
    cfg = load(GOOD+"seed:\nlora_fan_in_fan_out:\n", tmp_path)
    assert cfg.seed==42 and len(cfg.notes)==1 and "`seed` is blank" in cfg.notes[0]
    assert "is blank, but should be text" in str(problems(GOOD.replace("tiny:llama", ""), tmp_path)[0])


def test_old_names_are_accepted_with_a_note(tmp_path):
    cfg = load(GOOD.replace("type: alpaca", "train_on_split: test")+"evaluation_strategy: steps\neval_steps: 5\nval_set_size: 0.1\nmodel_type: LlamaForCausalLM\n", tmp_path)
    assert (cfg.eval_strategy, cfg.type_of_model, cfg.datasets[0].split)==("steps", "LlamaForCausalLM", "test")
    assert len(cfg.notes)==2 and any("`evaluation_strategy` is called `eval_strategy`" in n for n in cfg.notes) and cfg.where("eval_strategy").endswith("c.yml:6")


def test_an_unknown_key_that_is_blank_is_a_note(tmp_path):
    cfg = load(GOOD.replace("type: alpaca", "tyype:")+"qqqz:\nsample_packing_seq_len_multiplier:\nlora_rr: ~\n", tmp_path)
    assert [n.split(": ", 1)[1] for n in cfg.notes]==["unknown key `qqqz`; it is blank, and asks for nothing", "unknown key `sample_packing_seq_len_multiplier`, did you mean `sample_packing_sequentially`? It is blank, and asks for nothing",
        "unknown key `lora_rr`, did you mean `lora_r`? It is blank, and asks for nothing", "unknown key `tyype` under `datasets[0]`, did you mean `type`? It is blank, and asks for nothing"]
    assert cfg.notes[0].split(": ")[0].endswith("c.yml:6:1")
    assert len(problems(GOOD+"qqqz: ''\nlora_rr: 0\n", tmp_path))==2


def test_what_changes_no_result_is_a_note(tmp_path):
    lines = "gptq_groupsize: 128\ngptq_model_v1: true\nlora_mlp_kernel: true\nlora_qkv_kernel: true\nlora_o_kernel: true\nfused_attn_kernel: true\ninclude_tkps: true\ninclude_tokens_per_second: true\nexperimental_skip_move_to_device: true\ncontext_parallel_size: 1\ntensor_parallel_size: 1\ndp_shard_size: 1\ndp_replicate_size: 1\n"
    cfg = load(GOOD+lines, tmp_path)
    assert len(cfg.notes)==13 and all(" says nothing here: " in n for n in cfg.notes) and "`context_parallel_size: 1` says nothing" in " ".join(cfg.notes)
    assert load(GOOD+"sequence_parallel_degree: 1\n", tmp_path).context_parallel_size is None


def test_the_kind_of_an_entry_follows_from_the_mode(tmp_path):
    pair = dict(base_model="x", learning_rate=1, datasets=[dict(path="y", field_chosen="good")])
    assert isinstance(load_config(pair | dict(rl="dpo"), planned=True).datasets[0], PreferenceDataset)
    with pytest.raises(ConfigError, match="unknown key `field_chosen`"): load_config(pair)
    with pytest.raises(ConfigError, match="unknown key `train_on_eos`.*preference pairs"): load_config(pair | dict(rl="dpo", datasets=[dict(path="y", train_on_eos="turn")]), planned=True)
    with pytest.raises(ConfigError, match="`datasets\\[0\\].train_on_eos` is 'bogus'"): load_config(pair | dict(datasets=[dict(path="y", type="chat_template", train_on_eos="bogus", field="x")]))
    assert load_config(pair | dict(datasets=[dict(path="y", name=["a", "b"])])).datasets[0].name==["a", "b"]


def test_sizes(tmp_path): assert load(GOOD+"max_memory: {0: 20GiB, cpu: 64GiB}\n", tmp_path, planned=True).max_memory=={0: "20GiB", "cpu": "64GiB"}


# ---- overrides, bases, several files

def test_overrides_mean_what_the_file_means(tmp_path):
    cfg = load(GOOD, tmp_path, "--learning-rate", "2e-5", "--sample_packing", "--no-shuffle-merged-datasets", "--datasets.0.type=completion", "--special-tokens.pad-token", "<pad>", "--tokenizer-type", "1e3")
    assert (cfg.learning_rate, cfg.sample_packing, cfg.shuffle_merged_datasets, cfg.datasets[0].type, cfg.special_tokens.pad_token, cfg.tokenizer_type)==(2e-5, True, False, "completion", "<pad>", "1e3")
    assert load(GOOD+"load_in_8bit: true\nadapter: lora\nlora_target_linear: true\n", tmp_path, "--no-load-in-8bit").load_in_8bit is False
    assert load(GOOD, tmp_path, "--lora_r=").lora_r==8


@pytest.mark.parametrize("args, says", [(["--micro-batch-size", "2", "--lora-rr", "8"], "on the command line, argument 3: unknown key `lora_rr`, did you mean `lora_r`"), (["--micro-batch-size", "two"], "argument 1: `micro_batch_size` is 'two', but should be a whole number"),
    (["--datasets.5.path", "x"], "argument 1: there is no `datasets.5`: `datasets` has 1 entries"), (["--learning-rate"], "argument 1: `--learning-rate` needs a value: a number over 0"), (["--datasets[0].pth", "x"], "argument 1: unknown key `pth`"),
    (["--datasets.0.path.foo", "x"], "argument 1: there is no `datasets.0.path.foo`"), (["--extends", "x.yml"], "argument 1: `extends` belongs into a file"), (["--.lora_r", "8"], "argument 1: '--.lora_r' names no key"), (["--lora.r", "8"], "argument 1: unknown key `lora`"), (["--lora-target-modules.0", "q"], "argument 1: `lora_target_modules` is"), (["--base-model.x", "1", "--datasets.0.pth", "x"], "unknown key `pth`"), (["lora_r", "8"], "argument 1: expected an option"), (["--seed", "[1"], "argument 1: '[1': this is not valid YAML")])
def test_override_mistakes_are_placed_by_argument(args, says, tmp_path):
    assert any(says in str(p) for p in problems(GOOD, tmp_path, *args)), problems(GOOD, tmp_path, *args)


def test_datasets_can_be_added(tmp_path): assert [e.path for e in load(GOOD, tmp_path, "--datasets.1.path", "more.jsonl").datasets]==["train.jsonl", "more.jsonl"]


def test_an_override_wins_under_either_name(tmp_path):
    assert load(GOOD+"model_type: A\n", tmp_path, "--type-of-model", "B").type_of_model=="B"
    assert load(GOOD+"type_of_model: A\n", tmp_path, "--model-type", "B").type_of_model=="B"
    assert "another name" in str(problems(GOOD+"type_of_model: A\nmodel_type: B\n", tmp_path)[0])


def test_strict_allows_no_new_keys(tmp_path):
    text = GOOD+"strict: true\n"
    assert load(text, tmp_path, "--learning-rate", "1").learning_rate==1
    assert "allows no new keys" in problems(text, tmp_path, "--seed", "1")[0].message


@given(st.lists(st.sampled_from(["--a", "--a=1", "--no-b", "x", "3", "--c.0.d", "[1, 2]", "--", "{", "--=", "--no-"]), max_size=6))
def test_parsing_overrides_never_crashes(args):
    try: assert len(parse_overrides(args))<=len(args)
    except ConfigError as e: assert "argument" in str(e)


def test_bases_and_several_configs(tmp_path):
    (tmp_path/"sub").mkdir()
    (tmp_path/"base.yml").write_text(GOOD+"seed: 1\nmicro_batch_size: 2\n")
    (tmp_path/"more.yml").write_text("special_tokens: {pad_token: p}\nseed: 2\n")
    (tmp_path/"sub"/"mine.yml").write_text("extends: [../base.yml, ../more.yml]\nmicro_batch_size: 8\nspecial_tokens: {eos_token: e}\n")
    cfg = load_config([tmp_path/"sub"/"mine.yml", dict(num_epochs=3)], ["--seed", "9"])
    assert (cfg.seed, cfg.micro_batch_size, cfg.num_epochs, cfg.special_tokens.pad_token, cfg.special_tokens.eos_token)==(9, 8, 3, "p", "e")
    assert cfg.where("learning_rate").endswith("base.yml:5") and cfg.where("special_tokens", "pad_token").endswith("more.yml:1") and cfg.where("seed")=="on the command line, argument 1"
    (tmp_path/"more.yml").write_text("seeed: 2\n")
    with pytest.raises(ConfigError, match="more.yml:1:1: unknown key `seeed`, did you mean `seed`"): load_config(tmp_path/"sub"/"mine.yml")


def test_circles_and_missing_bases(tmp_path):
    (tmp_path/"a.yml").write_text("extends: b.yml\n")
    (tmp_path/"b.yml").write_text("extends: ./a.yml\n")
    with pytest.raises(UserError, match="(?s)circle.*a.yml.*b.yml.*a.yml"): load_config(tmp_path/"a.yml")
    (tmp_path/"b.yml").write_text("extends: 3\n")
    with pytest.raises(ConfigError, match="`extends` is 3, but should be a file"): load_config(tmp_path/"a.yml")
    (tmp_path/"b.yml").write_text("extends: gone.yml\n")
    with pytest.raises(ConfigError, match="b.yml:1:10: no config file"): load_config(tmp_path/"a.yml")


def test_folders(tmp_path):
    with pytest.raises(UserError, match="holds no config"): load_config(tmp_path)
    (tmp_path/"one.yml").write_text(GOOD)
    assert load_config(tmp_path).base_model=="tiny:llama"
    (tmp_path/"two.yaml").write_text(GOOD)
    with pytest.raises(UserError, match="(?s)several configs.*one.yml.*two.yaml"): load_config(tmp_path)
    with pytest.raises(UserError, match="did you mean `.*one.yml`"): load_config(tmp_path/"onee.yml")


def test_not_utf8(tmp_path):
    (tmp_path/"c.yml").write_bytes(GOOD.encode()+b"# caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"): load_config(tmp_path/"c.yml")
    (tmp_path/"c.yml").write_bytes(b"\xef\xbb\xbf"+GOOD.encode())
    assert load_config(tmp_path/"c.yml").base_model=="tiny:llama"


# ---- in Python

def test_python_and_yaml_say_the_same(tmp_path):
    kw = dict(base_model="tiny:llama", datasets=[dict(path="train.jsonl", type="alpaca")], learning_rate=1e-4)
    assert Config(**kw)==load(GOOD, tmp_path)==load_config(kw)==Config(**(kw | dict(datasets=[DatasetOptions(path="train.jsonl", type="alpaca")])))
    for bad in (dict(lora_rr=1), dict(seed="x"), dict(lora_r=8)):
        said = []
        for make in (lambda: Config(**kw, **bad), lambda: load(GOOD+yaml.safe_dump(bad), tmp_path), lambda: Config(**kw).replace(**bad)):
            with pytest.raises(ConfigError) as e: make()
            said.append(e.value.problems[0].message)
        assert len(set(said))==1


def test_calls_people_try(tmp_path):
    import numpy as np
    cfg = load(GOOD, tmp_path)
    assert cfg.replace(learning_rate=np.float64(2e-4), seed=np.int64(3)).learning_rate==2e-4 and load_config(cfg, "--seed 5").seed==5
    for bad, says in [(lambda: Config(str(tmp_path/"c.yml")), "load_config"), (lambda: load_config(tmp_path/"c.yml", dict(lora_r=4)), "are keywords"), (lambda: load_config(None), "a config is a file")]:
        with pytest.raises(TypeError, match=says): bad()
    for bad, says in [(lambda: load_config([]), "name a config"), (lambda: load_config("s3://a/b.yml"), "https address"), (lambda: cfg.where("lora_rr"), "did you mean `lora_r`")]:
        with pytest.raises(UserError, match=says): bad()
    assert cfg.where("datasets[0].path")==cfg.where("datasets.0.path")==cfg.where("datasets", 0, "path") and cfg.where("datasets[0].path").endswith("c.yml:3")
    cfg.save(tmp_path/"new"/"folder"/"c.yml")
    assert "Python, key 1: unknown key `nope`" in str(pytest.raises(ConfigError, load_config, [tmp_path/"c.yml", dict(nope=1)]).value)
    (tmp_path/"big.yml").write_text("# "+"x"*2**21)
    with pytest.raises(UserError, match="larger than"): load_config(tmp_path/"big.yml")
    (tmp_path/"empty.yml").write_text("")
    assert all(p.mark.file.endswith("empty.yml") for p in pytest.raises(ConfigError, load_config, tmp_path/"empty.yml").value.problems)


def test_text_with_a_dollar_stays(tmp_path):
    load(GOOD, tmp_path).replace(output_dir="${HOME}/x").save(tmp_path/"d.yml")
    assert load_config(tmp_path/"d.yml").output_dir=="${HOME}/x"


def test_frozen_copied_pickled(tmp_path):
    cfg = load(GOOD+"lora_target_modules: [a]\nadapter: lora\n", tmp_path)
    for change in (lambda: cfg.datasets.append(1), lambda: cfg.lora_target_modules.extend(["b"]), lambda: setattr(cfg.datasets[0], "path", "x"), lambda: cfg.datasets.__setitem__(0, 1)):
        with pytest.raises(AttributeError, match="frozen"): change()
    with pytest.raises(Exception, match="frozen"): cfg.seed = 1
    for twin in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))): assert twin==cfg and twin.where("learning_rate")==cfg.where("learning_rate")
    assert cfg.replace(seed=3).seed==3 and cfg.seed==42


COMMENTED = """# what this is for
base_model: tiny:llama   # small

datasets:
- path: "train.jsonl"    # quoted
  type: alpaca
- {path: b.jsonl, type: completion}
learning_rate: 1e-4      # as written
special_tokens:
    pad_token: '<pad>'
val_set_size: ${VAL:-0.1}
# the end
"""


def test_text_is_kept(tmp_path):
    cfg = load(COMMENTED, tmp_path)
    assert cfg.to_yaml()==COMMENTED
    changed = cfg.replace(seed=7, val_set_size=0.2, special_tokens=dict(pad_token="<none>"))
    text = changed.to_yaml()
    changed.save(tmp_path/"d.yml")
    assert load_config(tmp_path/"d.yml")==changed
    kept = [l for l in COMMENTED.splitlines() if "pad_token" not in l and "val_set" not in l]
    assert [l for l in text.splitlines() if "pad_token" not in l and "val_set" not in l and "seed" not in l]==kept
    one = cfg.replace(learning_rate=2e-5).to_yaml()
    assert "${VAL:-0.1}" in one and "# as written" in one and load_config(yaml.safe_load(one.replace("${VAL:-0.1}", "0.1"))).learning_rate==2e-5


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict(seed=st.integers(0, 10), learning_rate=st.floats(1e-6, 1), output_dir=st.text("ab :#-'\"", min_size=1, max_size=8).filter(lambda s: s.strip()), sample_packing=st.booleans(),
    datasets=st.lists(st.builds(dict, path=st.text("ab.", min_size=1, max_size=4)), min_size=1, max_size=3))))
def test_yaml_says_what_the_config_says(changes):
    cfg = load_config(in_file(COMMENTED)).replace(**changes)
    assert load_config(in_file(cfg.to_yaml()))==cfg


def in_file(text):
    import tempfile, pathlib
    p = pathlib.Path(tempfile.mkdtemp())/"c.yml"
    p.write_text(text)
    return p


def test_secrets_are_hidden(tmp_path):
    cfg = load(GOOD+"comet_api_key: sesame\ncomet_project_name: p\n", tmp_path, planned=True)
    shown = repr(cfg)+str(cfg.rows())+cfg._repr_html_()+json.dumps(cfg.model_dump(mode="json"))
    assert "sesame" not in shown and cfg.comet_api_key.get_secret_value()=="sesame"


def test_unsafe_yaml_is_refused(tmp_path):
    said = [p.message for p in problems("a: !!python/object/apply:os.system ['true']\nb: !!python/name:os.system\n", tmp_path)]
    assert any("plain values only" in m or "not valid YAML" in m for m in said)


PLACES_OF = dict(base_model="~/m", base_model_config="~/m", tokenizer_config="~/m", dataset_prepared_path="~/p", output_dir="~/o", resume="~/o/checkpoint-1", lora_model_dir="~/a", mlflow_tracking_uri="~/runs")

def test_home_is_expanded_once_where_a_config_is_read(tmp_path, monkeypatch):
    "transformers expands `output_dir` itself: a run was split over two folders"
    monkeypatch.setenv("HOME", "/there")
    text = GOOD.replace("base_model: tiny:llama\n", "").replace("path: train.jsonl", "path: ~/t.jsonl\n    data_files: [~/a.jsonl, b~.jsonl]")
    text += "adapter: lora\nlora_target_linear: true\nmlflow_experiment_name: ~/not-a-path\n"+"".join(f"{k}: {v}\n" for k, v in PLACES_OF.items())
    cfg = load(text, tmp_path)
    assert {k: getattr(cfg, k) for k in PLACES_OF}=={k: v.replace("~", "/there") for k, v in PLACES_OF.items()}
    assert (cfg.datasets[0].path, cfg.datasets[0].data_files, cfg.mlflow_experiment_name)==("/there/t.jsonl", ["/there/a.jsonl","b~.jsonl"], "~/not-a-path")
    assert ("output_dir", "/there/o", "c.yml:13") in [(k, v, w.split("/")[-1]) for k, v, w in cfg.rows()]
    assert cfg.to_yaml()==text and "output_dir: ~/o\n" in cfg.replace(seed=1).to_yaml() # the author's own text stays
    assert DatasetOptions(path="~/x.jsonl").path=="/there/x.jsonl" # no config is needed


@pytest.mark.parametrize("key, text, value", [("wandb_project", o, o) for o in ("run #3", "#3", "a\nlearning_rate: 7", "a\nb # c\n d", "- x", "x: y", "'quoted", '"', "*x", "&x y", "@x", "%x", "[x]", "{x", "a:b", "{% for m in x %}{{m}}{% endfor %}")] + [
    ("wandb_project", "'a # b'", "a # b"), ("wandb_project", "null", None), ("wandb_project", "", None), ("wandb_project", "1e5", "1e5"), ("seed", " 3", 3), ("chat_template_jinja", "[{{x}}] # y", "[{{x}}] # y"),
    ("special_tokens.pad_token", "[PAD]", "[PAD]"), ("special_tokens", "{pad_token: a}", SpecialTokens(pad_token="a")), ("wandb_name", "${WHERE_NOT:-x} #3", "x #3"), ("wandb_name", "'${X}'", "${X}")])
def test_what_the_shell_gave_is_not_cut(tmp_path, key, text, value):
    also = ["--chat_template", "jinja"] if key=="chat_template_jinja" else []
    cfg = load(GOOD+"wandb_project: p\nspecial_tokens: {}\n", tmp_path, f"--{key}", text, *also)
    for k in key.split("."): cfg = getattr(cfg, k)
    assert cfg==value


@pytest.mark.parametrize("key, text, says", [("tokens", "[a, b", "'[a, b': this is not valid YAML"), ("tokens", "[a] # b", "more behind the bracket"), ("special_tokens", "{pad_token: a", "not valid YAML"), ("model_kwargs.a", "[1", "not valid YAML"), ("datasets.0.data_files", "[a", "not valid YAML"),
    ("seed", "3 # x", "'3 # x', but should be a whole number"), ("seed", "3\n4", "but should be a whole number"), ("seed", "0x_", "'0x_', but should be a whole number"), ("seed", "9"*5000, "but should be a whole number"), ("wandb_name", "${WHERE_NOT} #3", "`WHERE_NOT` is not set"), ("seed", "&a "+"["*5000, "but should be a whole number")])
def test_broken_values_have_their_argument(tmp_path, key, text, says):
    p, = problems(GOOD+"wandb_project: p\n", tmp_path, f"--{key}={text}")
    assert says in p.message and str(p.mark)=="on the command line, argument 1"


WORDS = st.one_of(st.sampled_from(["no", "yes", "on", "off", "NULL", "~", "1e5", "1_000", "0x1f", "0x_", "1.", "007", "0o17", "12:30", "2024-01-01", "<<", "=", "${HOME}", "$${A}\n  ${B:-c}", "&a", "*a", "- x", "a: b", "#", " ", "\x85", "\u2028"]), st.text(st.characters(codec="utf-8", exclude_categories=("Cc","Cs")), max_size=6), st.text("ab ${}:#-'\"\n\t", max_size=8))
PLAIN = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), WORDS), lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(WORDS, v, max_size=3)), max_leaves=6)
SHARED = """x-a: &a {no: 1, one: {q: [a, {b: 1}]}}
base_model: tiny:llama
learning_rate: 1e-3
datasets: [{path: a.jsonl}]
model_kwargs: &m
  <<: *a # from above
  b: [1, true]
overrides_of_model_config: *m
"""

@settings(max_examples=100, deadline=None)
@given(st.sampled_from([GOOD, SHARED]), st.dictionaries(WORDS, PLAIN, max_size=4))
def test_plain_values_come_back_equal(text, block):
    cfg = load_config(in_file(text)).replace(model_kwargs=block)
    back = load_config(in_file(cfg.to_yaml()))
    assert kinds(back.model_kwargs)==kinds(block) and back==cfg


def kinds(v): # 1 is not True
    if isinstance(v, dict): return {k: kinds(o) for k, o in v.items()}
    return [kinds(o) for o in v] if isinstance(v, list) else (type(v), v)


@pytest.mark.parametrize("key, there", [("model_kwargs.b.0", "overrides_of_model_config"), ("overrides_of_model_config.b.0", "model_kwargs"), ("model_kwargs.one.q.0", "overrides_of_model_config")])
def test_an_anchor_changes_in_one_place_only(tmp_path, key, there):
    was, cfg = load(SHARED, tmp_path), load(SHARED, tmp_path, f"--{key}", "7")
    assert getattr(cfg, there)==getattr(was, there)
    back = load(cfg.to_yaml(), tmp_path)
    assert back==cfg and back!=was and "x-a: " in cfg.to_yaml()


def test_comments_in_an_entry_stay(tmp_path):
    cfg = load(GOOD.replace("train.jsonl", "train.jsonl # ours"), tmp_path, "--datasets.0.type", "completion")
    assert "path: train.jsonl # ours\n    type: completion" in cfg.to_yaml()


def test_files_that_may_not_be_touched_are_said(tmp_path):
    cfg = load(GOOD, tmp_path)
    (tmp_path/"c.yml").chmod(0)
    (tmp_path/"closed").mkdir()
    (tmp_path/"closed").chmod(0)
    try:
        with permissions_hold():
            for path in (tmp_path/"c.yml", tmp_path/"closed", tmp_path/"closed"/"c.yml", "x"*300): # the last is no name at all
                with pytest.raises(UserError, match="this config cannot be read: (Permission denied|File name too long)"): load_config(path)
            with pytest.raises(UserError, match="cannot be written there: Permission denied"): cfg.save(tmp_path/"closed"/"below"/"c.yml")
    finally: (tmp_path/"closed").chmod(0o755)


@pytest.mark.parametrize("text, says", [("m"*300, "is neither a Jinja text nor a file"), ("a/"+"m"*300, "is neither a Jinja text nor a file"), (".", "is neither a Jinja text nor a file"), ("closed.jinja", "Permission denied"), ("latin.jinja", "utf-8")])
def test_a_template_that_cannot_be_read(tmp_path, monkeypatch, text, says):
    from tuneforge.templates import resolve_template
    from tuneforge.tiny import resolve_model
    monkeypatch.chdir(tmp_path)
    (tmp_path/"closed.jinja").touch(0)
    (tmp_path/"latin.jinja").write_bytes(b"\xe4")
    with permissions_hold(), pytest.raises(UserError, match=f"`chat_template_jinja: .*{says}"): resolve_template("jinja", text, None)
    assert resolve_model("m"*300)=="m"*300 # the hub will say that there is no such model
