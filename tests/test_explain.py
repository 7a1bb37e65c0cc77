"What is said about keys and configs is true: schema, explanations, tables, new configs"
import json, re
import jsonschema, pytest, yaml
from tuneforge.config import load_config
from tuneforge.document import UserError
from tuneforge.explain import NewConfig, config_rows, explain, first_row, json_schema, sniff_format
from tuneforge.options import AllOptions, DatasetOptions, NOT_YET, REFUSED
from tests.tools import ROOT, run, tuneforge

GOOD = dict(base_model="x", datasets=[dict(path="y")], learning_rate=1e-4)
SCHEMA = json_schema()


def valid(values):
    try: jsonschema.validate(values, SCHEMA)
    except jsonschema.ValidationError: return False
    return True


def test_the_schema_is_one(): jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_examples_satisfy_the_schema():
    for f in sorted((ROOT/"examples").glob("*.yml")): assert valid(yaml.safe_load(f.read_text().replace("2e-3", "0.002").replace("1e-3", "0.001"))), f


@pytest.mark.parametrize("more, ok", [({}, True), (dict(lora_r="${R}"), True), (dict(seed=None), True), (dict(sample_packing="yes"), True), (dict(model_type="X"), True), (dict(lora_rr=1), False), (dict(lora_r="many"), False), (dict(lora_r=0), False),
    (dict(optimizer="adamw_torh"), False), (dict(datasets=[dict(path="y", typ="x")]), False), (dict(datasets=[dict(path="y", train_on_split="x", name=["a", "b"])]), True), (dict(datasets=[dict(path="y", field_chosen="c")], rl="dpo"), True),
    (dict(special_tokens=dict(pad_token="p")), True), (dict(special_tokens=dict(pad="p")), False), (dict(datasets=[dict(path="y", kind="kto")]), False), (dict(wandb_name=3), True), (dict(lora_r="16"), True)])
def test_the_schema_agrees(more, ok): assert valid(GOOD | more)==ok


def test_bases_may_hold_what_is_required():
    assert valid(dict(extends="base.yml", seed=1)) and not valid(dict(seed=1))


def test_every_key_is_explained():
    for k in AllOptions.model_fields:
        said = explain(k)
        assert k in said and AllOptions.model_fields[k].description in said and ("not supported yet" in said.split("\n\n")[0])==(k in NOT_YET) and ("does not serve" in said.split("\n\n")[0])==(k in REFUSED), k
    assert "also called" in explain("model_type") and "type_of_model" in explain("model_type")
    for bad, says in [("lora_rr", "did you mean `lora_r`"), ("rope_scaling", "is no more"), ("trl", "does not serve")]:
        with pytest.raises(UserError, match=says): explain(bad)


def test_every_description_is_a_description():
    for g in (AllOptions, DatasetOptions):
        for k, f in g.model_fields.items(): assert f.exclude or (f.description and len(f.description)>3 and not f.description.endswith(".")), k


def test_resolved_rows():
    cfg = load_config(GOOD | dict(lora_dropout=0.0, micro_batch_size=4), ["--seed", "7"])
    rows = {k: (v, w) for k, v, w in config_rows(cfg, resolved=True)}
    assert rows["seed"]==(7, "on the command line, argument 1") and rows["eval_batch_size"][0]==4 and rows["eval_batch_size"][1].startswith("derived") and rows["num_epochs"]==(1.0, "default")
    diff = [k for k, *_ in config_rows(cfg, diff=True)]
    assert "lora_dropout" not in diff and "seed" in diff


@pytest.mark.parametrize("how", ["lora", "qlora", "full"])
@pytest.mark.parametrize("row", [dict(messages=[]), dict(conversations=[]), dict(instruction="a", output="b"), dict(text="t"), dict(what="x")])
def test_new_configs_are_sound(how, row, tmp_path):
    (tmp_path/"new.yml").write_text(str(NewConfig("tiny:llama", "data file.jsonl", sniff_format(row), how)))
    cfg = load_config(tmp_path/"new.yml")
    assert cfg.adapter==(None if how=="full" else how) and cfg.datasets[0].path=="data file.jsonl"


@pytest.mark.parametrize("content, says", [(None, "no such file"), ("", "no row in it"), (" \n\ufeff\n", "no row in it"), ("{", "not JSON"), ("[1]", "a row is a JSON object"), ("[]", "no row in it"), ("[\n]\n", "no row in it"), ("1", "a row is a JSON object"), ('{"a": 1}{"a": 2}', "not JSON"), ('{"a": "\udce4"}', "not UTF-8")])
def test_first_row_of_a_bad_file(content, says, tmp_path):
    p = tmp_path/"x.json"
    if content is not None: p.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=says): first_row(p)


# ---- the commands, as a user types them

@pytest.fixture
def d(tmp_path):
    (tmp_path/"a.yml").write_text("base_model: tiny:llama\ndatasets:\n  - path: rows.jsonl\nlearning_rate: 1e-4\n")
    (tmp_path/"bad.yml").write_text("base_model: tiny:llama\ndatasets:\n  - pth: rows.jsonl\nlearning_rat: 1e-4\nseed: x\n")
    (tmp_path/"rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    return tmp_path


def test_check(d):
    ok = tuneforge("config", "check", "a.yml", cwd=d)
    assert ok.returncode==0 and "nothing wrong" in ok.stdout
    bad = tuneforge("config", "check", "bad.yml", "--lora-rr", "3", cwd=d)
    assert bad.returncode==2 and bad.stderr.count("did you mean")==3 and "argument 4" in bad.stderr and "`seed` is 'x'" in bad.stderr and "Traceback" not in bad.stderr
    assert tuneforge("config", "check", cwd=d).returncode==2
    assert "config needs one of" in tuneforge("config", "chek", "a.yml", cwd=d).stderr and "2 problems" not in bad.stderr and "4 problems" in bad.stderr


def test_show_explain_schema(d):
    shown = tuneforge("config", "show", "a.yml", "--resolved", "--diff", "--seed", "7", cwd=d)
    assert shown.returncode==0 and re.search(r"seed +7 +on the command line, argument 6", shown.stdout) and "a.yml:4" in shown.stdout and "derived" in shown.stdout, shown.stdout+shown.stderr
    assert "rank" in tuneforge("config", "explain", "lora_r", cwd=d).stdout
    bad = tuneforge("config", "explain", "lora_rr", cwd=d)
    assert bad.returncode==2 and "did you mean `lora_r`" in bad.stderr
    assert json.loads(tuneforge("config", "schema", cwd=d).stdout)["title"]=="tuneforge config"


def test_new(d):
    res = tuneforge("config", "new", cwd=d, stdin="tiny:llama\nrows.jsonl\nlora\n256\nout\n")
    assert res.returncode==0 and "type: alpaca" in (d/"config.yml").read_text(), res.stderr
    assert tuneforge("config", "check", "config.yml", cwd=d).returncode==0
    res = tuneforge("config", "new", "--out", "two.yml", cwd=d, stdin="C: model\ngone.jsonl\nrows.jsonl\nlora\nabc\n0\n64\nout: #x\n")
    cfg = load_config(d/"two.yml")
    assert (cfg.base_model, cfg.sequence_len, cfg.output_dir)==("C: model", 64, "out: #x"), res.stderr
    assert "no folder" in tuneforge("config", "new", "--out", "gone/c.yml", cwd=d, stdin="").stderr
    assert "is there already" in tuneforge("config", "new", cwd=d, stdin="").stderr
    assert "input ended" in tuneforge("config", "new", "--out", "other.yml", cwd=d, stdin="tiny:llama\n").stderr and not (d/"other.yml").exists()


def test_several_configs_and_folders(d):
    (d/"more.yml").write_text("seed: 9\n")
    assert re.search(r"seed +9 +more.yml:1", tuneforge("config", "show", "a.yml", "more.yml", cwd=d).stdout)
    assert "several configs" in tuneforge("config", "check", ".", cwd=d).stderr


def test_commands_about_configs_are_light(d):
    code = "import sys, tuneforge.cli as c\nc.main(sys.argv[1:])\nprint('HEAVY', *({'torch', 'transformers', 'datasets', 'peft', 'numpy', 'pandas'} & {m.split('.')[0] for m in sys.modules}))"
    import sys
    for args in (["config", "check", "a.yml"], ["config", "show", "a.yml", "--resolved"], ["config", "schema"], ["config", "explain", "lora_r"], ["config", "new", "--out", "n.yml"]):
        res = run(sys.executable, "-c", code, *args, cwd=d, stdin="tiny:llama\nrows.jsonl\nlora\n256\nout\n")
        assert res.stdout.splitlines()[-1].strip()=="HEAVY", (args, res.stdout, res.stderr)


@pytest.mark.parametrize("name, content", [("a.json", b'{"text": "x"}\n{"text": "y"}\n'), ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n'), ("a.jsonl", b'\n \n{"text": "x"}\n'), ("a.json", b'\xef\xbb\xbf\n[\n{"text":\n"x"}, {"text": "y"}]'), ("a.jsonl", b'[{"text": "x"}]'), ("a.jsonl", b'{"text": "x"}\n'+b"\xe4"*10**5)])
def test_the_first_row_is_what_preparing_reads(name, content, tmp_path):
    (tmp_path/name).write_bytes(content)
    assert first_row(tmp_path/name)==dict(text="x")


@pytest.mark.parametrize("column, role, text, keys", [("conversations", "role", "content", dict(field_messages="conversations")), ("conversations", "from", "value", dict(field_messages="conversations", message_field_role="from", message_field_content="value")),
    ("messages", "from", "value", dict(message_field_role="from", message_field_content="value")), ("messages", "role", "content", {}), ("conversations", "role", "value", dict(field_messages="conversations", message_field_content="value"))])
def test_what_a_new_config_says_of_messages_is_prepared(column, role, text, keys, tmp_path):
    from tuneforge.all import TokenizerOptions, encode_rows, load_tokenizer
    from tuneforge.tiny import tiny_tokenizer, Village
    row = {column: [{role: "user", text: "hi"}, {role: "assistant", text: "yo"}]}
    entry = sniff_format(row)
    assert entry==dict(type="chat_template") | keys
    sample, = encode_rows([row], entry | dict(path="x.jsonl", chat_template="chatml"), load_tokenizer(TokenizerOptions(base_model="tiny:llama")))
    assert any(o!=-100 for o in sample["labels"])
