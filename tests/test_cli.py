"The command line as a user types it: the whole way, and every mistake a message and exit code 2"
import contextlib, io, json, os, shutil, sys
from pathlib import Path
import pytest
from tests.tools import ROOT, bin, command, run, tuneforge, write_jsonl
from tuneforge.cli import main
from tuneforge.document import UserError
from tuneforge.tiny import Village, tiny_model

# A config as people have them for Axolotl: an alpaca LoRA run with its blank keys and its GPU settings.
AXOLOTL = """
base_model: {model}
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer

load_in_8bit: true
load_in_4bit: false
strict: false

datasets:
  - path: {data}
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out

sequence_len: 1024
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true

adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:

wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:

gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002

train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false

gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
s2_attention:

warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
eval_max_new_tokens: 128
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder as a user has it: a model, a JSONL file, a config"
    d = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_model("tiny:llama"), d/"model")
    village = Village()
    write_jsonl(d/"mine.jsonl", village.questions(list(village.people)[:20]))
    (d/"lora.yml").write_text(AXOLOTL.format(model="./model", data="mine.jsonl"))
    return d


def test_an_axolotl_config_trains_merges_and_answers(home):
    res = tuneforge("train", "lora.yml", cwd=home) # as a process of its own; the others without the seconds of its imports
    assert res.returncode==0, res.stderr
    assert "not flash_attention_2" in res.stderr # said, not silent
    out = home/"outputs"/"lora-out"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "loss.png", "run.json"}<={p.name for p in out.iterdir()}
    assert json.loads((out/"run.json").read_text())["metrics"]["steps"]==4
    def say(*args, **kw):
        code, said, err = command(*args, cwd=home, **kw)
        assert code==0, err
        return said
    said = say("preprocess", "lora.yml", "--debug")
    assert "180" in said and "### Response:" in said
    said = say("merge-lora", "lora.yml")
    assert (out/"merged"/"model.safetensors").is_file() and "same token in 100.0%" in said
    assert say("inference", "lora.yml", "--max-new-tokens", "5", stdin="Where does anyone live?").strip()
    assert "exact match" in say("evaluate", "lora.yml", "--max-answers", "5")


CONFIG = "base_model: tiny:llama\ndatasets:\n  - path: {data}\n    type: {type}\nlearning_rate: 1e-4\noutput_dir: out\ndataset_prepared_path: prepared\n{more}\n"


def mistake(d, *args, data="mine.jsonl", type="alpaca", more="", config=None):
    "stderr of a command that must end with 2, without a traceback and without leaving anything"
    (d/"c.yml").write_text(config or CONFIG.format(data=data, type=type, more=more))
    before = {p for p in d.rglob("*")}
    here, said = os.getcwd(), io.StringIO()
    os.chdir(d)
    try:
        with contextlib.redirect_stderr(said): code = main(list(args or ["train", "c.yml"]))
    finally: os.chdir(here)
    assert code==2, (code, said.getvalue())
    left = [p for p in set(d.rglob("*"))-before if p.is_file()]
    assert not left, left
    return said.getvalue()


@pytest.fixture
def d(tmp_path):
    write_jsonl(tmp_path/"mine.jsonl", [dict(instruction="a", output="b")]*3)
    return tmp_path


def test_a_mistake_ends_with_2_and_no_traceback(d):
    res = tuneforge("train", "nothing.yml", cwd=d)
    assert res.returncode==2 and "no config file: nothing.yml" in res.stderr and "Traceback" not in res.stderr and not res.stdout


def test_missing_config(d): assert "no config file: nothing.yml" in mistake(d, "train", "nothing.yml")
def test_config_is_no_yaml(d): assert "c.yml:2:" in mistake(d, config="a: [1\nb: {")
def test_config_is_a_list(d): assert "`key: value`" in mistake(d, config="- a\n- b\n")
def test_unknown_key(d):
    said = mistake(d, more="micro_batch_sise: 2")
    assert "c.yml:8:1" in said and "did you mean `micro_batch_size`" in said
def test_missing_data(d): assert "no such file or folder: gone.jsonl" in mistake(d, data="gone.jsonl")
def test_broken_line(d):
    (d/"broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output\n')
    assert "broken.jsonl:2:" in mistake(d, data="broken.jsonl")
def test_missing_field(d):
    write_jsonl(d/"some.jsonl", [dict(instruction="a", output="b"), dict(instruction="a")])
    said = mistake(d, data="some.jsonl")
    assert "some.jsonl:2: output is null" in said
def test_wrong_type_of_field(d):
    write_jsonl(d/"num.jsonl", [dict(instruction="a", output=3)])
    assert "num.jsonl:1: output is a number (3)" in mistake(d, data="num.jsonl")
def test_chat_message_without_content(d):
    write_jsonl(d/"chat.jsonl", [dict(messages=[dict(role="user", content="a"), dict(role="assistant")])])
    assert "chat.jsonl:1: messages[1].content is null" in mistake(d, data="chat.jsonl", type="chat_template")
def test_formats_are_checked_with_all_the_rest(d):
    said = mistake(d, "config", "check", "c.yml", type="alpca", more="sed: 1\nval_set_size: x")
    assert "did you mean `alpaca`" in said and "did you mean `seed`" in said and "`val_set_size` is 'x'" in said and "3 problems" in said
def test_empty_file(d):
    (d/"empty.jsonl").write_text("")
    assert "the file is empty" in mistake(d, data="empty.jsonl")
    assert "no folder" in mistake(d, "preview", "c.yml", "--html", "gone/x.html")
def test_unknown_format(d): assert "c.yml:4:11: unknown `type: alpacca`, did you mean `alpaca`" in mistake(d, type="alpacca")
def test_unknown_template(d): assert "c.yml:8:16: unknown `chat_template: lama3`, did you mean `llama3`" in mistake(d, type="chat_template", more="chat_template: lama3")
def test_broken_template(d): assert "is no Jinja" in mistake(d, type="chat_template", more="chat_template_jinja: '{% if'")
def test_nothing_left(d):
    said = mistake(d, more="sequence_len: 8")
    assert "nothing is left" in said and "3 longer than `sequence_len`" in said
def test_no_adapter_folder(d):
    (d/"empty").mkdir()
    assert "is no adapter folder: it has no adapter_config.json" in mistake(d, "merge-lora", "c.yml", "--lora-model-dir", "empty", more="adapter: lora\nlora_target_linear: true")
def test_not_trained_yet(d): assert "run `tuneforge train` first" in mistake(d, "inference", "c.yml")
def test_no_such_model(d): assert "there is no such folder" in mistake(d, config=CONFIG.replace("tiny:llama", "./nowhere").format(data="mine.jsonl", type="alpaca", more=""))
def test_no_such_architecture(d): assert "no architecture 'lama'" in mistake(d, config=CONFIG.replace("tiny:llama", "tiny:lama").format(data="mine.jsonl", type="alpaca", more=""))
def test_bad_optimizer(d): assert "did you mean `adamw_torch`" in mistake(d, more="optimizer: adamw_torh")


def test_traceback_on_request(d):
    res = tuneforge("train", "nothing.yml", "--traceback", cwd=d)
    assert res.returncode!=0 and "Traceback" in res.stderr


def test_unknown_command(d):
    res = tuneforge("trian", "c.yml", cwd=d)
    assert res.returncode==2 and "did you mean `train`" in res.stderr
    assert "merge-lora" in tuneforge("sing", cwd=d).stderr
    assert "config explain" in mistake(d, "explain", "lora_r") and "merge-lora" in mistake(d, "merge", "c.yml") and "check, show" in mistake(d, "config")
    assert "before the options" in mistake(d, "train", "--lora-r", "8", "c.yml")


def test_what_people_also_call_a_command(d):
    for word, name in (("eval", "evaluate"), ("chat", "inference"), ("generate", "inference"), ("infer", "inference")): assert f"did you mean `{name}`?" in mistake(d, word, "c.yml")
    assert "did you mean `check`?" in mistake(d, "config", "chek", "c.yml")


@pytest.mark.parametrize("args, said", [(["evaluate", "c.yml", f"--{o}", "-1"], f"`--{o}` is -1, but should be 0 or more") for o in ("max-answers", "train-rows", "rank")]+[
    (["evaluate", "c.yml", "--harness", "x", "--harness-limit", "0"], "`--harness-limit` is 0, but should be 1 or more"), (["preprocess", "c.yml", "--debug", "--debug-num-examples", "-1"], "`--debug-num-examples` is -1"),
    (["preview", "c.yml", "--random", "-1"], "`--random` is -1"), (["preview", "c.yml", "--max-odd", "-1"], "`--max-odd` is -1"), (["preview", "c.yml", "--html", "."], ". is a folder: name a file with --html"),
    (["fetch", "examples", "--dest", "mine.jsonl"], "mine.jsonl is a file: name a folder with --dest"), (["fetch", "examples", "--dest", "mine.jsonl/x"], "mine.jsonl is a file: name a folder with --dest"),
    (["quickstart", "--out", "mine.jsonl"], "mine.jsonl is a file: name a folder with --out"), (["quickstart", "--out", "mine.jsonl/x/y"], "mine.jsonl is a file: name a folder with --out")], ids=lambda o: " ".join(o) if isinstance(o, list) else "")
def test_bad_arguments(d, args, said): assert said in mistake(d, *args)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_takes_nothing(d):
    "As Python buffers what goes to a pipe or a file, it is noticed at the end of a command: a reader that has gone is no mistake, a full disk is one, and neither is a traceback"
    (d/"c.yml").write_text(CONFIG.format(data="mine.jsonl", type="alpaca", more=""))
    sh = lambda line: run("sh", "-c", f"{line.replace('tuneforge', bin('tuneforge'))}; echo \"ended with $?\" >&2", cwd=d, env=dict(PYTHONUNBUFFERED="")).stderr
    assert sh("(tuneforge --help; echo \"ended with $?\" >&2) | true").startswith("ended with 0\n")
    full = sh("tuneforge config check c.yml >/dev/full")
    assert "ended with 2" in full and "No space left on device" in full and "Traceback" not in full and "ignored" not in full, full


def test_no_stdin(d):
    "Closed, or with bytes that are no text"
    from tuneforge.cli import _piped
    with pytest.raises(UserError, match="the standard input is not UTF-8"): _piped(io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8").read)
    (d/"c.yml").write_text(CONFIG.format(data="mine.jsonl", type="alpaca", more=""))
    was, sys.stdin = sys.stdin, None
    try: assert "there is no standard input to read from: give --prompt-file FILE" in mistake(d, "inference", "c.yml")
    finally: sys.stdin = was


def test_help_and_version(d):
    assert tuneforge("--version", cwd=d).stdout.strip().count(".")==2
    group = command("config", "--help", cwd=d)
    assert group[0]==0 and "config explain" in group[1] and "merge-lora" not in group[1]
    assert "merge-lora" in tuneforge("--help", cwd=d).stdout
    assert "--debug-num-examples" in tuneforge("preprocess", "--help", cwd=d).stdout


def test_fetch_examples(d):
    res = tuneforge("fetch", "examples", cwd=d)
    assert res.returncode==0 and (d/"examples"/"lora.yml").is_file()
    (d/"examples"/"lora.yml").write_text("mine: 1\n")
    assert "left alone" in tuneforge("fetch", "examples", cwd=d).stdout
    assert (d/"examples"/"lora.yml").read_text()=="mine: 1\n"


def test_the_quick_start_stands_in_any_folder(tmp_path, monkeypatch):
    from tuneforge.config import load_config
    from tuneforge.quickstart import write_quickstart
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "my #1 try", "a: b", "[x]", "{x}", "{folder}", "é", "it's", "- x", "*x", "%x", "@x", "a\\b", 'q"q', "$HOME ${X}", "$${X}"):
        write_quickstart(Path(name))
        first, second = (load_config(f"{name}/{n}.yml") for n in ("pretrain", "lora"))
        assert (first.output_dir, first.datasets[0].path, second.base_model, second.test_datasets[0].path)==(f"{name}/base", f"{name}/data/village.jsonl", f"{name}/base", f"{name}/data/held_out.jsonl")
        assert ('"' in (Path(name)/"lora.yml").read_text())==(name not in ("plain", "é"))


def test_every_example_is_a_sound_config():
    from tuneforge.config import load_config
    found = sorted((ROOT/"examples").rglob("*.yml"))
    assert found
    for f in found: assert load_config(f).base_model


def test_check_says_which_files_are_not_here(d, monkeypatch, capsys):
    (d/"c.yml").write_text("base_model: tiny:llama\nlearning_rate: 1\ndatasets:\n  - path: here.jsonl\n  - path: data/gone.jsonl\n  - path: someone/on-the-hub\n")
    (d/"here.jsonl").write_text("{}\n")
    monkeypatch.chdir(d)
    assert not main(["config", "check", "c.yml"])
    said = capsys.readouterr()
    assert said.out.endswith("3 keys, nothing wrong but that\n")
    assert said.err.count("on this machine")==1 and "c.yml:5: there is no data/gone.jsonl on this machine" in said.err
    (d/"m.yml").write_text("base_model: ./nosuch\ntokenizer_config: someone/on-the-hub\nlora_model_dir: out/of/here\nresume_from_checkpoint: outputs/x\nadapter: lora\nlora_target_linear: true\nlearning_rate: 1\ndatasets:\n  - path: here.jsonl\n")
    assert not main(["config", "check", "m.yml"])
    assert [l for l in capsys.readouterr().err.splitlines() if "on this machine" in l]==[f"m.yml:{n}: there is no {p} on this machine" for n, p in ((1, "./nosuch"), (3, "out/of/here"), (4, "outputs/x"))]
