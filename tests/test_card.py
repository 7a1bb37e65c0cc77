"What is written about a run: it can be believed, copied, and shown to others"
import contextlib, io, json, shutil, subprocess
from pathlib import Path
import pytest, torch
from hypothesis import given, strategies as st
from huggingface_hub import ModelCard
from tuneforge.all import *
from tuneforge.checkpoint import read_manifest
from tests.tools import write_jsonl


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder with a model and data, to stand in"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("tiny:llama?num_hidden_layers=1"), "model")
    village = Village()
    rows = village.questions(list(village.people)[:3])
    write_jsonl(tmp_path/"qa.jsonl", rows)
    write_jsonl(tmp_path/"mapped.jsonl", [dict(messages=[{"from": "user", "value": r["instruction"]}, {"from": "assistant", "value": r["output"]}]) for r in rows])
    write_jsonl(tmp_path/"chat.jsonl", [dict(messages=[dict(role="user", content=r["instruction"]), dict(role="assistant", content=r["output"])]) for r in rows])
    return tmp_path


def config(**kw):
    return load_config(dict(base_model="./model", datasets=[dict(path="qa.jsonl", type="alpaca")], dataset_prepared_path="prepared", output_dir="out", sequence_len=256,
        learning_rate=5e-3, max_steps=4, save_strategy="no", micro_batch_size=4, val_set_size=0.1) | kw)


LORA = dict(adapter="lora", lora_r=4, lora_target_linear=True)
CHAT = dict(datasets=[dict(path="chat.jsonl", type="chat_template")], chat_template="chatml", special_tokens=dict(eos_token="<|im_end|>"))


MAPPED = dict(datasets=[dict(path="mapped.jsonl", type="chat_template", message_property_mappings=dict(role="from", content="value"))], chat_template="chatml", special_tokens=dict(eos_token="<|im_end|>"))

@pytest.mark.parametrize("kw", [{}, LORA, LORA | CHAT, LORA | MAPPED], ids=["full", "adapter", "chat", "mapped"])
def test_the_code_on_the_card_gives_the_same_answer(home, kw):
    cfg = config(**kw)
    run = train(cfg)
    card = Path("out/README.md").read_text()
    code, scope, out = card.split("```python\n")[1].split("```")[0], {}, io.StringIO()
    with contextlib.redirect_stdout(out): exec(code, scope)
    question = "<question>" if "chat_template" in kw else "<instruction>"
    model, tok = load_finetuned(cfg)
    want = ask(model, tok, train_entries(cfg)[0], question, max_new_tokens=256)
    assert out.getvalue().strip()==want.strip()
    n = scope["inputs"]["input_ids"]
    assert torch.allclose(scope["model"].eval()(n).logits, model(n).logits, atol=1e-5) # all weights, the new tokens' as well


def test_the_card_says_what_run_json_says(home):
    train(config(**LORA))
    run, card = json.loads(Path("out/run.json").read_text()), ModelCard.load("out/README.md")
    assert card.data.library_name=="peft" and card.data.base_model is None and "lora" in card.data.tags and card.data.license is None and card.data.language is None
    for said in (f"{run['metrics']['eval_loss']:.4f}", f"{run['metrics']['eval_perplexity']:.2f}", f"{run['metrics']['tokens']:,}", f"{run['data']['sources'][0]['trained']:,}", "loss.png", "qa.jsonl", "learning_rate: 0.005"): assert said in card.text, said
    assert run["given"]["lora_r"]==4 and run["origins"]["lora_r"] and "derived" in run["origins"]["eval_batch_size"]
    assert run["fingerprints"]["data"]["train"]["sha256"] and len(run["fingerprints"]["tokenizer"])==64 and run["hardware"]["cores"]>0 and run["versions"]["torch"]


def test_own_words_stay(home):
    Path("out").mkdir()
    Path("out/README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    train(config(**LORA))
    assert Path("out/README.md").read_text()=="---\nlicense: mit\n---\nMine.\n" and "# out" in Path("out/MODEL_CARD.md").read_text()
    train(config(output_dir="new", save_strategy="steps", save_steps=2, **LORA))
    first = Path("new/README.md").read_text()
    assert "Model Card for Model ID" not in first and not list(Path("new").glob("checkpoint-*/README.md")) # PEFT's blank form is nowhere
    train(config(output_dir="new", learning_rate=1e-4, **LORA))
    assert "learning_rate: 0.0001" in Path("new/README.md").read_text() and not Path("new/MODEL_CARD.md").exists()


@pytest.mark.parametrize("kw", [{}, LORA], ids=["full", "adapter"])
@pytest.mark.parametrize("text", [b"---\ntitle: a: b\n---\nMine.\n", "# Mod\u00e8le\n".encode("latin-1")], ids=["no YAML", "Latin 1"])
def test_a_readme_that_nobody_can_read_stays(home, kw, text):
    Path("out").mkdir()
    Path("out/README.md").write_bytes(text)
    train(config(max_steps=1, **kw))
    assert Path("out/README.md").read_bytes()==text and "# out" in Path("out/MODEL_CARD.md").read_text() and not Path("out/.README.md.kept").exists()


def test_a_readme_comes_back_after_a_kill(tmp_path):
    (tmp_path/".README.md.kept").write_text("Mine.") # what a process left that was killed while it saved
    (tmp_path/"README.md").write_text("a library's")
    with no_other_card(tmp_path): (tmp_path/"README.md").write_text("a library's")
    assert (tmp_path/"README.md").read_text()=="Mine." and not (tmp_path/".README.md.kept").exists()


def test_a_hub_model_is_named(home):
    run = dict(config=dict(base_model="someone/base", adapter="qlora", datasets=[dict(path=p) for p in ("someone/rows", "qa.jsonl", "./x", "s3://b/c", "json")]))
    data = ModelCard(f"---\n{front_matter(run)}\n---\n").data
    assert (data.base_model, data.datasets, data.base_model_relation, data.tags)==("someone/base", ["someone/rows"], "adapter", ["tuneforge", "qlora", "lora"])
    Path("someone/base").mkdir(parents=True)
    assert ModelCard(f"---\n{front_matter(run)}\n---\n").data.base_model is None # a folder of that name wins


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_git(home, monkeypatch):
    git = lambda *args: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *args], check=True, capture_output=True, text=True).stdout.strip()
    assert git_state() is None
    git("init", "-q", "-b", "trunk")
    assert git_state() is None # no commit yet
    git("add", "qa.jsonl"); git("commit", "-q", "-m", "rows")
    assert git_state()==dict(commit=git("rev-parse", "HEAD"), branch="trunk", dirty=False) # what git doesn't follow doesn't count
    Path("qa.jsonl").write_text(Path("qa.jsonl").read_text()+"\n")
    assert git_state()["dirty"]
    train(config(save_strategy="steps", save_steps=2))
    assert json.loads(Path("out/run.json").read_text())["git"]==git_state()==read_manifest(Path("out/checkpoint-2"))["git"]
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=20).map(lambda w: "Q"+w)


def test_paths_that_are_no_home_stay(): assert without_homes(["/srv/homework/a", "./home/ann", "/rootless"], "/root")==["/srv/homework/a", "./home/ann", "/rootless"]


@given(WORD, st.sampled_from(["https://me:{}@host/x", "s3://{}@bucket/x", "https://host/x?sig={}", "see https://me:{}@host/x:3 for it", "hf_{0}{0}", "Bearer sk-{0}{0}"]), st.booleans())
def test_no_form_of_a_secret_is_shown(word, form, deep):
    value = form.format(word)
    shown = json.dumps(without_secrets(dict(a=[dict(b=value)]) if deep else value))
    assert word not in shown and without_secrets(json.loads(shown))==json.loads(shown)


@given(st.sampled_from(["api_key", "HF_TOKEN", "aws_secret_access_key", "password", "comet_api_key", "token", "auth_token"]), WORD)
def test_keys_that_name_secrets(key, word): assert word not in json.dumps(without_secrets({"a": [{key: word}]}))


@pytest.mark.parametrize("key", ["pad_token", "eos_token", "eot_tokens", "max_new_tokens", "special_tokens", "hf_use_auth_token", "message_field_content", "path"])
def test_keys_that_do_not(key): assert without_secrets({key: 5 if key.startswith(("max", "hf")) else "<x>"})[key] in (5, "<x>")
