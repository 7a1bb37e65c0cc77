"Streams against texts put together by hand, and runs on them that stop and go on"
import gzip, json, os, random, signal
from itertools import islice
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings as limits, strategies as st
from safetensors.torch import load_file
from tuneforge.all import *
from tuneforge.cli import preprocess
from tuneforge.derive import isolates
from tuneforge.stream import cut_rows, join_rows
from tests.test_resume import StopAt, same
from tests.tools import command, computed, forks, write_jsonl

BASE = dict(base_model="tiny:llama?num_hidden_layers=1", learning_rate=1e-3, sequence_len=64, micro_batch_size=2, max_steps=6)
TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
WORDS = "goat hill village river stone bread fire night road well".split()


def texts(n, longest=40, seed=0):
    rng = random.Random(seed)
    return [dict(text=f"{i} "+" ".join(rng.choices(WORDS, k=rng.randint(1, longest)))) for i in range(n)]


def config(entries, **kw): return load_config(BASE | dict(pretraining_dataset=[dict(path=str(e)) if isinstance(e, Path) else e for e in entries]) | kw)


def by_hand(row): # BOS, if the tokenizer has one, the text, EOS
    ids = TOK(row["text"]).input_ids
    return ids if ids[-1]==TOK.eos_token_id else [*ids, TOK.eos_token_id]


def one_pass(stream):
    "The micro-batches until everything was read once, and the samples that are still held then"
    got, feeds = [], stream.feeds
    now = stream.now
    while True:
        got += [[now.ds[b] for b in (now.plan.bin(i) for i in rows)] for step in now.plan.order for rows in step.reshape(-1, step.shape[-1])]
        if all(p.rounds for p in now.after.places): return got, now.after.held
        now = stream._fill(now.after)


WAYS = [dict(sample_packing=True), dict(sample_packing=True, packing="tight"), dict(sample_packing=True, sample_packing_sequentially=True), dict(pretraining_sample_concatenation=True),
    dict(pretraining_sample_concatenation=True, pretrain_multipack_attn=False), dict(sample_packing=True, pretrain_multipack_attn=False), {}, dict(group_by_length=True)]


@limits(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(n=st.lists(st.integers(1, 300), min_size=1, max_size=3), buffer=st.integers(1, 400), way=st.sampled_from(WAYS), rows=st.integers(1, 3), accumulate=st.integers(1, 3), shuffle=st.booleans(), longest=st.sampled_from([3, 40, 200]))
def test_every_token_once_in_a_pass(tmp_path_factory, n, buffer, way, rows, accumulate, shuffle, longest):
    d = tmp_path_factory.mktemp("stream")
    data = [texts(k, longest, seed=i) for i, k in enumerate(n)]
    files = [write_jsonl(d/f"{i}.jsonl", t) for i, t in enumerate(data)]
    cfg = config(files, pretrain_multipack_buffer_size=buffer, micro_batch_size=rows, gradient_accumulation_steps=accumulate, shuffle_merged_datasets=shuffle, min_sample_len=1, on_untrained_row="keep", **way)
    stream = Stream(cfg, TOK)
    batches, held = one_pass(stream)
    texts_seen = [ids for b in batches for bin in b for ids in bin["input_ids"]] + held["input_ids"].to_pylist()
    want = sorted(t for rows_ in data for r in rows_ for t in by_hand(r))
    extra = sum(p.report.rows_in for p in stream._at.places)-sum(n) # a small stream is read again to make up a step
    if not extra: assert sorted(t for s in texts_seen for t in s)==want
    else: assert not set(want)-{t for s in texts_seen for t in s}
    size = cfg.sequence_len
    for b in batches:
        assert len(b)==rows
        for bin in b:
            total = sum(map(len, bin["input_ids"]))
            assert 0<total<=size and all(l==i for o, p in zip(bin["labels"], bin["input_ids"]) for l, i in zip(o, p))
            if cfg.pretraining_sample_concatenation: assert total==size
            if not cfg.sample_packing and not cfg.pretraining_sample_concatenation or not cfg.pretrain_multipack_attn: assert len(bin["input_ids"])==1
    r = stream.report
    for s in r.sources: assert s.rows_in==s.rows_used+sum(s.dropped.values())


def test_joined_rows_are_the_joined_text(tmp_path):
    "In file order, the rows are nothing but the text, cut at every 64th token"
    data = texts(50)
    cfg = config([write_jsonl(tmp_path/"a.jsonl", data)], pretraining_sample_concatenation=True, shuffle_merged_datasets=False, micro_batch_size=1)
    batches, held = one_pass(Stream(cfg, TOK))
    flat = [t for r in data for t in by_hand(r)]
    rows = [sum(bin["input_ids"], []) for b in batches for bin in b]
    assert rows==[flat[i:i+64] for i in range(0, len(flat)//64*64, 64)] and sum(held["input_ids"].to_pylist(), [])==flat[len(flat)//64*64:]


@limits(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 64), st.randoms())
def test_cut_and_join(lengths, size, rng):
    import pyarrow as pa
    at = np.append(0, np.cumsum(lengths))
    lists = [list(range(a, b)) for a, b in zip(at, at[1:])]
    t = pa.table(dict(input_ids=lists, labels=lists), schema=pa.schema([(k, pa.list_(pa.int32())) for k in ("input_ids", "labels")]))
    order = list(range(len(lists)))
    rng.shuffle(order)
    flat = [x for i in order for x in lists[i]]
    pieces = cut_rows(t, np.array(order), size)["input_ids"].to_pylist()
    assert sum(pieces, [])==flat and max(map(len, pieces))<=size
    ends = np.cumsum([len(p) for p in pieces]).tolist()
    assert set(range(size, len(flat), size))<=set(ends) and set(np.cumsum([lengths[i] for i in order]).tolist())<=set(ends)
    assert len(pieces)<=len(lists)+len(flat)//size # no cut without need
    cuts = sorted({0, len(order), *rng.choices(range(len(order)+1), k=3)})
    joined = join_rows(t, np.array(order), np.array(cuts))["labels"].to_pylist()
    assert joined==[[x for i in order[a:b] for x in lists[i]] for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("way", WAYS[:4], ids=str)
def test_the_same_steps_for_any_ranks(tmp_path, way):
    f = write_jsonl(tmp_path/"a.jsonl", texts(400))
    def steps(world, rows, accumulate):
        stream = Stream(config([f], pretrain_multipack_buffer_size=150, micro_batch_size=rows, gradient_accumulation_steps=accumulate, **way), TOK, world)
        now, res = stream.now, []
        for _ in range(3): res += [sorted(str(now.ds[now.plan.bin(i)]["input_ids"]) for i in step.ravel()) for step in now.plan.order]; now = stream._fill(now.after)
        return res
    assert steps(1, 4, 2)==steps(2, 2, 2)==steps(4, 1, 2)==steps(8, 1, 1)


def test_weights(tmp_path):
    a, b = write_jsonl(tmp_path/"a.jsonl", texts(3000)), write_jsonl(tmp_path/"b.jsonl", texts(200, seed=1))
    entries = lambda x, y: [dict(path=str(a), weight=x), dict(path=str(b), weight=y)]
    by = lambda **kw: [round(s.share, 2) for s in Stream(config(entries(1, 3), pretrain_multipack_buffer_size=4000, **kw), TOK).report.sources]
    assert by()==pytest.approx([0.25, 0.75], abs=0.04) and by(mix_by="rows")==pytest.approx([0.25, 0.75], abs=0.04)
    s = Stream(config(entries(1, 3), pretrain_multipack_buffer_size=4000), TOK)
    assert s.now.after.places[1].rounds>5 # the small one again and again
    turns = Stream(config([a, b], pretrain_multipack_buffer_size=10_000), TOK)
    assert [p.rounds for p in turns.now.after.places]==[1, 1] and [x.rows_in for x in turns.report.sources]==[3000, 200] # each row once


def test_texts_are_isolated_or_not(tmp_path):
    f = write_jsonl(tmp_path/"a.jsonl", texts(60, longest=4))
    def batch(**kw):
        cfg = config([f], micro_batch_size=1, **kw)
        stream, apart = Stream(cfg, TOK), isolates(cfg)
        return next(iter(StreamLoader(stream, Collator(TOK.pad_token_id, apart, 64)))), next(iter(stream.batches()))
    for way in ("sample_packing", "pretraining_sample_concatenation"):
        b, (ds, bins) = batch(**{way: True})
        assert b["position_ids"][0].tolist()[:64]==[i for n in map(len, ds[bins[0]]["input_ids"]) for i in range(n)]+list(range(64-sum(map(len, ds[bins[0]]["input_ids"]))))
        b, (ds, bins) = batch(**{way: True}, pretrain_multipack_attn=False)
        n = len(ds[bins[0]]["input_ids"][0])
        assert "position_ids" not in b and b["attention_mask"][0].sum()==n>20 and (b["labels"][0, 1:n]==b["input_ids"][0, 1:n]).all() and b["input_ids"][0].tolist().count(TOK.eos_token_id)>2


# ---- trained

RUNS = {"packed": dict(sample_packing=True), "joined": dict(pretraining_sample_concatenation=True), "one text in a row": {}, "conversations": dict(streaming=True, sample_packing=True, streaming_multipack_buffer_size=20),
    "lora": dict(sample_packing=True, adapter="lora", lora_r=4, lora_dropout=0.1, lora_target_linear=True)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    village = Village()
    write_jsonl(d/"sft.jsonl", village.questions(list(village.people)[:4]))
    write_jsonl(d/"eval.jsonl", texts(5, seed=9))
    return write_jsonl(d/"a.jsonl", texts(70))


def run(data, out, way, **kw):
    more = dict(datasets=[dict(path=str(data.parent/"sft.jsonl"), type="alpaca")], test_datasets=[dict(path=str(data.parent/"eval.jsonl"), type="completion")], dataset_prepared_path=str(out.parent/"prepared"), eval_steps=4)
    base = dict(gradient_accumulation_steps=2, max_steps=12, output_dir=str(out), save_strategy="steps", save_steps=50, logging_steps=2, float32=True, resume="auto")
    keys = more | RUNS[way] if way=="conversations" else {k: v for k, v in more.items() if k!="datasets"} | RUNS[way]
    if way!="conversations": base |= dict(pretraining_dataset=[dict(path=str(data))], pretrain_multipack_buffer_size=10)
    return load_config(BASE | base | keys | kw)


@pytest.mark.parametrize("way", ["packed", *(pytest.param(w, marks=pytest.mark.slow) for w in RUNS if w!="packed")])
def test_stopped_and_resumed(data, tmp_path, way):
    "In the middle of a buffer, at its end, after a pass: the same weights, optimizer, history as without a stop"
    whole = train(run(data, tmp_path/"whole", way))
    assert "eval_loss" in whole.metrics and whole.metrics["steps"]==12
    for s in (1, 6):
        with pytest.raises(Stopped): train(run(data, tmp_path/"out", way), [StopAt(s)])
        assert (tmp_path/"out"/f"checkpoint-{s}"/"stream.safetensors").is_file()
    r = train(run(data, tmp_path/"out", way))
    name = "adapter_model.safetensors" if way=="lora" else "model.safetensors"
    assert same(load_file(tmp_path/"whole"/name), load_file(tmp_path/"out"/name))
    opt = lambda d: torch.load(tmp_path/d/"checkpoint-12"/"optimizer.pt", weights_only=True)
    assert same(opt("whole"), opt("out"))
    assert computed(r.history)==computed(whole.history) and r.metrics["tokens"]==whole.metrics["tokens"] and r.data==whole.data
    assert whole.metrics["loss"]<load_loss(whole, 2)


def load_loss(r, step): return next(h["loss"] for h in r.history if h["step"]==step)


def test_a_changed_source_is_not_gone_on_with(data, tmp_path, caplog):
    f = write_jsonl(tmp_path/"a.jsonl", texts(70))
    write_jsonl(tmp_path/"eval.jsonl", texts(5, seed=9))
    with pytest.raises(Stopped): train(run(f, tmp_path/"out", "packed"), [StopAt(3)])
    write_jsonl(f, [r | dict(text=r["text"].replace("goat", "toad")) for r in texts(70)]) # of the same size
    with pytest.raises(UserError, match="the stream gives other samples than when .*checkpoint-3"): train(run(f, tmp_path/"out", "packed"))
    write_jsonl(f, texts(69))
    with pytest.raises(UserError, match=r"data.train"): train(run(f, tmp_path/"out", "packed"))
    assert train(run(f, tmp_path/"out", "packed"), allow_drift=True).metrics["steps"]==12
    assert train(run(f, tmp_path/"out", "packed", max_steps=12), allow_drift=True).metrics["steps"]==12 # at its end already


@pytest.mark.slow
def test_ranks_share_a_stream(data, tmp_path):
    "Two ranks, stopped, then one: to rounding the weights of one rank that never stopped"
    cfg = run(data, tmp_path/"whole", "packed", micro_batch_size=1, gradient_accumulation_steps=4)
    whole = train(cfg)
    keys = {k: v for k, v in cfg.explicit().items()}
    (tmp_path/"c.yml").write_text(json.dumps(json.loads(cfg.model_dump_json(exclude_unset=True)) | dict(output_dir=str(tmp_path/"out"))))
    phase = lambda n, **kw: dict(config=str(tmp_path/"c.yml"), ranks=n, overrides=["--gradient-accumulation-steps", str(4//n)]) | kw
    came = forks([phase(2, stop=[0, 5, "step", signal.SIGTERM]), phase(1)], tmp_path)
    assert [o["codes"] for o in came]==[[143, 143], [0]], [o["said"][-500:] for o in came]
    a, b = (load_file(tmp_path/n/"model.safetensors") for n in ("whole", "out"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


# ---- bad input

def test_bad_rows(tmp_path, caplog):
    f = tmp_path/"a.jsonl"
    lines = [json.dumps(r) for r in texts(40)]
    f.write_text("\n".join([*lines[:20], '{"text": 5}', '{"text": "x', *lines[20:]])+"\n")
    with pytest.raises(UserError, match=r"a.jsonl:2[12]: "): Stream(config([f], sample_packing=True), TOK)
    s = Stream(config([f], sample_packing=True, on_bad_row="skip"), TOK).report.sources[0]
    assert (s.rows_in, s.rows_used, s.lost)==(42, 40, 2) and [b.split(": ")[0].rpartition(":")[2] for b in s.bad]==["21", "22"]
    assert "2 of 42 rows" not in caplog.text
    f.write_text("\n".join([*lines[:10], *['{"text": 5}']*30])+"\n")
    with pytest.raises(UserError, match="30 of 40 rows are lost"): Stream(config([f], sample_packing=True, on_bad_row="skip"), TOK)
    with pytest.raises(UserError, match="no such file"): Stream(config([tmp_path/"none.jsonl"]), TOK)
    f.write_text("")
    with pytest.raises(UserError, match="no rows|empty"): Stream(config([f]), TOK)


def test_a_source_that_breaks_off_stops_the_run(tmp_path):
    "In the thread that reads ahead"
    whole = gzip.compress("".join(json.dumps(r)+"\n" for r in texts(20_000)).encode())
    (tmp_path/"a.jsonl.gz").write_bytes(whole[:len(whole)*3//4])
    with pytest.raises(UserError, match="a.jsonl.gz"): train(run(tmp_path/"a.jsonl.gz", tmp_path/"out", "packed", max_steps=3000, pretrain_multipack_buffer_size=4000, eval_strategy="no", test_datasets=None, eval_steps=None))


def test_where_a_stream_begins(tmp_path):
    f = write_jsonl(tmp_path/"a.jsonl", texts(300, longest=5))
    seen = lambda **kw: {int(TOK.decode(i, skip_special_tokens=True).split()[0]) for b in one_pass(Stream(config([dict(path=str(f)) | kw]), TOK))[0] for bin in b for i in bin["input_ids"]}
    assert min(seen(skip=200))==200 and max(seen(split="train[:50]"))<50
    with pytest.raises(UserError, match="either `skip` or a slice"): seen(skip=3, split="train[:50]")


def test_commands(tmp_path):
    "An Axolotl file for pretraining, as it stands, through the commands"
    write_jsonl(tmp_path/"docs.jsonl", texts(300))
    (tmp_path/"c.yml").write_text("""
base_model: tiny:llama?num_hidden_layers=1
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: false
max_steps: 5
pretraining_dataset:
  - path: docs.jsonl
    type: pretrain
dataset_prepared_path:
val_set_size: 0.0
output_dir: ./model-out
sequence_len: 64
sample_packing: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: false
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention:
warmup_steps: 1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
""")
    code, out, err = command("preprocess", "c.yml", cwd=tmp_path)
    assert code==0 and "a stream, of which this is the beginning" in out and "300" in out, err
    with pytest.raises(UserError, match="a stream is read while it is trained"): preprocess(load_config(tmp_path/"c.yml"), why_miss=True)
    code, out, err = command("train", "c.yml", cwd=tmp_path)
    assert code==0 and "5 steps" in out and "a stream has no epochs" in err, err
    assert json.loads((tmp_path/"model-out"/"run.json").read_text())["data"]["sources"][0]["rows_in"]>=300
