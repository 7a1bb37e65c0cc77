"Rows and tokens a second of `encode_rows`, beside the bare tokenizer on the same texts; CPU time of one thread, in turns, best of several rounds"
import os
os.environ |= dict(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
import time
from rich.console import Console
from rich.table import Table
from tuneforge.all import *

ROUNDS, TOKENS = 7, 200_000
tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
fast = choose_encoder(tok)
village = Village()


def story(): return " ".join(village.story(p) for p in village.rng.sample(list(village.people), 4)) # about 90 tokens


def instructions(n): return [dict(instruction=story(), input="", output=story()) for _ in range(n)]


def chats(n, turns): return [dict(messages=[dict(role=("user", "assistant")[i%2], content=story()) for i in range(2*turns)]) for _ in range(n)]


def seconds(f):
    start = time.process_time()
    f()
    return time.process_time()-start


def measure(name, rows, entry):
    "Our time and the bare tokenizer's, in turns on the same machine"
    fmt, back = prompt_format(DatasetOptions(path="x", **entry), tok), tok.backend_tokenizer
    segments = [fmt(r) for r in rows]
    texts = ["".join(s.text for s in o) for o in segments] if segments[0][0].joined else [s.text for o in segments for s in o]
    n, ways = sum(len(o["input_ids"]) for o in encode_rows(rows, entry, tok)), [lambda: back.encode_batch(texts, add_special_tokens=False), lambda: encode_rows(rows, entry, tok), lambda: encode_rows(rows, entry, fast)]
    bare, ours, quick = map(min, zip(*[[seconds(w) for w in ways] for _ in range(ROUNDS)]))
    return [name, f"{n/bare:,.0f}", f"{n/ours:,.0f}", f"{bare/ours:.0%}", f"{n/quick:,.0f}", f"{bare/quick:.0%}"]


table = Table("rows", "tokens/s, bare", "tokens/s, hf", "share of bare", f"tokens/s, {fast.engine.name}", "share of bare")
table.add_row(*measure("alpaca", instructions(TOKENS//230), dict(type="alpaca")))
for turns in (1, 8, 64):
    for name in ("chatml", "llama3", "qwen3"):
        table.add_row(*measure(f"{name}, {turns} turns", chats(max(TOKENS//(200*turns), 16), turns), dict(type="chat_template", chat_template=name)))
Console().print(table)
