"Tokens and masks, against the tokenizer alone"
import json
from datetime import date
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tuneforge.config import DatasetOptions, TokenizerOptions, UserError
from tuneforge.prompts import Segment, from_function, prompt_format
from tuneforge.tokens import IGNORE, check_golden, encode_rows, golden_prompts, load_tokenizer, tokenise, tokenise_rows
from tests.tokenizers import tokenizer

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
segment = st.builds(Segment, text, st.booleans())


@settings(deadline=None)
@given(st.lists(st.lists(segment, min_size=1, max_size=4), min_size=1, max_size=4))
def test_apart_is_each_segment_alone(samples):
    for o, s in zip(samples, tokenise(TOK, samples)):
        pieces = [TOK(p.text, add_special_tokens=False).input_ids for p in o]
        mask = [o[0].train]+[p.train for p, i in zip(o, pieces) for _ in i]
        want = [TOK.bos_token_id]+[i for p in pieces for i in p]
        assert s.input_ids.tolist()==want
        assert s.labels.tolist()==[i if t else IGNORE for i, t in zip(want, mask)]


def brute(tok, parts, train_all):
    "The mask of a joined text, character by character; None where a token has no characters"
    whole = "".join(s.text for s in parts)
    owner = [s for s in parts for _ in s.text]
    enc = tok(whole, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    for a, b in enc.offset_mapping:
        held = owner[a:b]
        on = [s.train or train_all and not s.fixed for s in held]
        mask.append(None if not held else any(on) and not held[0].opens)
    return enc.input_ids, mask


@settings(deadline=None)
@given(st.lists(st.builds(Segment, st.text("ab Cold\nmere山é", max_size=9), st.booleans(), joined=st.just(True), fixed=st.booleans(), opens=st.booleans()), min_size=1, max_size=6).map(
    lambda o: [s if not s.opens or not s.train else Segment(s.text, True, joined=True) for s in o]), st.sampled_from(["byte", "metaspace"]), st.booleans())
def test_joined_is_one_text(parts, kind, train_all):
    tok = tokenizer(kind)
    ids, mask = brute(tok, parts, train_all)
    s = tokenise(tok, [parts], bos=False, train_all=train_all, want_offsets=True)[0]
    assert s.input_ids.tolist()==ids
    assert [m for m, w in zip((s.labels!=IGNORE).tolist(), mask) if w is not None]==[w for w in mask if w is not None]
    assert len(s.offsets)==len(s.segment)==len(ids)
    covered = [False]*len(s.text)
    for (a, b), i in zip(s.offsets, s.segment):
        covered[a:b] = [True]*(b-a)
        starts = np.cumsum([0]+[len(p.text) for p in parts])
        assert a>=b or (a<starts[i+1] and b>starts[i]) # the token has a character of its segment
    assert all(covered)


@pytest.mark.parametrize("trim", [True, False])
def test_offsets_without_spaces(trim): # GPT-2's way: a word's token doesn't cover its space
    from tokenizers import processors
    tok = tokenizer("byte", False)
    old = tok.backend_tokenizer.post_processor
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    try: s = tokenise(tok, [[Segment("[/INST]", False, joined=True), Segment(" Coldmere.  ", True, joined=True), Segment("</s>", False, joined=True)]], bos=False)[0]
    finally: tok.backend_tokenizer.post_processor = old or processors.Sequence([])
    assert tok.decode([i for i in s.labels if i!=IGNORE])==" Coldmere.  "


def test_where_a_prompt_ends_inside_of_a_token_it_is_masked():
    parts = lambda opens: [[Segment("A: ", False, joined=True, opens=opens), Segment("Coldmere", True, joined=True)]]
    of = lambda opens: TOK.decode([i for i in tokenise(TOK, parts(opens), bos=False)[0].labels if i!=IGNORE])
    assert of(False)==" Coldmere" and of(True) in ("", "mere", "oldmere", "ere")


def test_left_over_truncation_is_ignored():
    TOK("a b c d e f g h", truncation=True, max_length=3, padding="max_length")
    assert len(tokenise(TOK, [[Segment("Where does Bagol live? "*9, True)]])[0])>20


def test_pieces_and_offsets_say_where_tokens_come_from():
    fmt = prompt_format(DatasetOptions(path="x", type="alpaca"), TOK)
    s = tokenise_rows([dict(instruction="Who?", output="Käthe 山")], fmt, TOK, 99, want_offsets=True)[0][0]
    assert [s.segments[i].role if i>=0 else "" for i in s.segment[[0, 1, -2, -1]]]==["", "user", "assistant", ""]
    said = "".join(dict.fromkeys(s.text[a:b] for (a, b), i in zip(s.offsets, s.segment) if i==1))
    assert said=="Käthe 山"


def test_no_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer"): load_tokenizer(TokenizerOptions(base_model=str(tmp_path)))
    with pytest.raises(UserError, match="no tokenizer class `NoSuch`"): load_tokenizer(TokenizerOptions(base_model="tiny:llama", tokenizer_type="NoSuch"))


def test_golden_prompts_find_changes():
    rows = [dict(messages=[dict(role="user", content="Who?"), dict(role="assistant", content="Bagol.")])]
    entry = DatasetOptions(path="x", type="chat_template", chat_template="llama3")
    golden = golden_prompts(rows, prompt_format(entry, tokenizer()), tokenizer())
    check_golden(golden, [entry], tokenizer())
    with pytest.raises(UserError, match="the chat template has changed"): check_golden(golden, [entry.model_copy(update=dict(chat_template="chatml"))], tokenizer())
    with pytest.raises(UserError, match="tokenizer is no longer that of the training"): check_golden(golden, [entry], tokenizer("metaspace"))


def test_golden_prompts_are_rows_that_json_keeps():
    "A column without a value stays where a format of one's own reads it; a date stays out where it is read"
    plain = lambda row: [((row["ctx"] or "")+row["q"], False), ("A", True)]
    dated = lambda row: [(f"{row['when'].year}: {row['q']}", False), ("A", True)]
    rows = [dict(q="Who?", ctx=None, when=date(2024, 1, 2)), dict(q="Where?", ctx="Bagol ", when=date(2024, 1, 2))]
    made = {f: golden_prompts(rows, from_function(f, DatasetOptions(path="x")), tokenizer()) for f in (plain, dated)}
    assert made[dated]==[] and [g["text"] for g in made[plain]]==["Who?", "Bagol Where?"]
    kept = json.loads(json.dumps(made[plain]))
    assert [from_function(plain, DatasetOptions(path="x")).prompt(g["row"]) for g in kept]==["Who?", "Bagol Where?"]
    alpaca = prompt_format(DatasetOptions(path="x", type="alpaca"), tokenizer())
    assert [g["row"] for g in golden_prompts([dict(instruction="I?", input=None, output="O", when=rows[0]["when"])], alpaca, tokenizer())]==[dict(instruction="I?", output="O", when="2024-01-02")]


def test_nothing_is_something(): assert encode_rows([], {}, TOK)==[]


def test_only_what_stands_before_a_text_begins_it():
    from tokenizers import processors
    from tuneforge.tokens import bos_ids
    tok = tokenizer("byte", False)
    old = tok.backend_tokenizer.post_processor
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> <|user|> $A </s>", special_tokens=[("<s>", 1), ("<|user|>", tok.convert_tokens_to_ids("<|user|>")), ("</s>", 2)])
    try: assert bos_ids(tok)==[1, tok.convert_tokens_to_ids("<|user|>")]
    finally: tok.backend_tokenizer.post_processor = old or processors.Sequence([])


def test_an_empty_row_is_refused_and_takes_nothing_from_others():
    from tuneforge.prompts import prompt_format
    from tuneforge.tokens import encode_rows, tokenise_rows
    from tests.tokenizers import tokenizer
    tok, rows = tokenizer(), [dict(segments=[]), dict(segments=[dict(label=False, text="Q1 "), dict(label=True, text="A1")])]
    with pytest.raises(UserError, match="row 1 .*there is no text in this row"): encode_rows(rows, dict(type="input_output"), tok)
    batch, row, errors = tokenise_rows(rows, prompt_format(DatasetOptions(path="x", type="input_output"), tok), tok, 99)
    assert list(errors)==[0] and row.tolist()==[1] and batch[0].input_ids.tolist()==encode_rows(rows[1:], dict(type="input_output"), tok)[0]["input_ids"]


@pytest.mark.parametrize("rows, entry, says", [(dict(text="x"), dict(type="completion"), "a list of dicts"), ([None], dict(type="completion"), "a list of dicts"), ([dict(text="x")], "completion", "is a dict of keys"),
    ([dict(text="a\udc00b")], dict(type="completion"), "row 1 .*half a character"), ([dict(messages=[])], dict(type="alpaca"), "looks like `type: chat_template`"), ([{}], {}, "the row is empty")])
def test_what_is_no_row(rows, entry, says):
    from tuneforge.tokens import encode_rows
    from tests.tokenizers import tokenizer
    with pytest.raises(UserError, match=says): encode_rows(rows, entry, tokenizer())


def test_rows_may_be_a_dataset():
    from datasets import Dataset
    from tuneforge.tokens import encode_rows
    from tests.tokenizers import tokenizer
    rows = [dict(text="one"), dict(text="two")]
    assert encode_rows(Dataset.from_list(rows), dict(type="completion"), tokenizer())==encode_rows(rows, dict(type="completion"), tokenizer())


def test_a_new_special_token_is_told(caplog):
    caplog.set_level("INFO", "tuneforge")
    load_tokenizer(TokenizerOptions(base_model="tiny:llama", special_tokens=dict(pad_token="<pad>", eos_token="<s>")))
    told = [r.getMessage() for r in caplog.records]
    load_tokenizer(TokenizerOptions(base_model="tiny:llama", special_tokens=dict(pad_token="</ss>", bos_token="<|begin|>")))
    new = [r.getMessage() for r in caplog.records][len(told):]
    assert not [t for t in told if "<s>" in t] and len(new)==2
    assert sorted(new)==["`special_tokens.bos_token`: this tokenizer has no <|begin|>: it is added, and the model knows nothing of it yet", "`special_tokens.pad_token`: this tokenizer has no </ss>, did you mean `</s>`? It is added, and the model knows nothing of it yet"]
