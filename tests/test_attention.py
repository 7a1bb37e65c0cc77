"Backends of attention: what xFormers is told against transformers' own masks, and why a backend is refused"
from functools import partial
from importlib.util import find_spec
from typing import get_args
import logging
import pytest, torch
from tuneforge.all import *
from tuneforge.attention import FLASH, backends, why_no_flash, why_not, why_not_this_model
from tuneforge.config import Backend
from tuneforge.xformers import register_xformers, visible_runs, why_no_xformers, xformers_attention, xformers_mask
from tests.test_isolation import alone, as_bins, loss_and_grads, rows, tok

has_xformers = find_spec("xformers") is not None
needs_xformers = pytest.mark.skipif(not has_xformers, reason="xformers is not installed: pip install 'tuneforge[xformers]'")
if has_xformers and not torch.cuda.is_available(): logging.getLogger("xformers").setLevel(logging.ERROR)
FAMILIES = ["llama", "mistral?sliding_window=5", "mistral?sliding_window=1", "qwen3", "gemma3_text?sliding_window=5", "mixtral?sliding_window=5", "starcoder2?sliding_window=5", "gpt_neox", "stablelm", "phi", "olmo2", "gpt2"]


def operator(q, k, v, attn_bias, p, scale, seen=None):
    "What an operator of xFormers computes, by its documentation: (rows, tokens, heads, size), in plain torch"
    assert q.shape[2]==k.shape[2]==v.shape[2] and q.dtype==k.dtype==v.dtype and all(o.stride(-1)==1 for o in (q, k, v))
    if seen is not None: seen.append((type(attn_bias).__name__, q.dtype, p, scale))
    mask = attn_bias.materialize((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dtype=torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)*(q.shape[-1]**-0.5 if scale is None else scale)+mask
    return torch.einsum("bhqk,bkhd->bqhd", scores.float().softmax(-1).to(v.dtype), v)


def pair(name, **kw):
    "The same model twice, one with sdpa and one with xFormers"
    a, b = (load_model(ModelOptions(base_model=f"tiny:{name}")).eval() for _ in range(2))
    b.load_state_dict(a.state_dict())
    register_xformers(partial(operator, **kw), "xformers_in_torch")
    b.set_attn_implementation("xformers_in_torch")
    assert b.config._attn_implementation=="xformers_in_torch"
    return a, b


def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=2e-5*max(1, b.abs().max().item()))


# ---- xFormers

@needs_xformers
@pytest.mark.parametrize("name", FAMILIES)
def test_xformers_is_sdpa(name):
    "Logits and gradients on rows that are packed, flat, and padded: those of transformers' sdpa"
    a, b = pair(name)
    rs = rows(3)
    way = check_isolation(b, tok)
    assert way==Isolation() and check_isolation(a, tok)==way
    for flat in (False, True):
        batch = way.collator(tok.pad_token_id, length=48, flat=flat)(as_bins(rs))
        inputs = {k: v for k, v in batch.items() if k!="labels"}
        with torch.no_grad(): close(b(**inputs, use_cache=False).logits, a(**inputs, use_cache=False).logits)
        (la, ga), (lb, gb) = (loss_and_grads(m, [dict(batch)], 60) for m in (a, b))
        assert lb==pytest.approx(la, rel=2e-6) and ga.keys()==gb.keys()
        for k in ga: torch.testing.assert_close(gb[k], ga[k], rtol=1e-4, atol=2e-6)
    samples = [s for r in rs for s in r]
    batch = Collator(tok.pad_token_id, False)([dict(input_ids=[s], labels=[s]) for s in samples])
    assert not batch["attention_mask"].all()
    labels = batch.pop("labels")
    real = batch["attention_mask"].bool()
    with torch.no_grad(): close(b(**batch, use_cache=False).logits[real], a(**batch, use_cache=False).logits[real])
    (la, ga), (lb, gb) = (loss_and_grads(m, [batch | dict(labels=labels)], 60) for m in (a, b))
    assert lb==pytest.approx(la, rel=2e-6)
    for k in ga: torch.testing.assert_close(gb[k], ga[k], rtol=1e-4, atol=2e-6)


@needs_xformers
@pytest.mark.parametrize("name", ["llama", "mistral?sliding_window=5", "gemma3_text?sliding_window=5"])
def test_packed_with_xformers_is_every_sample_alone(name):
    _, b = pair(name)
    rs = rows(3)
    samples = [s for r in rs for s in r]
    n = sum(len(s)-1 for s in samples)
    want, grads = loss_and_grads(b, [alone(s) for s in samples if len(s)>1], n)
    loss, packed = loss_and_grads(b, [check_isolation(b, tok).collator(tok.pad_token_id)(as_bins(rs))], n)
    assert loss==pytest.approx(want, rel=2e-6)
    for k in grads: torch.testing.assert_close(packed[k], grads[k], rtol=1e-4, atol=2e-6)


@needs_xformers
@pytest.mark.parametrize("name", ["llama", "mistral?sliding_window=5", "gemma3_text?sliding_window=5"])
def test_generation_with_padding_on_the_left(name):
    "With a cache: the first pass is xFormers', the others are sdpa's"
    seen = []
    a, b = pair(name, seen=seen)
    ids = torch.tensor([[0]*6+rows(1)[0][2], rows(2)[0][1]+rows(3)[0][0]])
    kw = dict(attention_mask=(ids!=0).long(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad(): assert torch.equal(a.generate(ids, **kw), b.generate(ids, **kw))
    assert len(seen)==b.config.num_hidden_layers


@needs_xformers
@pytest.mark.parametrize("window", [None, 1, 2, 4, 99])
def test_masks_are_those_of_transformers(window):
    "By brute force: random samples, padding on either side, and a window, against the mask that sdpa gets"
    from transformers.masking_utils import causal_mask_function, find_packed_sequence_indices, packed_sequence_compatibility_function, sdpa_mask, sliding_window_causal_mask_function
    g, n, rs = torch.Generator().manual_seed(0), 13, 3
    base = sliding_window_causal_mask_function(window) if window else causal_mask_function
    for case in range(60):
        sees, padding = base, None
        if case%2:
            positions = torch.stack([torch.cat([torch.arange(k) for k in (ends.diff(prepend=ends.new_zeros(1), append=ends.new_tensor([n])))])
                for ends in (torch.randperm(n-1, generator=g)[:case%5].sort().values+1 for _ in range(rs))])
            ids = find_packed_sequence_indices(positions)
            if ids is not None: sees = packed_sequence_compatibility_function(base, positions, ids)
        elif case%4:
            first = torch.randint(0, 6, (rs, 1), generator=g)
            last = torch.randint(7, n+1, (rs, 1), generator=g)
            padding = (torch.arange(n)>=first) & (torch.arange(n)<last)
        wanted = sdpa_mask(rs, n, n, mask_function=sees, attention_mask=padding, allow_is_causal_skip=False)[:, 0]
        bias = xformers_mask(rs, n, n, mask_function=sees, attention_mask=padding, local_size=window)
        blocks = hasattr(bias, "q_seqinfo")
        got = bias.materialize((rs*n, rs*n)).exp().bool() if blocks else bias.materialize((rs, n, n)).exp().bool()
        if blocks:
            whole = got
            got = torch.stack([whole[i*n:(i+1)*n, i*n:(i+1)*n] for i in range(rs)])
            assert whole.sum()==got.sum() # no row sees another
        real = padding if padding is not None else torch.ones(rs, n).bool()
        assert torch.equal(got[real], wanted[real])
        assert got.any(-1).all() # what is padding sees itself: no weights of nothing, which are not a number


def test_chunks_are_runs():
    from transformers.masking_utils import chunked_causal_mask_function
    assert visible_runs(chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 1, 10)==[4, 4, 2]


@needs_xformers
def test_what_cannot_be_told_by_lengths_is_refused():
    from transformers.masking_utils import bidirectional_mask_function, blockwise_overlay, causal_mask_function, or_masks
    with pytest.raises(UserError, match="what comes after"): visible_runs(bidirectional_mask_function, 2, 5)
    images = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1]])))
    with pytest.raises(UserError, match="what comes after"): visible_runs(images, 1, 5)
    with pytest.raises(UserError, match="within a row"): visible_runs(causal_mask_function, 1, 5, torch.tensor([[1, 0, 1, 1, 0]]).bool())
    with pytest.raises(UserError, match="a mask of its own"): xformers_mask(1, 5, 5, mask_function=causal_mask_function, use_vmap=True)
    _, b = pair("llama")
    with pytest.raises(UserError, match="by positions, not by a mask"): b(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.zeros(1, 1, 3, 3))
    x = torch.zeros(1, 2, 3, 4)
    for kw in (dict(softcap=3.), dict(s_aux=torch.zeros(2)), dict(position_bias=x)):
        with pytest.raises(UserError, match="no operator"): xformers_attention(b, x, x, x, None, **kw)


@needs_xformers
def test_leaks_are_seen_with_xformers_too():
    "A model that is not told where samples end; one that takes no positions"
    _, b = pair("llama")
    assert leakage(b, tok, Isolation(positions=False)).exchanged>0.1
    _, opt = pair("opt")
    with pytest.raises(LeakError, match="not safe"): check_isolation(opt, tok)


@needs_xformers
def test_the_operator_gets_dropout_scaling_and_one_precision():
    seen = []
    _, b = pair("gemma3_text?attention_dropout=0.25", seen=seen)
    b.train()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert {(p, s) for _, _, p, s in seen}=={(0.25, b.config.query_pre_attn_scalar**-0.5)}
    b.eval()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert seen[-1][2]==0
    seen.clear()
    _, q = pair("qwen3", seen=seen) # its norms leave queries and keys in 32 bits
    with torch.autocast("cpu", torch.bfloat16): q(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert {d for _, d, *_ in seen}=={torch.bfloat16}


@needs_xformers
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again(reentrant):
    a, b = pair("gemma3_text?sliding_window=5")
    batch = Isolation().collator(tok.pad_token_id)(as_bins(rows(6)))
    la, ga = loss_and_grads(a, [dict(batch)], 60)
    b.train().gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    lb, gb = loss_and_grads(b, [dict(batch)], 60)
    assert b.is_gradient_checkpointing and lb==pytest.approx(la, rel=2e-6)
    for k in ga: torch.testing.assert_close(gb[k], ga[k], rtol=1e-4, atol=2e-6)


@needs_xformers
def test_a_saved_model_needs_no_xformers(tmp_path):
    from transformers import AutoModelForCausalLM
    a, b = pair("llama")
    b.save_pretrained(tmp_path)
    assert "xformers" not in (tmp_path/"config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation=="sdpa"


@needs_xformers
def test_ends_from_a_caller_who_knows():
    "`cu_seq_lens_q` instead of positions that restart, with a window"
    for name in ("llama", "mistral?sliding_window=5"):
        a, b = pair(name)
        rs = rows(4)[:1]
        batch = {k: v for k, v in Isolation().collator(0)(as_bins(rs)).items() if k!="labels"}
        ends = torch.tensor([0, *map(len, rs[0])]).cumsum(0).int()
        with torch.no_grad(): close(b(**batch, cu_seq_lens_q=ends, use_cache=False).logits, a(**batch, use_cache=False).logits)
        x = {k: torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(i)) for i, k in enumerate("qkv")}
        out = xformers_attention(b, *x.values(), None, cu_seq_lens_q=ends, operator=operator)[0]
        for s, e in zip(ends.tolist(), ends.tolist()[1:]):
            close(out[:, s:e], torch.nn.functional.scaled_dot_product_attention(*(o[:, :, s:e] for o in x.values()), is_causal=True).transpose(1, 2))


# ---- what can run, and what cannot

def test_flash_attention_goes_by_the_gpu():
    bf16 = torch.bfloat16
    runs = {c: [b for b in FLASH if why_no_flash(b, "cuda", c, True, bf16) is None] for c in (7, 8, 9, 10, 12, None)}
    assert runs=={7: [], 8: ["flash_attention_2"], 9: list(FLASH), 10: ["flash_attention_2", "flash_attention_4"], 12: ["flash_attention_2", "flash_attention_4"], None: ["flash_attention_2"]}
    for b in FLASH:
        assert "the model is on cpu" in why_no_flash(b, "cpu", None, True, bf16) and "32" in why_no_flash(b, "cuda", 9, True, torch.float32)
        assert "not installed" in why_no_flash(b, "cuda", 9, False, bf16)


class OnGPU:
    "A model that says that it is on a GPU, and must not be changed"
    device = torch.device("cuda")
    def set_attn_implementation(self, *a, **kw): raise AssertionError("transformers was asked, and would have fetched a kernel")


@pytest.mark.parametrize("backend", FLASH)
def test_no_kernel_is_fetched_from_the_hub(backend, monkeypatch):
    "With the package `kernels`, transformers reaches for the hub where a library is missing; tuneforge does not get that far"
    from transformers import modeling_utils, utils
    if getattr(utils, f"is_flash_attn_{backend[-1]}_available")(): pytest.skip("it is installed")
    fetched,model = [],load_model(ModelOptions(base_model="tiny:llama")).to(torch.bfloat16)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *a, **kw: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name, **kw: fetched.append(name))
    model.set_attn_implementation(backend)
    assert fetched and fetched[0].startswith("kernels-community/"), "transformers has changed: look again whether this is needed"
    fetched.clear()
    model.set_attn_implementation("sdpa")
    model.__class__ = type("Llama", (OnGPU, type(model)), {})
    if not torch.cuda.is_available(): monkeypatch.setattr(torch.version, "hip", "6" if backend[-1]=="2" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    assert "not installed: " in why_not(backend, model)
    assert not fetched


def test_models_written_for_a_kernel_of_the_hub():
    model = load_model(ModelOptions(base_model="tiny:gpt_oss"))
    assert "kernels-community/" in why_not_this_model("flash_attention_2", model)


def test_flash_is_all_that_transformers_calls_so():
    from transformers import AttentionInterface
    assert {k for k in AttentionInterface().valid_keys() if k.startswith("flash")}==set(FLASH)<set(get_args(Backend))


def test_what_a_model_stands_against():
    tiny = lambda name: load_model(ModelOptions(base_model=f"tiny:{name}"))
    assert "caps its scores" in why_not_this_model("xformers", tiny("gemma2"))
    assert "sinks" in why_not_this_model("xformers", tiny("gpt_oss"))
    assert why_not_this_model("xformers", tiny("llama?attention_dropout=0.1")) is None
    for b in ("flash_attention_3", "flash_attention_4", "flex_attention"): assert "attention_dropout: 0.1" in why_not_this_model(b, tiny("llama?attention_dropout=0.1"))
    assert why_not_this_model("flash_attention_2", tiny("llama?attention_dropout=0.1")) is None
    assert all(why_not_this_model(b, tiny("llama")) is None for b in get_args(Backend))


@needs_xformers
@pytest.mark.parametrize("name", ["falcon", "gptj", "mpt", "bloom"])
def test_models_that_attend_in_their_own_way(name, monkeypatch):
    from tuneforge import attention
    monkeypatch.setattr(attention, "why_no_xformers", lambda *a: None)
    model = load_model(ModelOptions(base_model=f"tiny:{name}"))
    before = model.config._attn_implementation
    assert "in its own way" in why_not("xformers", model)
    assert model.config._attn_implementation==before


def test_an_order_that_cannot_be_followed():
    "It says what can be ordered here, and why the rest cannot"
    model = load_model(ModelOptions(base_model="tiny:llama"))
    if model.device.type!="cpu": pytest.skip("there is a GPU")
    for b in ("flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "flex_attention"):
        with pytest.raises(UserError) as e: set_attention(model, ModelOptions(base_model="x", attn_implementation=b))
        said = str(e.value)
        assert f"`attn_implementation: {b}` cannot run here: " in said and "These can: sdpa, eager." in said
        others = said.split("These cannot: ")[1]
        assert all(f"{o} (" in others for o in get_args(Backend) if o not in (b, "sdpa", "eager")) and f"{b} (" not in others
    with pytest.raises(UserError, match="These can: eager"): set_attention(load_model(ModelOptions(base_model="tiny:gptj")), ModelOptions(base_model="x", attn_implementation="sdpa"))


def test_a_preference_gives_way(caplog):
    model = load_model(ModelOptions(base_model="tiny:llama"))
    if model.device.type!="cpu": pytest.skip("there is a GPU")
    for key, b in dict(xformers_attention="xformers", flash_attention="flash_attention_2", flex_attention="flex_attention").items():
        caplog.clear()
        assert set_attention(model, ModelOptions(base_model="x", **{key: True}))=="sdpa"
        assert f"attention: not {b}: " in caplog.text and "cpu" in caplog.text
    caplog.clear()
    assert set_attention(model, ModelOptions(base_model="x"))=="sdpa" and not caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_xformers
@pytest.mark.parametrize("name", ["llama?head_dim=64", "mistral?head_dim=64&sliding_window=5", "qwen3?head_dim=64"])
def test_the_true_operator(name):
    "On a GPU: xFormers against sdpa, in 16 bits"
    a = load_model(ModelOptions(base_model=f"tiny:{name}")).to(torch.bfloat16).cuda().eval()
    assert why_no_xformers(a.device, a.dtype, 64) is None
    batch = {k: v.cuda() for k, v in Isolation().collator(0)(as_bins(rows(3))).items() if k!="labels"}
    with torch.no_grad(): want = a(**batch, use_cache=False).logits
    assert set_attention(a, ModelOptions(base_model="x", attn_implementation="xformers"))=="xformers"
    with torch.no_grad(): got = a(**batch, use_cache=False).logits
    assert (got-want).abs().max()<0.05*want.abs().max()
    assert check_isolation(a, tok)==Isolation()
