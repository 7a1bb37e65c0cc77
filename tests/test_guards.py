"What is no number never reaches the weights"
import io, json, math, sys, threading
import pytest, torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback
from tuneforge.all import *
from tuneforge.train import set_up
from tests.tools import write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    village = Village()
    return write_jsonl(tmp_path_factory.mktemp("data")/"train.jsonl", village.questions(list(village.people)[:3]))


def config(data, out, **kw):
    base = dict(base_model="tiny:llama?num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out),
        sequence_len=128, learning_rate=1e-2, weight_decay=0.1, save_strategy="no", logging_steps=1, micro_batch_size=4, gradient_accumulation_steps=2, max_steps=4, warmup_steps=0, float32=True)
    return load_config(base | kw)


class Poison(TrainerCallback):
    "A weight's gradient, or the loss, is no number in some micro-batches"
    def __init__(self, steps, what): self.steps, self.what, self.now, self.on = steps, what, 0, True
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        p = next(iter(model.parameters()))
        if self.what=="loss": model.lm_head.register_forward_hook(lambda m, a, out: out*math.nan if self.on and self.now in self.steps and model.training else out)
        else: p.register_hook(lambda g: torch.full_like(g, self.what) if self.now in self.steps else g)
    def on_step_begin(self, args, state, control, **kwargs): self.now, self.on = state.global_step+1, True
    def on_substep_end(self, args, state, control, **kwargs): self.on = False # only the first micro-batch of a step


class Skip(TrainerCallback):
    "The same run, with the update of a step undone by hand"
    def __init__(self, step, lomo=None): self.step = step
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step+1==self.step: model.zero_grad(set_to_none=True)


def losses(r): return {h["step"]: h["loss"] for h in r.history if "loss" in h}


@pytest.mark.parametrize("what", ["loss", math.nan, math.inf])
def test_a_step_that_is_no_number_is_not_taken(data, tmp_path, what):
    bad = train(config(data, tmp_path/"bad"), [Poison({2}, what)])
    want = train(config(data, tmp_path/"want"), [Skip(2)])
    a, b = (load_file(tmp_path/n/"model.safetensors") for n in ("bad", "want"))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) and a[k].isfinite().all() for k in a)
    x, y = losses(bad), losses(want)
    assert 2 not in x and x=={k: v for k, v in y.items() if k!=2} and bad.metrics["steps"]==4
    assert [h["skipped_steps"] for h in bad.history if "skipped_steps" in h]==[1]


def test_a_log_line_is_the_mean_of_the_steps_taken(data, tmp_path):
    one = losses(train(config(data, tmp_path/"one"), [Poison({2}, math.nan)]))
    four, = losses(train(config(data, tmp_path/"four", logging_steps=4), [Poison({2}, math.nan)])).values()
    assert four==pytest.approx((one[1]+one[3]+one[4])/3, rel=1e-4)


def test_too_many_in_a_row_end_the_run(data, tmp_path):
    with pytest.raises(UserError, match="5 steps in a row, up to 6"): train(config(data, tmp_path, max_steps=9), [Poison(set(range(2, 10)), math.nan)])


class Touch(TrainerCallback):
    def __init__(self, path, step): self.path, self.step = path, step
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step+1==self.step: self.path.touch()


def test_a_checkpoint_on_request(data, tmp_path):
    train(config(data, tmp_path), [Touch(tmp_path/"SAVE", 3)])
    assert [p.name for p in checkpoints(tmp_path)]==["checkpoint-3"] and not damage(tmp_path/"checkpoint-3") and not (tmp_path/"SAVE").exists()
    assert not (tmp_path/"stalled.txt").exists()


def test_a_profile_changes_nothing(data, tmp_path):
    "Two steps of four, and the weights of a run without it"
    train(config(data, tmp_path/"a", profiler_steps=2, profiler_steps_start=1))
    train(config(data, tmp_path/"b"))
    a, b = (load_file(tmp_path/n/"model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    found = [e["name"] for e in json.loads((tmp_path/"a"/"profile.json").read_text())["traceEvents"] if e["name"].startswith("Optimizer.step")]
    assert len(found)==2


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==2: raise UserError("here it ends")


def test_a_run_that_fails_leaves_nothing_on(data, tmp_path, monkeypatch):
    "In a terminal, and while a profile is recorded: the bar gives the terminal back, the threads are gone, and what was recorded is written"
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr("tuneforge.callbacks.screen", screen)
    out, threads = sys.stdout, set(threading.enumerate())
    with pytest.raises(UserError, match="here it ends"): train(config(data, tmp_path, profiler_steps=3), [Fail()])
    said = screen.file.getvalue()
    assert sys.stdout is out and said.rfind("\x1b[?25h")>said.rfind("\x1b[?25l")>=0 # the cursor is shown again
    new = {t for t in threading.enumerate() if t not in threads and type(t).__name__!="TMonitor"} # tqdm keeps one for good
    for t in new: t.join(20) # told to end, they may take a moment
    assert not any(t.is_alive() for t in new) and not torch.autograd._profiler_enabled()
    assert sum(e["name"].startswith("Optimizer.step") for e in json.loads((tmp_path/"profile.json").read_text())["traceEvents"])==2


@pytest.mark.parametrize("kw", [dict(optimizer="lomo"), dict(optimizer="galore_adamw_layerwise", optim_target_modules=["attn", "mlp"])], ids=["lomo", "galore"])
def test_a_norm_that_is_not_known_is_not_shown(data, tmp_path, kw, capsys):
    "Their gradients are gone before anybody could measure them all"
    pytest.importorskip("lomo_optim" if kw["optimizer"]=="lomo" else "galore_torch")
    r = train(config(data, tmp_path, gradient_accumulation_steps=1, weight_decay=0, max_steps=2, **kw))
    assert len(losses(r))==2 and not any("grad_norm" in h for h in r.history) and "grad norm" not in "".join(capsys.readouterr())
    trainer, *_ = set_up(config(data, tmp_path/"b", gradient_accumulation_steps=1, weight_decay=0, max_steps=1, **kw))
    trainer.spikes.only = 1 # keeps a capsule of it
    run_to_end(trainer)
    capsule = Capsule.load(tmp_path/"b"/"spikes"/"step-1")
    assert capsule.facts["grad_norm"] is None and "gradient norm" not in repr(capsule)


def test_a_norm_that_is_known_is_shown(data, tmp_path, capsys):
    r = train(config(data, tmp_path, max_steps=2))
    assert all(h["grad_norm"]>0 for h in r.history if "loss" in h) and "grad norm" in "".join(capsys.readouterr())
