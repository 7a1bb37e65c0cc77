"Preparing data: every row accounted for, whatever it is"
import json
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tuneforge.config import DataOptions, DatasetOptions, TokenizerOptions, UserError
from tuneforge.dataset import data_key, draw_valid, prepare_data
from tuneforge.sources import load_rows
from tuneforge.tokens import IGNORE, cut_up, load_tokenizer
from tests.tools import write_jsonl

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))


def options(d, *entries, **kw): return DataOptions(datasets=list(entries), dataset_prepared_path=str(d/"prepared"), **kw)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text("ab c", min_size=1, max_size=40), st.text("xyz", max_size=60)), min_size=3, max_size=12))
def test_rows_in_are_rows_out_and_dropped(tmp_path, rows):
    f = write_jsonl(tmp_path/"x.jsonl", [dict(instruction=i, output=o) for i, o in rows])
    try: data = prepare_data(options(tmp_path, DatasetOptions(path=str(f)), sequence_len=64, dropped_rows_stop=1), TOK)
    except UserError as e:
        assert "nothing is left" in str(e)
        return
    s = data.report.sources[0]
    assert s.rows_in==len(rows)==s.rows_used+sum(s.dropped.values())
    assert s.tokens==sum(len(o) for o in data.train["input_ids"])
    assert s.trained==sum(l!=IGNORE for o in data.train["labels"] for l in o[1:])
    assert all(len(o)<=64 for o in data.train["input_ids"])


def test_long_completions_are_split_and_lose_nothing(tmp_path):
    text = "Bagol lives in Coldmere. "*100
    f = write_jsonl(tmp_path/"x.jsonl", [dict(text=text)])
    data = prepare_data(options(tmp_path, DatasetOptions(path=str(f), type="completion"), sequence_len=50), TOK)
    ids = [i for o in data.train["input_ids"] for i in o]
    assert ids==TOK(text).input_ids+[TOK.eos_token_id]
    assert data.train["input_ids"]==data.train["labels"]


def test_the_cache_follows_content_not_paths(tmp_path):
    rows = [dict(instruction=f"question {i}", output="answer") for i in range(5)]
    a, b = write_jsonl(tmp_path/"a.jsonl", rows), write_jsonl(tmp_path/"b.jsonl", rows)
    prep = lambda f, **kw: prepare_data(options(tmp_path, DatasetOptions(path=str(f)), **kw), TOK)
    first = prep(a)
    assert prep(b).path==first.path
    write_jsonl(a, rows[:4])
    changed = prep(a)
    assert changed.path!=first.path and len(changed.train)==4
    assert prep(b, train_on_inputs=True).path!=first.path


def test_an_interrupted_preparation_is_not_used(tmp_path):
    f = write_jsonl(tmp_path/"x.jsonl", [dict(instruction="a", output="b")]*3)
    opts = options(tmp_path, DatasetOptions(path=str(f)))
    whole = prepare_data(opts, TOK)
    whole.path.rename(whole.path.with_name(whole.path.name+".99.part")) # what a killed process leaves
    assert len(prepare_data(opts, TOK).train)==3


def test_test_datasets_are_evaluated_on(tmp_path):
    a, b = (write_jsonl(tmp_path/f"{n}.jsonl", [dict(instruction=n, output=str(i)) for i in range(k)]) for n, k in (("a", 4), ("b", 2)))
    data = prepare_data(options(tmp_path, DatasetOptions(path=str(a)), test_datasets=[DatasetOptions(path=str(b))]), TOK)
    assert (len(data.train), len(data.valid))==(4, 2)


@given(st.integers(2, 500), st.floats(0.01, 0.5), st.integers(0, 9))
def test_the_split_is_a_split(n, size, seed):
    train, valid = draw_valid(n, size, seed)
    assert sorted([*train, *valid])==list(range(n)) and len(valid)>=1


def test_json_arrays_and_folders(tmp_path):
    (tmp_path/"d").mkdir()
    (tmp_path/"d"/"1.json").write_text(json.dumps([dict(text="a"), dict(text="b")]))
    write_jsonl(tmp_path/"d"/"2.jsonl", [dict(text="c")])
    assert [r["text"] for r in load_rows(DatasetOptions(path=str(tmp_path/"d")))]==["a", "b", "c"]


@pytest.mark.parametrize("content, says", [(b'{"a": 1}\n[1]\n', "x.jsonl:2: a row is a JSON object"), (b'{"a": "\xff"}\n', "x.jsonl:1: this is not UTF-8"), (b'[{"a": 1},\n{"a" 2}]', ":2:6: this is not JSON")])
def test_broken_files_are_named(tmp_path, content, says):
    (tmp_path/"x.jsonl").write_bytes(content)
    with pytest.raises(UserError) as e: load_rows(DatasetOptions(path=str(tmp_path/"x.jsonl")))
    assert says in str(e.value)


def test_hub_without_a_network_is_a_clear_error():
    with pytest.raises(UserError, match="is no local file, and on the hub"): load_rows(DatasetOptions(path="someone/something"))


# rows that are no good

CHAT = [dict(role="user", content="Who?"), dict(role="assistant", content="Bagol.")]
BAD = [ # options of the entry, a good row, a bad one, what is said
    (dict(type="alpaca"), dict(instruction="a", output="b"), dict(instruction="a"), "output is null"),
    (dict(type="alpaca"), dict(instruction="a", output="b"), dict(instruction="a", output=5), "output is a number (5)"),
    (dict(type="chat_template"), dict(messages=CHAT), dict(messages=[]), "messages is empty"),
    (dict(type="chat_template"), dict(messages=CHAT), dict(messages=[CHAT[0], dict(role="assistant", content=None)]), "messages[1].content is null"),
    (dict(type="chat_template"), dict(messages=CHAT), dict(messages=[dict(role="narrator", content="x")]), "messages[0].role is 'narrator'"),
    (dict(type="chat_template"), dict(messages=CHAT), dict(messages="Who?"), "messages is no JSON"),
    (dict(type="chat_template"), dict(messages=CHAT, tools="[]"), dict(messages=CHAT, tools="{"), "tools is no JSON"),
    (dict(type="chat_template", chat_template="gemma"), dict(messages=CHAT), dict(messages=CHAT[1:]), "messages: the chat template refuses this conversation: this template wants user and assistant to take turns")]


@pytest.mark.parametrize("entry, good, bad, says", BAD, ids=[b[3][:28] for b in BAD])
def test_bad_rows_have_file_line_and_field(tmp_path, entry, good, bad, says):
    f = tmp_path/"x.jsonl"
    f.write_text("\n".join(["", json.dumps(good), "", json.dumps(bad), json.dumps(good), ""]))
    opts = lambda **kw: options(tmp_path, DatasetOptions(path=str(f), **entry), **kw)
    with pytest.raises(UserError) as e: prepare_data(opts(), TOK)
    assert f"{f}:4: {says}" in str(e.value)
    skipped = prepare_data(opts(on_bad_row="skip"), TOK)
    report = skipped.report.sources[0]
    assert (report.rows_in, report.rows_used, report.dropped)==(3, 2, {"no good": 1})
    assert f"x.jsonl:4: {says}" in str(report.bad) and says in str(skipped.report) and not (skipped.path/"quarantine.jsonl").exists()
    kept = prepare_data(opts(on_bad_row="quarantine"), TOK)
    line = json.loads((kept.path/"quarantine.jsonl").read_text())
    assert line["place"]==f"{f}:4" and says in line["error"] and {k: v for k, v in (json.loads(line["data"]) if isinstance(line["data"], str) else line["data"]).items() if v is not None}.keys()=={k for k in bad}
    assert kept.train["input_ids"]==skipped.train["input_ids"]


def test_lines_that_are_not_json_can_be_skipped(tmp_path):
    f = tmp_path/"x.jsonl"
    f.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n[1]\n')
    with pytest.raises(UserError, match="x.jsonl:2:17: this line is not JSON"): prepare_data(options(tmp_path, DatasetOptions(path=str(f))), TOK)
    with pytest.raises(UserError, match="2 of 3 rows are lost"): prepare_data(options(tmp_path, DatasetOptions(path=str(f)), on_bad_row="skip"), TOK)
    data = prepare_data(options(tmp_path, DatasetOptions(path=str(f)), on_bad_row="skip", dropped_rows_stop=0.9), TOK)
    assert data.report.sources[0].dropped=={"no good": 2} and len(data.train)==1


def test_two_files_and_a_json_array_are_told_apart(tmp_path):
    (tmp_path/"d").mkdir()
    write_jsonl(tmp_path/"d"/"1.jsonl", [dict(text="a")])
    (tmp_path/"d"/"2.json").write_text(json.dumps([dict(text="b"), dict(text=None)]))
    with pytest.raises(UserError, match="2.json: row 2: text is null"): prepare_data(options(tmp_path, DatasetOptions(path=str(tmp_path/"d"), type="completion")), TOK)


def test_many_processes_tell_the_same(tmp_path):
    f = write_jsonl(tmp_path/"x.jsonl", [dict(instruction=str(i), output="b" if i!=9000 else None) for i in range(10001)])
    with pytest.raises(UserError, match="x.jsonl:9001: output is null"): prepare_data(options(tmp_path, DatasetOptions(path=str(f)), dataset_processes=2), TOK)


def test_rows_where_inference_differs_are_listed(tmp_path):
    f = write_jsonl(tmp_path/"x.jsonl", [dict(messages=CHAT)]*3)
    gap = "{% for m in messages %}{{ m['role']+': '+m['content']+'\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    data = prepare_data(options(tmp_path, DatasetOptions(path=str(f), type="chat_template", chat_template="jinja", chat_template_jinja=gap)), TOK)
    report = data.report.sources[0]
    assert report.compared==3 and len(report.disagree)==3 and f"{f}:1: at character " in report.disagree[0]
    assert data.golden==[]


def test_the_cache_follows_templates_and_own_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f, t = write_jsonl(tmp_path/"x.jsonl", [dict(messages=CHAT)]*3), tmp_path/"t.jinja"
    t.write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    (tmp_path/"mine.py").write_text("def f(row): return [('a', False), ('b', True)]")
    key = lambda **kw: data_key(options(tmp_path, DatasetOptions(path=str(f), **kw)), TOK)
    jinja, own = dict(type="chat_template", chat_template_jinja=str(t)), dict(type="mine:f")
    first = key(**jinja), key(**own)
    assert (key(**jinja), key(**own))==first
    t.write_text(t.read_text()+"!")
    assert key(**jinja)!=first[0]
    assert key(type="chat_template", eot_tokens=["</s>"])!=key(type="chat_template")


BARE, FULL = "Frage,Antwort\nWo?,Hier\n", "Frage,Antwort,input\nWann?,Jetzt,\nWo?,Hier,dort\n"

@pytest.mark.parametrize("table, more, says", [(BARE, {}, True), (FULL, {}, False), (BARE, dict(no_input_format="{instruction}"), False), (BARE, dict(format="Q: {instruction}"), False)])
def test_a_format_that_no_row_uses_is_said(tmp_path, table, more, says):
    "A user's `format` wants an input, and the table has none"
    (tmp_path/"x.csv").write_text(table)
    kind = dict(field_instruction="Frage", field_output="Antwort", format="Q: {instruction} {input}\nA: ") | more
    report = prepare_data(options(tmp_path, DatasetOptions(path=str(tmp_path/"x.csv"), type=kind)), TOK).report
    assert any("no row has `input`" in n and "`no_input_format`" in n for n in report.sources[0].notes())==says


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 12))
def test_pieces_are_whole_and_none_is_too_short(sizes, size, least):
    ends = np.cumsum(sizes)
    starts = ends-sizes
    a, b, of = cut_up(starts, ends, size, least)
    for i, n in enumerate(sizes):
        mine = [list(range(x, y)) for x, y, k in zip(a, b, of) if k==i]
        assert sum(mine, [])==list(range(starts[i], ends[i])) and all(1<=len(o)<=size for o in mine) and len(mine)==-(-n//size)
        assert all(len(o)==size for o in mine[:-2])
        enough = max(2, least)
        if len(mine)>1 and size+(n-1)%size+1>=2*enough: assert len(mine[-1])>=min(enough, size) and len(mine[-2])>=enough


@pytest.mark.parametrize("type", ["alpaca", "completion"])
@pytest.mark.parametrize("over", [1, 2, 5])
def test_a_row_one_token_too_long_learns_to_stop(tmp_path, type, over):
    "Each token is there once, the end is trained, and no piece is dropped"
    f = write_jsonl(tmp_path/"x.jsonl", [dict(instruction="Who?", output="Bagol is a potter. "*5, text="Bagol is a potter. "*9)])
    opts = lambda **kw: options(tmp_path, DatasetOptions(path=str(f), type=type), excess_length_strategy="split", on_untrained_row="keep", **kw)
    whole = prepare_data(opts(), TOK).train[0]
    data = prepare_data(opts(sequence_len=len(whole["input_ids"])-over, min_sample_len=4), TOK)
    ids, labels = ([i for o in data.train[k] for i in o] for k in ("input_ids", "labels"))
    assert (ids, labels)==(whole["input_ids"], whole["labels"]) and ids[-1]==TOK.eos_token_id
    last = data.train["labels"][-1]
    assert len(last)==max(4, over) and last[-1]==TOK.eos_token_id and data.report.sources[0].pieces=={}


@pytest.mark.parametrize("n, size, wanted", [(100, 0.07, 7), (100, 0.071, 8), (1000, 0.1, 100), (10, 0.05, 1), (10, 2, 2), (10, 9, 9), (3, 0.999, None), (10, 1, None), (2, 1, None), (10, 10, None)])
def test_how_many_rows_are_set_aside(n, size, wanted):
    "A share is rounded up, and not because of the last bit of a product; 1 is the whole, as the description has it"
    if wanted: assert len(draw_valid(n, size, 0)[1])==wanted
    else:
        with pytest.raises(UserError, match="leaves nothing on one side"+r" \(1 is all of them\)"*(size==1)+": give a share below 1"+(f", such as 0.05, or a number of rows from 2 to {n-1}" if n>2 else ", such as 0.05$")): draw_valid(n, size, 0)
