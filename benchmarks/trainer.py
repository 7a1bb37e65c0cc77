"Overhead of the trainer over a bare PyTorch loop on the same batches, in turns"
import json, tempfile, time
from pathlib import Path
import torch
from rich.console import Console
from rich.table import Table
from tuneforge.all import *

STEPS, ROUNDS = 40, 5
folder = Path(tempfile.mkdtemp())
village = Village()
(folder/"train.jsonl").write_text("".join(json.dumps(r)+"\n" for r in village.texts(10)))
cfg = load_config(dict(base_model="tiny:llama?hidden_size=256&intermediate_size=768&num_hidden_layers=4&num_key_value_heads=4&head_dim=64", datasets=[dict(path=str(folder/"train.jsonl"), type="completion")],
    dataset_prepared_path=str(folder/"prepared"), output_dir=str(folder/"out"), sequence_len=256, sample_packing=True, micro_batch_size=4, max_steps=STEPS, learning_rate=1e-3,
    save_strategy="no", logging_steps=10))
tokenizer = load_tokenizer(cfg)
data = prepare_data(cfg, tokenizer)


def ours():
    trainer = make_trainer(cfg, load_model(cfg, tokenizer), tokenizer, data)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter()-start


def bare():
    model = load_model(cfg, tokenizer).train()
    plans, _ = plan_run(cfg, [len(o) for o in data.train["input_ids"]])
    loader = PlanLoader(data.train, plans, Collator(tokenizer.pad_token_id, True, 256))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0., fused=True)
    start, batches = time.perf_counter(), iter(loader)
    for _ in range(STEPS):
        b = next(batches)
        labels = b.pop("labels")
        causal_loss(model(**b, use_cache=False), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return time.perf_counter()-start


ours(), bare() # warm up
times = [(ours(), bare()) for _ in range(ROUNDS)]
best = [min(t) for t in zip(*times)]
table = Table("", "seconds (best of 5)", "tokens/s")
for name, t in zip(("tuneforge", "bare PyTorch"), best): table.add_row(name, f"{t:.2f}", f"{STEPS*4*256/t:,.0f}")
Console().print(table)
Console().print(f"overhead {best[0]/best[1]-1:+.1%}")
