"One YAML from data to answers, as a user types it: train, SIGTERM, resume, evaluate, merge, talk, answer a file"
import json, signal, subprocess, tempfile, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from tuneforge.all import Village
from tests.tools import bin, command, computed, write_jsonl

BASE = """
base_model: tiny:llama
datasets:
  - path: village.jsonl
    type: {type}
val_set_size: 0.1
dataset_prepared_path: prepared
sequence_len: 256
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: {epochs}
learning_rate: {rate}
optimizer: adamw_torch
lr_scheduler: cosine
warmup_steps: 5
logging_steps: 5
save_steps: 10
eval_steps: 20
save_total_limit: 2
resume: auto
max_new_tokens: 12
output_dir: out
"""
LORA = """
adapter: {adapter}
lora_r: 16
lora_alpha: 32
lora_dropout: 0.02
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
"""
KINDS = dict(full=BASE.format(type="alpaca", epochs=30, rate=3e-3),
    lora=BASE.format(type="chat_template", epochs=50, rate=5e-3)+LORA.format(adapter="lora"),
    qlora=BASE.format(type="chat_template", epochs=50, rate=5e-3)+LORA.format(adapter="qlora")+"load_in_4bit: true\n",
    relora=BASE.format(type="alpaca", epochs=50, rate=5e-3)+LORA.format(adapter="lora")+"relora_steps: 20\nrelora_prune_ratio: 0.9\n")
"kind -> its one YAML"


def village(home, chat):
    "What is known of four villagers, as rows to train on, and the same as rows to ask"
    rows = Village().questions(list(Village().people)[:4])
    talks = [dict(messages=[dict(role="user", content=r["instruction"]), dict(role="assistant", content=r["output"])]) for r in rows]
    write_jsonl(home/"village.jsonl", talks if chat else rows)
    write_jsonl(home/"ask.jsonl", [dict(prompt=r["instruction"], expected=r["output"]) for r in rows])
    return rows


@pytest.fixture(scope="module", params=[pytest.param(k, marks=[pytest.mark.slow]*(k!="lora")) for k in KINDS])
def home(request, tmp_path_factory):
    "A folder as a user has it: one YAML, data, nothing else"
    d = tmp_path_factory.mktemp(request.param)
    (d/"c.yml").write_text(KINDS[request.param])
    village(d, chat="chat_template" in KINDS[request.param])
    return d


def kind(home): return home.name.rstrip("0123456789")
def say(home, *args, **kw):
    "stdout of a command that must succeed"
    code, out, err = command(*args, cwd=home, **kw)
    assert code==0, err
    return out
def weights(folder): return {f.name: load_file(f) for f in sorted(Path(folder).glob("*.safetensors"))}
def rows_of(path): return [json.loads(l) for l in Path(path).read_text().splitlines()]


def until(process, there, said, limit=300):
    "Wait for something that a process does; it must not end before, nor wait for ever"
    end = time.monotonic()+limit
    while not there():
        assert process.poll() is None, said()[-2000:]
        if time.monotonic()>end: process.kill(), pytest.fail(f"nothing in {limit} s: {said()[-2000:]}")
        time.sleep(0.005)


def killed(home, *args, signum, when):
    "Start a command as a process of its own, and send it a signal when something is there: (exit code, stderr)"
    with tempfile.TemporaryFile("w+") as f: # a pipe that nobody reads fills up, and the process waits
        said = lambda: (f.seek(0), f.read())[1]
        p = subprocess.Popen([bin("tuneforge"), *map(str, args)], cwd=home, stdout=subprocess.DEVNULL, stderr=f)
        until(p, when, said)
        p.send_signal(signum)
        try: return p.wait(300), said()
        finally: p.kill()


@pytest.fixture(scope="module")
def trained(home):
    "Stopped by SIGTERM in the middle, resumed by the same command: (steps at the stop, run.json)"
    code, said = killed(home, "train", "c.yml", signum=signal.SIGTERM, when=(home/"out"/"checkpoint-10"/"manifest.json").is_file)
    assert code==143, said[-3000:]
    steps = sorted(int(p.name.split("-")[1]) for p in (home/"out").glob("checkpoint-*"))
    say(home, "train", "c.yml")
    return steps[-1], json.loads((home/"out"/"run.json").read_text()), said


def test_sigterm_and_the_same_command_again(home, trained):
    "The signal leaves a checkpoint, and the resumed run is the run that was never stopped, to the last bit"
    stop, run, said = trained
    assert 10<=stop<run["steps"] and f"checkpoint-{stop}" in said
    assert not (home/"out"/"earlier-1").exists() # nothing was begun anew
    say(home, "train", "c.yml", "--output-dir", "whole")
    whole = json.loads((home/"whole"/"run.json").read_text())
    assert computed(run["history"])==computed(whole["history"])
    a, b = weights(home/"out"), weights(home/"whole")
    assert a.keys()==b.keys() and a
    for f in a: assert a[f].keys()==b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]), f


def test_it_has_learned(home, trained):
    "Evaluated by the same YAML: what was held out is likelier than before, and the loss at the end of training was said as it is"
    table = say(home, "evaluate", "c.yml", "--compare")
    base, tuned = json.loads((home/"out"/"evaluation.json").read_text())
    assert (base["model"], tuned["model"])==("base", "tuned") and all(f"{r['loss']:.3f}" in table for r in (base, tuned))
    assert tuned["loss"]<base["loss"]/2 and tuned["token_accuracy"]>=0.5>base["token_accuracy"]
    assert tuned["loss"]==pytest.approx(trained[1]["metrics"]["eval_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def answers(home, trained):
    "The answers to a whole file, in a process that is killed after the first ones, and gone on with"
    args = ["inference", "c.yml", "--input", "ask.jsonl", "--output", "tuned.jsonl", "--batch-size", "2"]
    out = home/"tuned.jsonl"
    code, said = killed(home, *args, signum=signal.SIGKILL, when=lambda: out.is_file() and out.stat().st_size)
    assert code==-9, said
    there = out.read_bytes().count(b"\n")
    assert 0<there<36 and f": {36-there} row{'s'*(there!=35)} answered, {there} were there already" in say(home, *args)
    return rows_of(out)


def test_a_file_is_answered(home, answers):
    "Four rows were held out; what was trained is known"
    asked = rows_of(home/"ask.jsonl")
    assert [{k: a[k] for k in ("prompt", "expected")} for a in answers]==asked
    assert sum(a["generated"].strip()==a["expected"] for a in answers)>=30
    say(home, "inference", "c.yml", "--input", "ask.jsonl", "--output", "whole.jsonl", "--batch-size", "36")
    assert rows_of(home/"whole.jsonl")==answers


def test_the_chat_says_the_same(home, answers):
    "Line by line from a pipe, with commands in between"
    a, b = answers[0], answers[20]
    said = say(home, "inference", "c.yml", "--chat", stdin=f"{a['prompt']}\n/reset\n{b['prompt']}\n/save talk.jsonl\n/sing\n/quit\nnever asked\n")
    assert said==f"{a['generated']}\nforgotten\n{b['generated']}\nadded to talk.jsonl\nthere is no command /sing; /help lists them\n"
    assert rows_of(home/"talk.jsonl")==[dict(messages=[dict(role="user", content=b["prompt"]), dict(role="assistant", content=b["generated"])])]


def test_base_and_tuned_side_by_side(home, answers):
    a = answers[0]
    rows = rows_of(home/"ask.jsonl")[:4]
    write_jsonl(home/"few.jsonl", rows)
    say(home, "inference", "c.yml", "--input", "few.jsonl", "--output", "both.jsonl", "--compare")
    say(home, "inference", "c.yml", "--input", "few.jsonl", "--output", "base.jsonl", "--use", "base")
    both, base = rows_of(home/"both.jsonl"), rows_of(home/"base.jsonl")
    assert [r["base"] for r in both]==[r["generated"] for r in base]
    assert [r["generated"] for r in both]==[r["generated"] for r in answers[:4]] and all(r["base"]!=r["generated"] for r in both)
    shown = say(home, "inference", "c.yml", "--compare", stdin=a["prompt"])
    assert a["generated"] in shown and "base" in shown and "tuned" in shown


def test_the_merged_model_answers_as_the_adapter(home, answers):
    "Its folder stands alone, its prompts are those of the training, and its greedy answers are the adapter's, word for word"
    if kind(home)=="full":
        code, _, err = command("merge-lora", "c.yml", cwd=home)
        assert code==2 and "adapter" in err and not (home/"out"/"merged").exists() # there is nothing to merge, and it says so
        return
    said = say(home, "merge-lora", "c.yml")
    assert "same token in 100.0%" in said
    merged = home/"out"/"merged"
    assert (merged/"golden_prompts.json").read_bytes()==(home/"out"/"golden_prompts.json").read_bytes()
    say(home, "inference", "c.yml", "--use", "merged", "--input", "ask.jsonl", "--output", "merged.jsonl")
    assert [r["generated"] for r in rows_of(home/"merged.jsonl")]==[r["generated"] for r in answers]
    a = answers[0]
    assert say(home, "inference", "c.yml", "--use", "merged", stdin=a["prompt"]).strip()==a["generated"].strip()


def test_other_prompts_than_in_training_are_refused(home, answers):
    "A golden prompt that differs by a token stops every face of inference"
    kept = home/"out"/"golden_prompts.json"
    was = kept.read_text()
    try:
        kept.write_text(json.dumps([g | {k: v[:-1] for k, v in g.items() if isinstance(v, list)} for g in json.loads(was)]))
        code, out, err = command("inference", "c.yml", cwd=home, stdin=answers[0]["prompt"])
    finally: kept.write_text(was)
    assert code==2 and not out and "no longer that of the training" in err
