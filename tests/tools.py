"What several tests need: the repository, its notebooks, the command line, small data"
import contextlib, ctypes, io, json, multiprocessing, os, re, socket, ssl, subprocess, sys, threading
from contextlib import contextmanager
from http.server import HTTPServer, ThreadingHTTPServer
from pathlib import Path
from fastcore.nbio import read_nb

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(o.startswith(("_", ".")) for o in p.relative_to(ROOT).parts))


FORKS = multiprocessing.get_context("forkserver") # its children start with everything imported, and no threads; there is one server for a whole process of tests
FORKS.set_forkserver_preload(["nbdev.test", "peft", "datasets", "transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "matplotlib.figure", "tuneforge.dataset", "tuneforge.tiny"])


def bin(name): return str(Path(sys.executable).parent/name)


def run(*args, cwd=None, stdin="", env=None, timeout=300):
    "Run a program; stdout and stderr as text"
    return subprocess.run([str(a) for a in args], cwd=cwd, input=stdin, env=os.environ | (env or {}), timeout=timeout, capture_output=True, text=True)


def tuneforge(*args, **kwargs): return run(bin("tuneforge"), *args, **kwargs)


def command(*args, cwd=".", stdin=""):
    "A command line in this process, without the seconds that imports take: (exit code, stdout, stderr)"
    from tuneforge.cli import main
    out, err, was = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(a) for a in args])
    finally: sys.stdin = was
    return code, out.getvalue(), err.getvalue()


def code_cells(nb): return [c.source for c in read_nb(nb).cells if c.cell_type=="code"]


def is_exported(source): return bool(re.search(r"^#\|\s*exports?\b", source, re.M))


def module_of(nb):
    "The module that a notebook exports to, or None"
    found = [m[1] for s in code_cells(nb) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))]
    return found[0] if found else None


def computed(history):
    "The lines of a run's log, without the seconds and bytes that its machine took"
    of_the_machine = ("tokens_per_second", "memory_gib", "mfu")
    return [{k: v for k, v in h.items() if k not in of_the_machine} for h in history if "train_runtime" not in h]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r)+"\n" for r in rows), encoding="utf-8")
    return path


@contextmanager
def serving(handler, pem=None):
    "A server on loopback, with a handler of requests; with `pem`, by https with a certificate that this process trusts"
    server = (HTTPServer if pem else ThreadingHTTPServer)(("127.0.0.1", 0), handler)
    was = os.environ.get("SSL_CERT_FILE")
    if pem:
        import trustme
        ca, ctx = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.cert_pem.write_to_path(pem)
        ca.issue_cert("127.0.0.1", "localhost").configure_cert(ctx)
        server.socket = ctx.wrap_socket(server.socket, server_side=True)
        os.environ["SSL_CERT_FILE"] = str(pem)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http{'s' if pem else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        if pem: os.environ.pop("SSL_CERT_FILE")
        if was: os.environ["SSL_CERT_FILE"] = was


def free_port():
    "A port of loopback that nobody listens on: fixed ones meet when tests run side by side"
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def torchrun(n): return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]


def forks(phases, folder):
    "Trainings one after the other, each with its ranks, as forks of one process: what came of each (see tests/forks.py)"
    (folder/"spec.json").write_text(json.dumps(phases))
    res = run(sys.executable, "-m", "tests.forks", folder/"spec.json", cwd=ROOT, env=dict(PYTHONPATH=str(ROOT)), timeout=3600)
    assert res.returncode==0, res.stderr[-3000:]
    return [json.loads(l[6:]) for l in res.stdout.splitlines() if l.startswith("PHASE ")]


@contextmanager
def permissions_hold():
    "For root, too: the right to pass over them (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) is laid down for a while"
    if os.geteuid(): yield; return
    head, caps, libc = (ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)(), ctypes.CDLL(None)
    assert libc.capget(head, caps)==0
    had = caps[0]
    caps[0] &= ~0b110
    assert libc.capset(head, caps)==0
    try: yield
    finally:
        caps[0] = had
        libc.capset(head, caps)
