"Every notebook runs from top to bottom, in a process of its own that need not import the large libraries again"
import multiprocessing, os, sys
import pytest
from tests.tools import FORKS, NOTEBOOKS, ROOT


LONG = ("tutorials/first_finetune.ipynb",) # what it does, the quickstart does as well


def name(p): return str(p.relative_to(ROOT/"nbs"))


def run_notebook(nb, slow, said):
    "As `nbdev-test` does it, with all output in the file `said`"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    with open(said, "w") as f:
        for fd in (1, 2): os.dup2(f.fileno(), fd)
    for m in [m for m in sys.modules if m.partition(".")[0]=="tuneforge"]: del sys.modules[m] # a page registers its own
    os.chdir(ROOT/"nbs")
    multiprocessing.set_start_method("fork", force=True) # for what a cell starts, as in a fresh interpreter
    passed,_ = test_nb(nb, skip_flags=get_config().tst_flags.split(), force_flags=["slow"]*slow, basepath=ROOT)
    sys.stderr.flush()
    os._exit(not passed) # threads that a cell left behind do not hold it


@pytest.mark.parametrize("nb", [pytest.param(p, id=name(p), marks=pytest.mark.slow if name(p) in LONG else []) for p in NOTEBOOKS])
def test_notebook(nb, request, tmp_path):
    p = FORKS.Process(target=run_notebook, args=(nb, request.config.getoption("--slow"), tmp_path/"said.txt"))
    p.start()
    p.join(1200)
    ended = p.exitcode
    p.kill()
    assert ended==0, (tmp_path/"said.txt").read_text()[-8000:]
