"Preparing data: every row accounted for, whatever it is"
import json
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tuneforge.config import DataOptions, DatasetOptions, TokenizerOptions, UserError
from tuneforge.dataset import draw_valid, prepare_data
from tuneforge.sources import load_rows
from tuneforge.tokens import IGNORE, load_tokenizer
from tests.tools import write_jsonl

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))


def options(d, *entries, **kw): return DataOptions(datasets=list(entries), dataset_prepared_path=str(d/"prepared"), **kw)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text("ab c", min_size=1, max_size=40), st.text("xyz", max_size=60)), min_size=3, max_size=12))
def test_rows_in_are_rows_out_and_dropped(tmp_path, rows):
    f = write_jsonl(tmp_path/"x.jsonl", [dict(instruction=i, output=o) for i, o in rows])
    try: data = prepare_data(options(tmp_path, DatasetOptions(path=str(f)), sequence_len=64), TOK)
    except UserError as e:
        assert "nothing is left" in str(e)
        return
    s = data.report.sources[0]
    assert s.rows_in==len(rows)==s.rows_out+sum(map(len, s.dropped.values()))
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
