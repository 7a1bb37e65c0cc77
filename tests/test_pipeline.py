"What becomes of rows: every strategy against plain Python, and a report that adds up whatever is chosen"
import io, json, re
from collections import Counter
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tuneforge.config import DataOptions, DatasetOptions, TokenizerOptions, UserError
from tuneforge.dataset import prepare_data, rows_matching, sample_lengths
from tuneforge.prompts import FORMATS, from_function, register
from tuneforge.mixing import MIX, copies, draw, draw_valid, fingerprints, again, take_rows, targets
from tuneforge.report import LOST, REASONS, DataReport, SourceReport, load_report, plot_report, save_report, length_counts, EDGES
from tuneforge.tokens import IGNORE, encode_rows, load_tokenizer
from rich.console import Console
from tests.tools import command, write_jsonl

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
HUGE = 10**6


def prep(tmp_path, sources, name="x", **kw):
    "Prepare lists of rows; `kw` may hold `entries`, one dict of keys for each, and `test`"
    entries, test = kw.pop("entries", [{}]*len(sources)), kw.pop("test", None)
    entry = lambda n, rows, e: DatasetOptions(path=str(write_jsonl(tmp_path/f"{name}{n}.jsonl", rows)), **e)
    data = [entry(i, r, e) for i, (r, e) in enumerate(zip(sources, entries))]
    if test: kw["test_datasets"] = [entry("test", test, {})]
    return prepare_data(DataOptions(datasets=data, dataset_prepared_path=str(tmp_path/"prepared"), **kw), TOK)


def samples(ds): return [(tuple(o["input_ids"]), tuple(o["labels"])) for o in ds] if ds else []


def trained(labels): return sum(i!=IGNORE for i in labels[1:])


def brute(rows, size, how, least=2, keep=False):
    "Samples of rows, as plain Python makes them"
    res = []
    for r in rows:
        o, = encode_rows([r], dict(type="alpaca"), TOK, HUGE)
        ids, labels = o["input_ids"], o["labels"]
        if len(ids)>size and how=="drop": continue
        cuts = [0] if how!="split" else range(0, len(ids), size)
        for a in cuts:
            i, l = ids[a:a+size], labels[a:a+size]
            if len(i)>=least and (keep or trained(l)): res.append((tuple(i), tuple(l)))
    return res


def adds_up(data):
    "The report against the data themselves"
    r, train, valid = data.report, samples(data.train), samples(data.valid)
    assert (r.n_train, r.n_valid)==(len(train), len(valid))
    for s in r.sources:
        assert s.rows_in==s.rows_used+sum(s.dropped.values())
        assert set(s.dropped) | set(s.pieces) <= set(REASONS[1:]) and all(v>0 for v in [*s.dropped.values(), *s.pieces.values()])
    total = lambda k: sum(vars(s)[k] for s in r.sources)
    assert (total("samples"), total("valid"))==(len(train)+len(valid), len(valid))
    assert total("tokens")==sum(len(i) for i, _ in train+valid) and total("trained")==sum(trained(l) for _, l in train+valid)
    assert total("repeats")==len(train)-len({(k, n) for n, k in numbered(data)})
    assert sample_lengths(data.train).tolist()==[len(i) for i, _ in train]
    return train, valid


def numbered(data):
    "Numbers of the samples that are trained on"
    return [(i, "train") for i in np.load(data.path/"train.npy").tolist()]


texts = st.lists(st.tuples(st.text("ab c", min_size=1, max_size=30), st.text("xyz", max_size=80)), min_size=4, max_size=12)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts, st.sampled_from(["drop", "truncate", "split"]), st.booleans(), st.sampled_from([0, 0.2, 2]), st.sampled_from([None, (1, 1), (1, 5)]), st.sampled_from(["tokens", "rows"]),
    st.sampled_from(["first_exhausted", "all_exhausted"]), st.sampled_from([None, 3]), st.booleans(), st.sampled_from([None, 2]), st.booleans())
def test_the_report_adds_up(tmp_path, a, b, how, dedupe, val, weights, by, until, cap, keep, shards, with_test):
    rows = [[dict(instruction=i, output=o) for i, o in x] for x in (a, b)]
    entries = [dict(weight=w, max_rows=cap) for w in weights or (None, None)]
    kw = dict(test=rows[0][:2]+[dict(instruction="only here", output="q")]) if with_test else dict(val_set_size=val)
    kw |= dict(dataset_shard_num=shards, dataset_shard_idx=1) if shards else {}
    try: data = prep(tmp_path, rows, entries=entries, sequence_len=64, excess_length_strategy=how, dataset_exact_deduplication=dedupe, mix_by=by, mix_until=until,
        on_untrained_row="keep" if keep else "drop", dropped_rows_stop=1, **kw)
    except UserError as e:
        assert any(w in str(e) for w in ("nothing is left", "leaves nothing on one side")), e
        return
    train, valid = adds_up(data)
    assert all(len(i)<=64 for i, _ in train+valid)
    if dedupe:
        assert not {i for i, _ in train} & {i for i, _ in valid} if with_test else not set(train) & set(valid)
        if not weights or until=="first_exhausted": assert len(set(train))==len(train) and len(set(valid))==len(valid)
    if cap or shards or weights: return
    want = Counter(brute(rows[0]+rows[1], 64, how, keep=keep))
    if not dedupe: assert Counter(train)+(Counter() if with_test else Counter(valid))==want
    elif not with_test: assert set(train) | set(valid)==set(want) and len(train)+len(valid)==len(want)
    else: assert set(train)=={s for s in want if s[0] not in {i for i, _ in valid}}


LONG = [dict(instruction="Tell", output="very "*200), dict(instruction="Say", output="yes"), dict(instruction="z "*200, output="no")]


@pytest.mark.parametrize("how, used, dropped", [("drop", 1, {"longer than `sequence_len`": 2}), ("truncate", 2, {"without a trained token once cut to `sequence_len`": 1}), ("split", 3, {})])
def test_strategies_for_long_rows(tmp_path, how, used, dropped):
    data = prep(tmp_path, [LONG], sequence_len=150, excess_length_strategy=how, dropped_rows_stop=1)
    s = data.report.sources[0]
    assert (s.rows_in, s.rows_used, s.dropped)==(3, used, dropped) and s.truncated==(how=="truncate")
    assert samples(data.train)==brute(LONG, 150, how) and s.split==(2 if how=="split" else 0)
    adds_up(data)


def test_pieces_are_the_whole(tmp_path):
    whole, = encode_rows(LONG[:1], dict(type="alpaca"), TOK, HUGE)
    data = prep(tmp_path, [LONG[:1]], sequence_len=100, excess_length_strategy="split", min_sample_len=1, on_untrained_row="keep")
    for k in whole: assert [i for o in data.train[k] for i in o]==whole[k]


def test_a_long_row_can_be_an_error(tmp_path):
    with pytest.raises(UserError, match=r"x0.jsonl:1: .*longer than `sequence_len: 100`"): prep(tmp_path, [LONG], sequence_len=100, excess_length_strategy="raise")
    assert len(prep(tmp_path, [LONG], sequence_len=2000, excess_length_strategy="raise").train)==3


def test_an_untrained_row_can_be_kept_or_an_error(tmp_path):
    rows = [dict(messages=[dict(role="user", content="Who?"), dict(role="assistant", content=c)]) for c in ("Bagol.", "Nobody.")] + [dict(messages=[dict(role="user", content="Why?")])]
    go = lambda **kw: prep(tmp_path, [rows], entries=[dict(type="chat_template", chat_template="chatml")], **kw)
    assert go().report.sources[0].dropped=={"without a trained token": 1}
    assert len(go(on_untrained_row="keep").train)==3
    with pytest.raises(UserError, match="x0.jsonl:3: there is no trained token"): go(on_untrained_row="stop")


def test_evaluation_rows_have_a_length_of_their_own(tmp_path):
    data = prep(tmp_path, [LONG[1:2]*3], test=LONG, sequence_len=120, eval_sequence_len=2000)
    assert len(data.valid)==3 and max(sample_lengths(data.valid))>500


# ---- too much lost

def test_too_much_lost_stops_and_says_where(tmp_path):
    rows = LONG[1:2]*4+LONG[:1]*5
    with pytest.raises(UserError) as e: prep(tmp_path, [rows], sequence_len=150)
    assert "5 of 9 rows are lost (56%)" in str(e.value) and "x0.jsonl:5, " in str(e.value) and not [p for p in (tmp_path/"prepared").iterdir() if p.is_dir()]
    assert len(prep(tmp_path, [rows], sequence_len=150, dropped_rows_stop=0.6).train)==4
    with pytest.raises(UserError, match="5 of 9 rows are lost"): prep(tmp_path, [rows], sequence_len=150) # the thresholds hold for what is found, too
    with pytest.raises(UserError, match="nothing is left"): prep(tmp_path, [LONG[:1]], sequence_len=150, dropped_rows_stop=1)


def test_warnings_have_a_threshold(tmp_path, caplog):
    rows = LONG[1:2]*9+LONG[:1]
    prep(tmp_path, [rows], sequence_len=150)
    assert "1 of 10 rows are lost (10%)" in caplog.text
    caplog.clear()
    prep(tmp_path, [rows], sequence_len=150, dropped_rows_warn=0.1)
    assert "lost" not in caplog.text


def test_rows_that_are_no_good_are_told_once(tmp_path):
    rows = LONG[1:2]*8+[dict(instruction="q"), dict(instruction=3, output="x")]
    report = prep(tmp_path, [rows], on_bad_row="skip", dropped_rows_warn=1).report
    for said in (str(report), report._repr_html_()): assert said.count("x0.jsonl:9")==said.count("x0.jsonl:10")==said.count("2 no good")==1
    write_jsonl(tmp_path/"d.jsonl", rows)
    (tmp_path/"c.yml").write_text("base_model: tiny:llama\ndatasets:\n  - path: d.jsonl\n    type: alpaca\non_bad_row: skip\nlearning_rate: 1e-3\nnum_epochs: 1\nsequence_len: 512\n")
    code, out, err = command("preprocess", "c.yml", cwd=tmp_path)
    assert code==0 and out.count("d.jsonl:9: ")==1 and "d.jsonl:9" not in err and out.endswith(": prepared now\n"), err
    code, out, err = command("preprocess", "c.yml", "--dropped-rows-stop", "0.1", cwd=tmp_path)
    assert code==2 and "2 of 10 rows are lost (20%), more than `dropped_rows_stop: 0.1` allows" in err


def test_roles_that_nobody_has_are_told(tmp_path):
    rows = [dict(messages=[dict(role="user", content=f"q{i}"), dict(role="assistant", content="a")]) for i in range(9)]
    go = lambda role: prep(tmp_path, [rows], entries=[dict(type="chat_template", roles_to_train=[role])])
    with pytest.raises(UserError) as e: go("bot")
    assert "nothing is left" in str(e.value) and "`roles_to_train: [bot]` trains nothing in the rows that were looked at: their roles are assistant, user\n" in str(e.value)
    assert not go("assistant").report.sources[0].hints


def test_the_report_fits_a_terminal_and_loses_nothing():
    long, short = "/home/somebody/data/projects/village/questions-2026.jsonl", "d.jsonl"
    source = lambda path: SourceReport(path, rows_in=123456, rows_used=123400, samples=223400, valid=12345, tokens=123456789, trained=99999999, weight=.5, share=.5)
    report = DataReport([source(long), source(short)], 2, 1)
    lines = str(report).splitlines()
    assert max(map(len, lines))<=80 and lines[1::2]==[long, short, "2 to train on, 1 to evaluate on"] and len({len(l) for l in (lines[0], lines[2], lines[4])})==1
    assert lines[2].split()==["123,456", "123,400", "223,400", "12,345", "123,456,789", "81.0%", "50.0%", "(50.0%)"]
    narrow = str(DataReport([SourceReport(short, rows_in=10)], 2, 1)).splitlines()
    assert narrow[0].split()[0]=="dataset" and narrow[1].split()[:2]==[short, "10"] and max(map(len, narrow))<=80
    with io.StringIO() as f:
        Console(file=f, width=80).print(report)
        assert [l.rstrip() for l in f.getvalue().splitlines()]==[l.rstrip() for l in lines]


@pytest.mark.parametrize("size, says", [(5000, "`val_set_size: 5000` of 8 rows leaves nothing"), (8.0, "`val_set_size: 8` of 8 rows"), (7, None)])
def test_a_split_that_leaves_little_is_told(tmp_path, caplog, size, says):
    if says:
        with pytest.raises(UserError) as e: prep(tmp_path, [LONG[1:2]*8], val_set_size=size)
        assert says in str(e.value) and "from 2 to 7" in str(e.value)
    else:
        for _ in range(2): # made, and found
            caplog.clear()
            prep(tmp_path, [LONG[1:2]*8], val_set_size=size)
            assert [r.getMessage() for r in caplog.records]==["`val_set_size: 7` leaves 1 sample to train on, fewer than the 7 to evaluate on"]
        caplog.clear()
        prep(tmp_path, [LONG[1:2]*8], val_set_size=4)
        assert not caplog.records


def test_what_was_asked_for_is_not_lost(tmp_path, caplog):
    rows = [dict(instruction=str(i), output="b") for i in range(20)]
    data = prep(tmp_path, [rows, rows[:10]], entries=[dict(max_rows=5, weight=1), dict(weight=9)], mix_by="rows", dataset_exact_deduplication=True)
    assert data.report.sources[0].dropped["left out by `max_rows`"]==15 and data.report.sources[0].lost==0 and "lost" not in caplog.text


# ---- duplicates

def test_the_evaluation_keeps_its_rows(tmp_path):
    row = lambda i: dict(instruction=str(i), output="b")
    data = prep(tmp_path, [[row(1), row(2), row(1), row(3)], [row(3), row(4)]], test=[row(2), row(5), row(5)], dataset_exact_deduplication=True, dropped_rows_stop=1)
    want = lambda *n: [s for i in n for s in brute([row(i)], HUGE, "drop")]
    assert samples(data.train)==want(1, 3, 4) and samples(data.valid)==want(2, 5)
    a, b, t = data.report.sources
    assert a.dropped=={REASONS[6]: 1, REASONS[7]: 1} and b.dropped=={REASONS[6]: 1} and t.dropped=={REASONS[6]: 1} and "x0.jsonl:3" in a.examples[REASONS[6]][0]


def test_equal_tokens_with_another_mask_are_no_duplicates_but_leak(tmp_path):
    ids = [5, 6, 7]
    own = lambda labels: dict(input_ids=ids, labels=labels)
    data = prep(tmp_path, [[own(ids), own([-100, 6, 7]), own(ids)]], dataset_exact_deduplication=True)
    assert len(data.train)==2
    rows = [own([-100, 6, 7]), dict(input_ids=[8, 9], labels=[8, 9])]
    assert [i for i, _ in samples(prep(tmp_path, [rows], test=[own(ids)], dataset_exact_deduplication=True).train)]==[(8, 9)]


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=40))
def test_duplicates_are_those_of_python(rows):
    import pyarrow as pa
    seen, want = set(), []
    for r in rows: want.append(tuple(r) in seen); seen.add(tuple(r))
    assert again(fingerprints([pa.array(rows, pa.list_(pa.int32()))])).tolist()==want


def test_fingerprints_of_a_slice_are_those_of_its_rows():
    import pyarrow as pa
    ids = pa.array([[1], [2, 3], [], [4, 5, 6]], pa.list_(pa.int32()))
    assert fingerprints([ids[1:3]]).tolist()==fingerprints([ids]).tolist()[1:3]


# ---- mixing

@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=4), st.data(), st.sampled_from(["first_exhausted", "all_exhausted"]))
def test_mixtures_come_as_near_as_samples_allow(sizes, data, until):
    weights = [data.draw(st.floats(0.1, 10)) for _ in sizes]
    sizes = [np.array(s) for s in sizes]
    wanted = targets([s.sum() for s in sizes], weights, until)
    used = [copies(s, t, draw(len(s), 0, MIX, i)) for i, (s, t) in enumerate(zip(sizes, wanted))]
    for s, t, n in zip(sizes, wanted, used):
        assert n.max()-n.min()<=1 and abs(int(n@s)-t)<=max(s.max()/2, s.max() if t<s.max() else 0)+1e-6*t
        if until=="first_exhausted": assert n.max()<=1
        else: assert n.min()>=1
    i = (np.argmin if until=="first_exhausted" else np.argmax)([s.sum()/w for s, w in zip(sizes, weights)])
    assert set(used[i].tolist())=={1}
    assert np.allclose(np.array(wanted)/sum(wanted), np.array(weights)/sum(weights))


@pytest.mark.parametrize("by", ["tokens", "rows"])
@pytest.mark.parametrize("until", ["first_exhausted", "all_exhausted"])
def test_mixed_data_against_a_count(tmp_path, by, until):
    rng = np.random.default_rng(0)
    rows = [[dict(instruction=f"{name}{i}", output="w "*int(rng.integers(1, 30))) for i in range(n)] for name, n in (("a", 40), ("b", 90), ("c", 60))]
    data = prep(tmp_path, rows, entries=[dict(weight=w) for w in (1, 2, 1)], mix_by=by, mix_until=until, val_set_size=10)
    train, valid = adds_up(data)
    of = {s: i for i, r in enumerate(rows) for s in brute(r, HUGE, "drop")}
    size = lambda s: len(s[0]) if by=="tokens" else 1
    got = [sum(size(s) for s in train if of[s]==i) for i in range(3)]
    for r, g, w in zip(data.report.sources, got, (0.25, 0.5, 0.25)):
        assert r.share==g/sum(got) and r.weight==w and abs(r.share-w)<0.01
    counts = Counter(train)
    assert not set(counts) & set(valid) and len(set(counts) | set(valid))<=190
    assert max(counts.values())==1 if until=="first_exhausted" else set(counts) | set(valid)==set(of)


def test_draws_depend_on_the_seed_alone(tmp_path):
    rows = [dict(instruction=str(i), output="b") for i in range(50)]
    go = lambda seed, folder, **kw: samples(prep(tmp_path, [rows], entries=[dict(max_rows=20)], seed=seed, name=folder, **kw).train)
    assert go(1, "x")==go(1, "y") and go(1, "x")!=go(2, "x") and len(go(1, "x"))==20
    assert take_rows(9, 9, 0, 0) is None and take_rows(100, 10, 7, 0).tolist()!=take_rows(100, 10, 7, 1).tolist()


def test_each_dataset_can_be_shuffled_by_itself(tmp_path):
    rows = [[dict(instruction=f"{n}{i}", output="b") for i in range(20)] for n in "ab"]
    plain = samples(prep(tmp_path, rows, shuffle_merged_datasets=False).train)
    mixed = samples(prep(tmp_path, rows, shuffle_merged_datasets=False, shuffle_before_merging_datasets=True).train)
    assert plain==brute(rows[0]+rows[1], HUGE, "drop") and mixed!=plain
    assert set(mixed[:20])==set(plain[:20]) and set(mixed[20:])==set(plain[20:])


def test_parts_of_the_data_are_a_partition(tmp_path):
    rows = [dict(instruction=str(i), output="w "*(i%40)) for i in range(31)]
    parts = [samples(prep(tmp_path, [rows], sequence_len=90, excess_length_strategy="split", dataset_shard_num=3, dataset_shard_idx=i).train) for i in range(3)]
    assert Counter(s for p in parts for s in p)==Counter(brute(rows, 90, "split"))
    assert len({o["input_ids"][0] for r in rows for o in encode_rows([r], {}, TOK)})==1 and max(map(len, parts))>min(map(len, parts))>0


def test_pieces_of_a_text_stay_on_one_side(tmp_path):
    rows = [dict(text=f"{chr(97+i)} "*200) for i in range(10)]
    data = prep(tmp_path, [rows], entries=[dict(type="completion")], sequence_len=50, val_set_size=3)
    letters = lambda ds: {c for o in ds["input_ids"] for c in TOK.decode(o, skip_special_tokens=True) if c.isalpha()}
    assert len(letters(data.valid))==3 and not letters(data.train) & letters(data.valid)


# ---- own tokens

def test_own_tokens_without_labels_need_their_type(tmp_path):
    rows = [dict(input_ids=[5, 6, 7]), dict(input_ids=[8, 9])]
    data = prep(tmp_path, [rows], entries=[dict(type="tokens")])
    assert data.train["input_ids"]==data.train["labels"]==[[5, 6, 7], [8, 9]]
    with pytest.raises(UserError, match="x0.jsonl:1: the row has no `instruction`.* looks like `type: tokens`"): prep(tmp_path, [rows])


@pytest.mark.parametrize("row, says", [(dict(input_ids=[1, 10**6]), "input_ids\\[1\\] is 1000000, but should be an id below"), (dict(input_ids=[1, -1]), "input_ids\\[1\\] is -1"), (dict(input_ids=[1, 2.5]), "input_ids\\[1\\] is 2.5"),
    (dict(input_ids=[1, 2], labels=[1]), "labels has 1 entries, but input_ids has 2"), (dict(input_ids=[1, 2], attention_mask=[1]), "attention_mask has 1 entries"), (dict(input_ids=[1, 2], labels=[1, -7]), "labels\\[1\\] is -7"),
    (dict(labels=[1, 2]), "input_ids is null"), (dict(input_ids="1 2"), "input_ids")])
def test_own_tokens_are_checked(tmp_path, row, says):
    with pytest.raises(UserError, match=f"x0.jsonl:2: {says}"): prep(tmp_path, [[dict(input_ids=[3, 4]), row]], entries=[dict(type="tokens")])


# ---- the report itself

def test_reports_survive_json_and_have_a_picture(tmp_path):
    data = prep(tmp_path, [LONG*3, LONG[1:2]*4], test=LONG[1:2], sequence_len=150, dropped_rows_stop=1, entries=[dict(weight=1), dict(weight=2)], mix_until="all_exhausted")
    save_report(data.report, tmp_path/"r.json")
    assert load_report(tmp_path/"r.json")==data.report==load_report(data.path/"report.json")
    said, page = str(data.report), data.report._repr_html_()
    assert "x0.jsonl:1, " in said and "<img" in page and page.count("<tr>")==4 and "longer than" in page
    assert len(plot_report(data.report).axes)==3


def test_reports_show_text_as_text():
    from tuneforge.report import DataReport
    assert "<b>" not in DataReport([SourceReport("<b>x</b>", rows_in=1, rows_used=1, samples=1, bad=["<b>"], dropped={REASONS[4]: 1})])._repr_html_().replace("<p><b>", "")


@given(st.lists(st.integers(0, 10**6), max_size=50))
def test_histograms_count_every_length(lengths):
    counts = length_counts(np.array(lengths, int))
    assert sum(counts)==len(lengths)
    assert counts==[sum(a<=max(n, 1)<b for n in lengths) for a, b in zip(EDGES, EDGES[1:])][:len(counts)]


def test_data_that_change_while_they_are_read_are_not_kept(tmp_path):
    rows = [dict(instruction=f"Where is {i}?", output="There.") for i in range(5)]
    path = write_jsonl(tmp_path/"x.jsonl", rows)
    @register("meddling")
    def meddling(opts, tokenizer=None):
        def text(row):
            if path.read_text().count("\n")==len(rows): path.write_text(path.read_text()+json.dumps(rows[0])+"\n") # as a second program might
            return [(row["instruction"], False), (row["output"], True)]
        return from_function(text, opts, tokenizer)
    opts = DataOptions(datasets=[DatasetOptions(path=str(path), type="meddling")], dataset_prepared_path=str(tmp_path/"prepared"))
    try:
        with pytest.raises(UserError, match="content of file 1: changed while the rows were read"): prepare_data(opts, TOK)
        assert not list((tmp_path/"prepared").glob("*/*"))
        assert len(prepare_data(opts, TOK).train)==len(rows)+1
    finally: del FORMATS["meddling"]


@given(st.lists(st.lists(st.sampled_from(["<|im_end|>", "</s>", "<s>", "a<", "|im_end|>", "Grüße", ""]), min_size=1, max_size=4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_special_tokens_in_texts_are_those_that_python_finds(rows):
    from datasets import Dataset
    ds = Dataset.from_list([dict(messages=[dict(role=["user", "assistant"][i%2], content=t) for i, t in enumerate(r)], id="<s>") for r in rows])
    expected = [i for i, r in enumerate(rows) if any(t in o for o in r for t in TOK.all_special_tokens)]
    assert rows_matching(ds, "messages", "|".join(map(re.escape, TOK.all_special_tokens))).tolist()==expected


@pytest.mark.parametrize("mixed", [False, True]) # a column of two kinds is kept as lines of JSON
def test_special_tokens_in_texts_are_said_with_their_place(tmp_path, mixed):
    rows = [dict(instruction=f"Where is {i}?", output="There."+"</s>"*(i in (2, 4)), note="<s>", odd=1 if mixed and i%2 else "x") for i in range(6)]
    said = prep(tmp_path, [rows]).report.sources[0].hints
    assert len(said)==1 and said[0].startswith("2 rows with special tokens") and "x0.jsonl:3, " in said[0] and "x0.jsonl:5" in said[0]
    rows = [r|dict(output="There.") for r in rows]
    assert prep(tmp_path, [rows], name="y").report.sources[0].hints==[] # `note` is not read


@pytest.mark.parametrize("split, says", [(None, True), ("test", False)])
def test_a_split_that_nobody_named_is_said(tmp_path, split, says):
    (tmp_path/"set").mkdir()
    for name in ("train", "test"): write_jsonl(tmp_path/"set"/f"{name}.jsonl", [dict(instruction=f"Where is {name} {i}?", output="There.") for i in range(4)])
    given = dict(split=split) if split else {}
    sources = prepare_data(DataOptions(datasets=[DatasetOptions(path=str(tmp_path/"set"))], test_datasets=[DatasetOptions(path=str(tmp_path/"set"), **given)], dataset_prepared_path=str(tmp_path/"prepared")), TOK).report.sources
    assert [s.hints for s in sources]==[[], ["`split` is not given, so the rows of `train` are evaluated on; there are test, train"]*says]


def test_special_tokens_are_counted_in_rows_that_are_taken(tmp_path):
    rows = [dict(instruction=f"Where is {i}?</s>", output="There.") for i in range(40)]
    report = prep(tmp_path, [rows], entries=[dict(max_rows=7)]).report.sources[0]
    assert report.rows_used==7 and report.hints[0].startswith("7 rows with special tokens")


@pytest.mark.parametrize("change", ["added", "removed"])
def test_a_folder_that_changes_while_it_is_read_is_not_kept(tmp_path, change):
    folder = tmp_path/"set"
    folder.mkdir()
    for name in "ab": write_jsonl(folder/f"{name}.jsonl", [dict(instruction=f"Where is {name}{i}?", output="There.") for i in range(3)])
    @register("meddling")
    def meddling(opts, tokenizer=None):
        def text(row):
            if change=="added": write_jsonl(folder/"c.jsonl", [dict(instruction="a", output="b")])
            else: (folder/"b.jsonl").unlink(missing_ok=True)
            return [(row["instruction"], False), (row["output"], True)]
        return from_function(text, opts, tokenizer)
    opts = DataOptions(datasets=[DatasetOptions(path=str(folder), type="meddling")], dataset_prepared_path=str(tmp_path/"prepared"))
    try:
        with pytest.raises(UserError, match="content of file [23]: changed while the rows were read"): prepare_data(opts, TOK)
    finally: del FORMATS["meddling"]
