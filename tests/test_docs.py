"The docs can be built from the notebooks, and the README is one of them"
import json, shutil, subprocess, sys
import pytest
from tests.readme import readme
from tests.tools import NOTEBOOKS, ROOT, run


def test_readme_is_in_step(): assert (ROOT/"README.md").read_text()==readme(), "run `make readme`"


def test_sidebar_lists_every_notebook():
    text = (ROOT/"_quarto.yml").read_text()
    missing = [str(p.relative_to(ROOT/"nbs")) for p in NOTEBOOKS if str(p.relative_to(ROOT/"nbs")) not in text]
    assert not missing


@pytest.mark.parametrize("names", [pytest.param(None, marks=pytest.mark.slow), ("index.ipynb", "15_packing.ipynb", "61_main.ipynb")], ids=["all", "some"])
def test_pages_are_built(tmp_path, names):
    "nbdev processes notebooks (show_doc, doc links) and nbconvert renders the result"
    for o in ("nbs", "tuneforge", "examples"): shutil.copytree(ROOT/o, tmp_path/o, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for p in (tmp_path/"nbs").rglob("*.ipynb"):
        if names and p.name not in names: p.unlink()
    for o in ("pyproject.toml", "settings.ini", "_quarto.yml"): shutil.copy(ROOT/o, tmp_path/o)
    code = "from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; refresh_quarto_yml(); print(proc_nbs(n_workers=0, force=True))"
    res = run(sys.executable, "-c", code, cwd=tmp_path, env=dict(PYTHONPATH=str(tmp_path)), timeout=600)
    assert res.returncode==0, res.stderr[-3000:]
    made = sorted(p for p in (tmp_path/"_proc").rglob("*.ipynb"))
    assert len(made)>=len(names or NOTEBOOKS)
    from nbdev.clean import clean_nb
    from fastcore.nbio import read_nb, write_nb
    for p in made:
        nb = read_nb(p)
        clean_nb(nb)
        write_nb(nb, p)
    res = run(sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR", *made, timeout=600)
    assert res.returncode==0, res.stderr[-3000:]
    assert all(p.with_suffix(".html").stat().st_size>10_000 for p in made)
