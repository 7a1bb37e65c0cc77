"A run ends with the weights that evaluated best; which they are is counted again from its log and its checkpoints"
import pytest, torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from tuneforge.all import *
from tests.tools import computed, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "What is trained says the contrary of what is evaluated, and both have words in common: the evaluation first falls, then rises"
    d = tmp_path_factory.mktemp("best")
    village = Village()
    rows = village.questions(list(village.people)[:8])
    turned = [r | dict(output=s["output"]) for r, s in zip(rows, rows[3:]+rows[:3])]
    write_jsonl(d/"valid.jsonl", rows[:12])
    return write_jsonl(d/"train.jsonl", turned[:12])


def config(data, out, **kw):
    base = dict(base_model="tiny:llama", datasets=[dict(path=str(data), type="alpaca")], test_datasets=[dict(path=str(data.parent/"valid.jsonl"), type="alpaca", split="train")],
        dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out), sequence_len=256, micro_batch_size=4, learning_rate=2e-2, lr_scheduler="constant",
        warmup_steps=0, logging_steps=1, eval_steps=2, max_steps=24, load_best_model_at_end=True, save_strategy="best")
    return load_config(base | kw)


KINDS = dict(full=dict(learning_rate=1e-2), lora=dict(adapter="lora", lora_r=4, lora_target_linear=True, bf16=True), schedule_free=dict(optimizer="schedule_free_adamw", learning_rate=2e-2))


def evaluations(r): return {h["step"]: h["eval_loss"] for h in r.history[:-1] if "eval_loss" in h} # the last line is of what the run ends with


def weights(folder): return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module", params=list(KINDS))
def done(request, data, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)/"out"
    return out, train(config(data, out, **KINDS[request.param]))


def test_the_run_ends_with_the_best_weights(done):
    out, r = done
    during = evaluations(r)
    best = min(during, key=during.get)
    assert 2<best<24, f"this data was made so that the best is not the last: {during}"
    assert r.metrics["eval_loss"]==during[best]
    assert same(weights(out), weights(out/f"checkpoint-{best}"))


def test_what_was_the_best_so_far_was_saved(done):
    out, r = done
    during = list(evaluations(r).items())
    want = [s for i, (s, l) in enumerate(during) if all(l<m for _, m in during[:i])]
    best, ever = min(want, key=lambda s: dict(during)[s]), sorted({*want, 24}) # the end is saved, too, so that a finished run is known as one
    assert [int(p.name.split("-")[1]) for p in checkpoints(out)]==sorted({*ever[-4:], best}) # as many as are kept


def test_a_finished_run_is_not_trained_again(done, data):
    out, r = done
    again = train(config(data, out, resume="auto", **{k: v for k, v in KINDS.items() if k in str(out)}.popitem()[1]))
    assert computed(again.history)==computed(r.history) and again.metrics["eval_loss"]==r.metrics["eval_loss"] and again.metrics["best_step"]==r.metrics["best_step"]


def test_the_best_outlives_newer_checkpoints(data, tmp_path):
    r = train(config(data, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, adapter="lora", lora_r=4, lora_target_linear=True))
    during = evaluations(r)
    best = min(during, key=during.get)
    assert {int(p.name.split("-")[1]) for p in checkpoints(tmp_path)}=={best, 24}
    assert r.metrics["eval_loss"]==during[best]


class Damage(TrainerCallback):
    "A disk that flips bits"
    def __init__(self, out): self.out = out
    def on_train_end(self, args, state, control, **kwargs):
        for p in (self.out/f"checkpoint-{state.best_global_step}").glob("*.safetensors"): p.write_bytes(p.read_bytes()[:-1]+b"?")


def test_a_damaged_best_costs_no_run(data, tmp_path, caplog):
    r = train(config(data, tmp_path, **KINDS["lora"]), [Damage(tmp_path)])
    assert "is damaged" in caplog.text
    assert r.metrics["eval_loss"]==evaluations(r)[24] and (tmp_path/"adapter_model.safetensors").is_file()


class Look(TrainerCallback):
    "How batches are really made"
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen = train_dataloader.num_workers, train_dataloader.prefetch_factor, args.accelerator_config.non_blocking


def test_workers_make_the_same_batches(data, tmp_path):
    looks = Look(), Look()
    kw = dict(adapter="lora", lora_r=4, lora_target_linear=True, lora_dropout=0.1, max_steps=4, save_strategy="no", load_best_model_at_end=False, num_epochs=3)
    a, b = (train(config(data, tmp_path/n, **kw, **more), [look])
        for look, n, more in zip(looks, "ab", ({}, dict(dataloader_num_workers=2, dataloader_prefetch_factor=3, accelerator_config=dict(non_blocking=True)))))
    assert [l.seen for l in looks]==[(0, None, False), (2, 3, True)]
    assert [h["loss"] for h in a.history if "loss" in h]==[h["loss"] for h in b.history if "loss" in h]
    assert evaluations(a)==evaluations(b)
