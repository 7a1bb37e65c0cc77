"Adapters and partial training against plain algebra, against other libraries, and against runs that never stopped"
import json, math
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tuneforge.all import *
from tuneforge.partial import parse_pattern
from tests.tools import write_jsonl

TINY = {"llama": "tiny:llama", "untied": "tiny:llama?tie_word_embeddings=false", "gpt2": "tiny:gpt2"}
LORA = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)


def base(name="llama", **kw): return load_model(ModelOptions(base_model=TINY.get(name, name), **kw))


def logits(model, n=20):
    with torch.no_grad(): return model.eval()(input_ids=torch.arange(3, n+3)[None]).logits


def disturb(model, seed=0, size=0.03):
    "Move everything that is trained"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p += size*torch.randn(p.shape, generator=g)
    return model


def adapted(opts, name="llama", **kw): return disturb(add_adapter(base(name, **kw), LoraOptions(**opts)))


def finished(model, folder, init=None, first=None):
    "As a run leaves it"
    model.save_pretrained(folder)
    if first: make_plain(folder, first)


@st.composite
def options(draw):
    "LoRA options that go together"
    name = draw(st.sampled_from(list(TINY)))
    names = dict(llama=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"], gpt2=["c_attn", "c_fc", "c_proj"])["gpt2" if name=="gpt2" else "llama"]
    some = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    o = dict(adapter="lora", lora_r=draw(st.sampled_from([1, 2, 4, 6])), lora_alpha=draw(st.integers(1, 32)), lora_dropout=draw(st.sampled_from([0., 0.1])))
    o |= draw(st.sampled_from([dict(lora_target_linear=True), dict(lora_target_modules=some), dict(lora_target_modules=rf".*\.({'|'.join(some)})"), dict(lora_target_linear=True, lora_target_modules=some)]))
    if draw(st.booleans()): o["peft_use_rslora"] = True
    init = draw(st.sampled_from([None, None, True, False, "gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal"]))
    if name=="gpt2" and init not in (None, True, False, "gaussian", "pissa"): init = None # PEFT's others take no transposed weights
    if init=="orthogonal" and o["lora_r"]%2: o["lora_r"] += 1
    if init is not None: o["peft_init_lora_weights"] = init
    elif draw(st.booleans()): o["peft_use_dora"] = True
    if name!="gpt2":
        if init!="orthogonal" and draw(st.booleans()): o["lora_rank_pattern"] = {some[0]: draw(st.sampled_from([2, 8]))}
        if draw(st.booleans()): o["lora_alpha_pattern"] = {some[0]: draw(st.integers(1, 64))}
        if not isinstance(o.get("lora_target_modules"), str) and draw(st.booleans()): o["peft_layers_to_transform"] = draw(st.sampled_from([0, [1], [0, 1]]))
        o |= draw(st.sampled_from([{}, {}, dict(lora_modules_to_save=["norm"]), dict(lora_modules_to_save=["embed_tokens", "lm_head"]), dict(peft_trainable_token_indices=[5, 9])]))
    elif draw(st.booleans()): o["lora_fan_in_fan_out"] = True
    return name, o


def exact(name, init=None): # where round-off hides nothing; PEFT decomposes in float32 alone
    return base(name) if isinstance(init, str) and init.startswith(("pissa", "olora")) else base(name).double()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(options())
def test_saved_loaded_merged_the_same(tmp_path_factory, given_):
    name, o = given_
    folder = tmp_path_factory.mktemp("adapter")
    init = o.get("peft_init_lora_weights")
    model = add_adapter(exact(name, init), LoraOptions(**o))
    first = first_factors(model) if isinstance(init, str) and init.startswith(("pissa", "olora")) else None
    want = logits(disturb(model))
    model.save_pretrained(folder)
    assert torch.equal(logits(load_adapter(exact(name, init), folder)), want)
    if first: # the finished adapter is plain
        make_plain(folder, first)
        assert json.loads((folder/"adapter_config.json").read_text())["init_lora_weights"] is True
    plain = load_adapter(exact(name, init), folder)
    near = want.abs().max() * (1e-4 if first else 1e-12)
    assert (logits(plain)-want).abs().max()<=near
    if not o.get("lora_fan_in_fan_out") or name=="gpt2": assert (logits(plain.merge_and_unload())-want).abs().max()<=2*near


@pytest.mark.parametrize("name, o, kw", [("mixtral", dict(lora_target_linear=True), {}), ("mixtral", dict(lora_target_linear=True), dict(load_in_4bit=True)), ("qwen3_moe", dict(lora_target_linear=True), {}), ("mixtral", dict(lora_target_modules=["gate", "q_proj", "w1", "w2", "w3"]), {}),
    *((n, dict(lora_target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]), {}) for n in ("qwen3_moe", "olmoe", "qwen2_moe"))])
def test_dropout_is_before_layers_beside_experts(name, o, kw, caplog):
    "As Axolotl's examples ask for it; experts and router are parameters now, and PEFT refuses dropout there"
    from peft.tuners.lora.layer import ParamWrapper
    model = adapted(dict(adapter="lora", lora_r=2, lora_dropout=0.5) | o, f"tiny:{name}?num_hidden_layers=1", **kw)
    found = adapted_layers(model)
    assert {type(m.lora_dropout["default"]).__name__ for m in found.values() if not isinstance(m, ParamWrapper)}=={"Dropout"}
    assert any(isinstance(m, ParamWrapper) for m in found.values())==("not of experts and their router" in caplog.text)
    with torch.no_grad(): drawn = [model.train()(input_ids=torch.arange(3, 23)[None]).logits for _ in range(2)]
    assert not torch.equal(*drawn) and torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("o", [dict(lora_target_linear=True), dict(lora_target_modules=["q_proj"], lora_target_parameters=["experts.gate_up_proj", "experts.down_proj"])])
def test_fused_experts(tmp_path, o):
    model = adapted(dict(adapter="lora", lora_r=2) | o, "tiny:mixtral")
    assert any("expert" in n for n, p in model.named_parameters() if p.requires_grad)
    want = logits(model)
    model.save_pretrained(tmp_path)
    back = load_adapter(base("tiny:mixtral"), tmp_path)
    assert torch.allclose(logits(back), want, atol=1e-5) and not torch.allclose(logits(base("tiny:mixtral")), want, atol=0.1)
    assert torch.allclose(logits(back.merge_and_unload()), want, atol=1e-4)


def test_adapter_by_hand():
    "rsLoRA, alpha pattern and rank pattern against matrix products"
    model = adapted(LORA | dict(peft_use_rslora=True, lora_rank_pattern={"q_proj": 2}, lora_alpha_pattern={"q_proj": 10}))
    for n, m in adapted_layers(model).items():
        r, alpha = (2, 10) if n.endswith("q_proj") else (4, 8)
        a, b = m.lora_A["default"].weight, m.lora_B["default"].weight
        assert a.shape[0]==b.shape[1]==r
        x = torch.randn(3, a.shape[1])
        assert torch.allclose(m(x), x@m.base_layer.weight.T+alpha/math.sqrt(r)*(x@a.T)@b.T, atol=1e-4)


def test_dora_by_hand():
    m = adapted_layers(adapted(LORA | dict(peft_use_dora=True)))["model.layers.1.mlp.up_proj"]
    w = m.base_layer.weight+2*m.lora_B["default"].weight@m.lora_A["default"].weight
    w = m.lora_magnitude_vector["default"].weight[:, None]*w/w.norm(dim=1, keepdim=True)
    x = torch.randn(3, 64)
    assert torch.allclose(m(x), x@w.T, atol=1e-4)


def test_layers_and_targets():
    model = add_adapter(base(), LoraOptions(**LORA, peft_layers_to_transform=1, peft_layers_pattern="layers"))
    assert {n.split(".")[2] for n in adapted_layers(model)}=={"1"} and len(adapted_layers(model))==7
    model = add_adapter(base(), LoraOptions(adapter="lora", lora_target_modules=r".*layers\.0\..*(q|v)_proj"))
    assert set(adapted_layers(model))=={"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_loses_less(tmp_path, bits):
    "Its first approximation is nearer to the base than the quantised base alone, and the adapter comes back with its base"
    model = add_adapter(base(), LoraOptions(**LORA, peft=dict(loftq_config=dict(loftq_bits=bits, loftq_iter=3))))
    for n, m in adapted_layers(model).items():
        w = dict(base().named_parameters())[f"{n}.weight"]
        q = m.base_layer.weight
        assert (q+m.get_delta_weight("default")-w).norm()<(q-w).norm() and not torch.equal(q, w)
        if bits==4: assert all(len(set(block.tolist()))<=16 for block in q.reshape(-1, 64))
    disturb(model).save_pretrained(tmp_path)
    save_base(model, tmp_path)
    assert torch.equal(logits(load_adapter(base(), tmp_path)), logits(model))


def test_going_on_with_an_adapter(tmp_path):
    model = adapted(LORA)
    model.save_pretrained(tmp_path)
    again = add_adapter(base(), LoraOptions(adapter="lora", lora_model_dir=str(tmp_path)))
    assert torch.equal(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad}=={n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match="`lora_alpha: 16` contradicts the adapter"): add_adapter(base(), LoraOptions(adapter="lora", lora_model_dir=str(tmp_path), lora_alpha=16))


def test_a_base_that_has_an_adapter(tmp_path):
    adapted(LORA).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds an adapter, not a model.*lora_model_dir"): load_model(ModelOptions(base_model=str(tmp_path)))
    with pytest.raises(UserError, match="already has an adapter.*lora_model_dir"): add_adapter(adapted(LORA), LoraOptions(**LORA))


def test_an_adapter_of_another_base(tmp_path):
    adapted(LORA).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model.layers.0.mlp.down_proj takes 96 numbers, the adapter's 192"): load_adapter(base("tiny:llama?intermediate_size=96"), tmp_path)
    with pytest.raises(UserError, match="adapts model.layers.1.mlp.down_proj, which the model does not have"): load_adapter(base("tiny:llama?num_hidden_layers=1"), tmp_path)
    with pytest.raises(UserError, match="adapts model.layers.0.mlp.down_proj, which the model does not have"): load_adapter(base("gpt2"), tmp_path)
    t = load_file(tmp_path/"adapter_model.safetensors")
    gone = sorted(t)[3]
    save_file({k: v for k, v in t.items() if k!=gone}, tmp_path/"adapter_model.safetensors")
    with pytest.raises(UserError, match="not whole: it has no "+gone.replace(".", r"\.")): load_adapter(base(), tmp_path)


@pytest.mark.parametrize("o, says", [(dict(lora_target_modules=["q_proj", "v_porj"]), "no `v_porj`; did you mean|no `v_porj`.*did you mean"), (dict(lora_target_modules=["xyz"]), r"there are q_proj \(2\)"),
    (dict(lora_target_modules=r".*nothing.*"), r"there are q_proj \(2\)"), (dict(lora_target_linear=True, lora_modules_to_save=["head"]), "`lora_modules_to_save`: the model has no `head`"),
    (dict(lora_target_parameters=["experts.down_proj"]), "`lora_target_parameters`"), (dict(lora_target_linear=True, lora_rank_pattern={"qproj": 2}), "`lora_rank_pattern`: no adapted layer matches `qproj`"),
    (dict(lora_target_linear=True, peft_layers_to_transform=[2]), "no layer 2; the model has layers 0 to 1"), (dict(lora_target_linear=True, peft_layers_to_transform=[0], peft_layers_pattern="h"), "`peft_layers_pattern`"),
    (dict(lora_target_linear=True, peft_trainable_token_indices=[768]), "no token 768; the embedding has 768 rows"), (dict(lora_target_modules=["q_proj", "embed_tokens"]), "share one weight"),
    (dict(lora_target_modules=r".*norm"), "cannot add the adapter")])
def test_names_that_match_nothing(o, says):
    with pytest.raises(UserError, match=says): add_adapter(base(), LoraOptions(adapter="lora", **o))


def test_rank_zero():
    with pytest.raises(ConfigError, match="lora_r.*over 0"): load_config(dict(base_model="tiny:llama", datasets=[dict(path="x", type="alpaca")], learning_rate=1e-3, lora_r=0, adapter="lora", lora_target_linear=True))


def test_quantising_without_the_library(monkeypatch):
    monkeypatch.setattr("tuneforge.precision.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tuneforge\[quant\]"): base(load_in_4bit=True)
    with pytest.raises(UserError, match=r"tuneforge\[quant\]"): add_adapter(base(), LoraOptions(**LORA, peft=dict(loftq_config={})))


def test_copies_of_layers_merge(tmp_path):
    model = adapted(LORA | dict(peft_layer_replication=[(0, 2), (1, 2)]))
    want = logits(model)
    model.save_pretrained(tmp_path/"a")
    merged = unshare(load_adapter(base(), tmp_path/"a")).merge_and_unload()
    merged.save_pretrained(tmp_path/"m")
    again = load_model(ModelOptions(base_model=str(tmp_path/"m")))
    assert again.config.num_hidden_layers==3 and torch.allclose(logits(again), want, atol=1e-4)


# Partial training

@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_ranges_are_sets_of_rows(ranges):
    m = torch.nn.Module()
    m.w = torch.nn.Parameter(torch.zeros(31, 2))
    good = [r for r in ranges if r[0]<r[1]]
    if len(good)<len(ranges):
        with pytest.raises(UserError, match="names no row"): choose_rows(m, [f"w[{a}:{b}]" for a, b in ranges])
    if not good: return
    got = choose_rows(m, [f"w[{a}:{b}]" for a, b in good])["w"]
    assert {i for a, b in got for i in range(a, b)}=={i for a, b in good for i in range(a, b)}
    assert all(b<c for (_, b), (c, _) in zip(got, got[1:]))


def test_patterns():
    assert parse_pattern("lm_head.weight[5]")[1]==(5, 6) and parse_pattern("a[:3]")[1]==(None, 3) and parse_pattern("a[3:]")[1]==(3, None) and parse_pattern("a.[0-3]")[1] is None
    e = parse_pattern("model.layers.2[0-9]+.mlp.gate")[0]
    assert e.match("model.layers.27.mlp.gate_proj.weight") and not e.match("model.layers.2.mlp.gate") and not e.match("modelxlayers.27.mlp.gate")
    with pytest.raises(UserError, match="no regular expression"): parse_pattern("a(")


OPTIMIZERS = {"adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5), "sgd": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.5, nesterov=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01, weight_decay=0.5), "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01, weight_decay=0.5)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_outside_never_move(name):
    "Rows inside do what the whole tensor would do, for optimizers that treat each number alone"
    one, two = (torch.nn.Linear(5, 8, bias=False) for _ in range(2))
    two.load_state_dict(one.state_dict())
    hooks = unfreeze(one, ["weight[1:3]", "weight[6]"])
    a, b = OPTIMIZERS[name](list(one.parameters())), OPTIMIZERS[name](list(two.parameters()))
    start = one.weight.detach().clone()
    for h in hooks: h.optimizer_made(a)
    for i in range(4):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(i))
        for m, opt, hs in ((one, a, hooks), (two, b, [])):
            m(x).pow(2).sum().backward()
            for h in hs: h.on_pre_optimizer_step(None, None, None)
            opt.step(); m.zero_grad(); opt.zero_grad()
            if m is one: m.weight.grad = None
    inside = [1, 2, 6]
    outside = [0, 3, 4, 5, 7]
    assert torch.equal(one.weight[outside], start[outside]) and not (one.weight[inside]==start[inside]).any()
    if name!="adafactor": # its statistics are shared between rows, and inputs of a linear layer's rows are their own
        assert torch.allclose(one.weight[inside], two.weight[inside], atol=1e-6)


def test_rows_outside_never_move_with_any_optimizer():
    "All that run here and that the rules allow, as the trainer builds them: with weight decay"
    from tuneforge.optim import OPTIMIZERS as ALL
    rows, ran = ["model.embed_tokens.weight[300:400]", "lm_head.weight[:20]", "lm_head.weight[70]", "model.layers.1.mlp.up_proj.weight[5:9]"], []
    for name, recipe in ALL.items():
        if any(o in name for o in ("galore", "apollo", "lomo", "grokadamw")) or recipe.cls.startswith("torchao"): continue # refused, and compiled
        model = base("untied")
        hooks = unfreeze(model, rows)
        try: opt = make_optimizer(model, LearningOptions(optimizer=name, learning_rate=0.01, weight_decay=0.3), 5)
        except UserError as e: assert "needs" in str(e), e; continue # no library here
        for h in hooks: h.optimizer_made(opt)
        if hasattr(opt, "train"): opt.train()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        for i in range(7): # RAdam waits for five
            ids = torch.randint(300, 400, (2, 12), generator=torch.Generator().manual_seed(i))
            model(input_ids=ids, labels=ids).loss.backward()
            for h in hooks: h.on_pre_optimizer_step(None, None, None)
            opt.step(); opt.zero_grad(); model.zero_grad()
        moved = {n: (p!=start[n]).reshape(len(p), -1).any(1).nonzero().flatten().tolist() for n, p in model.named_parameters()}
        assert {n for n, v in moved.items() if v}=={"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"}, name
        assert moved["model.layers.1.mlp.up_proj.weight"]==[5, 6, 7, 8] and set(moved["lm_head.weight"])=={*range(20), 70} and set(moved["model.embed_tokens.weight"])<=set(range(300, 400)), name
        ran.append(name)
    assert {"adamw_torch_fused", "sgd", "adafactor", "muon"}<=set(ran), ran


def test_spectrum_against_numpy():
    "Singular values from the eigenvalues of the Gram matrix, bounds and sums in plain Python"
    g = np.random.default_rng(0)
    w = g.normal(size=(24, 60))+4*np.outer(g.normal(size=24), g.normal(size=60))/5
    s = sorted(np.sqrt(np.linalg.eigvalsh(w@w.T)), reverse=True)
    up = sorted(s)
    quart = lambda q: up[int(q*23)]+(q*23-int(q*23))*(up[min(23, int(q*23)+1)]-up[int(q*23)])
    bound = (quart(.75)-quart(.25))/1.349*(1+math.sqrt(24/60))
    want = sum(x for x in s if x>bound)/sum(x for x in s if x<=bound)/s[0]
    assert signal_to_noise(torch.tensor(w))==pytest.approx(want, rel=1e-4)
    kinds = spectrum(base())
    w = dict(base().named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert kinds["model.layers.*.mlp.up_proj.weight"]["model.layers.0.mlp.up_proj.weight"]==pytest.approx(signal_to_noise(w)) and len(kinds)==7


def test_spectrum_chooses_the_best():
    model = base("tiny:llama?num_hidden_layers=5")
    with torch.no_grad(): dict(model.named_parameters())["model.layers.3.mlp.up_proj.weight"].copy_(torch.randn(192, 64)*0.01+torch.outer(torch.randn(192), torch.randn(64)))
    ratios = spectrum(model)
    unfreeze(model, spectrum_patterns(model, 0.4))
    on = {n for n, p in model.named_parameters() if p.requires_grad}
    for kind, r in ratios.items(): assert on & set(r)==set(sorted(r, key=r.get)[-2:])
    assert "model.embed_tokens.weight" in on and not any("norm" in n for n in on)


def test_lisa_draws_are_fair_and_repeat():
    draws = [tuple(lisa_layers(6, 2, i, seed=3)) for i in range(3000)]
    assert draws==[tuple(lisa_layers(6, 2, i, seed=3)) for i in range(3000)] and all(len(set(d))==2 for d in draws)
    counts = [sum(i in d for d in draws) for i in range(6)]
    assert max(abs(c-1000) for c in counts)<150


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 60), st.integers(0, 10), st.integers(0, 5), st.integers(0, 300))
def test_jagged_is_the_schedule_between_restarts(every, warmup, anneal, step):
    f = jagged(lambda s: 1/(1+s), every, min(warmup, every//2), min(anneal, every//3))
    i, first = step%every, step<every
    inside = (first or i>=min(warmup, every//2)) and i<every-min(anneal, every//3)
    assert 0<f(step)<=1/(1+step)
    assert (f(step)==1/(1+step))==inside


# Runs

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    village = Village()
    return write_jsonl(tmp_path_factory.mktemp("data")/"train.jsonl", village.questions(list(village.people)[:6]))


def config(data, out, **kw):
    return load_config(dict(base_model="tiny:llama", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out), sequence_len=256,
        learning_rate=5e-3, save_strategy="no", logging_steps=1, lr_scheduler="constant", warmup_steps=0, micro_batch_size=4) | kw)


def losses(r): return [h["loss"] for h in r.history if "loss" in h]
def tensors(folder): return {f"{p.name}:{k}": v for p in Path(folder).glob("*.safetensors") for k, v in load_file(p).items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


RELORA = LORA | dict(relora_steps=4, relora_warmup_steps=1, relora_prune_ratio=0.9)


def test_one_restart_is_a_merge_by_hand(data, tmp_path):
    "The adapter of the checkpoint before the restart, added by hand, is the base after it"
    r = train(config(data, tmp_path, max_steps=6, save_strategy="steps", save_steps=3, relora_anneal_steps=0, **(RELORA | dict(relora_steps=3, relora_warmup_steps=0))))
    plain = train(config(data, tmp_path/"plain", max_steps=3, **LORA))
    t = load_file(tmp_path/"plain"/"adapter_model.safetensors")
    start = dict(base().named_parameters())
    saved = load_file(tmp_path/"adapted_base.safetensors")
    assert len(saved)==14
    for k, w in saved.items():
        n = k.removesuffix(":weight")
        a, b = (t[f"base_model.model.{n}.lora_{o}.weight"] for o in "AB")
        assert torch.allclose(w, start[f"{n}.weight"]+2*b@a, atol=1e-6) and not torch.equal(w, start[f"{n}.weight"])
    assert (tmp_path/"checkpoint-3"/"adapted_base.safetensors").is_file()
    assert all((v==0).all() for k, v in load_file(tmp_path/"checkpoint-3"/"adapter_model.safetensors").items() if "lora_B" in k)
    assert losses(r)[:3]==losses(plain)
    for state in torch.load(tmp_path/"checkpoint-3"/"optimizer.pt", weights_only=True)["state"].values(): # nine tenths are forgotten, in both averages alike
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        assert (mean!=0).sum()==mean.numel()-round(0.9*mean.numel()) and torch.equal(mean!=0, square!=0) and state["step"]==3


@pytest.mark.parametrize("bits", [4, 8])
def test_one_restart_of_a_quantised_base_by_hand(data, tmp_path, bits):
    "Dequantise, add, quantise, with bitsandbytes' own functions: the same bytes"
    from bitsandbytes import functional as q
    kw = {f"load_in_{bits}bit": True, "learning_rate": 0.05}
    train(config(data, tmp_path/"r", max_steps=6, relora_anneal_steps=0, **(RELORA | dict(relora_steps=3, relora_warmup_steps=0) | kw)))
    train(config(data, tmp_path/"plain", max_steps=3, **(LORA | kw)))
    t, saved = load_file(tmp_path/"plain"/"adapter_model.safetensors"), load_file(tmp_path/"r"/"adapted_base.safetensors")
    kw.pop("learning_rate")
    start, changed = dict(base(**kw).named_modules()), 0
    for k in [k for k in saved if k.endswith(":weight")]:
        n = k.removesuffix(":weight")
        a, b = (t[f"base_model.model.{n}.lora_{o}.weight"].float() for o in "AB")
        w = start[n].weight
        if bits==8:
            new, scales, _ = q.int8_vectorwise_quant((q.int8_vectorwise_dequant(w.data, w.SCB).float()+2*b@a).half())
            assert torch.equal(saved[f"{n}:SCB"], scales), n
        else:
            s = w.quant_state
            new, _ = q.quantize_4bit((q.dequantize_4bit(w.data, s).float()+2*b@a).to(s.dtype), blocksize=s.blocksize, quant_type=s.quant_type, compress_statistics=s.nested)
        assert torch.equal(saved[k].flatten(), new.flatten()), n
        changed += not torch.equal(new.flatten(), w.data.flatten())
    assert changed==14


RESTARTS = dict(magnitude={}, random=dict(relora_prune_method="random"), reset=dict(relora_prune_method="reset", relora_prune_ratio=None, relora_cpu_offload=True)) | {"4bit": dict(adapter="qlora", load_in_4bit=True), "8bit": dict(load_in_8bit=True)}


@pytest.mark.parametrize("kw", [pytest.param(kw, id=n, marks=[] if n=="4bit" else pytest.mark.slow) for n, kw in RESTARTS.items()])
def test_restarts_resume(data, tmp_path, kw):
    "A run that goes on from before, at and after a restart ends as the one that never stopped; and its merge holds"
    o = dict(max_steps=10, save_strategy="steps", save_steps=1, save_total_limit=20, lora_dropout=0.1) | RELORA | kw
    whole = train(config(data, tmp_path/"whole", **o))
    for step in (3, 4, 6):
        resumed = train(config(data, tmp_path/f"from{step}", resume_from_checkpoint=str(tmp_path/"whole"/f"checkpoint-{step}"), **o))
        assert losses(resumed)[step:]==losses(whole)[step:], step
        assert same(tensors(tmp_path/"whole"), tensors(tmp_path/f"from{step}")), step
    cfg = config(data, tmp_path/"whole", **o)
    model, tok = load_finetuned(cfg)
    assert torch.equal(logits(model), logits(whole.model))
    folder, d = merge(cfg)
    assert d.kl<1e-5 and not torch.allclose(logits(load_model(ModelOptions(base_model=str(folder)))), logits(base()), atol=0.1)


def test_pissa_ends_as_a_plain_adapter(data, tmp_path):
    o = LORA | dict(peft_init_lora_weights="pissa_niter_4", max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    whole = train(config(data, tmp_path/"a", **o))
    resumed = train(config(data, tmp_path/"b", resume_from_checkpoint=str(tmp_path/"a"/"checkpoint-2"), **o))
    assert losses(resumed)[2:]==losses(whole)[2:]
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(base(), tmp_path/"a") # any tool, no help of ours
    assert theirs.peft_config["default"].r==8
    assert torch.allclose(logits(theirs), logits(whole.model), atol=1e-4) and same(tensors(tmp_path/"a"), tensors(tmp_path/"b"))
    with pytest.raises(UserError, match="resume_from_checkpoint"): add_adapter(base(), LoraOptions(adapter="lora", lora_model_dir=str(tmp_path/"a"/"checkpoint-2")))


def test_rows_outside_stay_in_a_run(data, tmp_path):
    o = dict(base_model=TINY["untied"], unfrozen_parameters=["model.embed_tokens.weight$[300:400]", "lm_head.weight[:20]", "model.layers.1.mlp"], weight_decay=0.3, max_steps=6, save_strategy="steps", save_steps=3, lora_dropout=None or 0.0)
    o.pop("lora_dropout")
    whole = train(config(data, tmp_path/"a", **o))
    before, after = (dict(m.named_parameters()) for m in (base("untied"), whole.model))
    e, h = "model.embed_tokens.weight", "lm_head.weight"
    moved = {n: (before[n]!=after[n]).reshape(len(before[n]), -1).any(1).nonzero().flatten().tolist() for n in before}
    assert set(moved[e])=={i for i in range(300, 400) if before[e][i].abs().sum()>0} and moved[h]==list(range(20))
    assert {n for n, v in moved.items() if v}=={e, h, *(n for n in before if "layers.1.mlp" in n)}
    resumed = train(config(data, tmp_path/"b", resume_from_checkpoint=str(tmp_path/"a"/"checkpoint-3"), **o))
    assert losses(resumed)[3:]==losses(whole)[3:] and same(tensors(tmp_path/"a"), tensors(tmp_path/"b"))


def test_lisa_moves_only_its_layers(data, tmp_path):
    from transformers import TrainerCallback
    class Watch(TrainerCallback):
        "What moved between two switches"
        def __init__(self): self.seen = []
        def on_step_begin(self, args, state, control, model=None, **kw):
            if state.global_step%2==0: self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        def on_step_end(self, args, state, control, model=None, **kw):
            if state.global_step%2==0: self.seen.append({int(n.split(".")[2]) for n, p in model.named_parameters() if ".layers." in n and not torch.equal(p, self.before[n])})
    watch = Watch()
    o = dict(base_model="tiny:llama?num_hidden_layers=6", lisa_n_layers=2, lisa_step_interval=2, max_steps=8, weight_decay=0.3, save_strategy="steps", save_steps=3, seed=5)
    whole = train(config(data, tmp_path/"a", **o), [watch])
    assert watch.seen==[set(lisa_layers(6, 2, i, 5)) for i in range(4)] and len(set(map(tuple, watch.seen)))>1
    resumed = train(config(data, tmp_path/"b", resume_from_checkpoint=str(tmp_path/"a"/"checkpoint-3"), **o))
    assert losses(resumed)[3:]==losses(whole)[3:] and same(tensors(tmp_path/"a"), tensors(tmp_path/"b"))


def test_spectrum_trains_what_it_chose(data, tmp_path):
    cfg = config(data, tmp_path, spectrum_top_fraction=0.5, max_steps=2)
    kinds = spectrum(base())
    r = train(cfg)
    before = dict(base().named_parameters())
    moved = {n for n, p in r.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved=={next(iter(v)) for v in kinds.values()}|{"model.embed_tokens.weight"}


def test_neftune_is_transformers_where_rows_are_alone(data, tmp_path):
    "One sample in a batch: the same noise as transformers'. Packed or padded: by each sample's own length"
    from types import SimpleNamespace
    from transformers.integrations.neftune import neftune_post_forward_hook
    from tuneforge.methods import Neftune
    model = base().train()
    plain, seen = model.get_input_embeddings()(torch.arange(30)[None]).detach(), []
    hook = Neftune(model, 7.)
    model.get_input_embeddings().register_forward_hook(lambda m, a, o: seen.append(o.detach()))
    def noise(**kw):
        torch.manual_seed(0)
        model(**kw)
        return seen[-1]
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=7.), None, plain)
    assert torch.allclose(noise(input_ids=torch.arange(30)[None]), theirs, atol=1e-6)
    ids, pos = torch.arange(30)[None], torch.tensor([[*range(10), *range(20)]])
    d = (noise(input_ids=ids, position_ids=pos)-plain)[0]
    one = (noise(input_ids=ids)-plain)[0]*math.sqrt(30)
    assert torch.allclose(d[:10], one[:10]/math.sqrt(10), atol=1e-5) and torch.allclose(d[10:], one[10:]/math.sqrt(20), atol=1e-5)
    mask = torch.ones(2, 30, dtype=torch.long); mask[1, 12:] = 0
    both = noise(input_ids=ids.repeat(2, 1), attention_mask=mask)-plain
    assert both[1, :12].abs().max()<=7/math.sqrt(12*64) and both[1, :12].abs().max()>7/math.sqrt(30*64) and both[0].abs().max()<=7/math.sqrt(30*64)
    a, b = (losses(train(config(data, tmp_path/str(x), max_steps=3, **({"neftune_noise_alpha": x} if x else {})))) for x in (0, 5))
    assert a!=b and all(math.isfinite(x) for x in b)


def test_skipped_positions():
    "Rising, from 0, in range, cut where they may be; each piece's move is drawn evenly, whatever the batch"
    from tuneforge.pose import PoseCollator, skip_positions
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=0, max_size=30), st.integers(30, 90), st.integers(0, 5), st.integers(2, 6), st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    def check(ids, longest, seed, chunks, split):
        p = skip_positions(np.array(ids, dtype=np.int64), longest, seed, chunks, split)
        assert len(p)==len(ids) and p.tolist()==sorted(set(p.tolist())) and all(0<=i<longest for i in p) and p[:1].tolist() in ([], [0])
        cuts = [i for i in range(1, len(p)) if p[i]-p[i-1]>1]
        assert all(ids[i-1] in split for i in cuts) if split else len(cuts)<chunks
        assert p.tolist()==skip_positions(np.array(ids, dtype=np.int64), longest, seed, chunks, split).tolist()
    check()
    ends = [int(skip_positions(np.arange(10), 20, seed)[-1]) for seed in range(5500)]
    assert set(ends)==set(range(9, 20)) and all(abs(ends.count(e)-500)<110 for e in range(9, 20)) # 5 standard deviations
    rows = [dict(input_ids=[np.arange(3, n)], labels=[np.arange(3, n)]) for n in (20, 9, 14)]
    collate = PoseCollator(Collator(0, False), OldPackingOptions(pose_max_context_len=50), 1)
    together, alone = collate(rows), [collate([r]) for r in rows]
    for i, one in enumerate(alone): assert torch.equal(together["position_ids"][i, :one["position_ids"].shape[1]], one["position_ids"][0])


def test_runs_with_skipped_positions(data, tmp_path):
    "The model sees the skips, in training alone; the run goes on exactly; short models are refused"
    from transformers import TrainerCallback
    seen = []
    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kw):
            model.register_forward_pre_hook(lambda m, a, k: seen.append((m.training, k.get("position_ids"), k["attention_mask"])), with_kwargs=True)
    o = dict(use_pose=True, pose_max_context_len=400, max_steps=6, save_strategy="steps", save_steps=3, val_set_size=0.2, eval_strategy="no", neftune_noise_alpha=1)
    whole = train(config(data, tmp_path/"a", **o), [Watch()])
    assert {t for t, p, _ in seen if p is not None}=={True} and all(p is None for t, p, _ in seen if not t)
    jumps = [int((p[0].diff()>1).sum()) for t, p, m in seen if t]
    assert all(p.max()<400 for t, p, _ in seen if t) and max(jumps)==1 and max(int(p.max()) for t, p, _ in seen if t)>256
    resumed = train(config(data, tmp_path/"b", resume_from_checkpoint=str(tmp_path/"a"/"checkpoint-3"), **o))
    assert losses(resumed)[3:]==losses(whole)[3:] and same(tensors(tmp_path/"a"), tensors(tmp_path/"b"))
    with pytest.raises(UserError, match="beyond the [0-9,]+ positions"): train(config(data, tmp_path/"c", use_pose=True, pose_max_context_len=10**6, max_steps=1))


def test_jagged_restarts_without_an_adapter(data, tmp_path):
    r = train(config(data, tmp_path, max_steps=8, jagged_restart_steps=4, jagged_restart_warmup_steps=1, jagged_restart_anneal_steps=1))
    own = schedule(LearningOptions(learning_rate=1, lr_scheduler="constant", relora_steps=4, relora_warmup_steps=1, relora_anneal_steps=1), 8)
    rates = [h["learning_rate"]/5e-3 for h in r.history if "learning_rate" in h]
    assert rates==pytest.approx([1, 1, 1, .5005, .5005, 1, 1, .5005]) and rates==pytest.approx([own(i) for i in range(8)]) # never quite 0: a thousandth stays


def test_the_table_is_shown(data, tmp_path, capfd):
    train(config(data, tmp_path/"a", max_steps=1, **LORA))
    said = capfd.readouterr().err
    assert "model.layers.0–1.self_attn.q_proj.lora_A.weight" in said and "weights are trained (" in said
    with pytest.raises(UserError, match="nothing would be trained"): Trainable(base().requires_grad_(False))
    model = base("untied")
    hooks = unfreeze(model, ["model.embed_tokens.weight[10:20]", "model.layers.1.mlp.up_proj"])
    t = Trainable(model, hooks)
    assert t.trained==10*64+192*64 and "rows 10:20" in repr(t) and "rows 10:20" in t._repr_html_()


def test_a_regular_run_keeps_its_base(data, tmp_path):
    "Nothing of all this touches a run that did not ask for it"
    train(config(data, tmp_path, max_steps=2, **LORA))
    assert {p.name for p in tmp_path.glob("*.safetensors")}=={"adapter_model.safetensors"}


@pytest.mark.parametrize("arch", ["jamba", "mamba", "falcon_mamba"])
def test_layers_that_are_not_called_get_no_adapter(arch):
    "What is left out is what a forward pass leaves out; fails when transformers calls these layers"
    from tuneforge.adapters import linear_layers, uncalled
    model, called = load_model(ModelOptions(base_model=f"tiny:{arch}")), set()
    layers = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for n in layers: model.get_submodule(n).register_forward_hook(lambda *_, n=n: called.add(n.rpartition(".")[2]))
    model(input_ids=torch.arange(10)[None])
    assert {n.rpartition(".")[2] for n in layers}-called=={"dt_proj"}<=set(uncalled(model)) and set(linear_layers(model))<=called
    lora = add_adapter(model, LoraOptions(adapter="lora", lora_target_linear=True))
    assert set(linear_layers(lora.get_base_model())) and not any(o in n for n, p in lora.named_parameters() if p.requires_grad for o in uncalled(model))
    with pytest.raises(UserError, match="would be passed over"): add_adapter(load_model(ModelOptions(base_model=f"tiny:{arch}")), LoraOptions(adapter="lora", lora_target_modules=r".*\.(x_proj|dt_proj)"))


@pytest.mark.parametrize("kw, said", [(dict(lora_modules_to_save=["embed_tokens"]), True), (dict(lora_modules_to_save=["lm_head"]), True), (dict(lora_modules_to_save=["embed_tokens"], peft_ensure_weight_tying=True), False),
    (dict(lora_modules_to_save=["norm"]), False), ({}, False)])
def test_weights_that_come_apart_are_said(kw, said, caplog, recwarn):
    "Once, in our words; and it is true"
    model = add_adapter(base(), LoraOptions(**LORA | kw))
    assert ("are one weight, and a copy of it is trained" in caplog.text)==said
    assert not [w for w in recwarn if "tie_word_embeddings" in str(w.message)]
    weights = [m.weight if not hasattr(m, "modules_to_save") else m.modules_to_save["default"].weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (weights[0] is not weights[1])==said


def test_untied_weights_come_apart_without_a_word(caplog):
    add_adapter(base("untied"), LoraOptions(**LORA, lora_modules_to_save=["embed_tokens", "lm_head"]))
    assert "are one weight" not in caplog.text


@pytest.mark.parametrize("name, says", [("lm_headx", "did you mean `lm_head`"), ("zzz", "embed_tokens \\(1\\).*lm_head \\(1\\)")])
def test_what_may_be_saved_whole_is_named(name, says):
    with pytest.raises(UserError, match=f"`lora_modules_to_save`: the model has no `{name}`.*{says}"): add_adapter(base(), LoraOptions(**LORA, lora_modules_to_save=[name]))
