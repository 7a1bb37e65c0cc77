"Time and fullness of the packing plan on log-normal lengths, against next-fit in the same order"
import time
import numpy as np
from rich.console import Console
from rich.table import Table
from tuneforge.packing import fill_then_close


def next_fit(lengths, order, capacity):
    bins, room = 0, 0
    for i in order:
        if lengths[i]>room: bins, room = bins+1, capacity
        room -= lengths[i]
    return bins


table = Table("samples", "capacity", "next-fit full", "fill-then-close full", "seconds", "times next-fit")
rng = np.random.default_rng(0)
for n, capacity in [(10_000, 2048), (100_000, 2048), (100_000, 8192)]:
    lengths = np.clip(rng.lognormal(np.log(400), 0.9, n), 8, capacity).astype(int).tolist()
    order = rng.permutation(n).tolist()
    start = time.perf_counter(); simple = next_fit(lengths, order, capacity); a = time.perf_counter()-start
    start = time.perf_counter(); bins = fill_then_close(lengths, order, capacity); b = time.perf_counter()-start
    full = lambda n_bins: f"{sum(lengths)/(n_bins*capacity):.2%}"
    table.add_row(f"{n:,}", f"{capacity:,}", full(simple), full(len(bins)), f"{b:.2f}", f"{b/a:.0f}")
Console().print(table)
