"""Trainings as forks of one process that has everything imported: `python -m tests.forks spec.json`

The spec is a list of phases, each a training with `config`, `overrides`, `ranks`, and what befalls it: `stop` (rank, step, moment, signals), `nan` (rank, step), `skip` (step), `small` (rank, rows), `memory` (bytes), `kill` (which call to the file system, or a torn file), `size` (largest file),
`drop` (checkpoints removed first). One JSON line for each phase: exit codes (negative: killed by a signal), damage of each visible checkpoint, what was said.
"""
import hashlib, json, os, resource, shutil, signal, sys, time
from pathlib import Path
import torch
from transformers import TrainerCallback
from tuneforge.all import *
from tuneforge import checkpoint
from tests.tools import free_port

CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


class Stop(TrainerCallback):
    "Signals to one rank at some moment of some step"
    def __init__(self, rank, step, moment, *signums): self.rank, self.step, self.moment, self.signums = rank, step, moment, signums
    def _at(self, moment, args, state):
        if (moment, args.process_index, state.global_step)==(self.moment, self.rank, self.step):
            for s in self.signums: os.kill(os.getpid(), s)
    def on_substep_end(self, args, state, control, **kw): self._at("substep", args, state)
    def on_step_end(self, args, state, control, **kw): self._at("step", args, state)


class Nan(TrainerCallback):
    "A gradient of one rank's is no number in some step; says before and after it what the weights are"
    def __init__(self, rank, step): self.rank, self.step, self.now = rank, step, 0
    def on_train_begin(self, args, state, control, model=None, **kw):
        p = next(p for p in model.parameters() if p.requires_grad)
        p.register_hook(lambda g: g*float("nan") if (args.process_index, self.now)==(self.rank, self.step) else g)
    def _say(self, word, args, model):
        h = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        os.write(2, f"{word} {args.process_index} {h}\n".encode())
    def on_step_begin(self, args, state, control, model=None, **kw):
        self.now = state.global_step+1
        if self.now==self.step: self._say("BEFORE", args, model)
    def on_step_end(self, args, state, control, model=None, **kw):
        if self.now==self.step: self._say("AFTER", args, model)


class Skip(TrainerCallback):
    "A step is left out by hand"
    def __init__(self, step): self.step = step
    def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
        if state.global_step+1==self.step: model.zero_grad(set_to_none=True)


class Small(TrainerCallback):
    "The model of one rank, or of each (None), has memory for so many rows; says with how many it is called"
    def __init__(self, rank, most): self.rank, self.most = rank, most
    def on_init_end(self, args, state, control, model=None, **kw): model.register_forward_pre_hook(lambda m, a, kw: self._refuse(args, len(kw["input_ids"])), with_kwargs=True)
    def _refuse(self, args, rows):
        os.write(2, f"ROWS {args.process_index} {rows}\n".encode())
        if self.rank in (None, args.process_index) and rows>self.most: raise torch.OutOfMemoryError(f"no memory for {rows} rows")


class Memory(TrainerCallback):
    "The process may ask for so many bytes more, once its trainer is made"
    def __init__(self, more): self.more = more
    def on_init_end(self, args, state, control, **kw):
        now = int(Path("/proc/self/statm").read_text().split()[0])*os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now+self.more, resource.RLIM_INFINITY))


def die(): os.kill(os.getpid(), signal.SIGKILL)


def kill_at(call):
    "Kill this process before its n-th call that changes the file system; None: count them"
    n = [0]
    def wrap(f):
        def g(*args, **kwargs):
            n[0] += 1
            if n[0]==call: die()
            return f(*args, **kwargs)
        return g
    for name in CALLS: setattr(os, name, wrap(getattr(os, name)))
    return n


def tear(step, kind):
    "Kill this process when half of a file of a checkpoint is written"
    def half(path):
        path = Path(path)
        if f"checkpoint-{step}" not in str(path): return
        with path.open("r+b") as f: f.truncate(path.stat().st_size//2)
        die()
    if kind=="weights":
        import transformers.modeling_utils as m
        save = m.safe_save_file
        m.safe_save_file = lambda t, path, *args, **kw: (save(t, path, *args, **kw), half(path))
    if kind=="optimizer":
        save = torch.save
        torch.save = lambda o, path, *args, **kw: (save(o, path, *args, **kw), half(path))
    if kind=="manifest":
        write = Path.write_text
        Path.write_text = lambda p, *args, **kw: (write(p, *args, **kw), half(p) if p.name==checkpoint.MANIFEST else None)


def child(phase, rank, n, port, out):
    "A rank of a training; never returns"
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if n==1: [os.environ.pop(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    code, count = 1, None
    if "size" in phase: resource.setrlimit(resource.RLIMIT_FSIZE, (phase["size"], phase["size"]))
    kill = phase.get("kill", {})
    if "call" in kill: count = kill_at(kill["call"])
    if "torn" in kill: tear(*kill["torn"])
    try:
        train(load_config(phase["config"], phase.get("overrides", [])), [kind(*phase[k]) if isinstance(phase[k], list) else kind(phase[k]) for k, kind in dict(stop=Stop, nan=Nan, skip=Skip, small=Small, memory=Memory).items() if k in phase])
        code = 0
    except SystemExit as e: code, _ = e.code, print(e, file=sys.stderr)
    except UserError as e: code, _ = 2, print(e, file=sys.stderr)
    except BaseException: sys.excepthook(*sys.exc_info())
    if count: print("CALLS", count[0], file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def play(phase, out):
    "Run a phase, with its messages in the file `out`; what came of it"
    n, port = phase.get("ranks", 1), free_port()
    output_dir = Path(load_config(phase["config"], phase.get("overrides", [])).output_dir)
    for p in phase.get("drop", []): shutil.rmtree(output_dir/p)
    pids = []
    for rank in range(n):
        if not (pid := os.fork()): child(phase, rank, n, port, out)
        pids.append(pid)
    if "after" in phase.get("kill", {}):
        time.sleep(phase["kill"]["after"])
        [os.kill(p, signal.SIGKILL) for p in pids]
    codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
    return dict(codes=codes, checkpoints={p.name: checkpoint.damage(p) for p in checkpoint.checkpoints(output_dir)}, said=out.read_text())


if __name__=="__main__":
    spec = Path(sys.argv[1])
    for i, phase in enumerate(json.loads(spec.read_text())): print("PHASE", json.dumps(play(phase, spec.with_name(f"said-{i}.txt"))), flush=True)
