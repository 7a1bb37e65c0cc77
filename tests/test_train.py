"The trainer against a bare PyTorch loop, against itself, and against other ways to group the same tokens"
import json, shutil, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from tuneforge.all import *
from tuneforge.models import free_memory
from tuneforge.train import set_up
from tests.tools import ROOT, run, torchrun, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    village = Village()
    return write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:6]))


def config(data, out, **kw):
    base = dict(base_model="tiny:llama", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out),
        sequence_len=256, learning_rate=1e-3, save_strategy="no", logging_steps=1, lr_scheduler="constant", warmup_steps=0)
    return load_config(base | kw)


def losses(r): return [h["loss"] for h in r.history if "loss" in h]


LORA = dict(adapter="lora", lora_r=4, lora_target_linear=True)


def test_same_as_a_bare_loop(data, tmp_path):
    cfg = config(data, tmp_path, micro_batch_size=3, gradient_accumulation_steps=2, max_steps=5, max_grad_norm=0, seed=7)
    got = losses(train(cfg))
    tok = load_tokenizer(cfg)
    ds = prepare_data(cfg, tok).train
    torch.manual_seed(7)
    model = load_model(cfg, tok).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    plan = plan_epoch([len(o) for o in ds["input_ids"]], 256, 3, 1, 2, seed=7, way="single")
    want = []
    for step in plan.order[:5]:
        rows = [plan.bin(i)[0] for i in step.ravel()]
        n = sum(l!=IGNORE for i in rows for l in ds[i]["labels"][1:])
        total = 0.
        for i in rows: # one sample at a time, without any padding
            ids, labels = (torch.tensor([ds[i][k]]) for k in ("input_ids", "labels"))
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            loss = -sum(logp[j, t] for j, t in enumerate(labels[0, 1:]) if t!=IGNORE)/n
            loss.backward()
            total += loss.item()
        opt.step()
        opt.zero_grad()
        want.append(total)
    assert got==pytest.approx(want, rel=1e-4)


def test_two_runs_are_bit_identical(data, tmp_path):
    kw = dict(micro_batch_size=2, sample_packing=True, max_steps=4, lora_dropout=0.1, **LORA)
    a, b = (train(config(data, tmp_path/n, **kw)) for n in "ab")
    assert losses(a)==losses(b)
    x, y = (load_file(tmp_path/n/"adapter_model.safetensors") for n in "ab")
    assert x.keys()==y.keys() and all(torch.equal(x[k], y[k]) for k in x)


GROUPINGS = {"one batch": dict(micro_batch_size=54), "accumulated": dict(micro_batch_size=9, gradient_accumulation_steps=6), "single rows": dict(gradient_accumulation_steps=54),
    "packed": dict(micro_batch_size=16, sample_packing=True), "packed, accumulated": dict(micro_batch_size=2, gradient_accumulation_steps=8, sample_packing=True)}


def test_one_process_is_one_device(data, tmp_path, monkeypatch, caplog):
    "Where two GPUs are seen, transformers would wrap the model in DataParallel, and double the loss"
    kw = dict(micro_batch_size=2, max_steps=2)
    alone, init = losses(train(config(data, tmp_path/"a", **kw))), TrainingArguments.__post_init__
    def two(self):
        init(self)
        self._n_gpu = 2
    monkeypatch.setattr(TrainingArguments, "__post_init__", two)
    assert losses(train(config(data, tmp_path/"b", **kw)))==alone
    assert "2 GPUs are here, and one process trains on one of them: `torchrun --nproc-per-node 2" in caplog.text


def test_nothing_of_an_earlier_run_is_taken_for_this_one(data, tmp_path):
    "An adapter, then the whole model; an adapter on a changed base, then one on the base: transformers and PEFT load what was trained last"
    kw, out = dict(max_steps=2, micro_batch_size=2, base_model="tiny:llama?num_hidden_layers=1"), tmp_path/"out"
    ids = torch.arange(20, 40)[None]
    def same(run, model): return torch.equal(run.model.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    train(config(data, out, **LORA | kw | dict(relora_steps=3, relora_warmup_steps=1, relora_anneal_steps=1, max_steps=4)))
    assert (out/"adapted_base.safetensors").is_file()
    assert same(train(config(data, out, **LORA | kw)), load_adapter(load_model(config(data, out, **kw)), out)) and not (out/"adapted_base.safetensors").exists()
    (out/"mine.txt").write_text("notes")
    assert same(train(config(data, out, **kw)), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    assert not list(out.glob("adapter_*")) and (out/"mine.txt").is_file() and sorted(p.name for p in out.rglob("adapter*.safetensors"))==["adapter_model.safetensors"]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("says, sampled", [(dict(temperature=0.6, top_p=0.9), True), (dict(length_penalty=2.0), False)])
def test_a_base_whose_wishes_cannot_be_saved(data, tmp_path, adapter, says, sampled):
    "Early Llama 2: a temperature, and no `do_sample`"
    shutil.copytree(resolve_model("tiny:llama?num_hidden_layers=1"), tmp_path/"base")
    f = tmp_path/"base"/"generation_config.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | says))
    train(config(data, tmp_path/"out", base_model=str(tmp_path/"base"), max_steps=2, save_strategy="steps", save_steps=1, **adapter))
    kept = json.loads((tmp_path/"out"/"generation_config.json").read_text())
    assert kept.get("do_sample", False)==sampled and all((kept.get(k)==v)==sampled for k, v in says.items()) and kept["eos_token_id"]
    with pytest.raises(UserError, match="`output_dir` is the folder of `base_model`"): train(config(data, tmp_path/"base", base_model=str(tmp_path/"base"), max_steps=2))


def test_loss_and_gradient_do_not_depend_on_grouping(data, tmp_path):
    "All 54 samples in one optimizer step, grouped in five ways"
    seen = {}
    for name, kw in GROUPINGS.items():
        r = train(config(data, tmp_path/name, max_steps=1, **kw))
        assert r.metrics["steps"]==1
        seen[name] = (r.history[0]["loss"], r.history[0]["grad_norm"])
    loss, norm = seen["one batch"]
    for name, got in seen.items(): assert got==pytest.approx((loss, norm), rel=1e-5), name


def test_steps_are_known_before(data, tmp_path):
    cfg = config(data, tmp_path, micro_batch_size=4, num_epochs=1.5)
    plans, steps = plan_run(cfg, [len(o) for o in prepare_data(cfg, load_tokenizer(cfg)).train["input_ids"]])
    r = train(cfg)
    assert r.metrics["steps"]==steps==21
    assert len(plans)==2


@pytest.mark.parametrize("kw, epochs", [(dict(num_epochs=1.5), 1.5), (dict(num_epochs=3, max_steps=4), None), (dict(max_steps=9), None), (dict(num_epochs=0.3), 0.3)], ids=str)
def test_the_steps_shown_are_the_steps_run(data, tmp_path, kw, epochs):
    "In the plan, in the run, and in the schedule, which reaches zero one step after the last"
    cfg = config(data, tmp_path, micro_batch_size=2, gradient_accumulation_steps=2, sample_packing=True, lr_scheduler="linear", **kw)
    plans, steps = plan_run(cfg, sample_lengths(prepare_data(cfg, load_tokenizer(cfg)).train))
    assert steps==(kw.get("max_steps") or -(-int(epochs*10)*plans[0].steps//10))
    r = train(cfg)
    rates = [h["learning_rate"] for h in r.history if "loss" in h]
    assert r.metrics["steps"]==steps==len(rates) and r.plan.startswith(f"{steps} step{'s'*(steps>1)} ")
    assert rates==pytest.approx([1e-3*(1-i/steps) for i in range(steps)])
    assert r.metrics["tokens"]==sum(RunPlan(plans, steps).step_tokens)


def test_resuming_is_not_having_stopped(data, tmp_path):
    kw = dict(micro_batch_size=2, sample_packing=True, num_epochs=2, save_strategy="steps", save_steps=3, lora_dropout=0.1, lr_scheduler="cosine", **LORA)
    whole = train(config(data, tmp_path/"whole", **kw))
    assert whole.metrics["steps"]>8
    for step in (3, 6):
        resumed = train(config(data, tmp_path/f"from{step}", resume_from_checkpoint=str(tmp_path/"whole"/f"checkpoint-{step}"), **kw))
        assert losses(resumed)[step:]==losses(whole)[step:]
        x, y = (load_file(tmp_path/n/"adapter_model.safetensors") for n in ("whole", f"from{step}"))
        assert all(torch.equal(x[k], y[k]) for k in x)


def token_mean(model, ds):
    "Mean loss of the trained tokens of rows, one row and one token after the other"
    total, n = 0., 0
    for s in ds:
        ids, labels = torch.tensor([s["input_ids"]]), torch.tensor(s["labels"])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for j, t in enumerate(labels[1:]):
            if t!=IGNORE: total, n = total-logp[j, t].item(), n+1
    return total/n


def test_evaluation_happens_and_is_a_token_mean(data, tmp_path):
    r = train(config(data, tmp_path, micro_batch_size=4, val_set_size=0.2, num_epochs=2, eval_batch_size=3))
    evals = [h for h in r.history if "eval_loss" in h]
    assert len(evals)>=2
    assert r.metrics["eval_loss"]==pytest.approx(token_mean(r.model, prepare_data(config(data, tmp_path, val_set_size=0.2), r.tokenizer).valid), rel=1e-4)


def test_a_finished_run_is_evaluated_on_what_its_config_names(data, tmp_path):
    "Though its log has an evaluation of the last step, on other rows"
    rows = [json.loads(l) for l in data.read_text().splitlines()]
    tests = [write_jsonl(tmp_path/f"{n}.jsonl", [r | dict(output=f"{r['output']} {n}") for r in rows[:5]]) for n in ("one", "other")]
    cfg = lambda test: config(data, tmp_path/"out", test_datasets=[dict(path=str(test), type="alpaca")], max_steps=2, save_strategy="steps", save_steps=2, eval_steps=1, resume="auto")
    first, again = (train(cfg(t), allow_drift=True) for t in tests)
    assert [h["step"] for h in first.history if "eval_loss" in h]==[1, 2] # the last step once
    for r, t in ((first, tests[0]), (again, tests[1])):
        assert r.metrics["eval_loss"]==pytest.approx(token_mean(r.model, prepare_data(cfg(t), r.tokenizer).valid), rel=1e-4)
    assert abs(again.metrics["eval_loss"]/first.metrics["eval_loss"]-1)>1e-3


def test_nothing_is_pickled(data, tmp_path):
    train(config(data, tmp_path, max_steps=2, micro_batch_size=2, save_strategy="steps", save_steps=1))
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert "training_args.bin" not in names and "model.safetensors" in names
    assert {n for n in names if n.endswith((".bin", ".pkl", ".pt", ".pth"))}<={"optimizer.pt", "scheduler.pt", "rng_state.pth"} # read with weights_only


def test_a_hopeless_run_stops(data, tmp_path):
    with pytest.raises(UserError, match=f"loss_watchdog_threshold.* at step 3. Neither a checkpoint nor a model was written to {tmp_path}. Try a lower `learning_rate`.*tuneforge preview"): train(config(data, tmp_path, max_steps=20, loss_watchdog_threshold=1.0))
    with pytest.raises(UserError, match=f"The last checkpoint is {tmp_path}/b/checkpoint-2, and no model was written"): train(config(data, tmp_path/"b", max_steps=20, loss_watchdog_threshold=1.0, save_strategy="steps", save_steps=1))
    assert [p.name for p in checkpoints(tmp_path/"b")][-1]=="checkpoint-2" and not (tmp_path/"b"/"model.safetensors").exists()


def test_tf32_is_for_one_run(data, tmp_path, monkeypatch):
    "As on a GPU that has it: two runs of one process, of which the first asks for it"
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("tuneforge.precision._tf32", lambda opts, device: opts.tf32)
    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs): seen.append(torch.backends.fp32_precision)
    before, seen = torch.backends.fp32_precision, []
    for kw in (dict(tf32=True), {}): train(config(data, tmp_path, max_steps=1, **kw), [Look()])
    assert seen==["tf32", before] and torch.backends.fp32_precision==before!="tf32"


def test_a_rank_asks_for_its_own_gpu(data, tmp_path, monkeypatch):
    "Before anything else is done: torch means the first one as long as nobody says which"
    now, asked = [0], []
    for name, f in dict(is_available=lambda: True, set_device=lambda i: now.__setitem__(0, i), current_device=lambda: now[0], mem_get_info=lambda i: asked.append(i) or ((20, 80) if i==0 else (60, 80))).items(): monkeypatch.setattr(torch.cuda, name, f)
    def first(cfg): raise StopIteration(free_memory("cuda"))
    monkeypatch.setattr("tuneforge.train.optimizer_name", first)
    for rank, free in ((None, 20), ("1", 60)):
        if rank: monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(StopIteration) as e: set_up(config(data, tmp_path))
        assert e.value.value==free and asked.pop()==int(rank or 0)


def test_packing_is_refused_where_it_leaks(data, tmp_path):
    with pytest.raises(LeakError, match="sample_packing.*ALiBi"): train(config(data, tmp_path/"out", base_model="tiny:bloom", sample_packing=True))
    assert not (tmp_path/"out").exists()
    off = dict(sample_packing=True, packing_check="off", max_steps=1)
    assert train(config(data, tmp_path/"out", base_model="tiny:jamba", **off)).metrics["steps"]==1
    with pytest.raises(UserError, match="takes none"): train(config(data, tmp_path/"none", base_model="tiny:bloom", **off))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(data, tmp_path, bits):
    "Evaluations in between neither change the base nor spoil the gradient, and the merge holds"
    kw = {f"load_in_{bits}bit": True} | LORA | dict(adapter="qlora" if bits==4 else "lora")
    cfg = config(data, tmp_path, micro_batch_size=8, num_epochs=4, val_set_size=0.1, evals_per_epoch=2, **(kw | dict(learning_rate=1e-2)))
    r = train(cfg)
    assert losses(r)[-1]<losses(r)[0]-0.5
    fresh = dict(load_model(cfg, r.tokenizer).named_parameters())
    kept = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in r.model.named_parameters()}
    same = [torch.equal(p, kept[n]) for n, p in fresh.items() if p.dtype in (torch.uint8, torch.int8)]
    assert len(same)==14 and all(same)
    folder, d = merge(cfg)
    assert d.kl<1e-5


RANKS = """
import gc, json, os, sys
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import TrainerCallback
from tuneforge.all import *
class Look(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        for o in gc.get_objects():
            if isinstance(o, DDP): os.write(1, f"DDP {o.bucket_bytes_cap} {o.broadcast_buffers} {o.find_unused_parameters} {args.ddp_timeout}\\n".encode()) # in one go: two processes write
r = train(load_config(sys.argv[1], ["--gradient-accumulation-steps", sys.argv[2], "--output-dir", sys.argv[3]]), [Look()])
if r.history and os.environ.get("RANK", "0")=="0": print("LOSSES", json.dumps([(h["loss"], h["grad_norm"]) for h in r.history if "loss" in h]))
"""


def test_two_ranks_are_one(data, tmp_path):
    "Two gloo processes and one process with twice the accumulation: the same steps, losses and gradients"
    (tmp_path/"run.py").write_text(RANKS)
    cfg = dict(base_model="tiny:llama", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(tmp_path/"prepared"), sequence_len=256,
        learning_rate=1e-3, save_strategy="no", logging_steps=1, sample_packing=True, micro_batch_size=2, num_epochs=2,
        ddp_timeout=77, ddp_bucket_cap_mb=3, ddp_broadcast_buffers=False, ddp_find_unused_parameters=True)
    (tmp_path/"c.yml").write_text(json.dumps(cfg))
    one = [(h["loss"], h["grad_norm"]) for h in train(load_config(tmp_path/"c.yml", gradient_accumulation_steps=2, output_dir=str(tmp_path/"one"))).history if "loss" in h]
    res = run(*torchrun(2), tmp_path/"run.py", tmp_path/"c.yml", 1, tmp_path/"two", env=dict(PYTHONPATH=str(ROOT)))
    assert res.returncode==0, res.stderr[-3000:]
    two = json.loads(next(l for l in res.stdout.splitlines() if l.startswith("LOSSES"))[7:])
    assert res.stdout.count("DDP 3145728 False True 77")==2, "as the config says, on both"
    assert len(one)==len(two)>3
    assert [x for p in two for x in p]==pytest.approx([x for p in one for x in p], rel=1e-4)


def test_new_tokens_are_trained_with_an_adapter(data, tmp_path):
    new = dict(special_tokens=dict(eos_token="<|the end|>"), micro_batch_size=8, max_steps=3, **LORA)
    cfg = config(data, tmp_path/"a", **new)
    tok = load_tokenizer(cfg)
    before = load_model(cfg, tok, untrained_tokens(cfg, tok)).get_input_embeddings().weight
    train(cfg)
    after = load_model(ModelOptions(base_model=str(merge(cfg)[0]))).get_input_embeddings().weight
    assert [i for i in range(len(tok)) if not torch.equal(after[i], before[i])]==[tok.eos_token_id]
    r = train(config(data, tmp_path/"b", **(new | dict(special_tokens=dict(pad_token="<|nothing|>")))))
    assert r.tokenizer.pad_token_id==len(r.tokenizer)-1
    cfg = config(data, tmp_path/"c", lora_modules_to_save=["embed_tokens", "lm_head"], **new)
    before = load_model(cfg, load_tokenizer(cfg)).get_output_embeddings().weight
    r = train(cfg)
    folder, d = merge(cfg)
    after = load_model(ModelOptions(base_model=str(folder))).get_output_embeddings().weight
    assert d.kl<1e-5 and not torch.equal(after[-1], before[-1]) # the end is predicted, never read


def test_four_bits_cost_what_they_stand_for():
    "The operations of a token, of a base that is frozen either way"
    cost = {}
    for bits in ({}, dict(adapter="qlora", load_in_4bit=True, lora_target_linear=True)):
        model = load_model(load_config(dict(base_model="tiny:llama", learning_rate=1e-3, datasets=[dict(path="x.jsonl")], **bits)))
        cost[len(bits)] = flops_per_token(model.requires_grad_(False))
    assert cost[0]==cost[3]>0
