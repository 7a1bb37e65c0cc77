"A folder belongs to one run, for as long as its process lives"
import json, os, signal, socket, subprocess, sys
import pytest
from transformers import TrainerCallback
from tuneforge.all import *
from tuneforge.folder import HOLDER, LOCK
from tuneforge.train import save_run, set_up
from tests.tools import ROOT, write_jsonl

HOLD = "import sys, time\nfrom tuneforge.folder import held\nwith held(sys.argv[1]):\n    {}\n    print('held', flush=True)\n    time.sleep(600)"
FORK = "import os\n    r,w = os.pipe()\n    if os.fork()==0: os.write(w, b'.'); time.sleep(600)\n    os.read(r, 1)" # a child that outlives its parent, and has begun


def holder(out, also="pass", **env):
    "Another process that holds a folder"
    p = subprocess.Popen([sys.executable, "-c", HOLD.format(also), str(out)], cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert p.stdout.readline()=="held\n"
    return p


def test_held_until_its_process_dies(tmp_path):
    p = holder(tmp_path/"out")
    try:
        with pytest.raises(UserError) as e:
            with held(tmp_path/"out"): pass
        for word in (f"process {p.pid}", socket.gethostname(), "since 20", f"kill {p.pid}", "`output_dir`"): assert word in str(e.value)
        assert (tmp_path/"out"/HOLDER).is_file() # whoever was refused has taken nothing away
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert (tmp_path/"out"/LOCK).exists() # it could not tidy up
    with held(tmp_path/"out"): assert json.loads((tmp_path/"out"/HOLDER).read_text())["pid"]==os.getpid()
    assert not (tmp_path/"out").exists()


def test_a_child_that_lives_on_holds_nothing(tmp_path):
    p = holder(tmp_path/"out", FORK)
    try:
        p.send_signal(signal.SIGKILL)
        p.wait()
        os.killpg(p.pid, 0) # the child is there
        with held(tmp_path/"out"): pass
    finally: os.killpg(p.pid, signal.SIGKILL) # its own session: only what this test started


def test_another_host(tmp_path, monkeypatch):
    with held(tmp_path/"out"):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(UserError) as e:
            with held(tmp_path/"out"): pass
        assert "elsewhere" not in str(e.value) and "kill" not in str(e.value) # a pid of another machine says nothing here


def test_only_the_first_rank_holds(tmp_path, monkeypatch):
    with held(tmp_path/"out"):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path/"out"): pass
        monkeypatch.delenv("RANK")
        assert (tmp_path/"out"/LOCK).exists() and (tmp_path/"out"/HOLDER).exists()


def test_no_place_to_write(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        with held(tmp_path/"file"): pass


class Meanwhile(TrainerCallback):
    "Does something in the middle of a run, and keeps what came of it"
    def __init__(self, f): self.f, self.said = f, None
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step!=1: return
        try: self.said = self.f()
        except UserError as e: self.said = str(e)


def test_a_run_refuses_a_second_one_but_no_reader(tmp_path):
    village = Village()
    data = write_jsonl(tmp_path/"train.jsonl", village.questions(list(village.people)[:2]))
    cfg = lambda **kw: load_config(dict(base_model="tiny:llama?num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(tmp_path/"prepared"),
        output_dir=str(tmp_path/"out"), sequence_len=128, learning_rate=1e-3, max_steps=2, save_strategy="no", adapter="lora", lora_r=2, lora_target_linear=True) | kw)
    second = Meanwhile(lambda: train(cfg()))
    train(cfg(), [second])
    assert "this very process" in second.said
    reader = Meanwhile(lambda: (load_finetuned(cfg()) and "read", merge(cfg()) and "merged"))
    train(cfg(), [reader])
    assert reader.said==("read", "merged")
    names = {p.name for p in (tmp_path/"out").iterdir()}
    assert not {LOCK, HOLDER} & names and {"run.json", "README.md"} <= names
    before = set((tmp_path/"out2").parent.iterdir())
    with pytest.raises(UserError): train(cfg(output_dir=str(tmp_path/"out2"), optimizer="adamw_bnb_8bit", base_model=str(tmp_path/"nothing")))
    assert set((tmp_path/"out2").parent.iterdir())==before # a run that cannot begin leaves no folder


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("adapter", [dict(adapter="lora", lora_r=2, lora_target_linear=True), dict()], ids=["adapter", "whole"])
def test_weights_may_be_read_by_whom_the_umask_says(tmp_path, umask, adapter):
    "In the folder, in a checkpoint, in the merged model, and in a capsule of a spike"
    village = Village()
    data = write_jsonl(tmp_path/"train.jsonl", village.questions(list(village.people)[:2]))
    was = os.umask(umask)
    try:
        cfg = load_config(dict(base_model="tiny:llama?num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(tmp_path/"prepared"),
            output_dir=str(tmp_path/"out"), sequence_len=128, learning_rate=1e-3, max_steps=1, save_strategy="steps", save_steps=1) | adapter)
        trainer, found, _ = set_up(cfg)
        trainer.spikes.only = 1 # keeps a capsule of it
        save_run(cfg, trainer, found, run_to_end(trainer))
        merged = [merge(cfg)[0]] if adapter else []
    finally: os.umask(was)
    folders = [tmp_path/"out", tmp_path/"out"/"checkpoint-1", tmp_path/"out"/"spikes"/"step-1", *merged]
    modes = {str(f): f.stat().st_mode & 0o777 for d in folders for f in d.glob("*.safetensors")}
    assert len({str(f.parent) for d in folders for f in d.glob("*.safetensors")})==len(folders) and set(modes.values())=={0o666 & ~umask}, modes
    assert not [f for f in tmp_path.rglob("*.part")]
