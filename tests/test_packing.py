"The plan: every sample once, never too much in a bin, the same whoever asks"
from decimal import ROUND_CEILING, Decimal
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tuneforge.config import PackingOptions, TrainOptions, UserError
from tuneforge.packing import (COMPILE_FROM, PackPlan, RunPlan, block_mask, Collator, count_steps, deal, epoch_order, length_correlation, pack, packing_way,
    plan_epoch, plan_evaluation, plan_training, sample_lengths, split_bins, _largest, _add, _remove)
from tuneforge.train import plan_run, total_steps
from tuneforge.config import load_config

lengths = st.lists(st.integers(1, 64), min_size=1, max_size=200)
ways = st.sampled_from(["fill", "tight", "sequential", "single", "by_length"])
seeds = st.integers(0, 99)
bins_of = lambda plan: [plan.bin(b) for b in range(len(plan.bin_offsets)-1)]


@settings(deadline=None)
@given(lengths, seeds, st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), ways, st.integers(0, 3), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 300))
def test_every_sample_exactly_once(lengths, seed, micro, world, acc, way, epoch, most, look):
    plan = plan_epoch(lengths, 64, micro, world, acc, seed, epoch, way, most=most, look_ahead=look)
    served = [i for r in range(world) for batch in plan.batches(r) for b in batch for i in b]
    assert sorted(served)==list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b)<=64 and len(b)<=(most or 64) for b in bins_of(plan))
    assert all(len(list(plan.batches(r)))==plan.steps*acc and all(len(b)==micro for b in plan.batches(r)) for r in range(world))
    assert plan.tokens==sum(lengths)==plan.step_tokens.sum()
    assert list(plan.batches(0, 2))==list(plan.batches(0))[2:]


@settings(deadline=None)
@given(lengths, seeds, ways, st.integers(0, 2))
def test_a_step_holds_the_same_on_any_number_of_ranks(lengths, seed, way, epoch):
    step = lambda plan, i: sorted(tuple(plan.bin(b)) for b in plan.order[i].ravel())
    plans = [plan_epoch(lengths, 64, m, w, 8//w//m, seed, epoch, way) for w in (1, 2, 4) for m in (1, 2)]
    assert len({p.steps for p in plans})==1
    for i in range(plans[0].steps): assert all(step(p, i)==step(plans[0], i) for p in plans)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=80), st.lists(st.integers(0, 3000), max_size=80), st.integers(0, 3000))
def test_the_largest_that_fits(there, gone, room):
    low, high, left = [0]*94, [0]*3, set(there)
    for l in left: _add(low, high, l)
    for l in left & set(gone): _remove(low, high, l)
    assert _largest(low, high, room)==max((l for l in left-set(gone) if l<=room), default=-1)


def fill_then_close(lengths, order, capacity, look, most):
    "As the page tells it, with lists, and a search through all that waits"
    waiting, rest, bins = [], list(order), []
    while waiting or rest:
        room, ids = capacity, []
        while len(ids)<most:
            while rest and len(waiting)<look: waiting.append(rest.pop(0))
            if waiting and lengths[waiting[0]]<=room: i = waiting[0]
            else:
                fits = [i for i in waiting if lengths[i]<=room]
                if not fits: break
                i = max(fits, key=lambda i: (lengths[i], -waiting.index(i)))
            waiting.remove(i)
            room -= lengths[i]
            ids.append(i)
        bins.append(ids)
    return bins


def best_fit(lengths, order, capacity):
    bins = []
    for i in sorted(order, key=lambda i: -lengths[i]):
        b = min((b for b in bins if sum(lengths[j] for j in b)+lengths[i]<=capacity), key=lambda b: -sum(lengths[j] for j in b), default=None)
        if b is None: bins.append([i])
        else: b.append(i)
    return bins


def next_fit(lengths, order, capacity):
    bins, room = [], -1
    for i in order:
        if lengths[i]>room: bins, room = [*bins, []], capacity
        bins[-1].append(i)
        room -= lengths[i]
    return bins


@settings(deadline=None)
@given(lengths, seeds, st.integers(1, 40), st.integers(1, 9))
def test_algorithms_are_the_textbook_ones(lengths, seed, look, most):
    lengths, order = np.array(lengths), epoch_order(len(lengths), seed, 0)
    split = lambda ids, offsets: [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
    assert split(*pack(lengths, order, 64, "fill", look, most))==fill_then_close(lengths, order.tolist(), 64, look, most)
    assert split(*pack(lengths, order, 64, "sequential"))==next_fit(lengths, order.tolist(), 64)
    totals = lambda bins: sorted(sum(lengths[i] for i in b) for b in bins)
    assert totals(split(*pack(lengths, order, 64, "tight")))==totals(best_fit(lengths, order.tolist(), 64))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300), seeds, st.sampled_from(["fill", "tight", "sequential"]), st.one_of(st.none(), st.integers(1, 9)))
def test_compiled_is_the_same(lengths, seed, way, most):
    pytest.importorskip("numba")
    a, b = (plan_epoch(lengths, 3000, 2, 2, seed=seed, way=way, most=most, look_ahead=50, compile=c) for c in (False, True))
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("sample_ids", "bin_offsets", "lengths", "order"))


def test_large_plans_are_compiled_and_the_same(monkeypatch):
    pytest.importorskip("numba")
    used, l = [], np.random.default_rng(0).integers(1, 2048, COMPILE_FROM)
    import tuneforge.packing as P
    compiled = P.compiled
    monkeypatch.setattr(P, "compiled", lambda k: used.append(k) or compiled(k))
    a = plan_epoch(l, 2048)
    assert used and np.array_equal(a.sample_ids, plan_epoch(l, 2048, compile=False).sample_ids)


@settings(deadline=None)
@given(lengths, seeds)
def test_no_more_bins_than_next_fit(lengths, seed):
    n = lambda way: len(pack(np.array(lengths), epoch_order(len(lengths), seed, 0), 64, way)[1])
    assert n("fill")<=n("sequential") and n("tight")<=n("sequential")


def test_order_is_a_pure_function_of_seed_and_epoch():
    l = np.random.default_rng(0).integers(1, 64, 500)
    for way in ("fill", "tight", "single", "by_length"):
        ids = lambda **kw: plan_epoch(l, 64, way=way, **kw).sample_ids.tolist()
        assert ids(seed=1, epoch=2)==ids(seed=1, epoch=2)!=ids(seed=2, epoch=2)
        assert ids(epoch=0)!=ids(epoch=1)


def test_ties_are_shuffled_anew():
    "All samples of one length: best fit must not pair the same ones in each epoch"
    pairs = lambda e: {tuple(sorted(b)) for b in bins_of(plan_epoch([32]*400, 64, way="tight", epoch=e))}
    assert len(pairs(0) & pairs(1))<20


def test_order_of_the_data():
    for way in ("single", "sequential"): assert plan_epoch([3]*100, 64, way=way, shuffle=False).sample_ids.tolist()==list(range(100))
    filled = plan_epoch(np.random.default_rng(0).integers(1, 64, 5000), 64, shuffle=False, look_ahead=100).sample_ids
    assert np.abs(filled-np.arange(5000)).max()<150 # not further from their place than the look-ahead


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 99))
def test_splitting_keeps_samples_in_order(sizes, more):
    offsets = np.cumsum([0, *sizes])
    out = split_bins(offsets, len(sizes)+more)
    assert len(out)==len(offsets)+more and set(offsets)<=set(out.tolist()) and (np.diff(out)>=0).all()
    if more<=sum(sizes)-len(sizes): assert (np.diff(out)>0).all() # no bin is empty as long as one can be split


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=64), st.integers(1, 8))
def test_dealing_is_fair(costs, world):
    costs = np.array((costs*world)[:len(costs)//world*world or world])
    ranks = deal(costs, world)
    assert sorted(ranks.ravel())==list(range(len(costs)))
    sums = costs[ranks].sum(1)
    assert sums.max()-sums.min()<=costs.max()-costs.min() # what snake order guarantees
    assert (np.diff(costs[ranks], axis=1)<=0).all() # the most expensive first


def test_dealing_evens_out_the_ranks():
    g = np.random.default_rng(0)
    ratio = lambda by: (by.max(-1)/by.mean(-1)).mean()
    costs = g.lognormal(5, 0.8, (200, 32))**2
    dealt = ratio(np.take_along_axis(costs, deal(costs, 8).reshape(200, -1), 1).reshape(200, 8, 4).sum(-1))
    assert dealt<ratio(costs.reshape(200, 8, 4).sum(-1))*0.9


def test_too_long_and_nothing_are_refused():
    with pytest.raises(UserError, match="65 tokens does not fit into 64"): plan_epoch([3, 65], 64)
    with pytest.raises(UserError, match="no sample"): plan_epoch([], 64)


@pytest.mark.parametrize("median, capacity, least", [(400, 2048, 0.999), (400, 4096, 0.999), (400, 8192, 0.999), (1200, 2048, 0.99)])
def test_full_and_unbiased(median, capacity, least):
    l = np.clip(np.random.default_rng(1).lognormal(np.log(median), 0.9, 100_000), 8, capacity).astype(int)
    plan = plan_epoch(l, capacity)
    assert plan.efficiency>=least
    if median==400: assert abs(length_correlation(plan.lengths, plan.bin_offsets))<0.06
    tenths = [part.mean()/l.mean() for part in np.array_split(plan.lengths, 10)]
    assert max(tenths)/min(tenths)<1.05 # no curriculum by length


def test_length_correlation_is_the_mean_over_pairs():
    "For bins of one size, the intra-class correlation is the correlation of all ordered pairs (to order 1/bins)"
    g = np.random.default_rng(0)
    x = g.normal(5, 0.5, 4000)[:, None]+g.normal(0, 0.7, (4000, 3))
    pairs = [(x[:, i], x[:, j]) for i in range(3) for j in range(3) if i!=j]
    want = np.corrcoef(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))[0, 1]
    assert length_correlation(np.exp(x).ravel(), np.arange(0, 12_001, 3))==pytest.approx(want, abs=2e-3)


def test_by_length_wastes_less_padding():
    l = np.clip(np.random.default_rng(1).lognormal(5, 0.9, 5000), 8, 2048).astype(int)
    padded = lambda plan: sum(max(sum(l[i] for i in b) for b in batch)*len(batch) for r in (0, 1) for batch in plan.batches(r))
    grouped, plain = (plan_epoch(l, 2048, 4, 2, 2, way=w) for w in ("by_length", "single"))
    assert padded(grouped)<0.75*padded(plain)
    assert abs(np.corrcoef(np.arange(grouped.steps), grouped.step_tokens)[0, 1])<0.2 # steps of one length do not follow each other


OPTIONS = [(dict(sample_packing=True), "fill"), (dict(sample_packing=True, packing="tight"), "tight"), (dict(sample_packing=True, sample_packing_sequentially=True), "sequential"),
    (dict(group_by_length=True), "by_length"), ({}, "single")]


@pytest.mark.parametrize("kw, way", OPTIONS, ids=lambda o: str(o))
def test_options_choose_the_way(kw, way):
    l = np.random.default_rng(0).integers(1, 64, 300)
    got, want = plan_training(l, PackingOptions(**kw), 64, 1, 1)[0], plan_epoch(l, 64, seed=1, way=way)
    assert packing_way(PackingOptions(**kw))==way and got.sample_ids.tolist()==want.sample_ids.tolist()


def test_options_limit_the_rows():
    l = np.random.default_rng(0).integers(1, 20, 300)
    plan = lambda **kw: plan_training(l, PackingOptions(sample_packing=True, **kw), 64, 1, 1)[0]
    assert max(map(len, bins_of(plan(sample_packing_bin_size=3))))==3<max(map(len, bins_of(plan())))
    assert plan(sample_packing_group_size=1).sample_ids.tolist()!=plan().sample_ids.tolist()
    assert len(bins_of(plan(sample_packing_group_size=1)))>len(bins_of(plan()))
    assert plan_training(l, PackingOptions(curriculum_sampling=True), 64, 1, 1)[0].sample_ids.tolist()==list(range(300))
    kept = plan_training(l, PackingOptions(sample_packing=True, curriculum_sampling=True, micro_batch_size=2), 64, 1, 3)
    for p in kept: # whatever is in a step comes before all of the next one
        steps = [sorted(i for b in s.ravel() for i in p.bin(b)) for s in p.order]
        assert sum(steps, [])==list(range(300)) and len(p.order)>5
    assert len(bins_of(plan_evaluation(l, PackingOptions(sample_packing=True), 64)))<len(bins_of(plan_evaluation(l, PackingOptions(sample_packing=True, eval_sample_packing=False), 64)))==300


@settings(deadline=None)
@given(lengths, st.decimals("0.1", "4", places=2), st.one_of(st.none(), st.integers(1, 60)), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_steps_are_exact(lengths, epochs, limit, world, acc, micro, packing):
    "Counted in decimals, and by drawing the batches"
    cfg = load_config(dict(base_model="x", datasets=[dict(path="y")], learning_rate=1, num_epochs=float(epochs), micro_batch_size=micro, gradient_accumulation_steps=acc, sample_packing=packing,
        sequence_len=64) | (dict(max_steps=limit) if limit else {}))
    plans, steps = plan_run(cfg, np.array(lengths), world)
    assert len({p.steps for p in plans})==1
    want = int((epochs*plans[0].steps).to_integral_value(ROUND_CEILING))
    assert steps==min(want, limit or want)
    drawn = [len([b for p in plans for b in p.batches(r)])//acc for r in range(world)]
    assert len(set(drawn))==1 and drawn[0]>=steps
    assert len(RunPlan(plans, steps).step_tokens)==steps and repr(RunPlan(plans, steps)).startswith("1 step (" if steps==1 else f"{steps:,} steps (")


def test_plans_are_told_in_words():
    "Without packing a bin is a row: 54 of them leave 2 of 7 steps of 8 empty"
    several = "7 steps of 1×2×4 (ranks × accumulation × rows)"
    plan = plan_epoch([5]*54, 64, 4, accumulation=2, way="single")
    assert repr(plan)=="54 samples, one to a row, and 2 empty rows to fill the last step; "+several and sum(not b for batch in plan.batches() for b in batch)==2
    assert repr(RunPlan([plan, plan], 14))==several.replace("7 steps", "14 steps (2 epochs of 7)")+"; 54 samples, one to a row, and 2 empty rows to fill the last step"
    assert "1 empty row to" in repr(plan_epoch([5]*3, 64, 4, way="single")) and "empty" not in repr(plan_epoch([5]*4, 64, 4, way="single"))
    assert repr(plan_epoch([64], 64))=="1 sample in 1 bin, 100.00% full; 1 step of 1×1×1 (ranks × accumulation × rows)"


def test_max_steps_alone_decides():
    cfg = load_config(dict(base_model="x", datasets=[dict(path="y")], learning_rate=1, max_steps=25, sequence_len=64))
    plans, steps = plan_run(cfg, np.array([5]*10))
    assert steps==25 and len(plans)==3
    assert total_steps(TrainOptions(num_epochs=1.1), 10)==11 and count_steps(0.7, None, 10)==7


def test_lengths_without_reading_rows():
    from datasets import Dataset
    rows = [[1]*n for n in (3, 1, 4, 1, 5)]
    ds = Dataset.from_dict(dict(input_ids=rows, labels=rows))
    assert sample_lengths(ds).tolist()==[3, 1, 4, 1, 5]
    assert sample_lengths(ds.select([4, 0])).tolist()==[5, 3] and sample_lengths(ds.shuffle(seed=1)).tolist()==[len(o) for o in ds.shuffle(seed=1)["input_ids"]]


docs = st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=3)


@settings(deadline=None)
@given(docs, st.booleans(), st.booleans(), st.integers(1, 5), st.booleans())
def test_batches_hold_what_bins_hold(sizes, flat, fixed, multiple, mask):
    "Documents, taken apart again by their positions, are those that went in; the mask is the one drawn cell by cell"
    import torch
    n = iter(range(1, 1000))
    rows = [[[next(n) for _ in range(k)] for k in row] for row in sizes]
    batch = Collator(0, True, 24 if fixed else None, multiple, flat, torch.float32 if mask else None)([dict(input_ids=r, labels=r) for r in rows])
    ids, labels, positions = (batch[k] for k in ("input_ids", "labels", "position_ids"))
    assert len(ids)==(1 if flat else len(rows)) and ids.shape[1]%multiple==0
    found = []
    for i, l, p in zip(ids.tolist(), labels.tolist(), positions.tolist()):
        starts = [k for k, x in enumerate(p) if x==0]+[len(p)]
        for a, b in zip(starts, starts[1:]):
            assert p[a:b]==list(range(b-a)) and l[a]==-100
            if i[a]: found.append(i[a:b]); assert l[a+1:b]==i[a+1:b]
            else: assert set(i[a:b])=={0} and set(l[a:b])=={-100}
    assert found==[s for r in rows for s in r]
    if mask:
        doc = (positions==0).cumsum(1).tolist()
        want = [[[doc[r][q]==doc[r][k] and k<=q for k in range(len(doc[r]))] for q in range(len(doc[r]))] for r in range(len(doc))]
        assert (batch["attention_mask"][:, 0]==0).tolist()==want


def test_flash_attention_finds_the_samples():
    "transformers' own reader of positions, which wants one row, gives the ends of all samples"
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids
    bins = [dict(input_ids=r, labels=r) for r in ([[1]*5, [2]*3], [[3]*4])]
    flat, rows = (Collator(0, True, flat=f)(bins)["position_ids"] for f in (True, False))
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(flat)
    assert _is_packed_sequence(flat, 1) and ends.tolist()==[0, 5, 8, 12] and longest==5
    assert not _is_packed_sequence(rows, 2) # why rows are joined
