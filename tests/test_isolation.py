"No sample sees another: packed logits, gradients and losses against every sample alone, one after the other"
import json, sys
import pytest, torch
from tuneforge.all import *
from tests.tools import run, ROOT

tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
FAMILIES = { # name -> backends; transformers gives some architectures no sdpa
    "llama": "sdpa eager", "mistral": "sdpa eager", "mistral?sliding_window=5": "sdpa eager", "qwen2": "sdpa eager", "qwen3": "sdpa eager", "gemma2?sliding_window=5": "eager",
    "gemma3_text?sliding_window=5": "sdpa eager", "gpt_neox": "sdpa eager", "falcon": "sdpa eager", "mixtral": "sdpa eager", "mixtral?sliding_window=5": "sdpa eager", "phi": "sdpa eager", "phi3?sliding_window=5": "sdpa eager",
    "gptj": "eager", "mpt": "eager", "opt": "sdpa eager", "gpt2": "sdpa eager", "stablelm": "sdpa eager", "starcoder2?sliding_window=5": "sdpa eager", "cohere": "sdpa eager", "olmo2": "sdpa eager", "gpt_bigcode": "sdpa eager"}
CASES = [(f, b) for f, bs in FAMILIES.items() for b in bs.split()]
REFUSED = {"bloom": "ALiBi", "falcon?alibi=true": "ALiBi", "mamba": "recurrent", "falcon_mamba": "recurrent", "rwkv": "recurrent", "jamba": "recurrent", "recurrent_gemma": "recurrent", "bamba": "recurrent", "falcon_h1": "recurrent",
    "qwen3_next": "recurrent", "nemotron_h": "recurrent", "granitemoehybrid": "recurrent", "gpt_oss": "sliding window"}


def rows(seed, lengths=((1, 12, 7, 20), (19, 2, 3), (9,))):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(5, len(tok), (n,), generator=g).tolist() for n in row] for row in lengths]


def as_bins(rs): return [dict(input_ids=r, labels=r) for r in rs]


def loss_and_grads(model, batches, n):
    "Sum over batches of the loss per trained token, and what it does to each weight"
    model.zero_grad()
    total = 0.
    for b in batches:
        labels = b.pop("labels")
        loss = causal_loss(model(**b, use_cache=False), labels, n)
        loss.backward()
        total += loss.item()
    return total, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def alone(s): return dict(input_ids=torch.tensor([s]), labels=torch.tensor([[-100, *s[1:]]]))


@pytest.mark.parametrize("name, backend", CASES, ids=lambda o: o)
def test_packed_is_every_sample_alone(name, backend):
    "Three rows of unequal length, padded, in the way that the check finds; and again as one flat row"
    model = load_model(ModelOptions(base_model=f"tiny:{name}"))
    model.set_attn_implementation(backend)
    way = check_isolation(model, tok)
    model.eval()
    rs = rows(3)
    samples = [s for r in rs for s in r]
    n = sum(len(s)-1 for s in samples)
    want, grads = loss_and_grads(model, [alone(s) for s in samples if len(s)>1], n)
    with torch.no_grad(): apart = [model(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in samples]
    for flat in (False, True):
        batch = way.collator(tok.pad_token_id, length=48, flat=flat)(as_bins(rs))
        with torch.no_grad(): logits = model(**{k: v for k, v in batch.items() if k!="labels"}, use_cache=False).logits
        ends = [sum(map(len, r)) for r in rs]
        got = logits[0, :sum(ends)].split([len(s) for s in samples]) if flat else [x for l, e, r in zip(logits, ends, rs) for x in l[:e].split([len(s) for s in r])]
        for a, b in zip(got, apart): torch.testing.assert_close(a, b, rtol=0, atol=2e-5*max(1, b.abs().max().item()))
        loss, packed = loss_and_grads(model, [batch], n)
        assert loss==pytest.approx(want, rel=2e-6)
        assert packed.keys()>=grads.keys()
        norm = lambda d: sum((x.double()**2).sum() for x in d.values())**0.5
        assert norm({k: packed[k]-grads[k] for k in grads})<2e-6*norm(grads)


def test_window_is_kept():
    "The windows of these tests do matter: without them, the logits are others"
    a, b = (load_model(ModelOptions(base_model=f"tiny:mistral{q}")) for q in ("?sliding_window=5", ""))
    b.load_state_dict(a.state_dict())
    ids = torch.tensor([rows(0)[0][3]])
    assert (a(input_ids=ids).logits-b(input_ids=ids).logits).abs().max()>1e-2


HEAVY = ("bamba", "falcon_h1", "granitemoehybrid") # their plain kernels take half a minute


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in REFUSED])
def test_refused_with_the_reason(name):
    model = load_model(ModelOptions(base_model=f"tiny:{name}"))
    with pytest.raises(LeakError, match=REFUSED[name]): check_isolation(model, tok)


def test_convolutions_leak_too():
    from transformers import AutoModelForCausalLM
    from tuneforge.tiny import TinyName, tiny_config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(TinyName("lfm2", 0, dict(layer_types=["conv", "full_attention"])), 768, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    with pytest.raises(LeakError, match="ShortConv"): check_isolation(model, tok)


def test_what_is_checked_is_what_leaks():
    "The same model, told nothing: the check sees it, and so does a mask that is off by one token"
    model = load_model(ModelOptions(base_model="tiny:llama"))
    assert leakage(model, tok, Isolation(positions=False)).exchanged>0.1
    class OffByOne(Isolation):
        def collator(self, *a, **kw):
            inner = super().collator(*a, **kw)
            def collate(bins):
                batch = inner(bins)
                m, p = batch["attention_mask"], batch["position_ids"]
                r, q = (p==0).nonzero()[1].tolist() # the first token of the second sample
                if q==0: r, q = (p==0).nonzero()[2].tolist()
                m[r, 0, q, q-1] = 0
                return batch
            collate.flat = inner.flat
            return collate
    found = leakage(model, tok, OffByOne(mask=torch.float32))
    assert found.apart>1e-3 and found.exchanged>1e-3


def test_half_precision_is_no_excuse():
    "In bf16 the exchange of samples still has no effect at all, and a leak is far above the tolerance"
    model = load_model(ModelOptions(base_model="tiny:llama")).to(torch.bfloat16)
    assert leakage(model, tok, isolations(model)[0]).exchanged==0
    assert check_isolation(model, tok)==isolations(model)[0]
    assert leakage(model, tok, Isolation(positions=False)).exchanged>0.1
    with pytest.raises(LeakError): check_isolation(load_model(ModelOptions(base_model="tiny:mamba")).to(torch.bfloat16), tok)


def varlen(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kw):
    "What FlashAttention does with positions, in plain torch: read the ends of samples as transformers does, attend within each"
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids
    n = query.shape[1]//key.shape[1]
    key, value = (o.repeat_interleave(n, 1) for o in (key, value))
    ends = [0, query.shape[2]]
    if _is_packed_sequence(position_ids, len(query)): ends = prepare_fa_kwargs_from_position_ids(position_ids)[0][0].tolist()
    parts = [torch.nn.functional.scaled_dot_product_attention(*(o[:, :, a:b] for o in (query, key, value)), is_causal=True, scale=scaling) for a, b in zip(ends, ends[1:])]
    return torch.cat(parts, 2).transpose(1, 2), None


def test_the_way_of_flash_attention():
    "One row isolates; two rows leak, as FlashAttention would, and the check says so"
    from transformers import AttentionInterface
    AttentionInterface.register("varlen_in_torch", varlen)
    model = load_model(ModelOptions(base_model="tiny:llama"))
    model.set_attn_implementation("varlen_in_torch")
    assert leakage(model, tok, Isolation(flat=True)).apart<1e-5 and leakage(model, tok, Isolation(flat=True)).exchanged==0
    assert leakage(model, tok, Isolation()).exchanged>0.1
    with pytest.raises(LeakError, match="reaches over the end"): check_isolation(model, tok)
    plain = load_model(ModelOptions(base_model="tiny:llama"))
    rs, n = rows(5), 60
    a = loss_and_grads(model, [Isolation(flat=True).collator(0, length=48)(as_bins(rs))], n)
    b = loss_and_grads(plain, [alone(s) for r in rs for s in r if len(s)>1], n)
    assert a[0]==pytest.approx(b[0], rel=1e-6)
    for k, g in b[1].items(): torch.testing.assert_close(a[1][k], g, rtol=1e-4, atol=1e-6)


FLEX = """
import sys, torch
from tuneforge.all import *
from tests.test_isolation import rows, as_bins, tok
model = load_model(ModelOptions(base_model=f"tiny:{sys.argv[1]}")).eval()
rs = rows(3, ((30, 12, 7, 79), (60, 68)))
batch = Isolation().collator(0, length=128)(as_bins(rs))
apart = [model(input_ids=torch.tensor([s]), use_cache=False).logits[0] for r in rs for s in r]
model.set_attn_implementation("flex_attention")
with torch.no_grad(): logits = model(**{k: v for k, v in batch.items() if k!="labels"}, use_cache=False).logits
got = [x for l, r in zip(logits, rs) for x in l.split([len(s) for s in r])]
print("DIFF", max((a-b).abs().max().item() for a, b in zip(got, apart)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma2", "gpt_neox", "mixtral"])
def test_flex(name, tmp_path):
    "One shape in a process of its own: on a CPU, compiled FlexAttention takes no second one, and has no backward pass"
    (tmp_path/"flex.py").write_text(FLEX)
    res = run(sys.executable, tmp_path/"flex.py", name, env=dict(PYTHONPATH=str(ROOT)))
    assert res.returncode==0, res.stderr[-2000:]
    assert float(res.stdout.split("DIFF ")[1])<2e-5


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_gets_one_row(backend):
    model = load_model(ModelOptions(base_model="tiny:llama"))
    model.config._attn_implementation_internal = backend
    assert isolations(model)==[Isolation(flat=True)]
    assert flattens(PackingOptions(batch_flattening="auto", micro_batch_size=2), isolations(model)[0])
    assert not flattens(PackingOptions(batch_flattening="auto", micro_batch_size=2), Isolation())


def test_flex_trains_on_gpus_only():
    model = load_model(ModelOptions(base_model="tiny:llama"))
    if model.device.type=="cuda": pytest.skip("there is a GPU")
    assert set_attention(model, ModelOptions(base_model="tiny:llama", flex_attention=True))=="sdpa"
    with pytest.raises(UserError, match="gradients on GPUs only"): set_attention(model, ModelOptions(base_model="tiny:llama", attn_implementation="flex_attention"))
