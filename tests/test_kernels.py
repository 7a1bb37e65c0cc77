"Losses without logits, recomputed and offloaded activations, compiled models: the same numbers as without"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from tuneforge.all import *
from tuneforge.document import ConfigError
from tests.test_train import config as plain
from tests.tools import write_jsonl

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    village = Village()
    return write_jsonl(tmp_path_factory.mktemp("data")/"train.jsonl", village.questions(list(village.people)[:4]))


def config(data, out, **kw): return plain(data, out, **dict(micro_batch_size=3, gradient_accumulation_steps=2, max_steps=3) | kw)


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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_output_layer(bits):
    "Its matrix product is the library's own, so the layer is called piece by piece"
    import bitsandbytes as bnb
    model = tiny("llama?tie_word_embeddings=false")
    n, wide = model.lm_head.weight.shape
    head = bnb.nn.Linear4bit(wide, n, bias=False, quant_type="nf4", compute_dtype=torch.float32) if bits==4 else bnb.nn.Linear8bitLt(wide, n, bias=False, has_fp16_weights=False)
    before = model.lm_head.weight.detach().clone()
    head.load_state_dict(model.lm_head.state_dict())
    model.set_output_embeddings(head.to("cpu"))
    ids = torch.randint(9, 700, (2, 16), generator=torch.Generator().manual_seed(5))
    grads = {}
    for way in ("whole", "pieces"):
        model.zero_grad()
        if way=="whole": loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        else:
            with HeadLoss(model, pieces=3) as pieces: loss = pieces(model(input_ids=ids), ids)
        loss.backward()
        grads[way] = torch.cat([loss.detach()[None], *[p.grad.flatten() for p in model.parameters() if p.grad is not None]])
    assert not torch.equal(model.lm_head(torch.eye(wide)).T, before) # it is quantised
    assert torch.allclose(grads["pieces"], grads["whole"], rtol=1e-4, atol=1e-3*grads["whole"].abs().max().item()*(0.1 if bits==4 else 1))


@pytest.mark.parametrize("n", [None, torch.tensor(0)], ids=["a batch", "a whole step"])
@pytest.mark.parametrize("made", [lambda model: HeadLoss(model, pieces=3), lambda model: causal_loss], ids=["pieces", "logits"])
def test_no_trained_token(n, made):
    model = tiny("llama")
    ids, loss = torch.arange(8)[None], made(model)
    with within(loss): out = loss(model(input_ids=ids), torch.full_like(ids, IGNORE), n)
    out.backward()
    assert out==0 and all((p.grad==0).all() for p in model.parameters())


def test_steps_without_a_trained_token(tmp_path):
    "Rows that are kept for the user's own reasons: steps of them alone have the loss 0 and are taken"
    say = lambda i: dict(messages=[dict(role="user", content=f"hello {i}"), dict(role="assistant", content=f"bye {i}", train=i==0)])
    rows = write_jsonl(tmp_path/"chat.jsonl", map(say, range(4)))
    r = train(plain(rows, tmp_path/"out", datasets=[dict(path=str(rows), type="chat_template", message_field_training="train")], on_untrained_row="keep", micro_batch_size=1, num_epochs=1))
    told = [h["loss"] for h in r.history if "loss" in h]
    assert len(told)==4 and sorted(told)[:3]==[0, 0, 0] and max(told)>1 and not any("skipped_steps" in h for h in r.history)


def test_the_output_layer_may_be_on_another_gpu(monkeypatch):
    "As `device_map: auto` places it: only devices are computed, on machines without any"
    monkeypatch.setattr("tuneforge.losses.checkpoint", lambda f, *args, **kw: f(*args)) # it asks a GPU for its random state
    with FakeTensorMode():
        on = lambda i, *shape, dtype=torch.float32: torch.empty(shape, device=f"cuda:{i}", dtype=dtype)
        labels = on(0, 2, 8, dtype=torch.long)
        for n in (on(0, dtype=torch.long), on(1, dtype=torch.long), 3): assert for_each_token(on(1), labels, n).device==labels.device
        tied = lambda hidden: on(0, len(hidden), 9) # a tied output layer stands where the embedding is, the last layer does not
        assert loss_in_pieces(tied, LogitMath(), on(1, 8, 4), on(1, 8, dtype=torch.long), 3).device==torch.device("cuda:0")


def test_logits_come_back_to_the_first_gpu(monkeypatch):
    "As accelerate's `io_same_device` gives them: compared where they are"
    compared = []
    monkeypatch.setattr("tuneforge.losses.torch.allclose", lambda *both, **kw: compared.append([t.device.type for t in both]) or True)
    prove_logits(Bent(tiny("llama"), lambda z: z.to("meta")))
    assert compared==[["meta", "meta"]]


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


# ---- activations


@pytest.mark.parametrize("kw", [dict(gradient_checkpointing=True), dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)), dict(gradient_checkpointing="offload"),
    dict(gradient_checkpointing=True, activation_offloading=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)), dict(gradient_checkpointing="unsloth", gradient_checkpointing_kwargs=dict(every_n_layers=2))], ids=str)
def test_recomputed_and_offloaded_activations_change_nothing(kw, monkeypatch):
    "As on a GPU, with hooks that really copy: gradients are the same in every bit"
    import transformers.modeling_utils as mu
    moved = []
    class Counting(mu.save_on_cpu):
        def __init__(self, pin_memory, device_type):
            super().__init__() # without a GPU there is no memory to pin
            pack = self.pack_hook
            self.pack_hook = lambda x: (moved.append(x.numel()), pack(x))[1]
    monkeypatch.setattr(mu, "save_on_cpu", Counting)
    model, ids = tiny("llama?num_hidden_layers=4").train(), torch.randint(9, 700, (2, 33), generator=torch.Generator().manual_seed(0))
    def gradients():
        model.zero_grad()
        loss = causal_loss(model(input_ids=ids, use_cache=False), ids)
        loss.backward()
        return [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
    want = gradients()
    made = checkpointing(ModelOptions(base_model="x", **kw), "cuda")
    assert made["activation_checkpointing"] is True
    args = dict(made["activation_checkpointing_kwargs"] or {})
    flags = {k: args.pop(k) for k in ("every_n_layers", "offload") if k in args}
    model.activation_checkpointing_enable(args or None, **flags)
    runs = []
    for l in model.model.layers: l.self_attn.register_forward_hook(lambda *a: runs.append(1))
    got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert len(runs)==(6 if flags.get("every_n_layers") else 8) # each layer once, and once more where it is checkpointed
    offload = flags.get("offload", False)
    assert (sum(n>=2*33*64 for n in moved)>=(2 if flags.get("every_n_layers") else 4))==offload and bool(moved)==offload


def test_nothing_to_offload_on_a_cpu(data, tmp_path, caplog):
    with caplog.at_level("WARNING", "tuneforge"): r = train(config(data, tmp_path/"a", gradient_checkpointing="unsloth", gc_steps=-1, torch_empty_cache_steps=2))
    assert "in the memory of the CPU already" in caplog.text and "keeps no cache" in caplog.text
    assert seen(r)==seen(train(config(data, tmp_path/"b")))
    with pytest.raises(ConfigError, match="a disk is slower"): config(data, tmp_path, gradient_checkpointing="offload_disk")


# ---- compiled models

@pytest.mark.parametrize("backend, kw", [("eager", dict(sample_packing=True, micro_batch_size=2)), pytest.param("aot_eager", LORA, marks=pytest.mark.slow), pytest.param("eager", dict(chunked_cross_entropy=True), marks=pytest.mark.slow), pytest.param("eager", dict(gradient_checkpointing=True), marks=pytest.mark.slow)], ids=str)
def test_a_compiled_run_is_the_same_run(data, tmp_path, backend, kw):
    usual = train(config(data, tmp_path/"a", **kw))
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    r = train(config(data, tmp_path/"b", torch_compile=True, torch_compile_backend=backend, save_strategy="steps", save_steps=2, **kw))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]>before
    assert seen(r)==pytest.approx(seen(usual), rel=1e-4)
    resumed = train(config(data, tmp_path/"c", torch_compile=True, torch_compile_backend=backend, resume_from_checkpoint=str(tmp_path/"b"/"checkpoint-2"), **kw))
    assert seen(resumed)[-2:]==pytest.approx(seen(r)[-2:], rel=1e-4)
    assert not any("_orig_mod" in n for n, _ in resumed.model.named_parameters())


# ---- kernels for a GPU

@pytest.mark.parametrize("key", ["cut_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_rope", "liger_rms_norm", "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "unsloth_rms_norm"])
def test_a_kernel_without_a_gpu_is_refused_before_anything_is_loaded(data, tmp_path, key, monkeypatch):
    monkeypatch.setattr("tuneforge.train.load_data", None)
    monkeypatch.setattr("tuneforge.train.load_model", None)
    with pytest.raises(UserError, match=f"`{key}` needs an NVIDIA or AMD GPU") as e: train(config(data, tmp_path, device="cpu", **{key: True}))
    assert ("chunked_cross_entropy" in str(e.value))==("cross_entropy" in key)


def test_a_kernel_without_its_library_names_the_extra():
    from importlib.util import find_spec
    for name, key in (("liger_kernel", "liger_rope"), ("cut_cross_entropy", "cut_cross_entropy")):
        if find_spec(name): pytest.skip(f"{name} is installed")
        with pytest.raises(UserError, match=r"tuneforge\[liger\]"): check_fused(ModelOptions(base_model="x", **{key: True}), "cuda")


def test_memory_is_freed_when_it_should_be(data, tmp_path):
    steps = []
    class Count(FreeMemory):
        def __init__(self, every): super().__init__(every, lambda: steps.append(self.state.global_step))
        def on_step_end(self, args, state, control, **kw): self.state = state; super().on_step_end(args, state, control, **kw)
    train(config(data, tmp_path/"a"), callbacks=[Count(2)])
    assert steps==[2]
    steps.clear()
    train(config(data, tmp_path/"b", val_set_size=0.2, eval_steps=2, max_steps=None, num_epochs=1, gradient_accumulation_steps=1), callbacks=[Count(-1)])
    n = max(steps)
    assert steps==[*range(2, n+1, 2), n] # before each evaluation, and at the end of the epoch
