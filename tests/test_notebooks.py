"Every notebook runs from top to bottom"
import pytest
from tests.tools import NOTEBOOKS, ROOT, bin, run


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=[str(p.relative_to(ROOT/"nbs")) for p in NOTEBOOKS])
def test_notebook(nb, request):
    flags = ["--flags", "slow"] if request.config.getoption("--slow") else []
    res = run(bin("nbdev-test"), nb, *flags, cwd=ROOT, timeout=1200)
    assert res.returncode==0 and "Success" in res.stdout+res.stderr, res.stdout[-4000:]+res.stderr[-4000:]
