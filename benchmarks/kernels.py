"""What each way to save memory or time costs and saves: steps of one training, each way in a process of its own, as shares of the plain run.

`python benchmarks/kernels.py --out nbs/kernels.json` keeps the figures for the page of the docs. It runs where it is: on a GPU in bf16 with peaks of the device's memory, else in float32 with peaks of the process. A way that this machine cannot go says why.
"""
import argparse, json, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

WAYS = {"plain": {}, "gradient_checkpointing": dict(gradient_checkpointing=True), "gradient_checkpointing: offload": dict(gradient_checkpointing="offload"), "chunked_cross_entropy": dict(chunked_cross_entropy=True),
    "both (checkpointing, chunks)": dict(gradient_checkpointing=True, chunked_cross_entropy=True), "torch_compile": dict(torch_compile=True), "liger (rope, norms, MLP)": dict(liger_rope=True, liger_rms_norm=True, liger_glu_activation=True),
    "liger_fused_linear_cross_entropy": dict(liger_fused_linear_cross_entropy=True), "cut_cross_entropy": dict(cut_cross_entropy=True), "all of Liger": dict(liger_rope=True, liger_rms_norm=True, liger_glu_activation=True, liger_fused_linear_cross_entropy=True)}
STEPS, WARM, LENGTH = 10, 3, 512
SIZES = dict(cpu=("hidden_size=256&intermediate_size=1024&num_hidden_layers=8", 32_000, 2), cuda=("hidden_size=2048&intermediate_size=8192&num_hidden_layers=16", 128_000, 8)) # of the model, its vocabulary, rows of a micro-batch


def run(way):
    "(seconds of a step, MiB) of a training"
    import torch
    from transformers import TrainerCallback
    from tuneforge.all import Config, Village, UserError, load_model, load_tokenizer, make_trainer, prepare_data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, vocabulary, rows = SIZES[device]
    used = lambda: torch.cuda.max_memory_allocated()/2**20 if device=="cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device=="cuda": torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        (folder/"train.jsonl").write_text("".join(json.dumps(r)+"\n" for r in Village().texts(60)))
        try:
            cfg = Config(base_model=f"tiny:llama?{size}", datasets=[dict(path=str(folder/"train.jsonl"), type="completion")], dataset_prepared_path=str(folder/"prepared"), output_dir=str(folder/"out"), bf16=device=="cuda",
                sequence_len=LENGTH, sample_packing=True, micro_batch_size=rows, max_steps=STEPS, learning_rate=1e-3, save_strategy="no", **WAYS[way])
            tokenizer = load_tokenizer(cfg)
            data, model = prepare_data(cfg, tokenizer), load_model(cfg, tokenizer)
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
            trainer = make_trainer(cfg, model, tokenizer, data, [Clock()])
        except UserError as e: return dict(refused=str(e).splitlines()[0])
        before = used()
        trainer.train()
    return dict(seconds=statistics.median(b-a for a, b in zip(ends[WARM:], ends[WARM+1:])), mib=used()-before, device=torch.cuda.get_device_name() if device=="cuda" else "CPU")


def main():
    from rich.console import Console
    from rich.table import Table
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="write the figures to this JSON file, too")
    args = parser.parse_args()
    if args.one: return print(json.dumps(run(args.one)))
    found = {}
    for way in WAYS:
        out = subprocess.run([sys.executable, __file__, "--one", way], capture_output=True, text=True)
        if out.returncode: sys.exit(out.stderr)
        found[way] = json.loads(out.stdout.splitlines()[-1])
    plain = found["plain"]
    table = Table("way", "seconds of a step", "of plain", "peak memory of training, MiB", "of plain", title=f"{plain['device']}, rows of {LENGTH} tokens")
    for way, o in found.items():
        if "seconds" in o: table.add_row(way, f"{o['seconds']:.3f}", f"{o['seconds']/plain['seconds']:.0%}", f"{o['mib']:,.0f}", f"{o['mib']/plain['mib']:.0%}")
    Console(width=140).print(table, *(f"{way}: {o['refused']}" for way, o in found.items() if "refused" in o), sep="\n")
    if args.out: Path(args.out).write_text(json.dumps(found, indent=1)+"\n", encoding="utf-8")


if __name__=="__main__": main()
