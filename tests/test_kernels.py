"Losses without logits, recomputed and offloaded activations, compiled models: the same numbers as without"
import gc
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from tuneforge.all import *
from tuneforge.document import ConfigError
from tests.tools import write_jsonl

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    village = Village()
    return write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:4]))


def config(data, out, **kw):
    base = dict(base_model="tiny:llama", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out),
        sequence_len=256, learning_rate=1e-3, save_strategy="no", logging_steps=1, lr_scheduler="constant", warmup_steps=0, micro_batch_size=3, gradient_accumulation_steps=2, max_steps=3)
    return load_config(base | kw)


def seen(r, *keys): return [h[k] for h in r.history for k in keys or ("loss", "grad_norm") if k in h]


def tiny(arch, **kw): return AutoModelForCausalLM.from_pretrained(resolve_model(f"tiny:{arch}"), **kw)


# ---- the loss in pieces

def by_hand(hidden, weight, bias, targets, scale, cap):
    "Of one token after the other, from the definition"
    total = 0.
    for h, t in zip(hidden, targets):
        z = scale*(weight@h+(0 if bias is None else bias))
        if cap: z = cap*torch.tanh(z/cap)
        if t!=IGNORE: total = total+z.exp().sum().log()-z[t]
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.booleans(), st.sampled_from([1., 0.25, 3.]), st.sampled_from([None, 2., 30.]), st.integers(0, 999))
def test_pieces_add_up(tokens, pieces, bias, scale, cap, seed):
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(5, 7, bias=bias).double()
    hidden = (torch.randn(tokens, 5, generator=g).double()*3).requires_grad_()
    targets = torch.randint(0, 7, (tokens,), generator=g)
    targets[1::3] = IGNORE
    params = [hidden, *head.parameters()]
    want = by_hand(hidden, head.weight, head.bias, targets, scale, cap)
    got = loss_in_pieces(head, LogitMath(scale, cap), hidden, targets, pieces)
    assert abs(got-want)<1e-10
    for a, b in zip(torch.autograd.grad(got, params), torch.autograd.grad(want, params)): assert (a-b).abs().max()<1e-10


ARCHS = ["llama", "gemma2", "cohere", "cohere2", "granite", pytest.param("falcon_h1", marks=pytest.mark.slow), "phi", "gpt2", "gptj", "mpt", "qwen3", "rwkv", "opt", "gemma3_text"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kind_of_output_layer(arch):
    "Loss and gradients of a whole model in float64: scaled, capped, tied and biased heads"
    model = tiny(arch, dtype=torch.float64).eval()
    ids = torch.randint(9, 700, (2, 10), generator=torch.Generator().manual_seed(3))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(4))<0.4, IGNORE)
    def step(loss):
        model.zero_grad()
        with within(loss): out = loss(model(input_ids=ids, use_cache=False), labels, 5)
        out.backward()
        return [out.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]
    def whole(outputs, labels, n):
        logp = outputs.logits.log_softmax(-1)
        return -sum(logp[i, j-1, labels[i, j]] for i in range(2) for j in range(1, 10) if labels[i, j]!=IGNORE)/n
    want, got = step(whole), step(HeadLoss(model, pieces=3))
    assert len(want)==len(got)>5
    for a, b in zip(want, got): assert (a-b).abs().max()<=1e-10*max(1, a.abs().max())
    assert model(input_ids=ids).logits.shape[1]==10 # nothing stays on the model


def test_no_trained_token():
    model = tiny("llama")
    ids = torch.arange(8)[None]
    with HeadLoss(model, pieces=3) as loss: out = loss(model(input_ids=ids), torch.full_like(ids, IGNORE))
    out.backward()
    assert out==0 and all((p.grad==0).all() for p in model.parameters())


class Bent(torch.nn.Module):
    "A wrapper that changes logits behind the config's back"
    def __init__(self, model, bend): super().__init__(); self.model, self.bend, self.config, self.device = model, bend, model.config, model.device
    def get_output_embeddings(self): return self.model.get_output_embeddings()
    def forward(self, **kw):
        out = self.model(**kw)
        out.logits = self.bend(out.logits)
        return out


@pytest.mark.parametrize("bend", [lambda z: 30*torch.tanh(z/30), lambda z: z*1.1, lambda z: z+1, lambda z: z[..., :-1]], ids=["cap", "scale", "bias", "fewer"])
def test_unknown_steps_are_refused(bend):
    with pytest.raises(UserError, match="not known here"): prove_logits(Bent(tiny("llama"), bend))


def test_models_without_an_output_layer_are_refused():
    model = tiny("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="no output layer"): HeadLoss(model)


LORA = dict(adapter="lora", lora_r=4, lora_target_linear=True)
WAYS = dict(full={}, packed=dict(sample_packing=True, micro_batch_size=2), capped=dict(base_model="tiny:gemma2"), lora=LORA, head=LORA | dict(lora_modules_to_save=["lm_head"]), adapted=dict(adapter="lora", lora_r=4, lora_target_modules=["lm_head", "q_proj"], base_model="tiny:llama?tie_word_embeddings=false"),
    half=dict(bf16=True, **LORA), quantised=dict(LORA, adapter="qlora", load_in_4bit=True), untied=dict(base_model="tiny:llama?tie_word_embeddings=false"))


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow]*(w in ("full", "lora", "head", "untied"))) for w in WAYS])
def test_a_run_in_pieces_is_the_same_run(data, tmp_path, way):
    kw = WAYS[way] | dict(val_set_size=0.2, eval_steps=2, max_steps=2)
    whole = train(config(data, tmp_path/"a", **kw))
    pieces = train(config(data, tmp_path/"b", chunked_cross_entropy=True, chunked_cross_entropy_num_chunks=5, **kw))
    rel = 2e-2 if way=="half" else 1e-4 # bf16 rounds a sum of five products five times
    assert seen(pieces)==pytest.approx(seen(whole), rel=rel) and len(seen(whole))==4
    assert pieces.metrics["eval_loss"]==pytest.approx(whole.metrics["eval_loss"], rel=rel)


class Largest(TorchDispatchMode):
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))])
        return out


def test_the_logits_never_exist():
    model, ids = tiny("llama?vocab_size=4000"), torch.arange(512)[None]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    def largest(loss):
        with Largest() as seen, within(loss): loss(model(input_ids=ids), ids).backward()
        return seen.size
    assert largest(causal_loss)>=511*vocabulary
    assert largest(HeadLoss(model, pieces=16))<511*vocabulary/4
