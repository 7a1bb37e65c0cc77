"Generated files are in step with the notebooks"
import shutil
from filecmp import cmp
import pytest
from tests.tools import NOTEBOOKS, ROOT, bin, run


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    "A copy of the project after exporting and cleaning"
    d = tmp_path_factory.mktemp("copy")
    for o in ("nbs", "tuneforge", "examples"): shutil.copytree(ROOT/o, d/o, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for o in ("pyproject.toml", "settings.ini", "_quarto.yml"): shutil.copy(ROOT/o, d/o)
    for o in ("nbdev-export", "nbdev-clean"):
        res = run(bin(o), cwd=d)
        assert res.returncode==0, res.stderr
    return d


def test_modules_are_exported(regenerated):
    stale = [p.name for p in (regenerated/"tuneforge").glob("*.py") if not (ROOT/"tuneforge"/p.name).is_file() or not cmp(p, ROOT/"tuneforge"/p.name, shallow=False)]
    assert not stale, f"run `make export`: {stale}"


def test_notebooks_are_clean(regenerated):
    dirty = [p.name for p in NOTEBOOKS if not cmp(p, regenerated/p.relative_to(ROOT), shallow=False)]
    assert not dirty, f"run `make export`: {dirty}"


def test_pages_name_no_machine():
    "Outputs hold no path of the machine that made them"
    import json, re
    bad = [f"{p.name}: {m[0]}" for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"] if (m := re.search(r"/site-packages/|/tmp/tmp\w+|/home/\w+|/root/", json.dumps(c.get("outputs", []))))]
    assert not bad, bad
