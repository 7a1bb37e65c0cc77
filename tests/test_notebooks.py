"Every notebook runs from top to bottom"
import pytest
from tests.tools import NOTEBOOKS, ROOT, bin, run


LONG = ("tutorials/first_finetune.ipynb", "tutorials/stop_and_go_on.ipynb") # what they do, the quickstart and tests do as well


def name(p): return str(p.relative_to(ROOT/"nbs"))


@pytest.mark.parametrize("nb", [pytest.param(p, id=name(p), marks=pytest.mark.slow if name(p) in LONG else []) for p in NOTEBOOKS])
def test_notebook(nb, request):
    flags = ["--flags", "slow"] if request.config.getoption("--slow") else []
    res = run(bin("nbdev-test"), nb, *flags, cwd=ROOT, timeout=1200)
    assert res.returncode==0 and "Success" in res.stdout+res.stderr, res.stdout[-4000:]+res.stderr[-4000:]
