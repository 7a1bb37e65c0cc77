"Rows and tokens a second of `encode_rows`, beside the bare tokenizer on the same texts; one thread, in turns, best of several rounds"
import time
from rich.console import Console
from rich.table import Table
from tuneforge.all import *

ROUNDS, TOKENS = 5, 200_000
tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
village = Village()


def story(): return " ".join(village.story(p) for p in village.rng.sample(list(village.people), 4)) # about 90 tokens


def instructions(n): return [dict(instruction=story(), input="", output=story()) for _ in range(n)]


def chats(n, turns): return [dict(messages=[dict(role=("user", "assistant")[i%2], content=story()) for i in range(2*turns)]) for _ in range(n)]


def measure(name, rows, entry):
    "Our time and the bare tokenizer's, in turns on the same machine"
    fmt, back = prompt_format(DatasetOptions(path="x", **entry), tok), tok.backend_tokenizer
    segments = [fmt(r) for r in rows]
    texts = ["".join(s.text for s in o) for o in segments] if segments[0][0].joined else [s.text for o in segments for s in o]
    bare, ours = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter(); enc = back.encode_batch(texts, add_special_tokens=False); bare.append(time.perf_counter()-start)
        start = time.perf_counter(); res = encode_rows(rows, entry, tok); ours.append(time.perf_counter()-start)
    n = sum(len(o["input_ids"]) for o in res)
    a, b = min(bare), min(ours)
    return [name, f"{len(rows)/b:,.0f}", f"{n/b:,.0f}", f"{sum(len(e.ids) for e in enc)/a:,.0f}", f"{a/b:.0%}"]


table = Table("rows", "rows/s", "tokens/s", "tokens/s, bare", "share of bare")
table.add_row(*measure("alpaca", instructions(TOKENS//230), dict(type="alpaca")))
for turns in (1, 8, 64):
    for name in ("chatml", "llama3", "qwen3"):
        table.add_row(*measure(f"{name}, {turns} turns", chats(max(TOKENS//(200*turns), 16), turns), dict(type="chat_template", chat_template=name)))
Console().print(table)
