"""Peak memory of a merge, against the size of the model and against PEFT's merge in memory.

    python benchmarks/merge.py [--layers 8 32 128]

Each figure is the peak of a process of its own, less the peak of one that only imports the same libraries. glibc keeps freed
blocks of less than 32 MiB for later; the weights of these models are smaller than that, those of large ones are not, so it is
told to give back everything (MALLOC_MMAP_THRESHOLD_).
"""
import os, subprocess, sys, tempfile
from argparse import ArgumentParser
from pathlib import Path

SETUP = """
import re, sys, time
from tuneforge.all import *
import tuneforge.merge as room, transformers, peft, accelerate.hooks
name, out, what = sys.argv[1:4]
cfg = load_config(dict(base_model=name, datasets=[dict(path="t.jsonl")], learning_rate=1e-4, adapter="lora", lora_r=8, lora_target_linear=True, output_dir=out))
true = room.write_shards
room.write_shards = lambda tensors, folder: true(tensors, folder, 16*2**20) # files of 16 MiB: the model is small, too
start = time.perf_counter()
if what=="adapter":
    model = add_adapter(load_model(cfg), cfg)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(std=0.02)
    model.save_pretrained(out)
if what=="tuneforge": merge(cfg, out+"/merged")
if what=="peft":
    peft.PeftModel.from_pretrained(load_model(cfg), out).merge_and_unload().save_pretrained(out+"/peft")
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])/1024, time.perf_counter()-start)
"""


def measure(*args):
    res = subprocess.run([sys.executable, "-c", SETUP, *map(str, args)], capture_output=True, text=True, env=os.environ | dict(MALLOC_MMAP_THRESHOLD_=str(2**17)))
    if res.returncode: sys.exit(res.stderr)
    return map(float, res.stdout.split()[-2:])


def main():
    parser = ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 96])
    rows = []
    for n in parser.parse_args().layers:
        name = f"tiny:llama?hidden_size=768&intermediate_size=2048&num_hidden_layers={n}"
        with tempfile.TemporaryDirectory() as d:
            (made, _), (bare, _), (ours, t), (theirs, u) = (measure(name, d, w) for w in ("adapter", "nothing", "tuneforge", "peft"))
            size = sum(f.stat().st_size for f in Path(d, "merged").glob("*.safetensors"))/2**20
        rows.append([f"{size:,.0f} MiB", f"{ours-bare:,.0f} MiB", f"{(ours-bare)/size:.2f}", f"{theirs-bare:,.0f} MiB", f"{(theirs-bare)/size:.2f}", f"{t/u:.1f}"])
    heads = ["model", "merge with proof", "/ model", "PEFT in memory, no proof", "/ model", "time / PEFT's"]
    for r in [heads, *rows]: print("  ".join(c.rjust(w) for c, w in zip(r, [max(len(x[i]) for x in [heads, *rows]) for i in range(6)])))


if __name__=="__main__": main()
