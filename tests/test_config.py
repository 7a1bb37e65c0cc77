"Mistakes in configs are found, placed and explained; sound configs are read as written"
import difflib
import pytest, yaml
from hypothesis import given, strategies as st
from tuneforge.config import NOT_YET, RENAMED, Config, ConfigError, DatasetOptions, Document, load_config, parse_overrides, unknown_key

GOOD = """base_model: tiny:llama
datasets:
  - path: train.jsonl
    type: alpaca
learning_rate: 1e-4
"""


def problems(text, tmp_path, *overrides):
    (tmp_path/"c.yml").write_text(text)
    with pytest.raises(ConfigError) as e: load_config(tmp_path/"c.yml", list(overrides))
    return e.value.problems


def load(text, tmp_path, *overrides):
    (tmp_path/"c.yml").write_text(text)
    return load_config(tmp_path/"c.yml", list(overrides))


@pytest.mark.parametrize("line, line_no, column, says", [
    ("lora_rr: 8", 6, 1, "did you mean `lora_r`"),
    ("  - pth: x", 6, 5, "did you mean `path`"),
    ("sequence_len: long", 6, 15, "'long'"),
    ("learning_rate: 2", 6, 1, "given twice, first in line 5"),
    ("deepspeed: zero3.json", 6, 1, "not supported by tuneforge yet"),
    ("adapter: qlora\nlora_target_linear: true", 6, 1, "needs `load_in_4bit: true`"),
    ("load_in_4bit: true", 6, 1, "needs an adapter"),
    ("lora_r: 8", 6, 1, "no effect without `adapter`"),
    ("adapter: lora", 6, 1, "say what to adapt"),
    ("warmup_steps: 1\nwarmup_ratio: 0.1", 7, 1, "give either"),
    ("eval_steps: 10", 6, 1, "needs something to evaluate on"),
    ("save_strategy: epoch\nsave_steps: 3", 7, 1, "contradicts"),
    ("batch_size: 3\nmicro_batch_size: 2", 6, 1, "no multiple"),
    ("eval_sample_packing: true", 6, 1, "needs `sample_packing: true`"),
    ("chat_template: jinja", 6, 1, "needs `chat_template_jinja`"),
    ("fp16: true\nbf16: true", 6, 1, "several precisions"),
    ("flash_attention: true\neager_attention: true", 6, 1, "several attention backends"),
    ("special_tokens: {pad_tokn: x}", 6, 18, "did you mean `pad_token`"),
    ("model_type: X\ntype_of_model: X", 6, 1, "another name of `type_of_model`"),
])
def test_problem_has_its_place(line, line_no, column, says, tmp_path):
    text = GOOD.replace("learning_rate", line+"\nlearning_rate") if line.startswith("  -") else GOOD+line+"\n"
    if line.startswith("  -"): line_no -= 1
    found = [p for p in problems(text, tmp_path) if says in p.message]
    assert found, [str(p) for p in problems(text, tmp_path)]
    assert (found[0].mark.line, found[0].mark.column)==(line_no, column)


@pytest.mark.parametrize("line", ["adapter: lora\nlora_target_linear: true\nlora_r: 4", "warmup_ratio: 0.1", "val_set_size: 0.1\neval_steps: 5", "save_strategy: steps\nsave_steps: 3",
    "batch_size: 4\nmicro_batch_size: 2", "deepspeed:", "wandb_project: ''", "adapter: qlora\nload_in_4bit: yes\nlora_target_modules: [q_proj]", "lora_fan_in_fan_out:", "bf16: true", "flash_attention: on", "save_strategy: no"])
def test_sound_configs_pass(line, tmp_path): assert load(GOOD+line+"\n", tmp_path).base_model=="tiny:llama"


def test_all_problems_at_once(tmp_path):
    found = problems("base_modl: x\ndatasets: []\nlearning_rate: -1\nfoo: 1\n", tmp_path)
    assert len(found)==5 # base_model missing, base_modl, datasets too short, learning_rate, foo


KEYS = sorted(Config.model_fields)


@given(st.sampled_from(KEYS), st.integers(0, 30), st.sampled_from("abcxyz_"))
def test_a_key_with_one_letter_too_many_is_refused_and_recognised(key, at, letter):
    typo = key[:at]+letter+key[at:]
    if typo in KEYS or typo in NOT_YET or typo in RENAMED: return
    with pytest.raises(ConfigError) as e: load_config(yaml.safe_load(GOOD) | {typo: None})
    said = " ".join(p.message for p in e.value.problems)
    assert f"unknown key `{typo}`" in said and ("did you mean" in said or "it is valid under" in said)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text("abcdef", min_size=1), c, max_size=3), max_leaves=12))
def test_documents_read_what_yaml_reads(value):
    text = yaml.safe_dump(dict(top=value))
    assert Document(text).value==yaml.safe_load(text)


def test_numbers_people_write():
    doc = Document("a: 1e-4\nb: 2.5E3\nc: 1_000\nd: yes\ne: off\nf: '1e-4'\n")
    assert doc.value==dict(a=1e-4, b=2500., c=1000, d=True, e=False, f="1e-4")


def test_anchors_and_merges(): assert Document("x: &a {p: 1, q: 2}\ny:\n  <<: *a\n  q: 3\n").value["y"]==dict(p=1, q=3)


def test_overrides_mean_what_the_file_means(tmp_path):
    cfg = load(GOOD, tmp_path, "--learning-rate", "2e-5", "--sample_packing", "--no-shuffle-merged-datasets", "--datasets.0.type=completion", "--special-tokens.pad-token", "<pad>")
    assert (cfg.learning_rate, cfg.sample_packing, cfg.shuffle_merged_datasets, cfg.datasets[0].type, cfg.special_tokens.pad_token)==(2e-5, True, False, "completion", "<pad>")


def test_override_mistakes_are_placed_by_argument(tmp_path):
    p = problems(GOOD, tmp_path, "--micro-batch-size", "2", "--lora-rr", "8")[0]
    assert "command line, argument 3" in str(p) and "lora_r" in str(p)


def test_strict_allows_no_new_keys(tmp_path):
    text = GOOD+"strict: true\n"
    assert load(text, tmp_path, "--learning-rate", "1").learning_rate==1
    assert "allows no new keys" in problems(text, tmp_path, "--seed", "1")[0].message


@given(st.lists(st.sampled_from(["--a", "--a=1", "--no-b", "x", "3", "--c.0.d", "[1, 2]"]), max_size=6))
def test_parsing_overrides_never_crashes(args):
    try: assert len(parse_overrides(args))<=len(args)
    except ConfigError as e: assert "argument" in str(e)


def test_unsafe_yaml_is_refused(tmp_path):
    said = [p.message for p in problems("a: !!python/object/apply:os.system ['true']\nb: !!python/name:os.system\n", tmp_path)]
    assert any("plain values only" in m or "not valid YAML" in m for m in said)
