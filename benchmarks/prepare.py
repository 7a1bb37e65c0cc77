"""Preparing data: rows/s, MB/s, CPU seconds and memory of `prepare_data`, beside the bare Hugging Face tokenizer on the same texts.

Each line is a process of its own, so that its CPU time and memory are its own. `python benchmarks/prepare.py` takes 200,000 instructions and 2,000 chats;
`--rows 2000000 --chats 10000` are the sizes of the table in the docs.
"""
import argparse, json, os, random, resource, subprocess, sys, tempfile, threading, time
from pathlib import Path

os.environ |= dict(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", MPLBACKEND="agg")


def write_data(folder, rows, chats):
    "Instructions of about 100 words, and chats of 32 turns, from a seed"
    from tuneforge.tiny import Village
    village, rng = Village(), random.Random(0)
    stories = [village.story(p) for p in village.people]
    text = lambda n: " ".join(rng.choices(stories, k=n))
    with (folder/"instructions.jsonl").open("w") as f:
        for i in range(rows): f.write(json.dumps(dict(instruction=f"{i}: {text(1)}", input="", output=text(2)))+"\n")
    with (folder/"chats.jsonl").open("w") as f:
        for i in range(chats): f.write(json.dumps(dict(messages=[dict(role=("user", "assistant")[j%2], content=f"{i}.{j}: {text(2)}") for j in range(64)]))+"\n")


def bare(folder, name):
    "The tokenizer alone, on the texts that `prepare_data` tokenises"
    from tuneforge.all import load_tokenizer, prompt_format, TokenizerOptions
    tok, entry = load_tokenizer(TokenizerOptions(base_model="tiny:llama")), options(folder, name, "hf").datasets[0]
    fmt, back, spent, n = prompt_format(entry, tok), tok.backend_tokenizer, 0, 0
    def texts():
        with open(entry.path) as f:
            for line in f:
                o = fmt(json.loads(line))
                yield from ["".join(s.text for s in o)] if o[0].joined else [s.text for s in o]
    def batches():
        batch = []
        for t in texts():
            batch.append(t)
            if len(batch)==2000: yield batch; batch = []
        yield batch
    for b in batches():
        start = time.process_time()
        n += sum(len(e.ids) for e in back.encode_batch(b, add_special_tokens=False))
        spent += time.process_time()-start
    return spent, spent, n


def options(folder, name, engine, workers=1):
    from tuneforge.all import Config
    kind = dict(instructions=dict(type="alpaca"), chats=dict(type="chat_template", chat_template="chatml"))[name]
    return Config(base_model="tiny:llama", learning_rate=1e-3, sequence_len=16384, datasets=[dict(path=str(folder/f"{name}.jsonl"), **kind)], dataset_prepared_path=str(folder/f"{engine}-{workers}"),
        tokenizer_engine=engine, dataset_processes=workers, val_set_size=0.0)


class Watch(threading.Thread):
    "The most memory of this process that is not a part of a mapped file, in bytes; what is mapped can be given back at any time"
    def __init__(self): super().__init__(daemon=True); self.most, self.over = 0, threading.Event()
    def run(self):
        while not self.over.wait(0.05): self.most = max(self.most, self.now())
    @staticmethod
    def now(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))*1024


def prepared(folder, name, engine, workers):
    from tuneforge.all import load_tokenizer, prepare_data
    import tuneforge.train # what a training imports, too
    opts = options(folder, name, engine, workers)
    tok, before = load_tokenizer(opts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = lambda: time.process_time()+sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    watch, anon = Watch(), Watch.now()
    watch.start()
    start, start_cpu = time.perf_counter(), cpu()
    data = prepare_data(opts, tok)
    first = data.train[:8]
    took = time.perf_counter()-start, cpu()-start_cpu
    watch.over.set()
    return *took, data.report.sources[0].tokens, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024, (watch.most-anon)/2**20


if __name__=="__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--chats", type=int, default=2_000)
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, name, engine, workers = args.one
        print(json.dumps(bare(Path(folder), name) if engine=="bare" else prepared(Path(folder), name, engine, int(workers))))
        sys.exit()
    from rich.console import Console
    from rich.table import Table
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.rows, args.chats)
        table = Table("rows", "engine", "workers", "seconds", "CPU s", "rows/s", "MB/s", "tokens/CPU s", "share of bare", "memory over imports", "not in files")
        for name, n in dict(instructions=args.rows, chats=args.chats).items():
            size = (Path(folder)/f"{name}.jsonl").stat().st_size/1e6
            base = None
            for engine, workers in (("bare", 1), ("hf", 1), ("hf", 2), ("auto", 1), ("auto", 2), ("auto", 2)):
                again = (engine, workers)==("auto", 2) and base is not None and (Path(folder)/"auto-2").exists() and any((Path(folder)/"auto-2").iterdir())
                out = subprocess.run([sys.executable, __file__, "--one", folder, name, engine, str(workers)], capture_output=True, text=True)
                if out.returncode: sys.exit(out.stderr)
                wall, cpu, tokens, *mem = json.loads(out.stdout.splitlines()[-1])
                base = base or tokens/cpu
                table.add_row(f"{n:,} {name}", engine, str(workers), f"{wall:.1f}", f"{cpu:.1f}", f"{n/wall:,.0f}", f"{size/wall:.1f}", f"{tokens/cpu:,.0f}", f"{tokens/cpu/base:.0%}", *(f"{m:,.0f} MiB" for m in mem))
        Console(width=140).print(table)
