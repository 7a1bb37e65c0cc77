"""The support matrix. Each column is tried on a family of its own; the slow test tries every cell, and writes what came out to nbs/matrix.json for the page, if it is not
what stands there. The record holds versions and rounded losses, so only a change of libraries or of a result changes it."""
import json, logging
import pytest
from tests.tools import ROOT
from tuneforge.matrix import COLUMNS, FAMILIES, TOLERANCE, Cell, Matrix, learn, read_matrix, try_cell, try_matrix, write_matrix

PAGE = ROOT/"nbs"/"matrix.json"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    logging.getLogger("transformers").setLevel("ERROR")
    return try_matrix(tmp_path_factory.mktemp("matrix"))


def outcome(m): return {(f, c): not o.why for f, r in m.cells.items() for c, o in r.items()}


def proves(cell): return not cell.why and 0<cell.last<0.9*cell.first and cell.reloaded<=TOLERANCE and (cell.merged is None or cell.merged<1e-3)


@pytest.mark.parametrize("arch, column", [("gptj", "full fp32"), ("falcon", "full bf16"), ("gpt_neox", "LoRA"), ("gpt2", "LoRA on 8 bit"), ("mpt", "QLoRA")])
def test_a_cell_works(arch, column, tmp_path): assert proves(cell := try_cell(arch, COLUMNS[column], tmp_path)), cell


def test_the_record_is_whole():
    shown = read_matrix(PAGE)
    assert list(shown.cells)==list(FAMILIES) and all(list(r)==list(COLUMNS) for r in shown.cells.values()) and all(proves(o) for r in shown.cells.values() for o in r.values())


@pytest.mark.slow
def test_every_cell_works(matrix):
    failed = {f"{f}, {c}": o.why for f, r in matrix.cells.items() for c, o in r.items() if o.why}
    assert not failed and len(outcome(matrix))==len(FAMILIES)*len(COLUMNS) and all(proves(o) for r in matrix.cells.values() for o in r.values())


@pytest.mark.slow
def test_the_page_shows_this_run(matrix):
    was = read_matrix(PAGE) if PAGE.is_file() else Matrix()
    if outcome(was)!=outcome(matrix) or was.made_with!=matrix.made_with: write_matrix(matrix, PAGE)
    shown = read_matrix(PAGE)
    assert outcome(shown)==outcome(matrix) and shown.made_with==matrix.made_with
    assert repr(shown).count("✓")==len(FAMILIES)*len(COLUMNS)


def test_an_empty_cell_has_its_reason():
    m = Matrix({"Llama": {"LoRA": Cell(why="it rained"), "QLoRA": Cell(7, 2)}})
    assert m.why("Llama", "LoRA")=="it rained" and m.says("Llama", "QLoRA")=="✓ 7.0 → 2.0"
    for line in m.rows(): assert all(line)
    assert "it rained" in repr(m) and "it rained" in m._repr_html_() and "stand-in" in repr(m)


def test_a_cell_that_cannot_learn_is_not_marked(tmp_path, monkeypatch):
    monkeypatch.setattr("tuneforge.matrix.learn", lambda model, lr, steps: [7.0]*3)
    assert "does not fall" in try_cell("llama", COLUMNS["LoRA"], tmp_path).why


def test_a_cell_that_is_not_saved_whole_is_not_marked(tmp_path, monkeypatch):
    def forgetful(model, lr, steps):
        res = learn(model, lr, steps)
        monkeypatch.setattr("tuneforge.matrix.load_finetuned", lambda cfg: (load_other(cfg), None))
        return res
    def load_other(cfg):
        from tuneforge.models import load_model
        return load_model(cfg)
    monkeypatch.setattr("tuneforge.matrix.learn", forgetful)
    assert "predicts something else" in try_cell("llama", COLUMNS["LoRA"], tmp_path).why
