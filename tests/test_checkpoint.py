"Nothing that was saved is lost: kill -9 at any moment of a save, damage, full disks, signals, retention"
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from tuneforge.all import *
from tuneforge.checkpoint import MANIFEST, SAVING, make_way
from tests.tools import ROOT, forks, run, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A config with a save after every step, and the run that nothing befell"
    d = tmp_path_factory.mktemp("data")
    rows = write_jsonl(d/"train.jsonl", Village().questions(list(Village().people)[:3]))
    cfg = dict(base_model="tiny:llama?attention_dropout=0.2&num_hidden_layers=1", datasets=[dict(path=str(rows), type="alpaca")], dataset_prepared_path=str(d/"prepared"), output_dir=str(d/"whole"), sequence_len=128,
        learning_rate=1e-3, micro_batch_size=2, gradient_accumulation_steps=2, sample_packing=True, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2, logging_steps=1, resume="auto", float32=True)
    (d/"c.yml").write_text(json.dumps(cfg))
    train(load_config(cfg))
    return d/"c.yml", weights(d/"whole")


def weights(out): return load_file(out/"model.safetensors"), torch.load(out/"checkpoint-4"/"optimizer.pt", weights_only=True)["state"]


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else all(map(same, a, b)) if isinstance(a, tuple) else a==b


def calls(made, folder):
    "How many calls change the file system in an undisturbed run"
    said = forks([dict(config=str(made[0]), overrides=["--output-dir", str(folder/"count")], kill=dict(call=None))], folder)[0]["said"]
    return int(said.rsplit("CALLS ", 1)[1].split()[0])


def befall(made, folder, whats):
    "Runs that something befalls, and each of them resumed: [(what, its folder, what came, what came of going on)]"
    folders = [folder/str(i) for i in range(len(whats))]
    phases = [dict(config=str(made[0]), overrides=["--output-dir", str(f), *w.get("options", [])]) | o for f, w in zip(folders, whats) for o in (w, {})]
    came = forks(phases, folder)
    return [(w, f, came[2*i], came[2*i+1]) for i, (w, f) in enumerate(zip(whats, folders))]


def survived(made, what, out, hit, on):
    "What was visible was whole, and going on ended as if nothing had been"
    assert not any(hit["checkpoints"].values()), (what, hit)
    assert on["codes"]==[0]*len(on["codes"]), (what, on["said"])
    assert same(weights(out), made[1]) and sorted(on["checkpoints"])==["checkpoint-3", "checkpoint-4"] and not (out/SAVING).exists(), what
    return hit


def stop(*signums): return dict(stop=[0, 1, "substep", *signums], options=["--save-steps", "100"])


ACCIDENTS = {"torn weights": dict(kill=dict(torn=[2, "weights"])), "torn optimizer": dict(kill=dict(torn=[2, "optimizer"])), "torn manifest": dict(kill=dict(torn=[2, "manifest"])),
    "SIGTERM": stop(15), "SIGINT": stop(2), "SIGTERM twice": stop(15, 15), "SIGINT twice": stop(2, 2), "echo": stop(2, 15)}


@pytest.fixture(scope="module")
def accidents(made, tmp_path_factory):
    "All that can befall a run, each once, in one process: kills before five of the calls that write, sync, name and delete, and what `ACCIDENTS` names"
    d = tmp_path_factory.mktemp("accidents")
    return befall(made, d, [*ACCIDENTS.values(), *(dict(kill=dict(call=c)) for c in range(6, 160, 36))])


def of(accidents, name): return accidents[list(ACCIDENTS).index(name)]


def test_kill_inside_a_save(made, accidents):
    hits = [survived(made, *a) for a in accidents[len(ACCIDENTS):]]
    assert [h["codes"] for h in hits]==[[-signal.SIGKILL]]*5
    assert {len(h["checkpoints"]) for h in hits}>={0, 1, 2} # from before the first save to after the last


@pytest.mark.parametrize("what", ["weights", "optimizer", "manifest"])
def test_kill_with_half_a_file(made, accidents, what):
    hit = survived(made, *of(accidents, f"torn {what}"))
    assert (hit["codes"], list(hit["checkpoints"]))==([-signal.SIGKILL], ["checkpoint-1"])


@pytest.mark.slow
def test_kill_before_each_call(made, tmp_path):
    n = calls(made, tmp_path)
    assert n>150
    for a in befall(made, tmp_path, [dict(kill=dict(call=c)) for c in range(1, n+1)]): assert survived(made, *a)["codes"]==[-signal.SIGKILL]


@pytest.mark.slow
def test_kill_at_any_time(made, tmp_path):
    for a in befall(made, tmp_path, [dict(kill=dict(after=0.05*i)) for i in range(60)]): survived(made, *a)


def test_a_full_disk_keeps_the_last_good_one(made, tmp_path):
    "The largest file may have as many bytes as the weights: the optimizer's state does not fit. On two ranks, both stop."
    cfg, want = made
    phase = dict(config=str(cfg), overrides=["--output-dir", str(tmp_path/"out")])
    both = dict(config=str(cfg), ranks=2, overrides=["--output-dir", str(tmp_path/"two"), "--gradient-accumulation-steps", "1"], size=100_000)
    size = (cfg.parent/"whole"/"model.safetensors").stat().st_size
    _, full, on, two = forks([phase | dict(stop=[0, 2, "step", signal.SIGTERM]), phase | dict(size=size+1000), phase, both], tmp_path)
    assert full["codes"]==[2] and full["checkpoints"]=={"checkpoint-1": [], "checkpoint-2": []}
    assert "checkpoint-3 could not be written" in full["said"] and "the last good one is checkpoint-2" in full["said"]
    assert on["codes"]==[0] and same(weights(tmp_path/"out"), want)
    assert two["codes"]==[2, 2] and two["said"].count("checkpoint-1 could not be written")==2 and not two["checkpoints"]


# Signals

@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("echo", 130)])
def test_a_signal_saves_and_exits(accidents, name, code):
    "In accumulation: the step is finished. After a person's SIGINT, a launcher's SIGTERM is an echo."
    _, out, hit, on = of(accidents, name)
    assert hit["codes"]==[code] and hit["checkpoints"]=={"checkpoint-2": []} and on["codes"]==[0]
    assert f": saved checkpoint-2 of {out}; `resume: auto` goes on from there" in hit["said"]


@pytest.mark.parametrize("name, signum", [("SIGTERM twice", 15), ("SIGINT twice", 2)])
def test_the_same_signal_again_ends_at_once(accidents, name, signum):
    _, _, hit, on = of(accidents, name)
    assert hit["codes"]==[-signum] and not hit["checkpoints"] and on["codes"]==[0]


def test_a_signal_to_the_command(made, tmp_path):
    cmd = [Path(sys.executable).parent/"tuneforge", "train", made[0], "--output-dir", tmp_path/"out", "--max-steps", "100000", "--save-steps", "100000", "--logging-steps", "1"]
    p = subprocess.Popen([str(c) for c in cmd], env=os.environ | dict(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
    for line in p.stderr:
        if line.startswith("Training"): break
    p.send_signal(signal.SIGTERM)
    said = p.stderr.read()
    assert p.wait(120)==143 and "SIGTERM: saved checkpoint-" in said, said
    assert [damage(c) for c in checkpoints(tmp_path/"out")]==[[]] and not (tmp_path/"out"/"run.json").exists()


# Damage

@pytest.fixture
def two(made, tmp_path):
    "A run folder with two good checkpoints"
    shutil.copytree(made[0].parent/"whole", tmp_path/"out")
    return tmp_path/"out"


FILES = ["model.safetensors", "optimizer.pt", "optimizer_names.json", "scheduler.pt", "rng_state.pth", "rank_0.json", "trainer_state.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST, f"{MANIFEST}.sha256"]
OPTS = lambda out: TrainOptions(output_dir=str(out), resume="auto")


def test_no_file_is_forgotten(two): assert {str(p.relative_to(two/"checkpoint-4")) for p in (two/"checkpoint-4").rglob("*") if p.is_file()}-{"chat_template.jinja", "special_tokens_map.json"}==set(FILES)


def test_a_checkpoint_that_is_not_there_is_no_damage(two):
    with pytest.raises(UserError, match=r"checkpoint-99 is no checkpoint to go on from: there is no such folder; .* has checkpoint-3, checkpoint-4"):
        resume_from(TrainOptions(output_dir=str(two), resume=str(two/"checkpoint-99")))


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(two, name, caplog):
    "Every bit of some bytes at the ends and in the middle, the last byte gone, half of it gone, all of it, and the file itself"
    good, f = two/"checkpoint-4"/name, (two/"checkpoint-4"/name).read_bytes()
    at = sorted({0, 1, len(f)//3, len(f)//2, len(f)-2, len(f)-1})
    bad = [f[:i]+bytes([f[i]^1<<b])+f[i+1:] for i in at for b in (range(8) if len(f)<20_000 else (0, 7))] + [f[:-1], f[:len(f)//2], b"", f+b"\0"]
    for b in bad:
        good.write_bytes(b)
        wrong = damage(two/"checkpoint-4")
        assert len(wrong)==1 and name in wrong[0]
        if name not in (MANIFEST, f"{MANIFEST}.sha256") and len(b)==len(f): assert json.loads((two/"checkpoint-4"/MANIFEST).read_text())["files"][name]["sha256"][:16] in wrong[0]
    good.unlink()
    assert name in damage(two/"checkpoint-4")[0]
    assert resume_from(OPTS(two))==str(two/"checkpoint-3")
    assert name in caplog.text and "passed over" in caplog.text
    good.write_bytes(f)
    assert resume_from(OPTS(two))==str(two/"checkpoint-4")


@given(st.data())
def test_any_flipped_bit_is_found(made, d):
    p = made[0].parent/"whole"/"checkpoint-3"
    f = p/d.draw(st.sampled_from(FILES))
    b = f.read_bytes()
    i, bit = d.draw(st.integers(0, len(b)-1)), d.draw(st.integers(0, 7))
    try:
        f.write_bytes(b[:i]+bytes([b[i]^1<<bit])+b[i+1:])
        assert f.name in damage(p)[0]
    finally: f.write_bytes(b)


def test_sha256sum_agrees(two):
    "What the manifest says can be checked without us"
    p = two/"checkpoint-4"
    assert run("sha256sum", "-c", f"{MANIFEST}.sha256", cwd=p).returncode==0
    sums = "".join(f"{f['sha256']}  {n}\n" for n, f in json.loads((p/MANIFEST).read_text())["files"].items())
    assert run("sha256sum", "-c", cwd=p, stdin=sums).returncode==0


def test_nothing_whole_is_an_error(two):
    for n in (3, 4): (two/f"checkpoint-{n}"/"optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole(.|\n)*checkpoint-4: optimizer.pt is damaged: it has 0 bytes(.|\n)*checkpoint-3"): resume_from(OPTS(two))
    with pytest.raises(UserError, match="checkpoint-9 is no checkpoint to go on from: there is no such folder"): resume_from(TrainOptions(resume=str(two/"checkpoint-9")))
    assert resume_from(TrainOptions(output_dir=str(two), resume="never")) is None
    assert resume_from(OPTS(two/"new")) is None


def test_the_damaged_one_is_passed_over_and_made_again(made, two):
    cfg, want = made
    (two/"checkpoint-4"/"optimizer.pt").write_bytes(b"")
    train(load_config(cfg, ["--output-dir", str(two)]))
    assert same(weights(two), want) and damage(two/"checkpoint-4")==[]
    assert [p.name for p in (two/"earlier-1").iterdir()]==["checkpoint-4"]


def test_no_pickle_is_run(made, two, tmp_path):
    "Not even from a checkpoint whose hashes are right"
    class Bomb:
        def __reduce__(self): return Path.touch, (tmp_path/"exploded",)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        p = two/"checkpoint-3"
        old = (p/name).read_bytes()
        torch.save(Bomb(), p/name)
        facts = json.loads((p/MANIFEST).read_text())
        facts.pop("files")
        [(p/n).unlink() for n in (MANIFEST, f"{MANIFEST}.sha256")]
        seal(p, facts)
        assert damage(p)==[]
        with pytest.raises(Exception, match="weights_only|Weights only"): train(load_config(made[0], ["--output-dir", str(two), "--resume", str(p)]))
        (p/name).write_bytes(old)
    assert not (tmp_path/"exploded").exists()


# What is kept

def fake(folder, name, whole=True):
    p = folder/name
    p.mkdir(parents=True)
    for f in ("optimizer.pt", "x.txt"): (p/f).write_text(name)
    if whole: seal(p, dict(step=1))
    return p


NAMES = ["checkpoint", "checkpoint-", "checkpoint-x", "checkpoint-7-old", "checkpoint-007x", "my-checkpoint-3", "checkpoint-3.bak", "xcheckpoint-3", "checkpoint-３x"]


@settings(max_examples=30) # each syncs its files
@given(steps=st.sets(st.integers(0, 30), max_size=8), foreign=st.sets(st.integers(31, 60), max_size=4), links=st.sets(st.integers(61, 90), max_size=3), torn=st.sets(st.integers(91, 99), max_size=2),
    names=st.sets(st.sampled_from(NAMES)), keep=st.integers(1, 4), best=st.none() | st.integers(0, 30))
def test_retention_deletes_ours_alone(tmp_path_factory, steps, foreign, links, torn, names, keep, best):
    "Whatever else stands there stays as it is: no manifest, another name, a link to a checkpoint, a damaged one"
    d = tmp_path_factory.mktemp("r")/"out"
    d.mkdir()
    for s in steps: fake(d, f"checkpoint-{s}")
    kept = [fake(d, f"checkpoint-{s}", False) for s in foreign] + [fake(d, n) for n in names] + [fake(d, f"checkpoint-{s}") for s in torn]
    for s in torn: (d/f"checkpoint-{s}"/"x.txt").write_text("another length")
    for s in links: (d/f"checkpoint-{s}").symlink_to(fake(d.parent, f"elsewhere-{s}"), target_is_directory=True)
    prune(d, keep, best)
    left = {int(p.name.split("-")[1]) for p in checkpoints(d) if p.name.removeprefix("checkpoint-").isascii()} & set(range(31))
    assert left==set(sorted(steps)[-keep:]) | ({best} & steps)
    assert all((p/"x.txt").is_file() for p in kept) and all((d/f"checkpoint-{s}").is_symlink() and (d.parent/f"elsewhere-{s}"/"x.txt").is_file() for s in links)


def test_the_best_is_kept_and_a_foreign_folder_gives_way(made, tmp_path):
    "In a real run: the first evaluation is the best, and someone's folder has the name of the second checkpoint"
    out = tmp_path/"out"
    (out/"checkpoint-2").mkdir(parents=True)
    (out/"checkpoint-2"/"mine.txt").write_text("mine")
    cfg = load_config(made[0], ["--output-dir", str(out), "--save-total-limit", "1", "--val-set-size", "0.3", "--eval-steps", "1", "--learning-rate", "3.0", "--resume", "never"])
    r = train(cfg)
    evals = [h["eval_loss"] for h in r.history if "eval_loss" in h][:4]
    best = evals.index(min(evals))+1
    assert [p.name for p in checkpoints(out)]==sorted({f"checkpoint-{best}", "checkpoint-4"}) and best<4
    assert (out/"earlier-1"/"checkpoint-2"/"mine.txt").read_text()=="mine"


def test_an_old_one_that_stays_costs_no_run(made, tmp_path, monkeypatch, caplog):
    "On a shared disk, a folder whose file somebody reads cannot be deleted at once"
    remove, refused = shutil.rmtree, []
    def busy(path, *args, **kw):
        if not str(path).endswith(".old") or refused: return remove(path, *args, **kw)
        refused.append(Path(path).name)
        raise OSError(39, "Directory not empty")
    monkeypatch.setattr("tuneforge.checkpoint.shutil.rmtree", busy)
    train(load_config(made[0], ["--output-dir", str(tmp_path), "--save-total-limit", "1", "--max-steps", "3"]))
    assert refused==["checkpoint-1.old"] and "checkpoint-2 is whole; of what is over, not all could be deleted (OSError: [Errno 39] Directory not empty)" in caplog.text
    assert [(p.name, damage(p)) for p in checkpoints(tmp_path)]==[("checkpoint-3", [])] and not (tmp_path/SAVING).exists() # tried again with the next save


def test_a_new_run_moves_the_old_ones_checkpoints(two, made):
    "So that none of them is ever resumed by mistake, and none is lost"
    (two/SAVING/"checkpoint-9").mkdir(parents=True)
    make_way(two, str(two/"checkpoint-3"))
    assert [p.name for p in checkpoints(two)]==["checkpoint-3"] and not (two/SAVING).exists()
    make_way(two, None)
    assert not checkpoints(two) and [sorted(p.name for p in (two/f"earlier-{i}").iterdir()) for i in (1, 2)]==[["checkpoint-4"], ["checkpoint-3"]]


def test_the_first_step_is_saved_when_asked(made, tmp_path):
    train(load_config(made[0], ["--output-dir", str(tmp_path/"out"), "--save-first-step", "--save-steps", "3", "--save-total-limit", "3"]))
    assert [p.name for p in checkpoints(tmp_path/"out")]==["checkpoint-1", "checkpoint-3", "checkpoint-4"]
