"The result of a run on a hub on loopback: what goes up, what never does, and what happens when the hub doesn't take it"
import json, os, time
from pathlib import Path
import pytest, torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load
from transformers import TrainerCallback
from tuneforge.all import *
from tuneforge.share import check_hub
from tests.hub import Hub
from tests.tools import command, serving, write_jsonl

MODEL = {"model.safetensors", "config.json"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
BESIDE = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "run.json"}
END = {"golden_prompts.json", "loss.png"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Mine(Hub): repos, log = {}, []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path/"no-token"))
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    monkeypatch.chdir(tmp_path)
    with serving(Mine) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield Mine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    village = Village()
    return write_jsonl(tmp_path_factory.mktemp("data")/"train.jsonl", village.questions(list(village.people)[:3]))


def config(data, **kw):
    base = dict(base_model="tiny:llama?num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir="out", sequence_len=128,
        learning_rate=1e-3, max_steps=4, save_steps=2, logging_steps=1, warmup_steps=0, val_set_size=0.1, hub_model_id="me/village", seed=3)
    return load_config(base | kw)


LORA = dict(adapter="lora", lora_r=2, lora_target_linear=True, lora_dropout=0.1)


def commits(hub): return [l for l in hub.log if "/commit/" in l]
def files(hub, repo="me/village"): return {n: b for n, b in hub.repos["model", repo]["files"].items() if n!=".gitattributes"}


@pytest.mark.parametrize("kw", [{}, LORA], ids=["full", "adapter"])
def test_the_result_goes_up_and_nothing_else(data, hub, kw):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("for my eyes")
    train(config(data, hub_strategy="end", **kw))
    got = files(hub)
    assert set(got)==BESIDE | END | (ADAPTER if kw else MODEL) and len(commits(hub))==1 and hub.repos["model", "me/village"]["private"]
    for n in got: # as they are, but for what names this machine
        if n not in ("README.md", "run.json", "adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"): assert got[n]==(Path("out")/n).read_bytes(), n
        else: assert str(Path.home()).encode() not in got[n].replace(str(data.parent).encode(), b""), n
    card = got["README.md"].decode()
    assert 'from_pretrained("me/village")' in card and "# village" in card and "checkpoint" not in "".join(got)
    if kw: assert json.loads(got["adapter_config.json"])["base_model_name_or_path"]=="tiny:llama?num_hidden_layers=1" and "/" in json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_comes_back(data, hub, tmp_path):
    cfg = config(data, hub_strategy="end", **LORA)
    run = train(cfg)
    for n, b in files(hub).items(): (tmp_path/"down").mkdir(exist_ok=True); (tmp_path/"down"/n).write_bytes(b)
    back = PeftModel.from_pretrained(load_model(cfg), tmp_path/"down").eval()
    ids = torch.arange(20)[None]
    assert torch.equal(back(ids).logits, run.model.eval()(ids).logits)


@pytest.mark.parametrize("how, states", [(None, set()), ("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-2"})])
def test_while_it_trains(data, hub, how, states):
    train(config(data, **(dict(hub_strategy=how) if how else {}), **LORA))
    got = files(hub)
    assert {n.partition("/")[0] for n in got if "/" in n}-{"checkpoint-4"}==states and len(commits(hub))>=2 # what came while a push went on is left out
    assert {n for n in got if "/" not in n}==BESIDE | END | ADAPTER # no optimizer at the top
    assert got["adapter_model.safetensors"]==Path("out/adapter_model.safetensors").read_bytes() # the last push is the result
    for s in states: assert {f"{s}/{n}" for n in ("optimizer.pt", "scheduler.pt", "manifest.json", "trainer_state.json")} <= set(got)


def test_the_model_of_a_checkpoint_says_that_training_goes_on(data, hub):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step==2: raise KeyboardInterrupt # right after the save
    with pytest.raises(KeyboardInterrupt): train(config(data, hub_strategy="every_save", **LORA), [Stop()])
    for _ in range(600): # the push goes on beside it
        if commits(hub) and "README.md" in files(hub): break
        time.sleep(0.1)
    got = files(hub)
    assert "this is step 2 of 4" in got["README.md"].decode() and got["adapter_model.safetensors"]==Path("out/checkpoint-2/adapter_model.safetensors").read_bytes()
    assert json.loads(got["run.json"])["metrics"]["steps"]==2


def test_a_pushed_checkpoint_goes_on_exactly(data, hub, tmp_path):
    whole = train(config(data, save_total_limit=1, output_dir="whole", hub_model_id=None, **LORA))
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop |= state.global_step==2
    train(config(data, hub_strategy="checkpoint", save_steps=2, **LORA), [Stop()])
    for n, b in files(hub).items():
        if n.startswith("last-checkpoint/"): (tmp_path/"new"/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/"new"/n).write_bytes(b)
    assert damage(tmp_path/"new"/"last-checkpoint")==[]
    train(config(data, output_dir="new", resume="new/last-checkpoint", hub_model_id=None, **LORA))
    a, b = (load(Path(n, "adapter_model.safetensors").read_bytes()) for n in ("whole", "new"))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_branch_and_a_bare_name(data, hub):
    train(config(data, hub_model_id="village", hub_revision="try-1", hub_strategy="end", **LORA))
    repo = hub.repos["model", "me/village"]
    assert set(repo["branches"]["try-1"])>=ADAPTER | BESIDE and not ADAPTER & set(repo["files"])
    train(config(data, hub_model_id="village", hub_revision="try-1", hub_strategy="end", output_dir="out2", **LORA)) # it is there already
    assert "me/village" in repo["branches"]["try-1"]["README.md"].decode()


def test_refused_before_it_begins(data, hub, monkeypatch):
    def refused(*says, **kw):
        with pytest.raises(UserError) as e: train(config(data, **LORA, **kw))
        for s in says: assert s in str(e.value), e.value
        assert not Path("out").exists() and not hub.repos
    refused("Repo id", hub_model_id="no/good/name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("hf auth login", "401")
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    hub.forbidden = True
    refused("403", "tuneforge push")
    monkeypatch.delenv("HF_TOKEN")
    hub.log.clear()
    refused("no token", "hf auth login")
    assert not hub.log # nothing was asked


def test_a_hub_that_is_gone_costs_nothing(data, hub, monkeypatch, caplog):
    there = constants.ENDPOINT
    with serving(Hub) as gone: pass # nobody listens there any more
    for how, change in dict(gone=("ENDPOINT", gone), offline=("HF_HUB_OFFLINE", True)).items():
        caplog.clear()
        with monkeypatch.context() as m:
            m.setattr(constants, *change)
            train(config(data, output_dir=how, **LORA))
        assert "cannot be reached" in caplog.text and f"tuneforge push {how} --to me/village" in caplog.text and Path(how, "run.json").is_file() and not hub.repos
    assert constants.ENDPOINT==there
    code, out, err = command("push", "gone") # another day
    assert code==0 and f"pushed to {there}/me/village" in out and set(files(hub))==BESIDE | END | ADAPTER
    code, out, err = command("push", "gone", "--to", "me/other", "--branch", "b")
    assert code==0 and set(hub.repos["model", "me/other"]["branches"]["b"])==BESIDE | END | ADAPTER


def test_refused_in_the_middle(data, hub, caplog):
    class Forbid(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs): hub.forbidden = True
    train(config(data, hub_strategy="end", **LORA), [Forbid()])
    assert "403" in caplog.text and "tuneforge push out --to me/village" in caplog.text and not commits(hub) and Path("out/README.md").is_file()


def test_an_error_of_any_kind_costs_nothing(data, hub, monkeypatch, caplog):
    "The hub's library raises what its parts in other languages raise; what is pushed at the end is tried all the same"
    tried = []
    def breaks(*args, **kw):
        tried.append(kw["message"])
        raise RuntimeError("Data processing error: CAS service error, for hf_0123456789abcdef")
    with monkeypatch.context() as m:
        m.setattr("tuneforge.share.push_files", breaks)
        r = train(config(data, **LORA))
    assert len(tried)>1 and tried[-1].startswith(f"{r.metrics['steps']} steps")
    assert "RuntimeError: Data processing error" in caplog.text and "tuneforge push out --to me/village" in caplog.text and "hf_0123" not in caplog.text
    assert command("push", "out")[0]==0 and "adapter_model.safetensors" in files(hub)


def test_nothing_to_push(hub, tmp_path):
    code, out, err = command("push", "nowhere", "--to", "me/x")
    assert code==2 and "no run.json" in err
    Path("half").mkdir()
    Path("half/run.json").write_text("{")
    assert command("push", "half", "--to", "me/x")[0]==2
    Path("half/run.json").write_text('{"config": {}}')
    assert "older tuneforge" in command("push", "half", "--to", "me/x")[2] and not hub.repos


def test_secrets_and_homes_stay_here(data, hub, monkeypatch, tmp_path):
    home = tmp_path/"home"/"ann-the-owner"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WHERE", str(home/"unnamed-project"))
    monkeypatch.setenv("TEAM", "unnamed-team")
    (home/"unnamed-project").mkdir()
    (home/"unnamed-project"/"train.jsonl").write_bytes(data.read_bytes())
    (home/"run.yml").write_text(f"""base_model: tiny:llama?num_hidden_layers=1
datasets:
- path: ${{WHERE}}/train.jsonl
  type: alpaca
dataset_prepared_path: {home}/prepared
output_dir: {home}/out
sequence_len: 128
learning_rate: 1e-3
max_steps: 2
save_steps: 1
use_mlflow: false
mlflow_tracking_uri: https://ann:sesame@example.org/mlflow?key=sesame
mlflow_experiment_name: ${{TEAM}}
adapter: lora
lora_r: 2
lora_target_linear: true
hub_model_id: me/village
hub_strategy: checkpoint
""")
    train(load_config(home/"run.yml"))
    local = (home/"out"/"run.json").read_text()
    assert "sesame" not in local and "unnamed-team" in local # what was resolved is known here
    for n, b in files(hub).items():
        assert b"sesame" not in b, n
        if "/" not in n: assert b"ann-the-owner" not in b and b"unnamed-team" not in b, n
    run = json.loads(files(hub)["run.json"])
    assert run["config"]["datasets"][0]["path"]==run["given"]["datasets"][0]["path"]=="${WHERE}/train.jsonl" and run["output_dir"]=="~/out"
