"The house stands as it was drawn: who may import whom, what stays light, what is documented"
import ast, inspect, re, sys
from importlib import import_module
import pytest
from fastcore.docments import docments
from fastcore.nbio import read_nb
from tests.tools import NOTEBOOKS, ROOT, code_cells, is_exported, module_of, run

MODULES = {module_of(nb): nb for nb in NOTEBOOKS if module_of(nb)}


def number(nb): return int(re.match(r"\d+", nb.name)[0])


def imports(nb):
    "Modules of tuneforge that exported cells import"
    trees = [ast.parse(s) for s in code_cells(nb) if is_exported(s)]
    found = [n.module for t in trees for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("tuneforge.")]
    return {m.split(".")[1] for m in found}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    nb = MODULES[name]
    above = [m for m in imports(nb) if number(MODULES[m])>=number(nb)]
    assert not above, f"{nb.name} imports {above}"


def test_no_two_rooms_give_one_name_to_all():
    "What comes later would take the place of what came before, and a page of a room below would not run after `from tuneforge.all import *`"
    tree, given = ast.parse((ROOT/"tuneforge"/"all.py").read_text()), {}
    for i in [i for i in tree.body if isinstance(i, ast.ImportFrom) and i.level]:
        room = import_module(f"tuneforge.{i.module}")
        for n in room.__all__ if i.names[0].name=="*" else [a.asname or a.name for a in i.names]: given.setdefault(n, {})[i.module] = getattr(room, n)
    assert len(given)>500
    assert {n: [*rooms] for n, rooms in given.items() if len({id(o) for o in rooms.values()})>1}=={}


def loaded_by(code):
    res = run(sys.executable, "-c", f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))")
    assert res.returncode==0, res.stderr
    return set(res.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import tuneforge", "import tuneforge.cli as c; c.main(['--help'])", "import tuneforge.config as c; c.load_config(dict(base_model='x', datasets=[dict(path='y')], learning_rate=1))"],
    ids=["import", "help", "config"])
def test_light_paths_stay_light(code):
    heavy = {"torch", "transformers", "datasets", "peft", "numpy", "pandas"} & loaded_by(code)
    assert not heavy


@pytest.mark.parametrize("nb", [nb for nb in MODULES.values()], ids=lambda p: p.stem)
def test_exported_cells_are_short(nb):
    lines = lambda s: [l for l in s.splitlines() if l.strip() and not l.startswith("#|")]
    long = [lines(s)[0] for s in code_cells(nb) if is_exported(s) and len(lines(s))>40]
    assert not long


def public(name):
    mod = import_module(f"tuneforge.{name}")
    for n in getattr(mod, "__all__", []):
        f = getattr(mod, n)
        if inspect.isfunction(f) and f.__module__==mod.__name__: yield n, f
        if inspect.isclass(f) and f.__module__==mod.__name__ and "__init__" in vars(f) and inspect.isfunction(vars(f)["__init__"]) and not hasattr(f, "__dataclass_fields__"): yield n, f.__init__


@pytest.mark.parametrize("name", [m for m in MODULES if m!="all"])
def test_public_functions_are_documented(name):
    bare = []
    for n, f in public(name):
        if f.__name__=="<lambda>" or not f.__module__.startswith("tuneforge"): continue
        docs, kinds = docments(f, returns=False), inspect.signature(f).parameters
        named = [p for p in kinds if p!="self" and kinds[p].kind is not inspect.Parameter.VAR_KEYWORD]
        bare += [f"{n}({p})" for p in named if not docs.get(p)]
        if not f.__doc__ and f.__name__!="__init__" and len(inspect.getsource(f).splitlines())>1: bare.append(f"{n}: no docstring")
    assert not bare


@pytest.mark.parametrize("nb", [nb for nb in MODULES.values()], ids=lambda p: p.stem)
def test_pages_are_no_dumps(nb):
    "At most three exported cells follow each other without a word or an example"
    kinds = "".join("x" if c.cell_type=="code" and is_exported(c.source) else "." for c in read_nb(nb).cells)
    assert "xxxx" not in kinds, kinds
