"As many rows at a time as fit: nothing else of the run changes, and what does not fit is found before the first step"
import json, os, signal
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from transformers import TrainerCallback
from tuneforge.all import *
from tuneforge.fit import heaviest, hold_back, next_rows, with_rows
from tests.tools import computed, forks, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    village = Village()
    return write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:6]))


def keys(data, out, **kw):
    base = dict(base_model="tiny:llama?attention_dropout=0.2&num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out), sequence_len=128, learning_rate=1e-3,
        micro_batch_size=4, max_steps=4, save_strategy="no", logging_steps=1, auto_find_batch_size=True, seed=5)
    return base | kw


def config(*args, **kw): return load_config(keys(*args, **kw))


class Small(TrainerCallback):
    "A model with memory for so many rows, which are counted"
    def __init__(self, most, error=torch.OutOfMemoryError): self.most, self.error, self.seen = most, error, []
    def on_init_end(self, args, state, control, model=None, **kw): model.register_forward_pre_hook(self.refuse, with_kwargs=True)
    def refuse(self, model, args, kwargs):
        self.seen.append(len(kwargs["input_ids"]))
        if self.seen[-1]>self.most: raise self.error(f"no memory for {self.seen[-1]} rows")


class Stop(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kw):
        if state.global_step==self.step: os.kill(os.getpid(), signal.SIGTERM)


def losses(r): return [h["loss"] for h in r.history if "loss" in h]
def weights(folder): return {k: t for f in sorted(Path(folder).glob("*.safetensors")) for k, t in load_file(f).items()}
def same(a, b): return a.keys()==b.keys() and len(a)>0 and all(torch.equal(a[k], b[k]) for k in a)


# Rows

@given(st.integers(2, 10_000))
def test_the_next_number_of_rows(n):
    m = next_rows(n)
    assert n%m==0 and m<=n/2 and not any(n%k==0 for k in range(m+1, n//2+1))


@given(st.data())
@settings(max_examples=60)
def test_steps_hold_the_same_rows(data):
    "The micro-batches of the smaller plan are pieces of the larger one's, on any number of ranks; the heaviest is found as by looking at each"
    lengths = np.array(data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=80)))
    micro, acc, world = (data.draw(st.integers(1, n)) for n in (12, 3, 3))
    rows = data.draw(st.sampled_from([n for n in range(1, micro+1) if micro%n==0]))
    way = data.draw(st.sampled_from(["single", "by_length", "fill", "tight"]))
    plans = [[plan_epoch(lengths, 60, m, world, a, seed=1, epoch=e, way=way) for e in (0, 1)] for m, a in ((micro, acc), (rows, acc*micro//rows))]
    for p, q in zip(*plans):
        assert np.array_equal(p.sample_ids, q.sample_ids) and np.array_equal(p.bin_offsets, q.bin_offsets)
        assert np.array_equal(p.order.reshape(p.steps, world, -1), q.order.reshape(q.steps, world, -1))
    batches = [[sum(lengths[s] for s in b) for b in batch] for p in plans[1] for r in range(world) for batch in p.batches(r)]
    found = [[sum(lengths[s] for s in b) for b in next(p.batches())] for p in heaviest(plans[0], rows)]
    assert all(len(f)==rows for f in found) and len(found)<=2
    for size in (max, sum): assert max(map(size, found))==max(map(size, batches))


# Runs

LORA = dict(adapter="lora", lora_r=4, lora_dropout=0.2, lora_target_linear=True)
RUNS = dict(full={}, accumulated=dict(gradient_accumulation_steps=2, float32=True), rows_of_a_step=dict(batch_size=8), packed=dict(sample_packing=True, max_steps=2, **LORA), pieces=dict(chunked_cross_entropy=True, gradient_checkpointing=True, **LORA),
    evaluated=dict(val_set_size=0.1, eval_steps=2, neftune_noise_alpha=5, optimizer="schedule_free_adamw", lr_scheduler="constant"), half=dict(bf16=True))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow]*(n not in ("accumulated", "packed"))) for n in RUNS])
def test_it_is_the_run_with_the_number_that_fits(data, tmp_path, name, caplog):
    "Bit for bit, dropout and noise and all; and, without them, to rounding the run that was asked for"
    kw = RUNS[name]
    cfg = config(data, tmp_path/"found", **kw)
    found = train(cfg, [small := Small(1)])
    assert small.seen[:3]==[4, 2, 1] and found.config["micro_batch_size"]==1 and f"4 rows at a time do not fit into memory, 1 do" in caplog.text
    number = 4*(2 if name in ("accumulated", "rows_of_a_step") else 1)
    assert f"`gradient_accumulation_steps` {number}" in caplog.text
    given = with_rows(cfg, 1).replace(output_dir=str(tmp_path/"given"), auto_find_batch_size=False)
    assert (given.batch_size or given.gradient_accumulation_steps)==number
    again = train(given)
    assert computed(found.history)==computed(again.history) and same(weights(tmp_path/"found"), weights(tmp_path/"given"))
    said = json.loads((tmp_path/"found"/"run.json").read_text())
    assert said["config"]["micro_batch_size"]==1 and said["rows_per_step"]==number


def test_the_steps_are_those_that_were_asked_for(data, tmp_path):
    kw = dict(base_model="tiny:llama?num_hidden_layers=1", gradient_accumulation_steps=2, val_set_size=0.1, eval_batch_size=2)
    asked = train(config(data, tmp_path/"asked", auto_find_batch_size=False, **kw))
    found = train(config(data, tmp_path/"found", **kw), [Small(2)])
    assert found.config["micro_batch_size"]==2 and found.metrics["tokens"]==asked.metrics["tokens"]
    assert losses(found)==pytest.approx(losses(asked), rel=1e-5) and found.metrics["eval_loss"]==pytest.approx(asked.metrics["eval_loss"], rel=1e-5)


def test_where_all_rows_fit_nothing_happens(data, tmp_path):
    "The trial itself leaves no trace: random numbers, weights and log are those of a run without it"
    found, plain = (train(config(data, tmp_path/n, auto_find_batch_size=n=="found", optimizer="adamw_torch"), [small := Small(4)]) for n in ("found", "plain"))
    assert computed(found.history)==computed(plain.history) and same(weights(tmp_path/"found"), weights(tmp_path/"plain"))


def test_the_heaviest_is_tried_first(data, tmp_path):
    "The first pass is as long as the longest row of all, wherever that is in the plan"
    longest = []
    class Long(TrainerCallback):
        def on_init_end(self, args, state, control, model=None, **kw): model.register_forward_pre_hook(lambda m, a, kw: longest.append(kw["input_ids"].shape[1]), with_kwargs=True)
    cfg = config(data, tmp_path)
    train(cfg, [Long()])
    assert longest[0]==max(longest)==max(len(o) for o in prepare_data(cfg, load_tokenizer(cfg)).train["input_ids"])


@pytest.mark.slow
def test_a_stream_is_tried_with_full_rows(tmp_path):
    texts = [dict(text=t["text"]) for t in Village().texts(2)]
    write_jsonl(tmp_path/"t.jsonl", texts)
    base = dict(base_model="tiny:llama?num_hidden_layers=1", pretraining_dataset=[dict(path=str(tmp_path/"t.jsonl"))], sequence_len=256, micro_batch_size=4, max_steps=3, learning_rate=1e-3, save_strategy="no", logging_steps=1)
    for packing in (False, True):
        shapes, cfg = [], load_config(base | dict(sample_packing=packing, output_dir=str(tmp_path/f"found{packing}"), auto_find_batch_size=True))
        class Shapes(Small):
            def refuse(self, model, args, kwargs):
                shapes.append(tuple(kwargs["input_ids"].shape))
                super().refuse(model, args, kwargs)
        found = train(cfg, [Shapes(2)])
        assert shapes[:2]==[(4, 256), (2, 256)]
        given = train(with_rows(cfg, 2).replace(output_dir=str(tmp_path/f"given{packing}"), auto_find_batch_size=False))
        assert losses(found)==losses(given) and same(weights(found.output_dir), weights(given.output_dir))


# Failures

def test_other_errors_are_not_taken_for_memory(data, tmp_path):
    with pytest.raises(RuntimeError, match="no memory for 4 rows"): train(config(data, tmp_path), [small := Small(1, RuntimeError)])
    assert small.seen==[4]


def test_a_single_row_that_does_not_fit(data, tmp_path):
    with pytest.raises(UserError, match="a single row.*gradient_checkpointing") as e: train(config(data, tmp_path/"out"), [small := Small(0)])
    assert small.seen==[4, 2, 1] and not list((tmp_path/"out").glob("*.safetensors"))


def test_a_signal_in_the_trial_is_not_lost(data, tmp_path):
    "It ends a run that must be set up again, as it would end one that has not begun"
    class Term(Small):
        def refuse(self, *args):
            if not self.seen: os.kill(os.getpid(), signal.SIGTERM)
            super().refuse(*args)
    def heard(signum, frame): raise SystemExit(signum)
    was = signal.signal(signal.SIGTERM, heard)
    try:
        with pytest.raises(SystemExit) as e: train(config(data, tmp_path), [small := Term(2)])
    finally: signal.signal(signal.SIGTERM, was)
    assert e.value.code==signal.SIGTERM and small.seen[:2]==[4, 2] and not list(tmp_path.glob("*.safetensors"))


def test_trackers_hear_of_one_run(data, tmp_path):
    train(config(data, tmp_path, use_tensorboard=True), [Small(2)])
    assert len(list((tmp_path/"tensorboard").iterdir()))==1


def test_what_is_held_back_is_what_the_optimizer_takes():
    for dtype in (torch.float32, torch.bfloat16):
        w = [torch.nn.Parameter(torch.randn(50, 30, dtype=dtype)), torch.nn.Parameter(torch.randn(7, dtype=dtype))]
        opt = torch.optim.AdamW(w)
        held = sum(t.nbytes for t in hold_back(opt, "adamw_torch"))
        sum(p.float().sum() for p in w).backward()
        opt.step()
        assert held==sum(s.nbytes for p in w for s in opt.state[p].values() if s.ndim)
        assert hold_back(opt, "adamw_torch")==[] and hold_back(torch.optim.AdamW(w), "paged_adamw_8bit")==[]
        assert sum(t.nbytes for t in hold_back(torch.optim.AdamW(w), "adamw_8bit"))==2*1507


# Going on

def test_a_run_that_goes_on_does_not_ask_for_more(data, tmp_path):
    kw = dict(max_steps=6, save_strategy="steps", save_steps=50, resume="auto")
    whole = train(config(data, tmp_path/"whole", **kw), [Small(2)])
    cfg = config(data, tmp_path/"out", **kw)
    with pytest.raises(Stopped): train(cfg, [Small(2), Stop(3)])
    assert json.loads((tmp_path/"out"/"checkpoint-3"/"manifest.json").read_text())["config"]["micro_batch_size"]==2
    on = train(cfg, [later := Small(4)]) # there would be room for more now
    assert set(later.seen)=={2} or max(later.seen)==2
    assert computed(on.history)==computed(whole.history) and same(weights(tmp_path/"out"), weights(tmp_path/"whole"))


def test_it_goes_on_with_less_memory(data, tmp_path):
    kw = dict(base_model="tiny:llama?num_hidden_layers=1", max_steps=6, save_strategy="steps", save_steps=50, resume="auto")
    whole = train(config(data, tmp_path/"whole", **kw))
    with pytest.raises(Stopped): train(config(data, tmp_path/"out", **kw), [Small(2), Stop(3)])
    on = train(config(data, tmp_path/"out", **kw), [later := Small(1)])
    assert later.seen[:2]==[2, 1] and on.config["micro_batch_size"]==1
    assert losses(on)==pytest.approx(losses(whole), rel=1e-4)


# Processes

@pytest.mark.slow
def test_ranks_agree(data, tmp_path):
    "One of two ranks is short of memory: both take fewer rows, and the steps are those of one process"
    (tmp_path/"c.yml").write_text(json.dumps(keys(data, tmp_path/"two", base_model="tiny:llama?num_hidden_layers=1")))
    (came,) = forks([dict(config=str(tmp_path/"c.yml"), ranks=2, small=[1, 1])], tmp_path)
    assert came["codes"]==[0, 0], came["said"][-2000:]
    rows = {r: [int(l.split()[2]) for l in came["said"].splitlines() if l.startswith(f"ROWS {r} ")] for r in (0, 1)}
    assert rows[1][:3]==[4, 2, 1] # the rank that is short: one call for each number that it refuses
    assert list(dict.fromkeys(rows[0]))==[4, 2, 1] and rows[0]==sorted(rows[0], reverse=True) # the other one could have had 4, and comes down with it
    assert came["said"].count("rows at a time do not fit")==1
    one = train(config(data, tmp_path/"one", base_model="tiny:llama?num_hidden_layers=1", gradient_accumulation_steps=2, auto_find_batch_size=False))
    two = json.loads((tmp_path/"two"/"run.json").read_text())
    assert two["config"]["micro_batch_size"]==1 and two["config"]["gradient_accumulation_steps"]==4
    assert [h["loss"] for h in two["history"] if "loss" in h]==pytest.approx(losses(one), rel=1e-4)


@pytest.mark.slow
def test_memory_that_really_runs_out(data, tmp_path):
    "A process that may have no more than so many bytes: fewer rows are found, and the run comes to its end"
    (tmp_path/"c.yml").write_text(json.dumps(keys(data, tmp_path/"out", base_model="tiny:llama?num_hidden_layers=1", sequence_len=512, pad_to_sequence_len=True, micro_batch_size=32, max_steps=1)))
    (came,) = forks([dict(config=str(tmp_path/"c.yml"), memory=150*2**20)], tmp_path)
    assert came["codes"]==[0], came["said"][-2000:]
    found = json.loads((tmp_path/"out"/"run.json").read_text())["config"]
    assert 1<=found["micro_batch_size"]<32==found["micro_batch_size"]*found["gradient_accumulation_steps"]
