"A step that went wrong is kept, says truly what was in it, and comes out again"
import json, math, time
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from tuneforge.all import *
from tuneforge.train import set_up
from tests.test_guards import Poison
from tests.tools import command, forks, tuneforge, write_jsonl

ODD = "zq xj 9 ## kv wq 77 qq vx "*3
LORA = dict(adapter="lora", lora_r=4, lora_target_linear=True, lora_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Two files; one answer of the second is nonsense"
    d, village = tmp_path_factory.mktemp("data"), Village()
    rows = village.questions(list(village.people)[:8])
    rows[45]["output"] = ODD
    return [write_jsonl(d/"a.jsonl", rows[:30]), write_jsonl(d/"b.jsonl", rows[30:])]


def config(data, out, **kw):
    base = dict(base_model="tiny:llama?num_hidden_layers=1&attention_dropout=0.1", datasets=[dict(path=str(p), type="alpaca") for p in data], dataset_prepared_path=str(data[0].parent/"prepared"), output_dir=str(out),
        sequence_len=128, learning_rate=5e-3, save_strategy="no", logging_steps=1, micro_batch_size=2, gradient_accumulation_steps=2, num_epochs=3, warmup_steps=0, float32=True, sdp_attention=True, spike_window=8)
    return load_config(quietly(base | kw))


def quietly(keys):
    "Without keys that another one switches off"
    off = ("spike_window", "spike_threshold") if keys.get("spike_capsules")==0 else ("spike_window",) if keys.get("spike_threshold", 1) is None else ()
    return {k: v for k, v in keys.items() if k not in off}


def kept(cfg, step, callbacks=()):
    "The capsule of a step that is asked for"
    trainer, *_ = set_up(cfg, callbacks, quiet=True)
    trainer.spikes.only = step
    trainer.add_callback(StopAfter(step))
    run_to_end(trainer)
    return Capsule.load(Path(cfg.output_dir)/SPIKES/f"step-{step}"), trainer


def same(a, b): return len(a)==len(b) and all(len(x)==len(y) and all(map(torch.equal, x, y)) for x, y in zip(a, b))


def recorded(c): return [c.of_rank(r)[1] for r in range(c.facts["world_size"])]


# ---- what a spike is

@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=4, max_size=50), st.floats(0.5, 50), st.floats(0, 1))
def test_the_limit_by_numpy(xs, k, least):
    m = np.median(xs)
    spread = 1.4826*np.median(np.abs(np.array(xs)-m))
    assert spike_limit(xs, k)==pytest.approx(m+k*max(spread, 0.01*m))
    assert spike_limit(xs, k, least)==pytest.approx(m+k*max(spread, least*m))


@given(st.lists(st.floats(1, 3), min_size=20, max_size=20), st.integers(1, 9))
def test_few_outliers_do_not_hide_the_next(xs, n):
    "Up to half of a window may be anything: the limit stays among what the rest could have given"
    assert spike_limit([*xs[n:], *[1e9]*n], 10)<=3+10*1.4826*2


def watch(**kw):
    w = SpikeWatch(load_config(quietly(dict(base_model="tiny:llama", datasets=[dict(path="x.jsonl")], learning_rate=1e-3, spike_window=8) | kw)), None, None)
    return lambda losses, norms=None: [i for i, (l, g) in enumerate(zip(losses, norms or [1.]*999), 1) if w.strikes(i, not math.isfinite(l), l, g)]


def test_when_a_capsule_is_kept():
    calm = [2., 2.1]*10
    assert watch()([*calm, 9.])==[21] and watch(spike_threshold=None)([*calm, 9.])==[]
    assert watch()([2., 2.1, 9., 2.])==[], "too early to tell"
    assert watch()([2.]*20, [*[1.]*10, 30., *[1.]*9])==[11], "the norm counts, too"
    assert watch()([2.]*20, [*[1.]*10, 2.9, *[1.]*9])==[] and watch()([2.]*20, [*[1.]*10, 3.1, *[1.]*9])==[11], "once it has tripled"
    assert watch()([*calm, math.nan, math.nan, 2., math.nan])==[21, 24] and watch(spike_threshold=None)([*calm, math.nan])==[21]
    assert watch()([*calm, 9., 2.]*9) ==[21, 43, 65, 87, 109] and watch(spike_capsules=0)([*calm, 9., math.nan])==[]
    assert watch()([*calm, *[9.]*6, *[2.]*20, 9.])==[21, 47], "a new level is one spike"


# ---- what is in a capsule

@pytest.mark.parametrize("kind, packed", [pytest.param(k, p=="packed", id=f"{k}-{p}", marks=pytest.mark.slow if (k, p)!=("lora", "packed") else [])
    for k in ("lora", "full") for p in ("packed", "rows")])
def test_a_capsule_by_plain_transformers(data, tmp_path, packed, kind):
    "A run meets nonsense; each sample's loss is what the model says of it alone, and the step comes out again, also in another process"
    odd = dict(base_model="tiny:llama?num_hidden_layers=1")
    cfg = config(data, tmp_path/"out", sample_packing=packed, num_epochs=4, **(dict(micro_batch_size=1, gradient_accumulation_steps=1) if packed else {}), **odd, **(LORA | dict(lora_dropout=0.) if kind=="lora" else {}))
    run = train(cfg)
    folders = sorted((tmp_path/"out"/"spikes").iterdir())
    c = next(c for c in map(Capsule.load, folders) if c.samples[0].get("place", "").endswith("b.jsonl:16"))
    assert "loss" in c.facts["why"] and c.facts["worst"][0]["text"].count("zq xj")==3
    logged = {h["step"]: h for h in run.history if "loss" in h}[c.facts["step"]]
    assert logged["loss"]==pytest.approx(c.facts["loss"], rel=1e-5) and logged["grad_norm"]==pytest.approx(c.facts["grad_norm"], rel=1e-5)

    tok = load_tokenizer(cfg)
    model = load_model(cfg, tok)
    model.save_pretrained(tmp_path/"base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/"base", dtype=torch.float32)
    if kind=="lora":
        from peft import PeftModel
        plain = PeftModel.from_pretrained(plain, tmp_path/"out")
    missing = plain.load_state_dict(load_file(c.folder/"weights.safetensors"), strict=False)
    assert not missing.unexpected_keys
    total = trained = 0
    for s in c.samples:
        file, line = s["place"].rsplit(":", 1)
        row = json.loads(Path(file).read_text().splitlines()[int(line)-1])
        batch = c.of_rank(0)[0][s["micro_batch"]]
        ids = batch["input_ids"][s["row"], s["start"]:s["end"]]
        labels = batch["labels"][s["row"], s["start"]:s["end"]]
        assert row["output"] in tok.decode(ids) and row["instruction"] in tok.decode(ids)
        with torch.no_grad(): assert plain.eval()(input_ids=ids[None], labels=labels[None]).loss.item()==pytest.approx(float(s["loss"]), rel=2e-4)
        total, trained = total+s["loss"]*s["trained"], trained+s["trained"]
    assert trained==c.facts["trained_tokens"] and total/trained==pytest.approx(c.facts["loss"], rel=1e-5)

    assert replay(c.folder).exact and replay(c.folder, weights=False).exact
    came = tuneforge("replay", c.folder)
    assert came.returncode==0 and "bit by bit" in came.stdout and "b.jsonl:16" in came.stdout, came.stderr
    w = load_file(c.folder/"weights.safetensors")
    save_file({k: v+1e-3 for k, v in w.items()}, c.folder/"weights.safetensors")
    code, _, err = command("replay", c.folder)
    assert code==2 and "not reproduced" in err


def test_a_replay_in_another_folder_names_what_it_misses(tmp_path, monkeypatch):
    rows = [dict(instruction=f"Where is {i}?", output="There.") for i in range(8)]
    write_jsonl(tmp_path/"rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    c, _ = kept(config([Path("rows.jsonl")], "out"), 2)
    assert replay(c.folder).exact
    (tmp_path/"elsewhere").mkdir()
    monkeypatch.chdir(tmp_path/"elsewhere")
    with pytest.raises(UserError, match="the run read rows.jsonl, which is not there seen from .*elsewhere: replay from the folder in which it was trained"): replay(tmp_path/c.folder)


def test_capsules_change_nothing(data, tmp_path):
    "With dropout: a run that keeps capsules, and one that keeps none"
    a, b = (train(config(data, tmp_path/n, spike_capsules=k, spike_threshold=0.5)) for n, k in (("a", 5), ("b", 0)))
    assert len(list((tmp_path/"a"/"spikes").iterdir()))>1 and not (tmp_path/"b"/"spikes").exists()
    x, y = (load_file(tmp_path/n/"model.safetensors") for n in "ab")
    assert all(torch.equal(x[k], y[k]) for k in x) and [h.get("loss") for h in a.history]==[h.get("loss") for h in b.history]


KINDS = dict(
    flat=dict(batch_flattening=True, micro_batch_size=3), pieces=dict(chunked_cross_entropy=True), noise=dict(neftune_noise_alpha=5), checkpointing=dict(gradient_checkpointing=True), bf16=dict(float32=None, bf16=True),
    dora=LORA | dict(peft_use_dora=True), embeddings=LORA | dict(lora_modules_to_save=["embed_tokens"]), free=dict(optimizer="schedule_free_adamw", lr_scheduler="constant"), tight=dict(sample_packing=True, packing="tight"))


@pytest.mark.parametrize("name", KINDS)
def test_ways_to_train(data, tmp_path, name):
    "The forward passes are those of the training, dropout and all, whatever way it takes"
    cfg = config(data, tmp_path/"out", **({"sample_packing": True} if name in ("pieces", "dora") else {}) | KINDS[name])
    c, trainer = kept(cfg, 5)
    total = sum(s["loss"]*s["trained"] for s in c.samples)/c.facts["trained_tokens"]
    assert total==pytest.approx(c.facts["loss"], rel=1e-5) # with another dropout, it would be another loss
    batches, each, _ = c.of_rank(0)
    ds = trainer.train_dataset
    for s in c.samples: assert batches[s["micro_batch"]]["input_ids"][s["row"], s["start"]:s["end"]].tolist()==ds[s["id"]]["input_ids"]
    assert replay(c.folder, weights=True).exact
    if name in ("free", "embeddings", "noise"): assert replay(c.folder, weights=False).exact


@pytest.mark.parametrize("kw,why", [(dict(spike_weights="1KB"), "spike_weights"), (dict(lisa_n_layers=1, lisa_step_interval=2), "not trained"), (LORA | dict(relora_steps=3, relora_warmup_steps=1), "not trained")], ids=["large", "lisa", "relora"])
def test_without_weights_a_checkpoint_will_do(data, tmp_path, kw, why, caplog):
    cfg = config(data, tmp_path/"out", save_strategy="steps", save_steps=2, **kw)
    c, _ = kept(cfg, 6)
    assert c.facts["weights"] is None and why in c.facts["why_no_weights"] and [p.name for p in checkpoints(tmp_path/"out")]==["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    with pytest.raises(UserError, match="has no weights"): replay(c.folder, weights=True)
    with caplog.at_level("INFO", "tuneforge"): assert replay(c.folder).exact
    assert "checkpoint-4" in caplog.text, "the last one before the step"
    (tmp_path/"out"/"checkpoint-4"/"model.safetensors" if (tmp_path/"out"/"checkpoint-4"/"model.safetensors").exists() else tmp_path/"out"/"checkpoint-4"/"adapter_model.safetensors").write_bytes(b"")
    assert replay(c.folder).exact # from checkpoint-2
    assert [p.name for p in c.folder.iterdir() if p.is_dir()]==[]


def test_a_stream(data, tmp_path):
    cfg = load_config(dict(base_model="tiny:llama?num_hidden_layers=1&attention_dropout=0.1", pretraining_dataset=[dict(path=str(data[0]), text_column="output")], max_steps=30, sample_packing=True, pretrain_multipack_buffer_size=24,
            sequence_len=64, micro_batch_size=1, learning_rate=1e-3, output_dir=str(tmp_path/"out"), save_strategy="no", float32=True, sdp_attention=True))
    c, _ = kept(cfg, 20)
    assert sum(s["loss"]*s["trained"] for s in c.samples)/c.facts["trained_tokens"]==pytest.approx(c.facts["loss"], rel=1e-5)
    assert "place" not in c.samples[0] and replay(c.folder).exact and replay(c.folder, weights=False).exact


def test_a_step_that_is_no_number(data, tmp_path):
    "It is kept once for an episode, with the weights that it did not reach"
    train(config(data, tmp_path/"out", spike_threshold=None), [Poison({3, 4, 8}, math.nan)])
    found = {p.name for p in (tmp_path/"out"/"spikes").iterdir()}
    assert found=={"step-3", "step-8"}
    c = Capsule.load(tmp_path/"out"/"spikes"/"step-8")
    assert c.facts["grad_norm"]=="nan" and all(w.isfinite().all() for w in load_file(c.folder/"weights.safetensors").values()) and replay(c.folder).exact
    json.loads((c.folder/"capsule.json").read_text(), parse_constant=pytest.fail) # no NaN, which is no JSON


class Break(TrainerCallback):
    "From a step on, a weight of the output layer is no number"
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step+1==self.step: model.lm_head.weight.data[5, 0] = math.nan


def test_losses_that_are_no_number(data, tmp_path):
    "A sample whose loss is none is the worst, and comes out again"
    c, _ = kept(config(data, tmp_path/"out"), 3, [Break(3)])
    assert {s["loss"] for s in c.samples}=={"nan"} and "nan" in repr(c) and replay(c.folder).exact
    from rich.console import Console
    Console(width=80, file=open("/dev/null", "w")).print(replay(c.folder))


def test_what_cannot_be_kept_costs_no_run(data, tmp_path, caplog):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"spikes").write_text("a file in the way")
    r = train(config(data, tmp_path/"out"), [Poison({3}, math.nan)])
    assert "no capsule of step 3 was kept: FileExistsError" in caplog.text or "NotADirectoryError" in caplog.text
    assert r.metrics["steps"]>3


@pytest.mark.slow
def test_the_watch_goes_on_after_a_resume(data, tmp_path):
    kw = dict(save_strategy="steps", save_steps=3, spike_threshold=1., spike_capsules=99)
    train(config(data, tmp_path/"whole", **kw))
    with pytest.raises(UserError): train(config(data, tmp_path/"out", **kw), [Bomb(7)])
    train(config(data, tmp_path/"out", resume="auto", **kw))
    a, b = ({p.name: json.loads((p/"capsule.json").read_text())["why"] for p in (tmp_path/n/"spikes").iterdir()} for n in ("whole", "out"))
    assert a==b and len(a)>3


class Bomb(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==self.step: raise UserError("bomb")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="is no capsule"): replay(tmp_path)
    code, _, err = command("replay", tmp_path)
    assert code==2 and "is no capsule" in err


# ---- two ranks

@pytest.mark.slow
def test_two_ranks(data, tmp_path):
    "A gradient that is no number on one rank only reaches neither's weights; the capsule has the samples of both, and one process computes both again"
    base = json.loads(config(data, tmp_path/"x", **LORA, max_steps=6).model_dump_json(exclude_unset=True))
    (tmp_path/"c.yml").write_text(json.dumps(base))
    phase = lambda name, **kw: dict(config=str(tmp_path/"c.yml"), ranks=2, overrides=["--output-dir", str(tmp_path/name)]) | kw
    bad, skipped, never = forks([phase("bad", nan=[1, 4]), phase("skipped", skip=4), phase("never")], tmp_path)
    assert bad["codes"]==skipped["codes"]==never["codes"]==[0, 0], bad["said"][-2000:]
    a, b, c = (load_file(tmp_path/n/"adapter_model.safetensors") for n in ("bad", "skipped", "never"))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    before, after = ([l.split()[1:] for l in bad["said"].splitlines() if l.startswith(w)] for w in ("BEFORE", "AFTER"))
    assert len(before)==len(after)==2 and len({h for _, h in before+after})==1, "both ranks, before and after the step, bit by bit"
    capsule = Capsule.load(tmp_path/"bad"/"spikes"/"step-4")
    assert {s["rank"] for s in capsule.samples}=={0, 1} and len({s["id"] for s in capsule.samples})==len(capsule.samples)==8 and capsule.facts["world_size"]==2
    assert capsule.facts["trained_tokens"]==sum(s["trained"] for s in capsule.samples)
    assert replay(capsule.folder).exact
    with pytest.raises(UserError, match="that had 2 ranks, not 1"): replay(capsule.folder, weights=False)


# ---- optimizers that step in the backward pass

@pytest.mark.parametrize("kw", [dict(optimizer="lomo"), dict(optimizer="galore_adamw_layerwise", optim_target_modules=["attn", "mlp"])], ids=["lomo", "galore"])
def test_fused_optimizers_stop_before_the_weight(data, tmp_path, kw):
    "A gradient that is no number ends the run; no weight is touched by it, and nothing is saved"
    if kw["optimizer"].startswith("galore"): pytest.importorskip("galore_torch")
    else: pytest.importorskip("lomo_optim")
    seen = {}
    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs): seen["model"] = model
    cfg = config(data, tmp_path/"out", gradient_accumulation_steps=1, learning_rate=1e-3, **kw)
    with pytest.raises(UserError, match="steps in the backward pass"): train(cfg, [Keep(), Break(3)])
    bad = [n for n, p in seen["model"].named_parameters() if not p.isfinite().all()]
    assert bad in (["lm_head.weight"], ["model.embed_tokens.weight"]), "only what the test broke"
    assert not (tmp_path/"out"/"model.safetensors").exists()
    train(config(data, tmp_path/"fine", gradient_accumulation_steps=1, learning_rate=1e-3, max_steps=3, **kw))


# ---- options

def test_how_many_steps_may_be_left_out(data, tmp_path):
    with pytest.raises(UserError, match="2 steps in a row, up to 4"): train(config(data, tmp_path, max_skipped_steps=2), [Poison({3, 4, 5, 6}, math.nan)])


class Nap(TrainerCallback):
    "Waits in each step until the watch has seen it once, then for another four times as long; the one stack of a step may be taken by a pause of the machine"
    def __init__(self, file, longest): self.file, self.longest = file, longest
    def seen(self): return self.file.is_file() and "nap_here" in self.file.read_text()
    def on_step_end(self, args, state, control, **kwargs):
        if not self.seen(): self.nap_here()
    def nap_here(self):
        until = time.monotonic()+self.longest
        while not self.seen() and time.monotonic()<until: time.sleep(0.05)
        if self.seen(): time.sleep(1.2)


def test_when_stacks_are_written(data, tmp_path):
    for name, seconds, longest in (("a", 0.3, 3), ("b", None, 0.6)): train(config(data, tmp_path/name, max_steps=4, stall_seconds=seconds), [Nap(tmp_path/name/"stalled.txt", longest)])
    stacks = (tmp_path/"a"/"stalled.txt").read_text().split("no step has ended")
    assert ["thread MainThread" in s for s in stacks if "nap_here" in s]==[True], "once for each stall"
    assert not (tmp_path/"b"/"stalled.txt").exists()


# ---- the hardest rows

def test_the_hardest_rows_by_brute_force(data, tmp_path):
    "Row by row, by the model's own loss; with file and line, on the command line, too"
    cfg = config(data, tmp_path/"out", max_steps=30, val_set_size=0.2)
    model = train(cfg).model.eval()
    tok = load_tokenizer(cfg)
    prepared = prepare_data(cfg, tok)
    for split, ds in (("train", prepared.train), ("valid", prepared.valid)):
        want = []
        for r in ds:
            with torch.no_grad(): want.append(model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.item())
        hard = hardest(model, tok, prepared, cfg, 7, split, 4)
        assert [s["id"] for s in hard.rows]==np.argsort(-np.array(want), kind="stable")[:7].tolist()
        assert [s["loss"] for s in hard.rows]==pytest.approx(sorted(want, reverse=True)[:7], rel=1e-4)
        for s in hard.rows:
            file, line = s["place"].rsplit(":", 1)
            assert json.loads(Path(file).read_text().splitlines()[int(line)-1])["output"] in s["text"]
        if split=="train": assert hard.rows[0]["place"].endswith("b.jsonl:16")
    scores = evaluate(cfg, 2, train_rows=5, rank=3)
    assert [h.split for h in scores.hardest]==["valid", "train"] and "b.jsonl:16" in repr(scores)
    kept = json.loads((tmp_path/"out"/"hardest.json").read_text())
    assert [len(k["rows"]) for k in kept]==[3, 3] and kept[1]["rows"][0]["place"].endswith("b.jsonl:16")
    with pytest.raises(UserError, match="no rows to rank"): evaluate(cfg.replace(val_set_size=0, do_bench_eval=True, bench_dataset=str(write_jsonl(tmp_path/"q.jsonl", [dict(question="?", choices=["a", "b"], answer=0)]))), rank=3)


def test_pieces_of_long_rows_and_several_files(tmp_path):
    "Rows cut into samples, two files in an entry, weights: each sample's row holds its text"
    village = Village()
    for n in "ab": write_jsonl(tmp_path/f"{n}.jsonl", [dict(text=" ".join(r["text"] for r in village.texts(2))+f" {n}{i}") for i in range(4)])
    cfg = load_config(dict(base_model="tiny:llama", datasets=[dict(path=str(tmp_path/"a.jsonl"), type="completion", weight=2), dict(path=str(tmp_path/"b.jsonl"), type="completion", weight=1)], excess_length_strategy="split",
        sequence_len=64, dataset_prepared_path=str(tmp_path/"prepared"), learning_rate=1e-3, output_dir=str(tmp_path/"out")))
    tok = load_tokenizer(cfg)
    prepared = prepare_data(cfg, tok)
    found = sample_places(prepared, cfg, list(range(len(prepared.train))))
    assert len(found)>20 and {Path(f["dataset"]).name for f in found}=={"a.jsonl", "b.jsonl"}
    for f, r in zip(found, prepared.train):
        file, line = f["place"].rsplit(":", 1)
        assert tok.decode(r["input_ids"], skip_special_tokens=True).strip() in json.loads(Path(file).read_text().splitlines()[int(line)-1])["text"]
