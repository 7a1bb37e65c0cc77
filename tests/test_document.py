"YAML with positions: every mistake has its place, and nothing else can come in"
import json, os
import pytest
from datasets import Dataset
from hypothesis import given, strategies as st
from tuneforge.document import ConfigError, Document, Mark, expand, nearest, one_slip

def brute(a, b):
    "Optimal string alignment by its recursive definition"
    if not a or not b: return len(a)+len(b)
    options = [brute(a[1:], b)+1, brute(a, b[1:])+1, brute(a[1:], b[1:])+(a[0]!=b[0])]
    if len(a)>1 and len(b)>1 and a[0]==b[1] and a[1]==b[0]: options.append(brute(a[2:], b[2:])+1)
    return min(options)


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_one_slip_is_a_distance_of_one(a, b): assert one_slip(a, b)==(brute(a, b)==1)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text("abcdef", min_size=1), c, max_size=3), max_leaves=12))
def test_documents_read_what_was_written(value):
    text = json.dumps(dict(top=value))
    assert Document(text).value==dict(top=value)


@given(st.lists(st.sampled_from(["a: 1", "  b: 2", "- x", "\tc: 3", "d: [1", "e: {f: 2}", "g: 'x", "&h", "*h", "k: !!x y", "<<: *a", "? [a]", "${X}: 1", "l: ${X}", "m: |", "\x01", ": :", "n: a: b"]), max_size=8))
def test_reading_never_crashes(lines):
    try: doc = Document("\n".join(lines), "c.yml")
    except ConfigError as e: assert all(p.mark or "config" in str(p) or "deep" in str(p) for p in e.problems)
    else: assert isinstance(doc.value, dict)


def test_numbers_people_write():
    doc = Document("a: 1e-4\nb: 2.5E3\nc: 1_000\nd: yes\ne: off\nf: '1e-4'\ng: 0.1\nh: -3\ni: 010\nj: 12:30\nk: 2024-01-01\nl: 1.\nm: .inf\n")
    assert doc.value==dict(a=1e-4, b=2500., c=1000, d=True, e=False, f="1e-4", g=0.1, h=-3, i="010", j="12:30", k="2024-01-01", l=1., m=float("inf"))


def test_anchors_and_merges():
    doc = Document("x: &a {p: 1, q: 2}\nz: &b {r: 3}\ny:\n  <<: [*a, *b]\n  q: 3\n")
    assert doc.value["y"]==dict(p=1, q=3, r=3)
    assert doc.keys["y", "p"].line==1 and doc.keys["y", "q"].line==5


def test_aliases_cannot_fill_the_memory():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]+[f"a{i}: &a{i} [{', '.join([f'*a{i-1}']*10)}]" for i in range(1, 8)]
    with pytest.raises(ConfigError, match="more than 100,000 values"): Document("\n".join(lines))


def test_deep_nesting_is_a_message():
    with pytest.raises(ConfigError, match="nested too deeply"): Document("["*5000)


@pytest.mark.parametrize("text, line, column, says", [
    ("a: 1\na: 2", 2, 1, "given twice, first in line 1"), ("x:\n  b: 1\n  b: 2", 3, 3, "given twice, first in line 2"), ("a: !!set {x}", 1, 4, "plain values only"),
    ("a: ${NOPE_X}", 1, 4, "`NOPE_X` is not set"), ("a: [\"${NOPE_X}\"]", 1, 5, "`NOPE_X` is not set")])
def test_problems_have_their_place(text, line, column, says):
    p = Document(text, "c.yml").problems[0]
    assert says in p.message and (p.mark.line, p.mark.column)==(line, column)


@pytest.mark.parametrize("text, line, says", [("a:\n\tb: 1", 2, "a tab"), ("a: b: c", 1, "in quotes"), ("a: 1\nb:2\nc: 3", 3, "not valid YAML"), ("a: [${HOME}]", 1, "in quotes"), ("a: 1\nb: \x07", 2, "not allowed"), ("? [x]\n: 1", 1, "single word"), ("a: 1\n---\nb: 2", 2, "not valid YAML")])
def test_what_is_no_yaml(text, line, says):
    with pytest.raises(ConfigError) as e: Document(text, "c.yml")
    assert says in str(e.value) and e.value.problems[0].mark.line==line


@given(st.dictionaries(st.sampled_from(["A", "B_1"]), st.text("xy {}$", max_size=5)), st.sampled_from(["${A}", "x${A:-d}y", "$${A}", "${B_1:-}", "$A", "${A", "${A:-${B_1}}"]))
def test_variables(env, text):
    got, missing = expand(text, env)
    if text=="${A}": assert (got, missing)==((env["A"], []) if "A" in env else ("", ["A"]))
    if text=="x${A:-d}y": assert got==f"x{env.get('A') or 'd'}y"
    if text=="$${A}": assert (got, missing)==("${A}", [])
    if text in ("$A", "${A"): assert got==text


def test_variables_are_read_as_if_written():
    doc = Document("a: ${R}\nb: '${R}'\nc: \"${R}\"\nd: |\n  ${R}\ne: x-${R}\nf: ${S:-1e-4}\n", env=dict(R="8"))
    assert doc.value==dict(a=8, b="${R}", c="8", d="${R}\n", e="x-8", f=1e-4)


def test_variables_of_now_though_a_library_put_another_environment_in_place(monkeypatch):
    was = os.environ
    Dataset.from_dict(dict(n=[1, 2])).map(lambda r: r, num_proc=2)
    assert os.environ is not was # datasets copies it to its workers, and leaves the copy in place
    monkeypatch.setenv("SET_AFTERWARDS", "7")
    assert Document("a: ${SET_AFTERWARDS}").value==dict(a=7) and expand("${SET_AFTERWARDS}")==("7", [])


def test_no_variables_from_the_network():
    assert "may not read" in Document("a: ${HOME}", "https://x/c.yml", local=False).problems[0].message


def test_putting_and_merging():
    mark = Mark("cli", 1, 0)
    doc = Document("a: {b: 1}\nl: [1, 2]\ns: text\n")
    assert not list(doc.put(("a", "c"), 2, mark)) and not list(doc.put(("l", 1), 5, mark)) and not list(doc.put(("n", "m"), 1, mark))
    assert doc.value==dict(a=dict(b=1, c=2), l=[1, 5], s="text", n=dict(m=1))
    for path in (("l", 7), ("l", "x"), ("l", 9, "x")): assert "there is no" in list(doc.put(path, 1, mark))[0].message
    doc.merge(Document("a: {b: 3}\nl: [9]\n", "other.yml"))
    assert doc.value["a"]==dict(b=3, c=2) and doc.value["l"]==[9] and doc.keys["a", "b"].file=="other.yml" and ("l", 1) not in doc.marks


def test_nearest_names_all_that_are_equally_near(): assert nearest("f16", ["fp16", "bf16", "tf32"])==["fp16", "bf16"]
