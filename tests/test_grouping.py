"The loss and the gradient of a step depend on its tokens alone: not on rows, micro-batches, packing or the number of ranks"
import json, sys
import pytest, torch
from tuneforge.all import *
from tests.tools import ROOT, run, torchrun, write_jsonl

STEP = """
import json, os, sys, torch
from transformers import TrainerCallback
from tuneforge.all import *

class Keep(TrainerCallback):
    "The gradient that the optimizer is about to see, and the loss in full precision"
    def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
        if os.environ.get("RANK", "0")!="0": return
        m = model.module if hasattr(model, "module") else model
        torch.save({k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}, sys.argv[2])

for name, kw in json.loads(sys.argv[1]).items():
    keep = Keep()
    sys.argv[2] = name
    r = train(load_config(kw), callbacks=[keep])
    if os.environ.get("RANK", "0")=="0": print("LOSS", name, repr(r.history[0]["loss"]), r.metrics["steps"], flush=True)
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    d = tmp_path_factory.mktemp("grouping")
    village = Village()
    write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:6])[:48])
    (d/"step.py").write_text(STEP)
    return d


def config(d, out, **kw):
    return dict(base_model="tiny:llama", datasets=[dict(path=str(d/"train.jsonl"), type="alpaca")], dataset_prepared_path=str(d/"prepared"), output_dir=str(d/out), sequence_len=256, learning_rate=1e-9,
        save_strategy="no", logging_steps=1, lr_scheduler="constant", warmup_steps=0, max_steps=1, max_grad_norm=0, weight_decay=0) | kw


# all 48 samples in one step; packed, they fill 15 bins, which 16 rows hold
ONE = dict(rows=dict(micro_batch_size=48), accumulated=dict(micro_batch_size=6, gradient_accumulation_steps=8), single=dict(gradient_accumulation_steps=48), grouped=dict(micro_batch_size=12, gradient_accumulation_steps=4, group_by_length=True),
    flat=dict(micro_batch_size=12, gradient_accumulation_steps=4, batch_flattening=True), packed=dict(micro_batch_size=16, sample_packing=True), tight=dict(micro_batch_size=4, gradient_accumulation_steps=4, sample_packing=True, packing="tight"),
    few=dict(micro_batch_size=8, gradient_accumulation_steps=2, sample_packing=True, sample_packing_bin_size=3, pad_to_multiple_of=7), checkpointed=dict(micro_batch_size=8, gradient_accumulation_steps=2, sample_packing=True, gradient_checkpointing=True))
RANKS = {2: dict(rows=dict(micro_batch_size=24), packed=dict(micro_batch_size=4, gradient_accumulation_steps=2, sample_packing=True)), 4: dict(single=dict(gradient_accumulation_steps=12), packed=dict(micro_batch_size=4, sample_packing=True))}


def step(d, ranks, cases):
    "Loss and gradients of the first step in each case"
    jobs = {str(d/f"{ranks}-{n}.pt"): config(d, f"out{ranks}-{n}", **kw) for n, kw in cases.items()}
    launcher = [sys.executable] if ranks==1 else torchrun(ranks)
    res = run(*launcher, d/"step.py", json.dumps(jobs), "-", env=dict(PYTHONPATH=str(ROOT)))
    assert res.returncode==0, res.stderr[-3000:]
    said = {l.split()[1]: l.split()[2:] for l in res.stdout.splitlines() if l.startswith("LOSS")}
    assert said.keys()==jobs.keys() and {s for _, s in said.values()}=={"1"}
    return {f: (float(said[f][0]), torch.load(f, weights_only=True)) for f in jobs}


def apart(d):
    "The same step in a bare loop: one sample at a time, no padding, in double precision"
    cfg = load_config(config(d, "bare"))
    tok = load_tokenizer(cfg)
    ds = prepare_data(cfg, tok).train
    model = load_model(cfg, tok).double()
    n = sum(l!=IGNORE for s in ds for l in s["labels"][1:])
    total = 0.
    for s in ds:
        logits = model(input_ids=torch.tensor([s["input_ids"]])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(s["labels"][1:]), ignore_index=IGNORE, reduction="sum")/n
        loss.backward()
        total += loss.item()
    return total, {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.slow # `test_loss_and_gradient_do_not_depend_on_grouping` and `test_two_ranks_are_one` are its quick siblings
def test_grouping_changes_nothing(setup):
    loss, grads = apart(setup)
    size = sum((g**2).sum() for g in grads.values())**0.5
    seen = {}
    for ranks, cases in {1: ONE, **RANKS}.items(): seen |= step(setup, ranks, cases)
    assert len(seen)==len(ONE)+4
    for name, (l, g) in seen.items():
        assert l==pytest.approx(loss, rel=1e-6), name
        assert g.keys()==grads.keys()
        off = sum(((g[k].double()-grads[k])**2).sum() for k in grads)**0.5
        assert off<1e-6*size, (name, off/size)
