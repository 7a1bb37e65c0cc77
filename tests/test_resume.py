"To stop and go on is not to have stopped: bit for bit, at any step"
import json, os, re, shutil, signal
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from datasets import Dataset
from tuneforge.all import *
from tests.tools import computed, forks, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    village = Village()
    return write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:4]))


def settings(data, out, **kw):
    "Two and a half epochs with all that could come in between: packing, accumulation, dropout, shuffling, evaluations, a schedule, log lines that span a save"
    base = dict(base_model="tiny:llama?attention_dropout=0.2&num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out),
        sequence_len=128, learning_rate=1e-3, micro_batch_size=2, gradient_accumulation_steps=2, sample_packing=True, num_epochs=2.5, val_set_size=0.2, eval_steps=3,
        save_strategy="no", logging_steps=2, lr_scheduler="cosine", warmup_steps=2, weight_decay=0.1, float32=True, sdp_attention=True, seed=3)
    return base | kw


def config(*args, **kw): return load_config(settings(*args, **kw))


LORA = dict(adapter="lora", lora_r=4, lora_dropout=0.1, lora_target_linear=True, lora_modules_to_save=["embed_tokens"])


class Seen(TrainerCallback):
    "Which samples the trainer really fetches"
    def __init__(self): self.ids = []
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        bins, ids = train_dataloader.dataset, self.ids
        class Rows(type(bins)):
            def __getitem__(self, i):
                ids.append(list(i))
                return super().__getitem__(i)
        train_dataloader.dataset.__class__ = Rows


class StopAt(TrainerCallback):
    "A signal at some moment"
    def __init__(self, step, when="step_end", signum=signal.SIGTERM): self.step, self.when, self.signum = step, when, signum
    def _at(self, when, done):
        if when==self.when and done==self.step: os.kill(os.getpid(), self.signum)
    def on_step_begin(self, args, state, control, **kw): self._at("step_begin", state.global_step)
    def on_substep_end(self, args, state, control, **kw): self._at("substep_end", state.global_step)
    def on_step_end(self, args, state, control, **kw): self._at("step_end", state.global_step)
    def on_evaluate(self, args, state, control, **kw): self._at("evaluate", state.global_step)


def states(folder, final):
    "Weights and optimizer state: of the run, of its last checkpoint"
    weights = load_file(folder/("adapter_model.safetensors" if (folder/"adapter_model.safetensors").exists() else "model.safetensors"))
    return weights, torch.load(folder/f"checkpoint-{final}"/"optimizer.pt", weights_only=True), torch.load(folder/f"checkpoint-{final}"/"rng_state.pth", weights_only=False)


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    if hasattr(a, "tolist"): return a.tolist()==b.tolist()
    return a==b


@pytest.fixture(scope="module", params=[pytest.param("full", marks=pytest.mark.slow), "lora"])
def whole(request, data, tmp_path_factory):
    "A run that was never stopped"
    kw = LORA if request.param=="lora" else {}
    seen, out = Seen(), tmp_path_factory.mktemp(request.param)/"whole"
    r = train(config(data, out, save_steps=1000, save_strategy="steps", **kw), [seen])
    return r, seen.ids, states(out, r.metrics["steps"]), kw


def resumed(whole, data, out, *stops, **more):
    "The same run, stopped by signals and resumed each time"
    _, _, _, kw = whole
    ids, cfg = [], config(data, out, save_steps=1000, save_strategy="steps", resume="auto", **(kw | more))
    for s in stops:
        seen = Seen()
        with pytest.raises(Stopped) as e: train(cfg, [seen, s])
        assert e.value.code==128+s.signum
        ids += seen.ids
    seen = Seen()
    r = train(cfg, [seen])
    return r, ids+seen.ids


def assert_same(whole, r, ids):
    before, before_ids, before_states, _ = whole
    assert computed(r.history)==computed(before.history)
    assert r.metrics["loss"]==before.metrics["loss"] and r.metrics["eval_loss"]==before.metrics["eval_loss"]
    assert ids==before_ids
    for a, b in zip(before_states, states(Path(r.output_dir), r.metrics["steps"])): assert same(a, b)


def test_stopped_after_every_step(whole, data, tmp_path):
    "Stopped and resumed after every single step, in one chain of runs"
    steps = whole[0].metrics["steps"]
    assert steps>=8 and steps%(steps*2//5) # ends within an epoch
    r, ids = resumed(whole, data, tmp_path/"chain", *(StopAt(s) for s in range(1, steps)))
    assert_same(whole, r, ids)


@pytest.mark.parametrize("stop", [StopAt(4, "substep_end"), StopAt(7, "step_begin", signal.SIGINT), StopAt(3, "evaluate"), StopAt(0, "substep_end", signal.SIGINT)], ids=["in accumulation", "before a step", "in evaluation", "in the first step"])
def test_stopped_at_odd_moments(whole, data, tmp_path, stop):
    "The step that has begun is finished first"
    r, ids = resumed(whole, data, tmp_path/"odd", stop)
    assert_same(whole, r, ids)


def test_a_checkpoint_of_a_signal_is_full(data, tmp_path):
    "`save_only_model` saves what cannot be resumed; a signal saves what can"
    kw = dict(save_only_model=True, save_strategy="steps", save_steps=1, val_set_size=0, eval_steps=None, max_steps=4)
    with pytest.raises(Stopped): train(config(data, tmp_path/"a", **kw), [StopAt(3)])
    assert [damage(p)==[] for p in checkpoints(tmp_path/"a")]==[False, False, True]
    assert "save_only_model" in damage(tmp_path/"a"/"checkpoint-2")[0]
    assert train(config(data, tmp_path/"a", resume="auto", **kw)).metrics["steps"]==4


@pytest.mark.parametrize("kw, last", [(dict(max_steps=2, save_only_model=True, save_strategy="steps", save_steps=1), 2), (dict(max_steps=9, learning_rate=1e-9, early_stopping_patience=1), 2)], ids=["the last", "the one that stops early"])
def test_a_signal_in_the_last_evaluation(data, tmp_path, caplog, kw, last):
    "All steps are done, so there is nothing to go on with: the run comes to its end, and nothing says that a checkpoint was saved"
    r = train(config(data, tmp_path, eval_steps=1, **kw), [StopAt(last, "evaluate")])
    assert r.metrics["steps"]==last and (tmp_path/"model.safetensors").is_file() and (tmp_path/"run.json").is_file()
    assert "SIGTERM came when the last step was done" in caplog.text and "saved checkpoint" not in caplog.text


# Where to begin

def test_nothing_before_the_position_is_looked_at(data):
    "The first batch after a resume costs one batch, wherever it is"
    class Counted(PackPlan):
        def bin(self, i):
            asked.append(int(i))
            return super().bin(i)
    plans = [Counted(**vars(plan_epoch([5]*400, 16, 2, 1, 2, epoch=e))) for e in range(3)]
    ds = Dataset.from_dict(dict(input_ids=[[i]*5 for i in range(400)], labels=[[i]*5 for i in range(400)]))
    steps = plans[0].steps
    batches = lambda start, epoch: [b["input_ids"].tolist() for b in loader(start, epoch)]
    def loader(start, epoch):
        l = PlanLoader(ds, plans, Collator(0, True), start=start)
        l.set_epoch(epoch)
        return l
    for start in (0, 1, steps-1, steps, 2*steps+3):
        epoch, asked = start//steps, []
        assert len(loader(start, epoch))==steps*2 # the trainer counts epochs by it
        next(iter(loader(start, epoch)))
        assert len(asked)==2
        assert batches(start, epoch)==batches(0, epoch)[start%steps*2:]
        if epoch<2: assert batches(start, epoch+1)==batches(0, epoch+1)


def test_a_loader_draws_no_random_numbers(data):
    ds = Dataset.from_dict(dict(input_ids=[[1, 2]]*4, labels=[[1, 2]]*4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(PlanLoader(ds, [plan_epoch([2]*4, 8)], Collator(0, True)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_finished_run_is_not_trained_further(whole, data, tmp_path):
    r, _, _, kw = whole
    shutil.copytree(r.output_dir, tmp_path/"again")
    again = train(config(data, tmp_path/"again", save_steps=1000, save_strategy="steps", resume="auto", **kw))
    assert again.metrics["steps"]==r.metrics["steps"] and again.metrics["loss"]==r.metrics["loss"]
    assert same(states(Path(r.output_dir), r.metrics["steps"]), states(tmp_path/"again", r.metrics["steps"]))


def test_early_stopping_remembers(data, tmp_path):
    "Evaluations without improvement before the stop count after it"
    kw = dict(learning_rate=1e-9, eval_steps=1, early_stopping_patience=4, max_steps=9, save_strategy="steps", save_steps=1, lr_scheduler="constant", warmup_steps=0)
    steps = train(config(data, tmp_path/"a", **kw)).metrics["steps"]
    assert steps<9
    with pytest.raises(Stopped): train(config(data, tmp_path/"b", **kw), [StopAt(steps-2)])
    assert train(config(data, tmp_path/"b", resume="auto", **kw)).metrics["steps"]==steps
    again = train(config(data, tmp_path/"b", resume="auto", **kw)) # what it has ended stays ended
    assert again.metrics["steps"]==steps and max(h["step"] for h in again.history)==steps


# What may have changed

@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("drift")/"out"
    with pytest.raises(Stopped): train(config(data, out, max_steps=4), [StopAt(2)])
    return out


DRIFT = {"learning_rate": 5e-4, "seed": 4, "sequence_len": 160, "num_epochs": 3, "lr_scheduler": "linear", "gradient_accumulation_steps": 4, "weight_decay": 0.2, "val_set_size": 0.3, "max_steps": 5, "sample_packing": False, "shuffle_merged_datasets": False}


@pytest.mark.parametrize("key", DRIFT)
def test_a_changed_key_is_refused(data, stopped, key):
    with pytest.raises(UserError) as e: train(config(data, stopped, resume="auto", **({"max_steps": 4} | {key: DRIFT[key]})))
    name = "rows_per_step" if key=="gradient_accumulation_steps" else key
    assert f"\n  {name}: " in str(e.value) and f"→ {json.dumps(8 if name=='rows_per_step' else DRIFT[key])}" in str(e.value) and "--allow-drift" in str(e.value)
    assert len(list(stopped.glob("checkpoint-*")))==1 and not list(stopped.glob("earlier-*")) # nothing was touched


def test_a_changed_config_is_refused_before_anything_is_loaded(data, stopped, monkeypatch):
    def loads(*args): raise AssertionError("something was loaded")
    for name in ("load_tokenizer", "load_data", "load_model"): monkeypatch.setattr(f"tuneforge.train.{name}", loads)
    for resume in ("auto", str(stopped/"checkpoint-2")):
        with pytest.raises(UserError, match="learning_rate: 0.001 → 0.0005"): train(config(data, stopped, resume=resume, max_steps=4, learning_rate=5e-4))
    with pytest.raises(AssertionError): train(config(data, stopped, resume="auto", max_steps=4))


def test_changed_data_are_refused(data, stopped, tmp_path):
    rows = [json.loads(l) for l in data.read_text().splitlines()]
    other = write_jsonl(tmp_path/"other.jsonl", [r | dict(output=r["output"]+"!") if i==0 else r for i, r in enumerate(rows)])
    with pytest.raises(UserError, match=r'data.train.sha256: "[0-9a-f]{8}…" → "[0-9a-f]{8}…" \(its tokens\)') as e: train(config(other, stopped, resume="auto", max_steps=4))
    assert "datasets.0.path: " in str(e.value) and "learning_rate" not in str(e.value)
    then = json.loads((stopped/"checkpoint-2"/"manifest.json").read_text())
    assert re.fullmatch(r'plan: "[0-9a-f]{8}…" → "aaaaaaaa…" \(samples come in another order: .*\)', *run_changes(then, then | dict(plan="a"*64)))


def test_a_run_that_has_become_shorter(data, stopped):
    with pytest.raises(UserError, match="checkpoint-2 was written after step 2, and this run has only 1: raise `num_epochs`"): train(config(data, stopped, resume="auto", max_steps=1), allow_drift=True)
    assert [p.name for p in stopped.glob("*-*") if p.is_dir()]==["checkpoint-2"] # nothing was moved


def test_a_checkpoint_that_is_not_there_is_missed_at_once(data, stopped, monkeypatch, tmp_path):
    def loads(*args): raise AssertionError("something was loaded")
    for name in ("load_tokenizer", "load_data", "load_model"): monkeypatch.setattr(f"tuneforge.train.{name}", loads)
    with pytest.raises(UserError, match=f"no checkpoint to go on from: there is no such folder; {stopped} has checkpoint-2"): train(config(data, tmp_path/"out", resume=str(stopped/"checkpoint-9"), max_steps=4))


def test_what_cannot_matter_may_change(data, stopped, tmp_path):
    "Another place of the same rows, other log lines and saves, other micro-batches of the same step"
    shutil.copytree(stopped, tmp_path/"out")
    moved = write_jsonl(tmp_path/"moved.jsonl", [json.loads(l) for l in data.read_text().splitlines()])
    kw = dict(max_steps=4, logging_steps=1, save_strategy="steps", save_steps=1, micro_batch_size=1, gradient_accumulation_steps=4, debug=True)
    r = train(config(moved, tmp_path/"out", resume="auto", **kw))
    assert [h["step"] for h in r.history if "loss" in h]==[2, 3, 4]
    assert (tmp_path/"out"/"checkpoint-3").is_dir() # the new `save_steps` holds


def test_allowed_drift_takes_effect(data, stopped, tmp_path, caplog):
    "A learning rate that was changed on purpose is used, not the one in the optimizer's state"
    shutil.copytree(stopped, tmp_path/"out")
    r = train(config(data, tmp_path/"out", resume="auto", max_steps=4, learning_rate=5e-3, logging_steps=1, weight_decay=0.3), allow_drift=True)
    factor = schedule(config(data, tmp_path/"out", max_steps=4), 4)
    assert [h["learning_rate"] for h in r.history if "learning_rate" in h and h["step"]>2]==pytest.approx([5e-3*factor(2), 5e-3*factor(3)])
    assert "learning_rate: 0.001 → 0.005" in caplog.text


class Look(TrainerCallback):
    "Moments by the name of their parameter, and rates of groups, when a run goes on"
    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters() if p in optimizer.state}
        self.rates, self.counted = {g["name"]: g["lr"] for g in optimizer.param_groups}, {k: v for k, v in lr_scheduler.state_dict().items() if k in ("best", "num_bad_epochs", "last_epoch", "patience")}


GROUP = lambda module: dict(lr_groups=[dict(name="own", modules=[module], lr=3e-3)])
PLATEAU, GREEDY = (dict(lr_scheduler=n, lr_scheduler_kwargs=dict(patience=0), weight_decay=0, warmup_steps=0) for n in ("reduce_lr_on_plateau", "greedy"))


@pytest.mark.parametrize("then, now, rates", [(GROUP("q_proj"), GROUP("o_proj"), dict(base=.5, own=1.5)), (dict(weight_decay=0), dict(weight_decay=0.1, embedding_lr=2e-3), dict(base=.5, embeddings=1)), (PLATEAU, PLATEAU | dict(learning_rate=5e-4), dict(base=.1)),
    (GREEDY, GREEDY | dict(learning_rate=5e-4, weight_decay=0.1), None), (dict(lr_scheduler="cosine"), PLATEAU, dict(base=1)), (PLATEAU, dict(lr_scheduler="linear"), dict(base=.5))], ids=["groups", "new groups", "plateau", "greedy", "to plateau", "from plateau"])
def test_drift_keeps_each_moment_at_its_parameter(data, tmp_path, then, now, rates):
    "Other groups, another schedule, or both: moments are compared by name with those at the stop, rates with what the new config says of this step"
    kw = dict(max_steps=4, eval_steps=1, warmup_steps=0, lr_scheduler="linear", logging_steps=1)
    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs): self.moments = lambda: {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
        def on_step_end(self, args, state, control, **kwargs): self.at_end = self.moments()
    keep, look = Keep(), Look()
    with pytest.raises(Stopped): train(config(data, tmp_path, **kw | then | (dict(learning_rate=50.) if then is PLATEAU else {})), [keep, StopAt(2)])
    counted = torch.load(tmp_path/"checkpoint-2"/"scheduler.pt", weights_only=True)
    r = train(config(data, tmp_path, resume="auto", **kw | now), [look], allow_drift=True)
    assert r.metrics["steps"]==4 and same(keep.at_end, look.moments)
    if rates: assert look.rates==pytest.approx({n: v*(5e-4 if now.get("learning_rate") else 1e-3) for n, v in rates.items()})
    if "lr_scheduler" in then and then["lr_scheduler"]==now.get("lr_scheduler"): assert look.counted=={k: counted[k] for k in look.counted} and look.counted["last_epoch"]==2


def test_what_was_not_trained_has_no_moments(data, tmp_path):
    part = lambda name, **kw: config(data, tmp_path, max_steps=4, unfrozen_parameters=[name], **kw)
    with pytest.raises(Stopped): train(part("model.layers.0.mlp"), [StopAt(2)])
    with pytest.raises(UserError, match="cannot go on from there: model.layers.0.mlp.down_proj.weight is not trained any more, and moments are kept"): train(part("model.layers.0.self_attn", resume="auto"), allow_drift=True)


@pytest.mark.parametrize("kw, says", [(dict(lora_r=8), "was \\(4, .*and is \\(8"), (dict(lora_target_linear=False, lora_target_modules=["q_proj"]), "is no part of the adapter any more"), (dict(optimizer="lion_pytorch"), "another optimizer")], ids=["rank", "targets", "optimizer"])
def test_no_drift_is_allowed_that_cannot_be(data, tmp_path_factory, adapted, kw, says):
    with pytest.raises(UserError) as e: train(config(data, adapted, resume="auto", max_steps=4, **SMALL | kw))
    assert "this has changed" in str(e.value) and "--allow-drift" not in str(e.value)
    with pytest.raises(UserError, match=f"cannot go on from there: .*{says}"): train(config(data, adapted, resume="auto", max_steps=4, **SMALL | kw), allow_drift=True)
    assert [p.name for p in adapted.glob("*-*") if p.is_dir()]==["checkpoint-2"] # nothing was moved


SMALL = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")/"out"
    with pytest.raises(Stopped): train(config(data, out, max_steps=4, **SMALL), [StopAt(2)])
    return out


# Ranks

@pytest.mark.slow
def test_the_number_of_ranks_may_change(data, tmp_path):
    "A run that goes on with other ranks, four times, takes the same steps as one that never stopped, to rounding"
    kw = dict(base_model="tiny:llama?num_hidden_layers=1", max_steps=10, micro_batch_size=1, resume="auto")
    whole = train(config(data, tmp_path/"whole", **(kw | dict(gradient_accumulation_steps=4))))
    (tmp_path/"c.yml").write_text(json.dumps(settings(data, tmp_path/"out", **kw)))
    ranks, stops = [1, 2, 1, 4, 2], [2, 4, 5, 8, None]
    phases = [dict(config=str(tmp_path/"c.yml"), ranks=n, overrides=["--gradient-accumulation-steps", str(4//n)]) | (dict(stop=[0, s, "step", signal.SIGTERM]) if s else {}) for n, s in zip(ranks, stops)]
    came = forks(phases, tmp_path)
    assert [o["codes"] for o in came]==[[143 if s else 0]*n for n, s in zip(ranks, stops)], [o["said"][-500:] for o in came]
    assert [json.loads((tmp_path/"out"/f"checkpoint-{s}"/"manifest.json").read_text())["world_size"] for s in stops if s]==ranks[:-1]
    losses = lambda h: [x for o in h if "loss" in o for x in (o["step"], o["loss"])]
    assert losses(json.loads((tmp_path/"out"/"run.json").read_text())["history"])==pytest.approx(losses(whole.history), rel=1e-5)
    a, b = (load_file(tmp_path/n/"model.safetensors") for n in ("whole", "out"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def test_ranks_agree_when_to_stop(data, tmp_path):
    "A signal to one of two ranks, in accumulation, stops both after the same step; with dropout the run goes on exactly"
    (tmp_path/"c.yml").write_text(json.dumps(settings(data, tmp_path/"out", max_steps=5, save_strategy="steps", save_steps=50, resume="auto", use_tensorboard=True, eval_table_size=2, eval_max_new_tokens=3)))
    phase = lambda name, **kw: dict(config=str(tmp_path/"c.yml"), ranks=2, overrides=["--output-dir", str(tmp_path/name)]) | kw
    whole, stop, on = forks([phase("whole"), phase("out", stop=[1, 2, "substep", signal.SIGTERM]), phase("out")], tmp_path)
    assert whole["codes"]==on["codes"]==[0, 0], on["said"]
    assert stop["codes"]==[143, 143] and list(stop["checkpoints"])==["checkpoint-3"]
    for f in ("model.safetensors", "checkpoint-5/optimizer.pt", "checkpoint-5/rng_state_0.pth", "checkpoint-5/rng_state_1.pth"):
        load = (lambda p: load_file(p)) if f.endswith("safetensors") else (lambda p: torch.load(p, weights_only=False))
        assert same(load(tmp_path/"whole"/f), load(tmp_path/"out"/f)), f
    history = lambda n: computed(json.loads((tmp_path/n/"run.json").read_text())["history"])
    assert history("whole")==history("out")
    assert [len(list((tmp_path/n/"tensorboard").iterdir())) for n in ("whole", "out")]==[1, 2] # the first rank alone tells the tracker, once for each start
    said = {n: [json.loads(l) for l in (tmp_path/n/"samples.jsonl").read_text().splitlines()] for n in ("whole", "out")}
    assert said["whole"]==said["out"] and [r["step"] for r in said["whole"]]==[0, 0, 3, 3, 5, 5]


@pytest.mark.slow
def test_the_first_rank_alone_says_what_a_run_that_is_over_is(data, tmp_path):
    (tmp_path/"c.yml").write_text(json.dumps(settings(data, tmp_path/"over", max_steps=5, save_strategy="steps", save_steps=50, resume="auto", eval_table_size=2, eval_max_new_tokens=3, load_best_model_at_end=True)))
    came = forks([dict(config=str(tmp_path/"c.yml"), ranks=2)]*2, tmp_path)
    assert [o["codes"] for o in came]==[[0, 0]]*2, came[1]["said"]
    assert [json.loads(l)["step"] for l in (tmp_path/"over"/"samples.jsonl").read_text().splitlines()][6:]==[5, 5]


def test_a_run_below_home_lies_in_one_folder(data, tmp_path, monkeypatch):
    (home := tmp_path/"home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    text = f"base_model: tiny:llama?num_hidden_layers=1\nlearning_rate: 1e-3\ndatasets:\n- path: {data}\nsave_steps: 1\nsequence_len: 128\noutput_dir: ~/out\ndataset_prepared_path: ~/prepared\n"
    (tmp_path/"c.yml").write_text(text)
    cfg = load_config("c.yml", max_steps=3, resume="auto")
    with pytest.raises(Stopped): train(cfg, [StopAt(2)])
    train(cfg, [seen := Seen()])
    assert len(seen.ids)==1 # it went on after step 2
    assert {"model.safetensors","run.json","README.md","checkpoint-3"}<={f.name for f in (home/"out").iterdir()} and (home/"prepared").is_dir() and not (tmp_path/"~").exists()
    manifest = json.loads((home/"out"/"run.json").read_text())
    assert (manifest["config"]["output_dir"], manifest["given"]["output_dir"], manifest["origins"]["output_dir"])==(str(home/"out"), "~/out", "c.yml:7")
