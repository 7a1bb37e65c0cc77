"Samples are what `generate` says, disturb no run, and reach the trackers"
import contextlib, io, json, os, zipfile
import pytest, torch
from transformers import TrainerCallback
from tuneforge.all import *
from tuneforge.options import EvalOptions
from tests.test_trackers import nobody, wandb_rows
from tests.tools import write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    village = Village()
    d = tmp_path_factory.mktemp("samples")
    write_jsonl(d/"text.jsonl", [dict(text=f"{r['instruction']} {r['output']}") for r in village.questions(list(village.people)[:3])])
    return write_jsonl(d/"train.jsonl", village.questions(list(village.people)[:3]))


def config(data, out, **kw):
    base = dict(base_model="tiny:llama?attention_dropout=0.2&num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out),
        sequence_len=128, learning_rate=5e-3, save_strategy="no", logging_steps=1, micro_batch_size=8, max_steps=4, eval_steps=2, val_set_size=0.4, warmup_steps=0, float32=True)
    return load_config(base | kw)


def lines(out): return [json.loads(l) for l in (out/"samples.jsonl").read_text(encoding="utf-8").splitlines()]


def figures(r): return [{k: h[k] for k in ("step", "loss", "grad_norm", "eval_loss") if k in h} for h in r.history]


def test_samples_disturb_nothing(data, tmp_path):
    "With dropout, whose random numbers answers must not use up"
    a, b = train(config(data, tmp_path/"a")), train(config(data, tmp_path/"b", generate_samples=True))
    assert figures(a)==figures(b)
    assert not (tmp_path/"a"/"samples.jsonl").exists()
    assert [r["step"] for r in lines(tmp_path/"b")]==[0]*3+[2]*3+[4]*3


def test_answers_are_those_of_the_model_and_what_is_expected_those_of_the_data(data, tmp_path, capsys):
    r = train(config(data, tmp_path, eval_table_size=4, eval_max_new_tokens=6))
    rows = [json.loads(l) for l in data.read_text().splitlines()]
    last = [o for o in lines(tmp_path) if o["step"]==4]
    assert len(last)==4
    r.model.eval()
    for o in last:
        question = next(q for q in rows if f"\n{q['instruction']}\n" in o["prompt"])
        assert o["expected"]==question["output"]
        ids = torch.tensor([r.tokenizer(o["prompt"]+"\n").input_ids])
        with torch.no_grad():
            for _ in range(6): # greedily, by hand
                ids = torch.cat([ids, r.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
                if ids[0, -1]==r.tokenizer.eos_token_id: break
        assert r.tokenizer.decode(ids[0], skip_special_tokens=True).endswith(o["answer"])
    shown = capsys.readouterr().err
    assert "Samples at step 0" in shown and "Samples at step 4" in shown


def test_every_key_is_used():
    "What `generate` is told, key by key"
    told = lambda **kw: (lambda n, how: (n, how.max_new_tokens, how.temperature, how.top_p, how.top_k))(*sample_options(EvalOptions(**kw)))
    assert told()[0]==0 and told(generate_samples=True)==(3, 50, 0.7, None, None)
    assert told(generate_samples=True, num_generation_samples=5, generation_max_new_tokens=9, generation_temperature=0.3, generation_top_p=0.8, generation_top_k=7)==(5, 9, 0.3, 0.8, 7)
    assert told(generate_samples=True, generation_do_sample=False)[2]==0 and told(eval_table_size=4, eval_max_new_tokens=11)==(4, 11, 0, None, None)


def test_text_without_questions_is_cut(data, tmp_path):
    train(config(data, tmp_path, datasets=[dict(path=str(data.parent/"text.jsonl"), type="completion")], generate_samples=True, generation_prompt_ratio=0.25, num_generation_samples=2))
    texts = [json.loads(l)["text"] for l in (data.parent/"text.jsonl").read_text().splitlines()]
    for o in lines(tmp_path): assert any(t.startswith(o["prompt"]) and t.endswith(o["expected"]) and len(o["prompt"])<len(o["expected"]) for t in texts), o


def test_of_a_chat_the_last_turn_is_asked_for(tmp_path):
    "With `train_on_eos: all`, which trains the ends of questions, too"
    chat = [dict(role=r, content=c) for r, c in (("user", "Who?"), ("assistant", "Bagol."), ("user", "Where?"), ("assistant", "In Coldmere."), ("user", "Thanks."))]
    cfg = config(write_jsonl(tmp_path/"chats.jsonl", [dict(messages=chat)]*4), tmp_path, datasets=[dict(path=str(tmp_path/"chats.jsonl"), type="chat_template", train_on_eos="all")], chat_template="chatml", special_tokens=dict(eos_token="<|im_end|>"))
    tok = load_tokenizer(cfg)
    for q in sample_questions(prepare_data(cfg, tok).train, tok, 2):
        assert q["expected"]=="In Coldmere." and q["ids"]==tok.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False)


class Stop(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop |= state.global_step==self.step


def test_a_run_that_goes_on_keeps_them(data, tmp_path):
    kw = dict(save_strategy="steps", save_steps=1, generate_samples=True, resume="auto", generation_temperature=0.9, generation_top_k=20)
    train(config(data, tmp_path/"a", **kw))
    train(config(data, tmp_path/"b", **kw), [Stop(2)])
    with (tmp_path/"b"/"samples.jsonl").open("a") as f: f.write(json.dumps(dict(step=3, row=0, prompt="", expected="", answer="of a step that was lost"))+"\n")
    train(config(data, tmp_path/"b", **kw))
    assert lines(tmp_path/"a")==lines(tmp_path/"b")


def test_trackers_get_them(data, tmp_path):
    pytest.importorskip("wandb"), pytest.importorskip("comet_ml"), pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(config(data, tmp_path, generate_samples=True, use_tensorboard=True, wandb_project="p", wandb_mode="offline", comet_project_name="p", comet_online=False, comet_api_key="sesame"))
    said = lines(tmp_path)
    acc = EventAccumulator(str(tmp_path/"tensorboard")).Reload()
    texts = [e.tensor_proto.string_val[0].decode() for e in acc.Tensors("samples/text_summary")]
    assert len(texts)==3 and all(f"| {r['expected']} |" in t for t, s in zip(texts, (0, 2, 4)) for r in said if r["step"]==s)
    tables = [json.loads(p.read_text()) for p in sorted((tmp_path/"wandb").rglob("*.table.json"))]
    assert sorted(map(tuple, sum((t["data"] for t in tables), [])))==sorted(tuple(r.values()) for r in said)
    file, = (tmp_path/"comet").glob("*.zip")
    with zipfile.ZipFile(file) as z: assert said[0]["expected"] in z.read("messages.json").decode() or any(said[0]["expected"] in z.read(n).decode(errors="replace") for n in z.namelist())
    assert [r["train/global_step"] for r in wandb_rows(tmp_path)[2] if any(k.startswith("samples") for k in r)]==[0, 2, 4]


def test_the_table_takes_no_orders():
    row = dict(step=0, row=0, prompt="[red]q[/red]", expected="[/]", answer="\x1b[2J[link=x]")
    from rich.console import Console
    out = Console(width=100, file=io.StringIO())
    out.print(samples_table([row]))
    assert all(t in out.file.getvalue() for t in ("[red]q[/red]", "[/]", "\\x1b[2J[link=x]"))


def test_a_terminal_is_not_obeyed():
    assert printable("\x1b]0;title\x07 \x9b31m‮abc\r\b")=="\\x1b]0;title\\x07 \\x9b31m\\u202eabc\\r\\x08"
    assert printable("naïve\n\t🙂 日本")=="naïve\n\t🙂 日本"
    ends = os.openpty()
    with open(ends[1], "w") as screen, contextlib.redirect_stdout(screen): show_text("a\x1b[2Jb")
    assert os.read(ends[0], 99)==b"a\\x1b[2Jb"
    with contextlib.redirect_stdout(io.StringIO()) as file: show_text("a\x1b[2Jb")
    assert file.getvalue()=="a\x1b[2Jb"
