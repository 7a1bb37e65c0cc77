"The plan: every sample once, never too much in a bin, the same whoever asks"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tuneforge.config import UserError
from tuneforge.packing import deal, fill_then_close, plan_epochs, split_bins

lengths = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@settings(deadline=None)
@given(lengths, st.integers(0, 99), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans())
def test_every_sample_exactly_once(lengths, seed, micro, world, acc, packing):
    plans = plan_epochs(lengths, 64, micro, world, acc, seed, n_epochs=2, packing=packing)
    assert plans[0].steps==plans[1].steps
    for plan in plans:
        served = [i for r in range(world) for batch in plan.batches(r) for b in batch for i in b]
        assert sorted(served)==list(range(len(lengths)))
        assert all(sum(lengths[i] for i in plan.bin(b))<=64 for b in range(len(plan.bin_offsets)-1))
        assert all(len(plan.batches(r))==plan.steps*acc for r in range(world))


@settings(deadline=None)
@given(lengths, st.integers(0, 99))
def test_a_step_holds_the_same_on_any_number_of_ranks(lengths, seed):
    step = lambda plan, i: sorted(s for b in plan.order[i].ravel() for s in plan.bin(b))
    a, b, c = (plan_epochs(lengths, 64, 2, w, 4//w, seed)[0] for w in (1, 2, 4))
    assert a.steps==b.steps==c.steps
    assert all(step(a, i)==step(b, i)==step(c, i) for i in range(a.steps))


@given(lengths)
def test_fill_then_close_needs_no_more_bins_than_next_fit(lengths):
    order, room, next_fit = list(range(len(lengths))), 0, 0
    for i in order:
        if lengths[i]>room: next_fit, room = next_fit+1, 64
        room -= lengths[i]
    assert len(fill_then_close(lengths, order, 64))<=next_fit


def test_order_is_a_pure_function_of_seed_and_epoch():
    l = np.random.default_rng(0).integers(1, 64, 500).tolist()
    ids = lambda **kw: plan_epochs(l, 64, n_epochs=3, **kw)[2].sample_ids.tolist()
    assert ids(seed=1)==ids(seed=1)!=ids(seed=2)
    e = plan_epochs(l, 64, n_epochs=2)
    assert e[0].sample_ids.tolist()!=e[1].sample_ids.tolist()


def test_unshuffled_order_is_the_datas():
    assert plan_epochs([3]*10, 64, packing=False, shuffle=False)[0].sample_ids.tolist()==list(range(10))


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(0, 8))
def test_splitting_keeps_samples(bins, more):
    out = split_bins(bins, len(bins)+more)
    assert len(out)==len(bins)+more
    assert sorted(i for b in out for i in b)==sorted(i for b in bins for i in b)


def test_dealing_evens_out_the_ranks():
    g = np.random.default_rng(0)
    ratio = lambda by: by.max()/by.mean()
    costs = g.lognormal(5, 0.8, (200, 32))**2
    dealt = np.mean([ratio(c[deal(c, 8)].sum(1)) for c in costs])
    by_chance = np.mean([ratio(c.reshape(8, 4).sum(1)) for c in costs])
    assert dealt<by_chance*0.9


def test_too_long_is_refused():
    with pytest.raises(UserError, match="65 tokens does not fit into 64"): plan_epochs([3, 65], 64)


def test_full_and_unbiased():
    g = np.random.default_rng(1)
    l = np.clip(g.lognormal(6, 0.9, 20_000), 8, 4096).astype(int).tolist()
    plan = plan_epochs(l, 4096)[0]
    assert plan.efficiency>0.995
    quarter = len(plan.sample_ids)//4
    means = [np.mean([l[i] for i in plan.sample_ids[q*quarter:(q+1)*quarter]]) for q in range(4)]
    assert max(means)/min(means)<1.1 # no curriculum by length
