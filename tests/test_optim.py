"Schedules against formulas, torch and transformers; groups by counting; every optimizer against transformers' own making, on a tiny model, and through a checkpoint"
import copy, gc, io, math, sys, weakref
from functools import partial
from importlib.util import find_spec
import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames
from tuneforge.all import *
from tuneforge.optim import OPTIMIZERS, GroupOptions, find_optimizer, make_optimizer, make_scheduler, optimizer_arguments, optimizer_name, parameter_groups
from tuneforge.options import Schedule
from tuneforge.schedules import LearningOptions, jagged, schedule
from tests.tools import write_jsonl

learning = partial(LearningOptions, learning_rate=1e-3)
N, W = 60, 7


def rates(scheduler_of, n=N, lr=1e-3):
    "Factors that a scheduler of another library gives"
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    s, seen = scheduler_of(opt), []
    for _ in range(n):
        seen.append(opt.param_groups[0]["lr"]/lr)
        opt.step()
        s.step()
    return seen


# ---- schedules

def hf(name, **kw): return lambda opt: get_scheduler(name, opt, W, N, kw)


SAME = [("linear", {}), ("cosine", {}), ("cosine", dict(num_cycles=1.5)), ("cosine_with_restarts", dict(num_cycles=3)), ("polynomial", {}), ("polynomial", dict(power=2.5, lr_end=1e-4)), ("inverse_sqrt", {}), ("inverse_sqrt", dict(timescale=20)),
    ("constant_with_warmup", {}), ("constant", {}), ("cosine_with_min_lr", dict(min_lr=1e-4)), ("cosine_with_min_lr", dict(min_lr_rate=0.3)), ("warmup_stable_decay", dict(num_decay_steps=20)),
    ("warmup_stable_decay", dict(num_decay_steps=11, num_stable_steps=30, decay_type="linear", min_lr_ratio=0.1)), ("warmup_stable_decay", dict(num_decay_steps=25, decay_type="1-sqrt"))]


@pytest.mark.parametrize("name, kw", SAME, ids=lambda o: str(o))
def test_after_the_warmup_as_transformers(name, kw):
    f = schedule(learning(lr_scheduler=name, warmup_steps=W, lr_scheduler_kwargs=kw), N)
    assert [f(s) for s in range(W, N)]==pytest.approx(rates(hf(name, **kw))[W:], abs=1e-12)


@pytest.mark.parametrize("name, kw", [("linear", {}), ("cosine", {}), ("cosine_with_min_lr", dict(min_lr=1e-4)), ("rex", {}), ("inverse_sqrt", {}), ("constant_with_warmup", {})])
def test_warmup_is_a_line_and_its_square(name, kw):
    f = schedule(learning(lr_scheduler=name, warmup_steps=W, lr_scheduler_kwargs=kw), N)
    g = schedule(learning(lr_scheduler=name, warmup_steps=W, lr_scheduler_kwargs=kw, lr_quadratic_warmup=True), N)
    assert [f(s) for s in range(W)]==pytest.approx([(s+1)/(W+1) for s in range(W)])
    assert [g(s) for s in range(W)]==pytest.approx([((s+1)/8)**2 for s in range(W)]) and [f(s) for s in range(W, N)]==[g(s) for s in range(W, N)]


@pytest.mark.parametrize("first", [None, 0.25])
def test_warmup_to_a_floor_is_transformers_one_step_on(first):
    "transformers counts the first step into the warmup, and is one step ahead"
    kw = dict(min_lr=1e-4) | (dict(warmup_lr_rate=first) if first else {})
    f = schedule(learning(lr_scheduler="cosine_warmup_with_min_lr", warmup_steps=W-1, lr_scheduler_kwargs=kw), N-1)
    assert [f(s) for s in range(N)]==pytest.approx(rates(hf("cosine_warmup_with_min_lr", **kw)), abs=1e-12)


@pytest.mark.parametrize("bend, rise", [("linear", lambda x: x), ("cosine", lambda x: (1-math.cos(math.pi*x))/2), ("1-sqrt", lambda x: 1-(1-x)**.5)])
def test_rise_of_wsd(bend, rise):
    f = schedule(learning(lr_scheduler="warmup_stable_decay", warmup_steps=W, lr_scheduler_kwargs=dict(warmup_type=bend, num_decay_steps=9)), N)
    assert [f(s) for s in range(W)]==pytest.approx([rise((s+1)/(W+1)) for s in range(W)])


@pytest.mark.parametrize("kw", [{}, dict(anneal_strategy="linear"), dict(pct_start=0.3), dict(pct_start=0.25, three_phase=True), dict(div_factor=10., final_div_factor=100.)], ids=str)
def test_one_cycle_is_torchs(kw):
    f = schedule(learning(lr_scheduler="one_cycle", warmup_steps=None if "pct_start" in kw else W, lr_scheduler_kwargs=kw), N)
    assert [f(s) for s in range(N)]==pytest.approx(rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, N, cycle_momentum=False, **dict(pct_start=W/N) | kw)), rel=1e-6)


def test_lr_div_factor(): assert schedule(learning(lr_scheduler="one_cycle", lr_div_factor=8, warmup_steps=5), N)(0)==pytest.approx(1/8)


@given(st.integers(0, 40), st.floats(0, 1), st.floats(0.5, 1), st.integers(41, 300))
@settings(deadline=None)
def test_floor_and_tail_by_hand(w, r, k, n):
    f = schedule(learning(warmup_steps=w, cosine_min_lr_ratio=r, cosine_constant_lr_ratio=k), n)
    for s in range(w, n+1):
        end = k*n
        want = r if s>=end else (1-r)*0.5*(1+math.cos(math.pi*(s-w)/(end-w)))+r
        assert f(s)==pytest.approx(want, abs=1e-9)


@given(st.integers(0, 50), st.integers(51, 200), st.floats(0, 1))
@settings(deadline=None)
def test_rex_by_hand(w, n, r):
    f = schedule(learning(lr_scheduler="rex", warmup_steps=w, cosine_min_lr_ratio=r), n)
    for s in range(w, n+1):
        z = (n-s)/(n-w) # what is left
        assert f(s)==pytest.approx(r+(1-r)*z/(0.5+0.5*z), abs=1e-9)


@given(st.integers(2, 40), st.integers(0, 15), st.integers(0, 15))
@settings(deadline=None)
def test_teeth(every, warmup, anneal):
    if warmup+anneal>=every: return
    f = jagged(lambda s: 1., every, warmup, anneal, floor=0.2)
    teeth = [f(s) for s in range(3*every)]
    assert teeth[:every-anneal]==[1.]*(every-anneal) # the first stretch has the schedule's own warmup
    for i in (1, 2):
        up, level, down = teeth[i*every:i*every+warmup], teeth[i*every+warmup:(i+1)*every-anneal], teeth[(i+1)*every-anneal:(i+1)*every]
        assert up==sorted(up) and down==sorted(down, reverse=True) and set(level)<={1.} and all(0.2<t<1 for t in up+down)
        assert up==pytest.approx([0.2+0.8*(j+1)/(warmup+1) for j in range(warmup)]) and down==pytest.approx([0.2+0.8*(anneal-j)/(anneal+1) for j in range(anneal)])


def test_teeth_from_a_config():
    f, base = (schedule(learning(warmup_steps=4, jagged_restart_steps=j), N) for j in (20, None))
    assert [f(s) for s in range(19)]==[base(s) for s in range(19)] and f(20)<base(20)/5 and f(30)==base(30)


ANY = {"polynomial": dict(power=2), "cosine_with_min_lr": dict(min_lr=1e-5), "cosine_warmup_with_min_lr": dict(min_lr=1e-5)}
PURE = [n for n in Schedule.__args__ if n not in ("reduce_lr_on_plateau", "greedy")]


@pytest.mark.parametrize("name", PURE)
@given(st.integers(1, 400), st.integers(0, 500), st.booleans())
@settings(deadline=None, max_examples=40)
def test_any_run_has_a_rate(name, total, warmup, teeth):
    f = schedule(learning(lr_scheduler=name, warmup_steps=warmup, lr_scheduler_kwargs=ANY.get(name), jagged_restart_steps=13 if teeth and name!="one_cycle" else None), total)
    assert all(0<=f(s)<=1+1e-9 for s in range(total+1))


@pytest.mark.parametrize("name", PURE)
def test_rates_depend_on_the_step_alone(name):
    "A scheduler that is thrown away and loaded from its state goes on with the same rates"
    o = learning(lr_scheduler=name, warmup_steps=5, lr_scheduler_kwargs=ANY.get(name))
    opt = lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    whole = rates(lambda opt: make_scheduler(opt, o, N))
    first = opt()
    s = make_scheduler(first, o, N)
    for _ in range(23): first.step(), s.step()
    second = opt()
    t = make_scheduler(second, o, N)
    second.load_state_dict(first.state_dict())
    t.load_state_dict(torch.load(_saved(s.state_dict()), weights_only=True))
    went_on = []
    for _ in range(23, N):
        went_on.append(second.param_groups[0]["lr"]/1e-3)
        second.step(), t.step()
    assert went_on==whole[23:]


# ---- groups

@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer(TokenizerOptions(base_model="tiny:llama"))


@pytest.fixture(scope="module")
def model(tokenizer): return load_model(ModelOptions(base_model="tiny:llama"), tokenizer)


def lora(model, **kw):
    m = get_peft_model(copy.deepcopy(model), LoraConfig(**dict(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"]) | kw))
    return m


OPTIONAL = dict(embedding_lr=st.none() | st.floats(1e-6, 1), weight_decay=st.sampled_from([0., .1]), groups=st.lists(st.sampled_from(["q_proj", "mlp", r"layers\.0", "norm", "lm_head", "embed", "weight", "zzz"]), max_size=3))


@given(st.booleans(), st.booleans(), *OPTIONAL.values())
@settings(deadline=None, max_examples=60)
def test_each_trained_parameter_is_in_one_group(model, tokenizer, adapted, plus, embedding_lr, decay, patterns):
    m = lora(model, modules_to_save=["lm_head"]) if adapted else model
    o = GroupOptions(learning_rate=1e-3, embedding_lr=embedding_lr, weight_decay=decay, loraplus_lr_ratio=8 if plus else None, lr_groups=[dict(name=f"g{i}", modules=[p], lr=1/(i+1)) for i, p in enumerate(patterns)])
    try: groups = parameter_groups(m, o)
    except UserError as e:
        assert "finds no trained parameter" in str(e) or "no effect" in str(e)
        return
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids)==len(set(ids)) and set(ids)=={id(p) for p in m.parameters() if p.requires_grad}
    assert all(g["weight_decay"]==0 for g in groups for p in g["params"] if p.ndim<2)
    assert all(g["weight_decay"]==decay for g in groups if g["name"]!="embeddings" for p in g["params"] if p.ndim>1)


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:qwen2"])
def test_no_decay_as_in_transformers(name, tokenizer):
    m = load_model(ModelOptions(base_model=name), load_tokenizer(TokenizerOptions(base_model=name)))
    decays = {id(p) for g in parameter_groups(m, GroupOptions(learning_rate=1, weight_decay=.1)) if g["weight_decay"] for p in g["params"]}
    names = Trainer.get_decay_parameter_names(None, m)
    assert decays=={id(p) for n, p in m.named_parameters() if n in names} and names


def test_loraplus_as_in_peft(model):
    m = lora(model)
    theirs = create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-5, loraplus_weight_decay=.1)
    ours = parameter_groups(m, GroupOptions(learning_rate=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-5, weight_decay=.1))
    rates = lambda groups: {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates(ours)==rates(theirs.param_groups)


def test_embeddings_by_what_they_are(model):
    m = lora(model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    g = {g["name"]: g for g in parameter_groups(m, GroupOptions(learning_rate=1e-3, embedding_lr_scale=.1, weight_decay=.1))}
    assert g["embeddings"]["lr"]==pytest.approx(1e-4) and g["embeddings"]["weight_decay"]==0
    assert {tuple(p.shape) for p in g["embeddings"]["params"]}=={tuple(model.get_input_embeddings().weight.shape)} and len(g["embeddings"]["params"])==2
    with pytest.raises(UserError, match="embedding_lr.*no effect"): parameter_groups(lora(model, target_modules=["q_proj"]), GroupOptions(learning_rate=1, embedding_lr=1e-3))


def test_no_decay_that_does_nothing(model):
    m = copy.deepcopy(model)
    for p in m.parameters(): p.requires_grad = p.ndim==1
    with pytest.raises(UserError, match="`weight_decay` has no effect"): parameter_groups(m, GroupOptions(learning_rate=1, weight_decay=.1))
    for p in m.parameters(): p.requires_grad = False
    with pytest.raises(UserError, match="nothing is trained"): parameter_groups(m, GroupOptions(learning_rate=1))


# ---- optimizers

def _saved(state):
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return f


GPU = {n for n, r in OPTIMIZERS.items() if r.cuda}
HERE = [n for n, r in OPTIMIZERS.items() if find_spec(r.cls.split(":")[0].split(".")[0]) and n not in GPU]
ABSENT = [n for n in OPTIMIZERS if n not in HERE and n not in GPU]


def options(name, **kw):
    low = dict(optim_target_modules=["self_attn", "mlp"], optim_args="rank=8,update_proj_gap=3") if name.startswith(("galore", "apollo")) else {}
    if name.startswith("flash_"): low = dict(optim_args=dict(quantize=False, master_weight_bits=None, fused=False)) # what runs without a GPU
    return learning(**dict(optimizer=name, lr_scheduler="constant", learning_rate=1e-2 if name in ("sgd", "flash_sgd", "flash_sgdw") else 1e-3) | low | kw)


def step(m, optimizer, o, seed):
    ids = torch.arange(2*24).view(2, 24)+seed%3
    if schedule_free(o): optimizer.train()
    loss = m(input_ids=ids, labels=ids).loss
    if OPTIMIZERS[o.optimizer].kind=="model": optimizer.fused_backward(loss, o.learning_rate)
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.fixture
def eager():
    "torchao compiles its update for each shape, which takes minutes on a CPU"
    with torch.compiler.set_stance("force_eager"): yield


@pytest.mark.parametrize("name", HERE)
def test_loss_falls_and_a_checkpoint_goes_on(name, model, eager):
    "Eight steps; then four, a checkpoint read with weights_only, and four"
    o, m = options(name), copy.deepcopy(model)
    optimizer = make_optimizer(m, o, 8)
    whole = [step(m, optimizer, o, 0) for _ in range(8)]
    assert whole[-1]<whole[0]-0.02
    m = copy.deepcopy(model)
    optimizer = make_optimizer(m, o, 8)
    first = [step(m, optimizer, o, 0) for _ in range(4)]
    state, weights = _saved(optimizer.state_dict()), copy.deepcopy(m.state_dict())
    n = copy.deepcopy(model)
    n.load_state_dict(weights)
    second = make_optimizer(n, o, 8)
    second.load_state_dict(torch.load(state, weights_only=True))
    assert first+[step(n, second, o, 0) for _ in range(4)]==pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", sorted(GPU))
def test_what_needs_a_gpu_says_why(name, model):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=f"`optimizer: {name}` needs a CUDA device"): make_optimizer(copy.deepcopy(model), options(name), 8)


def test_adalomo_keeps_its_moments(model, monkeypatch):
    "Its library calls `.cuda()`; without that it runs on a CPU, too"
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    o, m, n = options("adalomo"), copy.deepcopy(model), copy.deepcopy(model)
    first = make_optimizer(m, o, 8)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for _ in range(3): step(m, first, o, 0)
    state = _saved(first.state_dict())
    n.load_state_dict(copy.deepcopy(m.state_dict()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    second = make_optimizer(n, o, 8)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    second.load_state_dict(torch.load(state, weights_only=True))
    assert [step(n, second, o, 0) for _ in range(3)]==pytest.approx([step(m, first, o, 0) for _ in range(3)], rel=1e-6)


def test_galore_in_8_bits_gives_bitsandbytes_what_it_means(model, monkeypatch):
    "By place, 100 and True would become `max_unorm` and `skip_zeros`"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    args = make_optimizer(copy.deepcopy(model), options("galore_adamw_8bit"), 8).args
    assert args.max_unorm==0 and not args.skip_zeros and args.optim_bits==8


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_installed_is_named(name):
    top = OPTIMIZERS[name].cls.split(":")[0].split(".")[0]
    with pytest.raises(UserError, match=f"needs {top}: (pip install 'tuneforge|PyPI does not have it)"): optimizer_name(options(name))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("tuneforge.optim.find_spec", lambda name: None)
    for name, extra in (("lion_pytorch", "optimizers"), ("paged_adamw_8bit", "quant"), ("ao_adamw_4bit", "optimizers")):
        with pytest.raises(UserError, match=rf"pip install 'tuneforge\[{extra}\]'"): optimizer_name(options(name))


def test_extras_are_in_the_settings():
    from configparser import ConfigParser
    from tests.tools import ROOT
    from tuneforge.optim import _EXTRAS
    c = ConfigParser(delimiters=["="])
    c.read(ROOT/"settings.ini")
    pypi = dict(optimi="torch-optimi", lomo_optim="lomo-optim", galore_torch="galore-torch", apollo_torch="apollo-torch", lion_pytorch="lion-pytorch", pytorch_optimizer="pytorch-optimizer", came_pytorch="came-pytorch")
    for package, extra in _EXTRAS.items(): assert f"{pypi.get(package, package)}>=" in c["DEFAULT"][f"extra_{extra}"]


THEIRS = [n for n in HERE if n in [o.value for o in OptimizerNames] and not n.endswith("layerwise")]
EXPECTED = {"betas", "eps"} # where ours gives the class more than transformers does


@pytest.mark.parametrize("name", THEIRS)
def test_class_and_arguments_are_transformers(name, model, tmp_path):
    o = options(name, optim_args=None, adam_beta1=.8 if OPTIMIZERS[name].moments(learning()) else .9, warmup_steps=2 if "schedule_free" in name else None)
    args = TrainingArguments(str(tmp_path), optim=name, learning_rate=o.learning_rate, adam_beta1=o.adam_beta1, warmup_steps=0, optim_target_modules=o.optim_target_modules, use_cpu=True, report_to="none")
    cls, want = Trainer.get_optimizer_cls_and_kwargs(args, copy.deepcopy(model))
    got, group = optimizer_arguments(o)
    assert find_optimizer(o) is cls
    low = want.pop("params", None)
    for k in ("weight_decay", "warmup_steps", "model"): want.pop(k, None) # ours are in the groups, or come with the model
    defaults = {k: p.default for k, p in __import__("inspect").signature(cls.__init__).parameters.items()}
    if name in ("grokadamw", "galore_adamw"): got = {k: v for k, v in got.items() if k not in EXPECTED} # transformers drops adam_beta1 and adam_epsilon here
    if name.startswith("apollo"): want = got | want # and gives the moments to the groups
    for k in got.keys() | want.keys(): assert got.get(k, defaults.get(k))==want.get(k, defaults.get(k)), k
    if low: assert {k: low[1][k] for k in group}==group


def test_muon_is_torchs_beside_adamw(model):
    "The joint optimizer moves each parameter as the two would alone"
    m, n = copy.deepcopy(model), copy.deepcopy(model)
    o = options("muon", weight_decay=.1)
    optimizer = make_optimizer(m, o, 8)
    inside = [p for name, p in n.named_parameters() if p.ndim==2 and "embed" not in name and "lm_head" not in name]
    vectors, rest = ([p for name, p in n.named_parameters() if all(p is not q for q in inside) and (p.ndim==1)==v] for v in (True, False))
    alone = [torch.optim.Muon(inside, lr=1e-3, weight_decay=.1, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW([dict(params=vectors, weight_decay=0), dict(params=rest, weight_decay=.1)], lr=1e-3)]
    for i in range(3):
        step(m, optimizer, o, i)
        ids = torch.arange(48).view(2, 24)+i%3
        n(input_ids=ids, labels=ids).loss.backward()
        for a in alone: a.step(), a.zero_grad()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(m.parameters(), n.parameters()))


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor"]) # APOLLO draws its projections in the order of the steps
def test_layerwise_is_the_same_optimizer(name, model):
    m, n = copy.deepcopy(model), copy.deepcopy(model)
    a, b = options(name, weight_decay=.1), options(name+"_layerwise", weight_decay=.1)
    torch.manual_seed(0)
    x, y = make_optimizer(m, a, 8), make_optimizer(n, b, 8)
    for i in range(3): step(m, x, a, i), step(n, y, b, i)
    assert all(p.grad is None for p in n.parameters()) and all(torch.allclose(p, q, atol=1e-6) for p, q in zip(m.parameters(), n.parameters()))


def test_frozen_weights_stay(model):
    for name in ("galore_adamw", "muon", "lion_8bit"):
        m = copy.deepcopy(model)
        for n, p in m.named_parameters(): p.requires_grad = "layers.1" in n
        o = options(name)
        optimizer = make_optimizer(m, o, 8)
        for i in range(2): step(m, optimizer, o, i)
        moved = {n for (n, p), q in zip(m.named_parameters(), model.parameters()) if not torch.equal(p, q)}
        assert moved=={n for n, p in m.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "lion_8bit"])
def test_embeddings_keep_whole_states(name, model):
    m = copy.deepcopy(model)
    o = options(name)
    optimizer = make_optimizer(m, o, 8)
    step(m, optimizer, o, 0)
    assert optimizer.state[m.get_input_embeddings().weight]["state1"].dtype==torch.float32
    assert any(s["state1"].dtype==torch.uint8 for s in optimizer.state.values())
    plain = torch.nn.Linear(128, 128, bias=False) # of the next run of this process, in the same place of its optimizer
    plain.get_input_embeddings = plain.get_output_embeddings = lambda: None
    other = make_optimizer(plain, o, 8)
    plain(torch.ones(1, 128)).sum().backward()
    other.step()
    assert other.state[plain.weight]["state1"].dtype==torch.uint8
    alive = weakref.ref(m)
    del m, optimizer
    gc.collect()
    assert alive() is None


def test_schedule_free_warms_up_by_itself(model):
    made = lambda **kw: make_optimizer(copy.deepcopy(model), learning(optimizer="schedule_free_adamw", **kw), 100).param_groups[0]["warmup_steps"]
    assert made(warmup_steps=9)==9 and made()==3 and made(lr_scheduler="constant")==0 and made(lr_scheduler="constant_with_warmup", warmup_ratio=.2)==20 and made(warmup_ratio=0)==0
    f = schedule(learning(optimizer="schedule_free_adamw", warmup_steps=9), 100)
    assert {f(s) for s in range(101)}=={1.}


def test_came_reads_its_keys():
    kw, _ = optimizer_arguments(learning(optimizer="came_pytorch", adam_beta3=.99, adam_epsilon2=1e-10))
    assert kw["betas"]==(.9, .999, .99) and kw["eps"]==(1e-30, 1e-10)
    assert optimizer_arguments(learning(optimizer="ademamix", adam_beta3=.99))[0]["betas"]==(.9, .999, .99)


def test_torchdistx_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path/"torchdistx").mkdir()
    (tmp_path/"torchdistx"/"__init__.py").write_text("")
    (tmp_path/"torchdistx"/"optimizers.py").write_text("import torch\nclass AnyPrecisionAdamW(torch.optim.AdamW):\n    def __init__(self, params, lr, betas, eps, weight_decay=0., momentum_dtype=torch.float32):\n        self.dtype = momentum_dtype\n        super().__init__(params, lr, betas, eps, weight_decay)\n")
    o = learning(optimizer="adamw_anyprecision", torchdistx_path=str(tmp_path), optim_args="momentum_dtype=bfloat16")
    found, kw = find_optimizer(o), optimizer_arguments(o)[0]
    for m in [m for m in sys.modules if m.startswith("torchdistx")]: del sys.modules[m] # no other test has it
    assert found.__name__=="AnyPrecisionAdamW" and kw["momentum_dtype"] is torch.bfloat16
    with pytest.raises(UserError, match="is no folder"): find_optimizer(learning(optimizer="adamw_anyprecision", torchdistx_path=str(tmp_path/"x")))


# ---- the whole run

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    village = Village()
    return write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:6]))


def config(data, out, **kw):
    return load_config(dict(base_model="tiny:llama", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out), sequence_len=256, learning_rate=1e-3, save_strategy="no", logging_steps=1, micro_batch_size=4, max_steps=6) | kw)


RUNS = [dict(optimizer="muon"), dict(optimizer="lomo"), dict(optimizer="galore_adamw_layerwise", optim_target_modules="all_linear", optim_args=dict(rank=8)), dict(optimizer="schedule_free_adamw", val_set_size=8, eval_steps=2), pytest.param(dict(optimizer="ao_adamw_8bit", lr_scheduler="rex"), marks=pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")), dict(lr_scheduler="rex"),
    dict(optimizer="lion_pytorch", adapter="lora", lora_target_linear=True, loraplus_lr_ratio=8, jagged_restart_steps=4, jagged_restart_warmup_steps=1), dict(lr_scheduler="greedy", val_set_size=8, eval_steps=1), dict(lr_groups=[dict(name="mlp", modules=["mlp"], lr=1e-4)])]


@pytest.mark.parametrize("kw", RUNS, ids=lambda kw: kw.get("optimizer") or kw.get("lr_scheduler") or "groups")
def test_a_run(kw, data, tmp_path, eager):
    history = train(config(data, tmp_path/"out", **kw)).history
    losses = [h["loss"] for h in history if "loss" in h]
    assert len(losses)==6 and all(math.isfinite(l) for l in losses) and losses[-1]<losses[0]


def test_rates_in_the_log(data, tmp_path):
    cfg = config(data, tmp_path/"out", lr_scheduler="one_cycle", warmup_steps=2)
    f = schedule(cfg, 6)
    assert [h["learning_rate"] for h in train(cfg).history if "learning_rate" in h]==pytest.approx([1e-3*f(s) for s in range(6)])


def test_plateau_lowers_the_rate(data, tmp_path):
    "A metric that can't improve by so much: the rate falls at each evaluation after the first"
    cfg = config(data, tmp_path/"out", lr_scheduler="reduce_lr_on_plateau", lr_scheduler_kwargs=dict(factor=.5, patience=0, threshold=100., threshold_mode="abs"), val_set_size=8, eval_steps=1)
    assert [h["learning_rate"] for h in train(cfg).history if "learning_rate" in h]==pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5])


@pytest.mark.parametrize("kw", [dict(optimizer="muon", lr_scheduler="rex"), dict(optimizer="schedule_free_adamw"), dict(optimizer="galore_adamw", optim_target_modules=["mlp"], optim_args="rank=4,update_proj_gap=2"), dict(optimizer="adamw_bnb_8bit", lr_scheduler="warmup_stable_decay")], ids=lambda kw: kw["optimizer"])
def test_stopped_and_resumed(kw, data, tmp_path):
    "The second half after a resume, against a run that never stopped"
    kw = kw | dict(save_strategy="steps", save_steps=3, learning_rate=1e-3)
    losses = lambda r: [h["loss"] for h in r.history if "loss" in h]
    whole = losses(train(config(data, tmp_path/"a", **kw)))
    again = losses(train(config(data, tmp_path/"a", resume_from_checkpoint=str(tmp_path/"a"/"checkpoint-3"), **kw)))
    assert again==pytest.approx(whole, rel=1e-5)


REGROUPED = [dict(optimizer="adamw_torch"), dict(optimizer="muon"), dict(optimizer="schedule_free_adamw"), dict(optimizer="grokadamw", optim_args="gamma=0.0"), dict(optimizer="adafactor"), dict(optimizer="adagrad"), dict(optimizer="came_pytorch"), dict(optimizer="optimi_adamw"),
    dict(optimizer="galore_adamw", optim_target_modules=["mlp"], optim_args="rank=4,update_proj_gap=9"), dict(optimizer="galore_adamw_layerwise", optim_target_modules=["mlp"], optim_args="rank=4,update_proj_gap=9"), dict(optimizer="adamw_bnb_8bit"), dict(optimizer="lomo")]


@pytest.mark.parametrize("kw", REGROUPED, ids=lambda kw: kw["optimizer"])
def test_other_groups_with_the_same_moments(kw, model):
    "Groups that differ in nothing but the order of their parameters: a step with moments that were carried over is, bit for bit, the step of the optimizer that they come from"
    if not find_spec(OPTIMIZERS[kw["optimizer"]].cls.split(":")[0].split(".")[0]): pytest.skip("not installed")
    split = dict(lr_groups=[dict(name=n, modules=[m], lr=1e-3) for n, m in (("down", "down_proj"), ("queries", "q_proj"), ("first", "embed"))])
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    def made(m, **more):
        o = LearningOptions(learning_rate=1e-3, lr_scheduler="constant", **kw, **more)
        optimizer = make_optimizer(m, o, 9)
        make_scheduler(optimizer, o, 9)
        return optimizer
    def step(m, optimizer, seed):
        torch.manual_seed(seed)
        ids = torch.randint(0, 700, (2, 12))
        if kw["optimizer"].startswith("schedule_free"): optimizer.train()
        loss = m(input_ids=ids, labels=ids).loss
        if kw["optimizer"]=="lomo": return optimizer.fused_backward(loss, 1e-3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    one, two = made(a), made(b, **split if kw["optimizer"]!="lomo" else {})
    for s in range(3): step(a, one, s)
    b.load_state_dict(a.state_dict())
    two.load_state_dict(carry_over(copy.deepcopy(one.state_dict()), parameter_names(a, one), two, parameter_names(b, two)))
    for s in range(3, 5): step(a, one, s); step(b, two, s)
    assert parameter_names(a, one)!=parameter_names(b, two) or kw["optimizer"]=="lomo"
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), model.parameters()))


def test_projected_moments_are_no_others(model):
    pytest.importorskip("galore_torch")
    def made(*targets):
        o = LearningOptions(learning_rate=1e-3, optimizer="galore_adamw", optim_target_modules=list(targets))
        make_scheduler(optimizer := make_optimizer(model, o, 9), o, 9)
        return optimizer, parameter_names(model, optimizer)
    then, names = made("down_proj")
    with pytest.raises(UserError, match="some moments are of projected gradients"): carry_over(then.state_dict(), names, *made("down_proj", "q_proj"))


@pytest.mark.skipif(not find_spec("flashoptim") or not find_spec("triton") or torch.cuda.is_available(), reason="flashoptim on a machine without a GPU")
def test_what_a_library_refuses_is_said(model):
    with pytest.raises(UserError, match="`optimizer: flash_adamw` cannot be made: Quantization requires a CUDA device"): make_optimizer(copy.deepcopy(model), options("flash_adamw", optim_args=None), 8)


@pytest.mark.parametrize("spelling", ["all_linear", "all-linear"]) # Axolotl's, and PEFT's
def test_all_linear_layers(model, spelling):
    from tuneforge.optim import projected_weights
    assert projected_weights(model, options("galore_adamw", optim_target_modules=spelling).optim_target_modules)=={id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}


def test_muon_with_an_adapter(model):
    "All that is trained are matrices: nothing is left for AdamW"
    m, o = lora(copy.deepcopy(model), target_modules=["q_proj"]), options("muon")
    optimizer = make_optimizer(m, o, 8)
    before = step(m, optimizer, o, 0)
    assert [type(x).__name__ for x in optimizer.optimizers]==["Muon"] and [step(m, optimizer, o, 0) for _ in range(6)][-1]<before
