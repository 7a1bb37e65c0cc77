"The audit counts what training sees; the preview shows what was asked for"
import json
import pytest
from hypothesis import given, strategies as st
from tests.tokenizers import tokenizer
from tests.tools import write_jsonl
from tuneforge.audit import SampleBrowser, audit, choose, filtered, preview
from tuneforge.config import UserError, load_config
from tuneforge.dataset import prepare_data
from tuneforge.inspect import token_texts
from tuneforge.tokens import IGNORE, encode_rows, load_tokenizer

CHAT = [dict(messages=[dict(role=("user", "assistant")[i%2], content=f"{'word '*(n%7+1)}{n}") for i in range(2*(n%3+1))]) for n in range(30)]
ODD = [dict(messages=[dict(role="user", content="alone")]), dict(messages=[dict(role="user", content="long"), dict(role="assistant", content="x "*600)])]
INSTRUCT = [dict(instruction=f"say {i}", output=f"number {i}") for i in range(10)]


def config(d, **kw):
    write_jsonl(d/"chat.jsonl", CHAT+ODD)
    write_jsonl(d/"alpaca.jsonl", INSTRUCT)
    entries = [dict(path=str(d/"chat.jsonl"), type="chat_template"), dict(path=str(d/"alpaca.jsonl"), type="alpaca")]
    return load_config(dict(base_model="tiny:llama", learning_rate=1e-4, sequence_len=256, dataset_prepared_path=str(d/"prepared"), datasets=entries) | kw)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("audit"))
    tok = load_tokenizer(cfg)
    return cfg, tok, audit(cfg, tok, progress=False)


def test_counts_are_those_of_the_encoded_rows(ready):
    cfg, tok, report = ready
    enc = [encode_rows(rows, dict(type=e.type), tok, sequence_len=256) for rows, e in zip((CHAT+ODD, INSTRUCT), cfg.datasets)]
    for d, rows in enumerate(enc, 1):
        table = report.samples[report.samples.dataset==d]
        assert table.tokens.tolist()==[len(r["input_ids"]) for r in rows]
        assert table.trained.tolist()==[sum(l!=IGNORE for l in r["labels"][1:]) for r in rows]
    assert report.roles.tokens.sum()==report.samples.tokens.sum() and report.roles.trained.sum()==report.samples.trained.sum()
    assert report.roles.trained.drop(["assistant", "(BOS, EOS)"]).sum()==0


def test_odd_samples_are_found(ready):
    assert {(r.dataset, r.row): r.odd for r in ready[2].odd().itertuples()}=={(1, 31): "untrained", (1, 32): "long"}
    assert ready[2].places[1, 31].endswith("chat.jsonl:31")


def test_an_end_that_is_not_trained_is_odd(tmp_path):
    cfg = config(tmp_path, datasets=[dict(path=str(tmp_path/"chat.jsonl"), type="chat_template", train_on_eos="none")])
    report = audit(cfg, load_tokenizer(cfg), progress=False)
    assert (report.samples.odd[:30]=="stop").all()


def test_broken_rows_are_shown_not_hidden(tmp_path):
    cfg = config(tmp_path, on_bad_row="skip")
    with (tmp_path/"alpaca.jsonl").open("a") as f: f.write('{"instruction": "x", "output": null}\n')
    report = audit(cfg, load_tokenizer(cfg), progress=False)
    assert report.samples.odd.iloc[-1]=="bad" and (2, 11) in report.errors
    said = preview(cfg, load_tokenizer(cfg), report, row="2:11").bad
    assert len(said)==1 and "alpaca.jsonl:11" in said[0] and "output" in said[0]


def test_choosing(ready):
    report = ready[2]
    why = {w: i for i, w in choose(report, n=0)}
    assert report.samples.tokens[why["longer than `sequence_len`"]]==report.samples.tokens.max()
    assert report.samples.tokens.min() in [report.samples.tokens[i] for i in why.values()]
    assert [report.samples.row[i] for i, _ in choose(report, row="2:3")]==[3]
    assert all(report.samples.trained[i]==0 for i, _ in choose(report, filter="trained==0"))
    for bad in ("x", "2:x", "99", "9:1"):
        with pytest.raises(UserError, match="row"): choose(report, row=bad)
    for bad in ("tokns>1", "tokens >", "__import__('os')", "tokens"):
        with pytest.raises(UserError, match="no condition"): filtered(report, bad)


def test_views_say_who_speaks_and_why(ready):
    cfg, tok, report = ready
    view = preview(cfg, tok, report, row="3").views[0]
    text = "".join(m["content"] for m in CHAT[2]["messages"] if m["role"]=="assistant")
    said = "".join(t.text for t in view.tokens if t.trained).replace("<|im_end|>", "")
    assert said==text and {t.role for t in view.tokens if t.trained}=={"assistant"} and sorted({t.turn for t in view.tokens if t.trained})==[1, 3, 5]
    assert all(t.why for t in view.tokens if not t.trained) and not any(t.why for t in view.tokens if t.trained)
    starts = [t.start for t in view.tokens]
    assert starts==sorted(starts)


def test_outputs(ready):
    p = preview(*ready)
    d = json.loads(p.as_json())
    assert d["summary"]["samples"]==42 and len(d["samples"])==len(p.views) and all("text" in t for s in d["samples"] for t in s["tokens"])
    page = p.page()
    assert page.startswith("<!doctype html>") and page.count("tokens, ")>=len(p.views) and "<script" not in page


def test_text_in_the_data_is_not_markup(tmp_path):
    cfg = config(tmp_path)
    write_jsonl(tmp_path/"alpaca.jsonl", [dict(instruction="<script>alert(1)</script>", output="[bold]x[/bold] <b>")])
    tok = load_tokenizer(cfg)
    p = preview(cfg, tok, row="2:1")
    assert "<script>alert" not in p.page()
    from rich.console import Console
    c = Console(record=True, width=200, file=open("/dev/null", "w"))
    c.print(p)
    assert "[bold]x[/bold]" in c.export_text()


def test_browser(ready):
    b = SampleBrowser(*ready)
    assert b.index.max==41
    b.filter.value = "dataset==2"
    assert b.index.max==9 and "10 samples" in b.said.value
    b.index.value = 4
    assert "alpaca.jsonl:5" in b.view.value and "<sub" not in b.view.value
    b.ids.value = True
    assert "<sub" in b.view.value
    b.filter.value = "nonsense here"
    assert "is no condition" in b.said.value
    b.filter.value, b.odd.value = "", True
    assert b.index.max==1
    b.filter.value = "tokens<0"
    assert "no sample fits" in b.view.value


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
def test_the_texts_of_tokens_are_the_text(text):
    ids = tokenizer("byte", bos=False)(text).input_ids
    texts = token_texts(tokenizer("byte", bos=False), ids)
    assert len(texts)==len(ids) and "".join(texts)==text


def test_half_a_character_is_shown_as_its_bytes():
    ids = tokenizer("byte", bos=False)("山").input_ids
    assert token_texts(tokenizer("byte", bos=False), ids)==["山", "", ""] and token_texts(tokenizer("byte", bos=False), ids[:2])==["⟨e5⟩", "⟨b1⟩"]


@pytest.mark.parametrize("entry, rows", [(dict(type="alpaca"), [dict(instruction="a", output="word "*200), dict(instruction="b", output="short")]),
    (dict(type="chat_template", chat_template="chatml"), [dict(messages=[dict(role="user", content="a"), dict(role="assistant", content=t)]) for t in ("word "*200, "s")])])
def test_a_cut_sample_has_a_word_of_its_own(tmp_path, entry, rows):
    cfg = config(tmp_path, datasets=[dict(path=str(write_jsonl(tmp_path/"t.jsonl", rows)), **entry)], excess_length_strategy="truncate", sequence_len=100)
    tok = load_tokenizer(cfg)
    report = audit(cfg, tok, progress=False)
    assert report.samples.odd.tolist()==["cut",""] and report.samples.tokens[0]==100
    assert report.summary()["cut to `sequence_len`"]==prepare_data(cfg, tok).report.sources[0].truncated==1
    assert "cut to `sequence_len`" in preview(cfg, tok, report, row="1").report.__repr__()
    long = audit(cfg.replace(excess_length_strategy="drop"), tok, progress=False)
    assert long.samples.odd.tolist()==["long",""]


def test_only_rows_that_are_trained_are_audited(tmp_path):
    entries = [dict(path=str(tmp_path/"alpaca.jsonl"), type="alpaca", max_rows=n) for n in (3, 10)]
    cfg = config(tmp_path, datasets=entries)
    tok = load_tokenizer(cfg)
    report, data = audit(cfg, tok, progress=False), prepare_data(cfg, tok)
    assert len(report.samples)==13 and report.summary()["tokens"]==sum(map(len, data.train["input_ids"]))
    used = set(report.samples.row[report.samples.dataset==1])
    left = next(n for n in range(1, max(used)) if n not in used)
    with pytest.raises(UserError, match=rf"there is no row {left}: of dataset 1, 3 rows up to {max(used)} are used .`max_rows`."): preview(cfg, tok, report, row=str(left))
    assert preview(cfg, tok, report, row=str(max(used))).views[0].title.startswith(f"{tmp_path}/alpaca.jsonl:{max(used)} ")


@pytest.mark.parametrize("how", ["pretraining", "streaming"])
def test_the_beginning_of_a_stream_is_shown(tmp_path, how, monkeypatch):
    monkeypatch.setattr("tuneforge.audit.HEAD", 4)
    write_jsonl(tmp_path/"p.jsonl", [dict(text=f"abc {i}") for i in range(6)])
    e = dict(path=str(tmp_path/"p.jsonl"))
    kw = dict(pretraining_dataset=[e | dict(skip=1)]) if how=="pretraining" else dict(datasets=[e | dict(type="completion")], streaming=True)
    cfg = load_config(dict(base_model="tiny:llama", learning_rate=1e-4, max_steps=2, **kw))
    p = preview(cfg, load_tokenizer(cfg), n=9)
    assert p.report.summary()["samples"]==4 and "the first 4 rows" in repr(p.report)
    assert {v.title.split(" ")[0] for v in p.views}=={f"{tmp_path}/p.jsonl:{n+(how=='pretraining')}" for n in range(1, 5)}


@pytest.mark.parametrize("row", ["²", "1:²", "x", "-1", "1:2:3", "٣"])
def test_what_is_no_number_is_no_row(ready, row):
    cfg, tok, report = ready
    with pytest.raises(UserError, match="is no row"): choose(report, row=row)
