"The packing plan on a million log-normal lengths: fullness, time, mixture and balance, beside what other programs do"
import sys, time
import numpy as np
from rich.console import Console
from rich.table import Table
from tuneforge.packing import epoch_order, length_correlation, pack, plan_epoch, deal

N = int(sys.argv[1]) if len(sys.argv)>1 else 1_000_000
CASES = [(400, 2048), (400, 4096), (400, 8192), (1200, 2048)] # median, capacity; the last one is hard: a quarter is as long as a bin


def first_fit_decreasing(lengths, order, capacity):
    "With a tree over the bins that knows the most room below each node"
    by = order[np.argsort(-lengths[order], kind="stable")]
    n = 1<<(len(by)-1).bit_length()
    tree = [capacity]*(2*n)
    bin_of = []
    for l in lengths[by].tolist():
        k = 1
        while k<n: k = 2*k if tree[2*k]>=l else 2*k+1
        bin_of.append(k-n)
        tree[k] -= l
        while k>1:
            k //= 2
            tree[k] = max(tree[2*k], tree[2*k+1])
    order = np.argsort(bin_of, kind="stable")
    return by[order], np.append(0, np.cumsum(np.bincount(bin_of)))


def windows(lengths, order, capacity, size=1000):
    parts = [pack(lengths, order[i:i+size], capacity, "tight", compile=True) for i in range(0, len(order), size)]
    return np.concatenate([i for i, _ in parts]), np.append(0, np.concatenate([np.diff(o) for _, o in parts]).cumsum())


def imbalance(lengths, ids, offsets, world, rows, dealt):
    "Work of the slowest rank over the mean, with bins in shuffled order"
    cost = np.diff(np.append(0, np.cumsum(lengths[ids].astype(np.int64)**2))[offsets])
    cost = np.random.default_rng(0).permutation(cost)[:len(cost)//(world*rows)*world*rows].reshape(-1, world*rows)
    if dealt: cost = np.take_along_axis(cost, deal(cost, world).reshape(len(cost), -1), 1)
    cost = cost.reshape(len(cost), world, rows).sum(2)
    return (cost.max(1)/cost.mean(1)).mean()


WAYS = {
    "next-fit": (lambda l, o, c: pack(l, o, c, "sequential", compile=True), False),
    "first-fit-decreasing (plain Python)": (first_fit_decreasing, False),
    "best-fit-decreasing, windows of 1,000": (windows, False),
    "packing: tight": (lambda l, o, c: pack(l, o, c, "tight", compile=True), True),
    "fill-then-close (default)": (lambda l, o, c: pack(l, o, c, compile=True), True),
    "fill-then-close, plain Python": (lambda l, o, c: pack(l, o, c, compile=False), True)}

rng = np.random.default_rng(0)
for way in ("fill", "tight", "sequential"): plan_epoch([1]*10, 10, way=way, compile=True) # compiled, or read from the cache
for median, capacity in CASES:
    lengths = np.clip(rng.lognormal(np.log(median), 0.9, N), 8, capacity).astype(int)
    table = Table("way", "full", "CPU seconds", "times next-fit", "length correlation", "slowest of 8 ranks", "of 512", title=f"{N:,} samples, median {median:,}, bins of {capacity:,}")
    order, base = epoch_order(N, 0, 0), None
    for name, (way, dealt) in WAYS.items():
        start = time.process_time()
        ids, offsets = way(lengths, order, capacity)
        took = time.process_time()-start
        base = base or took
        table.add_row(name, f"{lengths.sum()/((len(offsets)-1)*capacity):.3%}", f"{took:.3f}", f"{took/base:.1f}", f"{length_correlation(lengths[ids], offsets):+.3f}",
            f"{imbalance(lengths, ids, offsets, 8, 4, dealt):.2f}", f"{imbalance(lengths, ids, offsets, 512, 2, dealt):.2f}")
    Console(width=150).print(table)
    start = time.process_time()
    plans = [plan_epoch(lengths, capacity, 4, 8), plan_epoch(lengths, capacity, 2, 512)]
    took = (time.process_time()-start)/2
    print(f"the whole plan (order, packing, split to whole steps, dealt): {took:.2f} CPU seconds; full after splitting: {plans[0].efficiency:.3%} for 8×4 rows a step, {plans[1].efficiency:.3%} for 512×2\n")
