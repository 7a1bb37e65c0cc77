"""Peak memory of a merge, against the size of the model and against PEFT's merge in memory.

    python benchmarks/merge.py [--layers 4 16 64]

Each figure is what a fork of one warm process adds to its memory at the highest. glibc keeps freed blocks of less than 32 MiB
for later; the weights of these models are smaller than that, those of large ones are not, so it is told to give back everything.
"""
import ctypes, re, tempfile, time
from argparse import ArgumentParser
from multiprocessing import get_context
from pathlib import Path
import peft
import tuneforge.merge as room
from tuneforge.all import add_adapter, load_config, load_model, merge

M_MMAP_THRESHOLD = -3


def adapter(cfg):
    model = add_adapter(load_model(cfg), cfg)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(std=0.02)
    model.save_pretrained(cfg.output_dir)


def ours(cfg): merge(cfg, cfg.output_dir+"/merged")
def theirs(cfg): peft.PeftModel.from_pretrained(load_model(cfg), cfg.output_dir).merge_and_unload().save_pretrained(cfg.output_dir+"/peft")


def status(key): return int(re.search(key+r":\s+(\d+)", Path("/proc/self/status").read_text())[1])/1024 # MiB


def measure(work, cfg):
    "Highest memory in MiB and seconds, in a fork"
    here, there = get_context("fork").Pipe()
    def child():
        before, start = status("VmRSS"), time.perf_counter() # the highest mark of a fork begins at what it has
        work(cfg)
        there.send((status("VmHWM")-before, time.perf_counter()-start))
    p = get_context("fork").Process(target=child)
    p.start(), there.close()
    got = here.recv()
    p.join()
    return got


def main():
    parser = ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
    true = room.write_shards
    room.write_shards = lambda tensors, folder: true(tensors, folder, 16*2**20) # files of 16 MiB: the model is small, too
    rows = []
    for n in [1, *parser.parse_args().layers]:
        name = f"tiny:llama?hidden_size=768&intermediate_size=2048&num_hidden_layers={n}"
        with tempfile.TemporaryDirectory() as d:
            cfg = load_config(dict(base_model=name, datasets=[dict(path="t.jsonl")], learning_rate=1e-4, adapter="lora", lora_r=8, lora_target_linear=True, output_dir=d))
            if n==1: # warm: code is loaded once for all
                for work in (adapter, ours, theirs): work(cfg)
                continue
            measure(adapter, cfg)
            (a, t), (b, u) = measure(ours, cfg), measure(theirs, cfg)
            size = sum(f.stat().st_size for f in Path(d, "merged").glob("*.safetensors"))/2**20
        rows.append([f"{size:,.0f} MiB", f"{a:,.0f} MiB", f"{a/size:.2f}", f"{b:,.0f} MiB", f"{b/size:.2f}", f"{t/u:.1f}"])
    heads = ["model", "merge with proof", "/ model", "PEFT in memory, no proof", "/ model", "time / PEFT's"]
    for r in [heads, *rows]: print("  ".join(c.rjust(w) for c, w in zip(r, [max(len(x[i]) for x in [heads, *rows]) for i in range(6)])))


if __name__=="__main__": main()
