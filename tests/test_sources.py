"Rows from anywhere: the same rows arrive whatever brings them, each with its place, and what is broken is named"
import bz2, csv, gzip, hashlib, json, os, socket, sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings, strategies as st
from tuneforge.config import DataOptions, TokenizerOptions, UserError, load_config
from tuneforge.dataset import data_key, expand_entries, prepare_data
from tuneforge.files import DataFile, as_rows, file_rows, raw_row
from tuneforge.options import DatasetOptions, PretrainingDataset
from tuneforge.sources import *
from tuneforge.tokens import load_tokenizer
from tests.tools import permissions_hold, run, serving, write_jsonl

ROWS = [dict(instruction=i, output=o) for i, o in [("When?", "1204-05-01"), ("Which dogs?", "None"), ("NA", "null"), ("Sing!", "La la,\nla \"la\" la.\n\nLa"), ("Wie heißt's?", "Größe 😀 \u2028 end"), ("007", "1e5"), ("", " spaces "), ("x", "-0")]]
ROWS += [dict(instruction=f"question {i}", output=f"answer {i}") for i in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    import datasets.config
    return datasets.config.HF_DATASETS_CACHE


def entry(path, **kw): return DatasetOptions(path=str(path), **kw)


def rows_of(e, on_bad_row="stop"): return as_rows(read_rows(e, on_bad_row)[:])[0]


def streamed(e, **kw): return [r for _, r, _ in stream_rows(e, **kw)]


# every form

def lines(rows): return "".join(json.dumps(r, ensure_ascii=False)+"\n" for r in rows).encode()


def zst(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f: f.write(data)
    return out.getvalue().to_pybytes()


def table(rows, delimiter=",", end="\r\n"):
    import io
    out = io.StringIO()
    w = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end)
    w.writeheader()
    w.writerows(rows)
    return out.getvalue().encode()


def parquet(rows):
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=3)
    return out.getvalue().to_pybytes()


def arrow(rows, new=pa.ipc.new_stream):
    out, t = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with new(out, t.schema) as f: f.write_table(t, max_chunksize=3)
    return out.getvalue().to_pybytes()


FORMS = {"a.jsonl": lines, "a.json": lambda r: json.dumps(r, indent=2).encode(), "b.json": lines, "a.ndjson": lines, "bom.jsonl": lambda r: b"\xef\xbb\xbf"+lines(r), "blank.jsonl": lambda r: b"\n\n"+lines(r).replace(b"\n", b"\r\n\n")+b"  \n",
    "noend.jsonl": lambda r: lines(r)[:-1], "a.jsonl.gz": lambda r: gzip.compress(lines(r)), "two.jsonl.gz": lambda r: gzip.compress(lines(r[:5]))+gzip.compress(lines(r[5:])), "a.jsonl.zst": lambda r: zst(lines(r)), "a.jsonl.bz2": lambda r: bz2.compress(lines(r)),
    "a.json.gz": lambda r: gzip.compress(json.dumps(r).encode()), "a.csv": table, "lf.csv": lambda r: table(r, end="\n"), "a.csv.gz": lambda r: gzip.compress(table(r)), "a.csv.zst": lambda r: zst(table(r)), "a.tsv": lambda r: table(r, "\t"),
    "a.parquet": parquet, "a.arrow": arrow, "file.arrow": lambda r: arrow(r, pa.ipc.new_file)}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_arrive(name, tmp_path):
    (tmp_path/name).write_bytes(FORMS[name](ROWS))
    e = entry(tmp_path/name)
    assert rows_of(e)==ROWS and streamed(e)==ROWS and load_rows(e).to_list()==ROWS
    assert rows_of(e, "skip")==ROWS
    odd = tmp_path/"no suffix" # told by `ds_type`
    if not name.endswith((".gz", ".zst", ".bz2")):
        (tmp_path/name).rename(odd)
        kind = dict(json="json", jsonl="json", ndjson="json").get(name.split(".")[-1], name.split(".")[-1])
        assert rows_of(entry(odd, ds_type=kind))==ROWS


def saved(d, rows): Dataset.from_list(rows).save_to_disk(str(d), num_shards=3)


FOLDERS = {"saved": saved, "saved dict": lambda d, rows: DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:3])).save_to_disk(str(d)),
    "two kinds of JSON": lambda d, rows: [(d/"1.json").write_text(json.dumps(rows[:7])), (d/"2.jsonl.gz").write_bytes(gzip.compress(lines(rows[7:])))],
    "parquet": lambda d, rows: [(d/f"train-{i}.parquet").write_bytes(parquet(rows[10*i:10*i+10])) for i in range(2)]+[(d/"test-0.parquet").write_bytes(parquet(rows[:3]))],
    "data": lambda d, rows: [(d/"data").mkdir(), (d/"data"/"train-00000-of-00001.csv").write_bytes(table(rows)), (d/"data"/"test-00000-of-00001.csv").write_bytes(table(rows[:3])), (d/"README.md").write_text("# words")]}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_rows_arrive_from_folders(name, tmp_path):
    d = tmp_path/"d"
    d.mkdir()
    FOLDERS[name](d, ROWS)
    assert rows_of(entry(d))==ROWS==streamed(entry(d))
    if "test" in splits_of(entry(d)): assert rows_of(entry(d, split="test"))==ROWS[:3]


def test_links_to_folders_are_followed_once(tmp_path):
    d = tmp_path/"d"
    for o in ("d", "elsewhere/deep"): (tmp_path/o).mkdir(parents=True)
    write_jsonl(d/"a.jsonl", ROWS[:5])
    write_jsonl(tmp_path/"elsewhere"/"deep"/"b.jsonl", ROWS[5:])
    for name, to in dict(more=tmp_path/"elsewhere", again=tmp_path/"elsewhere", up=d, deep=tmp_path/"elsewhere"/"deep").items(): (d/name).symlink_to(to)
    assert rows_of(entry(d))==ROWS==streamed(entry(d))


def test_a_kind_or_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("x.jsonl"), ROWS[:3])
    e = entry("json", data_files=["x.jsonl", "*.jsonl"])
    assert rows_of(e)==ROWS[:3]
    Path("json").mkdir()
    write_jsonl(Path("json/y.jsonl"), ROWS)
    with pytest.raises(UserError, match="no file x.jsonl in json: it is a folder here"): rows_of(e)
    assert rows_of(entry("json", data_files=["y.jsonl"]))==ROWS


def test_the_same_text_of_another_kind_is_another_source(tmp_path):
    for n in ("a.txt", "a.jsonl", "b.jsonl"): write_jsonl(tmp_path/n, ROWS)
    one, two, three = (fingerprint(entry(tmp_path/n)) for n in ("a.txt", "a.jsonl", "b.jsonl"))
    assert one!=two==three


def test_numbers_and_texts_of_another_width_go_together(tmp_path):
    d = tmp_path/"d"
    d.mkdir()
    for n, i, t in (("a", pa.int32(), pa.string()), ("b", pa.int64(), pa.large_string())): pq.write_table(pa.table(dict(n=pa.array([1, 2], i), text=pa.array([n, "z"], t))), d/f"{n}.parquet")
    assert rows_of(entry(d))==[dict(n=1, text="a"), dict(n=2, text="z"), dict(n=1, text="b"), dict(n=2, text="z")]
    pq.write_table(pa.table(dict(n=pa.array([1.5]), text=["c"])), d/"c.parquet")
    with pytest.raises(UserError, match="Field n has incompatible types"): rows_of(entry(d))


def test_columns_that_cannot_be_joined_or_read(tmp_path):
    d = tmp_path/"d"
    d.mkdir()
    write_jsonl(d/"train.jsonl", [dict(a=1)])
    write_jsonl(d/"test.jsonl", [dict(a="x")])
    with pytest.raises(UserError, match=r"`a` is Value\('int64'\) in part 1 \(`train`\), but Value\('string'\) in part 2 \(`test`\)"): rows_of(entry(d, split="train+test"))
    pq.write_table(pa.table(dict(m=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())))), tmp_path/"m.parquet")
    for f in (rows_of, streamed):
        with pytest.raises(UserError, match="m.parquet: the column `m` is map<string, int64"): f(entry(tmp_path/"m.parquet"))


@pytest.mark.parametrize("readme, says", [("configs: hello", "should be a list of blocks"), ("configs:\n- data_files: x", "should be a list of blocks"), ("a: [", "is no YAML")])
def test_a_readme_that_says_nothing_sensible(tmp_path, readme, says):
    write_jsonl(tmp_path/"a.jsonl", ROWS)
    (tmp_path/"README.md").write_text(f"---\n{readme}\n---\n")
    with pytest.raises(UserError, match=says): rows_of(entry(tmp_path))
    assert rows_of(entry(tmp_path, data_files="a.jsonl"))==ROWS


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("text", ['{"mine": 1}', "[1]", "no json"])
def test_files_that_are_named_like_those_of_datasets(tmp_path, name, text):
    write_jsonl(tmp_path/"a.jsonl", ROWS)
    (tmp_path/name).write_text(text)
    assert rows_of(entry(tmp_path))==ROWS


def test_what_is_no_number_and_two_rows_on_a_line(tmp_path):
    for lines, says in ((['{"a": 1.5}', '{"a": NaN}'], ":2: this line is not JSON: NaN"), (['{"a": 1}{"a": 2}', "", '{"a": 3}'], ":1:9: this line is not JSON: Extra data")):
        (tmp_path/"a.jsonl").write_text("\n".join(lines)+"\n")
        with pytest.raises(UserError, match=says): rows_of(entry(tmp_path/"a.jsonl"))


def test_threads_that_read_the_same_new_file(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    for i in range(3):
        f = write_jsonl(tmp_path/f"{i}.jsonl", [dict(n=i, text=str(tmp_path))]*200)
        with ThreadPoolExecutor(8) as pool: assert {len(o) for o in pool.map(rows_of, [entry(f)]*8)}=={200}


def test_files_with_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"d").mkdir()
    write_jsonl(tmp_path/"d"/"a.jsonl", ROWS)
    for name in ("a.jsonl", "~/d/a.jsonl", str(tmp_path/"d"/"a.jsonl")): assert rows_of(entry("~/d", data_files=name))==ROWS


def test_text_is_read_line_by_line(tmp_path):
    (tmp_path/"a.txt").write_bytes("one\r\n\n  two \u2028 \x0b same line\nthree".encode())
    e = entry(tmp_path/"a.txt", type="completion")
    assert rows_of(e)==[dict(text="one"), dict(text="  two \u2028 \x0b same line"), dict(text="three")]==streamed(e)
    assert row_places(e, [1, 2, 3])==[f"{tmp_path}/a.txt:{n}" for n in (1, 3, 4)]


def test_rows_of_a_notebook(tmp_path):
    ds = Dataset.from_list(ROWS).select(range(2, 20))
    assert rows_of(entry(keep_rows(ROWS)))==ROWS and rows_of(entry(keep_rows(ds)))==ROWS[2:]
    assert keep_rows(ROWS)==keep_rows(list(ROWS))!=keep_rows(ROWS[1:])
    assert keep_rows(ds)==keep_rows(Dataset.from_list(ROWS[2:]))
    for none in ([], ds.select([])):
        with pytest.raises(UserError, match="no rows to keep"): keep_rows(none)
    assert keep_rows(r for r in ROWS)==keep_rows(ROWS)
    cfg = load_config(dict(base_model="tiny:llama", learning_rate=1e-4, datasets=[dict(path=keep_rows(ROWS, "village"), type="alpaca")]))
    assert load_rows(cfg.datasets[0]).to_list()==ROWS and Path(row_places(cfg.datasets[0], [3])[0]).name.startswith("village-")
    for bad, says in (([dict(a=1), 5], "row 2 is no dict, but int"), ([dict(a={1, 2})], "row 1 cannot be kept as JSON")):
        with pytest.raises(UserError, match=says): keep_rows(bad)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["2020-01-01", "None", "5"]),
    lambda o: st.lists(o, max_size=3) | st.dictionaries(st.sampled_from("abc"), o, max_size=3), max_leaves=5)


def without_nulls(o):
    if isinstance(o, dict): return {k: without_nulls(v) for k, v in o.items() if v is not None}
    return [without_nulls(v) for v in o] if isinstance(o, list) else o


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "text"]), JSON, min_size=1), min_size=1, max_size=5), st.sampled_from(["x.jsonl", "x.json"]))
def test_any_json_arrives_exactly(tmp_path, rows, name):
    "Numbers with all their digits, dates as text, mixed types as they are; only null and absent are the same"
    (tmp_path/name).write_bytes(lines(rows) if name=="x.jsonl" else json.dumps(rows).encode())
    got = rows_of(entry(tmp_path/name))
    assert [without_nulls(r) for r in got]==[without_nulls(r) for r in rows]
    assert [json.dumps(without_nulls(r), sort_keys=True) for r in streamed(entry(tmp_path/name))]==[json.dumps(without_nulls(r), sort_keys=True) for r in rows]


@pytest.mark.parametrize("late", [dict(b="new"), dict(a="x", c=[]), dict(a="x", c=[dict(d="2020-01-01")]), dict(a=5), dict(a="2020-01-01"), dict(a=None)])
def test_blocks_do_not_matter(tmp_path, monkeypatch, late):
    "A column or a type that comes late is no other than one that comes early"
    monkeypatch.setattr("tuneforge.files.BLOCK", 100)
    rows = [dict(a=f"row {i}") for i in range(50)]+[late]+[dict(a="end", b="z")]
    f = write_jsonl(tmp_path/"x.jsonl", rows)
    assert [without_nulls(r) for r in rows_of(entry(f))]==[without_nulls(r) for r in rows]
    assert row_places(entry(f), [1, 51, 52])==[f"{f}:{n}" for n in (1, 51, 52)]


# parts

SPLITS = [("train", lambda r, t: r), ("train[:10%]", lambda r, t: r[:2]), ("train[-5:]", lambda r, t: r[-5:]), ("train[3:7]", lambda r, t: r[3:7]), ("train[3:7]+test", lambda r, t: r[3:7]+t), ("test[1:]+train[90%:]", lambda r, t: t[1:]+r[18:]), ("train[:2]+train[5:6]", lambda r, t: r[:2]+r[5:6])]


@pytest.mark.parametrize("split, by_hand", SPLITS, ids=[s for s, _ in SPLITS])
def test_splits_are_slices(split, by_hand, tmp_path):
    test = [dict(instruction=f"t{i}", output="x") for i in range(4)]
    write_jsonl(tmp_path/"train.jsonl", ROWS)
    write_jsonl(tmp_path/"test.jsonl", test)
    want = by_hand([("train", i+1) for i in range(20)], [("test", i+1) for i in range(4)])
    rows = dict(train=ROWS, test=test)
    for more, part in (({}, slice(None)), (dict(shards=3), slice(0, None, 3)), (dict(shards=2, shards_idx=1), slice(1, None, 2))):
        e = entry(tmp_path, split=split, **more)
        assert rows_of(e)==[rows[s][n-1] for s, n in want[part]]
        assert row_places(e, list(range(1, len(want[part])+1)))==[f"{tmp_path}/{s}.jsonl:{n}" for s, n in want[part]]
        if "%" not in split and "-" not in split: assert streamed(e)==rows_of(e) and streamed(e, skip=2)==rows_of(e)[2:]


def test_shards_make_up_the_whole(tmp_path):
    f = write_jsonl(tmp_path/"x.jsonl", ROWS)
    parts = [rows_of(entry(f, shards=7, shards_idx=i)) for i in range(7)]
    assert sorted(map(str, sum(parts, [])))==sorted(map(str, ROWS)) and {len(p) for p in parts}=={2, 3}
    assert rows_of(entry(f, shards=7))==parts[0]
    with pytest.raises(UserError, match="`shards_idx: 7` must be under `shards: 7`"): load_rows(entry(f, shards=7, shards_idx=7))
    with pytest.raises(UserError, match="has no rows in `split: train"): load_rows(entry(f, split="train[:1]", shards=2, shards_idx=1))


def test_wrong_splits_list_the_right_ones(tmp_path):
    for n in ("train", "dev"): write_jsonl(tmp_path/f"{n}.jsonl", ROWS)
    with pytest.raises(UserError, match=r"has no split test; it has: validation, train|has no split test; it has: train, validation"): load_rows(entry(tmp_path, split="test[:5]"))
    (tmp_path/"one").mkdir()
    write_jsonl(tmp_path/"one"/"test.jsonl", ROWS)
    with pytest.raises(UserError, match=r"has no split train \(`split` is `train` where it is not given\); it has: test"): load_rows(entry(tmp_path/"one"))
    assert rows_of(entry(tmp_path/"dev.jsonl", split="train[5:999]"))==ROWS[5:]==streamed(entry(tmp_path/"dev.jsonl", split="train[5:999]"))
    for bad in ("train[a:b]", "train[5", "train[:5]]"):
        for read in (load_rows, lambda e: next(stream_rows(e))):
            with pytest.raises(UserError, match="split: train"): read(entry(tmp_path/"dev.jsonl", split=bad))
    with pytest.raises(UserError, match="how long a stream is, is not known"): next(stream_rows(entry(tmp_path, split="train[:5%]")))


def test_configurations_of_a_folder(tmp_path):
    for n in "ab": write_jsonl(tmp_path/f"{n}.jsonl", [dict(text=n)])
    write_jsonl(tmp_path/"b-test.jsonl", [dict(text="t")])
    head = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files:\n  - {split: train, path: b.json*}\n  - {split: test, path: b-test.jsonl}\n"
    (tmp_path/"README.md").write_text(head+"---\n")
    get = lambda **kw: [r["text"] for r in rows_of(entry(tmp_path, **kw))]
    assert get(name="a")==["a"] and get(name="b")==["b"] and get(name="b", split="test")==["t"]
    assert [rows_of(e)[0]["text"] for e in expand_entries([entry(tmp_path, name=["a", "b"])])]==["a", "b"]
    with pytest.raises(UserError, match="several configurations: say `name:` with one of a, b"): get()
    with pytest.raises(UserError, match="has no configuration 'c'; it has a, b"): get(name="c")
    (tmp_path/"README.md").write_text(head+"  default: true\n---\n")
    assert get()==["b"]


def test_data_files_choose(tmp_path):
    for i in range(4): write_jsonl(tmp_path/f"part-{i}.jsonl", [dict(text=str(i))])
    get = lambda **kw: [r["text"] for r in rows_of(entry(tmp_path, **kw))]
    assert get()==list("0123") and get(data_files="part-2.jsonl")==["2"] and get(data_files=["part-3.jsonl", "part-[01].jsonl"])==list("301") and get(data_files=str(tmp_path/"part-1.jsonl"))==["1"]
    assert rows_of(entry("json", data_files=str(tmp_path/"part-[12].jsonl")))==[dict(text="1"), dict(text="2")]
    assert rows_of(entry(tmp_path/"part-1.jsonl", data_files=[str(tmp_path/"part-1.jsonl")], ds_type="json"))==[dict(text="1")]
    with pytest.raises(UserError, match="no file part-9.jsonl in"): get(data_files="part-9.jsonl")
    for kw, says in ((dict(data_files="y.jsonl"), "`data_files` is for folders"), (dict(name="x"), "`name` is for folders"), (dict(revision="main"), "`revision` is for datasets of the hub")):
        with pytest.raises(UserError, match=says): load_rows(entry(tmp_path/"part-1.jsonl", **kw))


# a local path wins

@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError(f"the network was touched: {args}")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


def test_a_local_path_wins_and_touches_no_network(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    Path("someone/something").mkdir(parents=True)
    write_jsonl(Path("someone/something/x.jsonl"), ROWS)
    e = entry("someone/something")
    assert rows_of(e)==ROWS==streamed(e) and row_places(e, [2])==["someone/something/x.jsonl:2"] and len(fingerprint(e))==1
    with pytest.raises(UserError, match="no such file or folder: ./someone/else"): load_rows(entry("./someone/else"))
    with pytest.raises(AssertionError, match="the network was touched"): load_rows(entry("someone/else")) # the guard works


# S3, and other clouds

@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto.server")
    import logging
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as m:
        host, port = server.get_host_and_port()
        for k, v in dict(AWS_ACCESS_KEY_ID="me", AWS_SECRET_ACCESS_KEY="secret", AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE="/nowhere", AWS_SHARED_CREDENTIALS_FILE="/nowhere").items(): m.setenv(k, v)
        import s3fs
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        fs.mkdir("village")
        yield fs
    server.stop()


def test_s3(s3, tmp_path):
    for name in ("a.jsonl", "a.jsonl.zst", "a.csv", "a.parquet"):
        s3.pipe_file(f"village/one/{name}", FORMS[name](ROWS))
        assert rows_of(entry(f"s3://village/one/{name}"))==ROWS
    e = entry("s3://village/one/a.jsonl")
    assert streamed(e)==ROWS and row_places(e, [4])==["s3://village/one/a.jsonl:4"]
    saved(tmp_path/"saved", ROWS)
    s3.put(str(tmp_path/"saved"), "village/saved", recursive=True)
    assert rows_of(entry("s3://village/saved"))==ROWS
    for n in ("train", "test"): s3.pipe_file(f"village/many/{n}.jsonl", lines(ROWS if n=="train" else ROWS[:2]))
    assert rows_of(entry("s3://village/many"))==ROWS and rows_of(entry("s3://village/many/", split="test"))==ROWS[:2]
    assert row_places(entry("s3://village/many"), [1])==["s3://village/many/train.jsonl:1"]


def test_s3_is_read_again_when_it_changed(s3, monkeypatch):
    s3.pipe_file("village/new.jsonl", lines(ROWS))
    e = entry("s3://village/new.jsonl")
    first = fingerprint(e)
    assert rows_of(e)==ROWS and fingerprint(e)==first
    got = []
    monkeypatch.setattr("s3fs.S3FileSystem._get_file", lambda *a, **k: got.append(a))
    assert rows_of(e)==ROWS and not got # from the copy
    monkeypatch.undo()
    s3.pipe_file("village/new.jsonl", lines(ROWS).replace(b"answer 3", b"answer X"))
    assert fingerprint(e)!=first


def test_s3_after_a_change(s3):
    e = entry("s3://village/new2.jsonl")
    s3.pipe_file("village/new2.jsonl", lines(ROWS))
    assert rows_of(e)==ROWS
    s3.pipe_file("village/new2.jsonl", lines(ROWS[::-1]))
    assert rows_of(e)==ROWS[::-1]


def test_s3_says_what_is_missing(s3, monkeypatch):
    with pytest.raises(UserError, match="no such file or folder: s3://village/gone.jsonl"): load_rows(entry("s3://village/gone.jsonl"))
    with pytest.raises(UserError, match="no such file or folder: s3://nobucket/x.jsonl"): load_rows(entry("s3://nobucket/x.jsonl"))
    s3.pipe_file("village/bad.jsonl", b'{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match="^s3://village/bad.jsonl:2:7: this line is not JSON"): load_rows(entry("s3://village/bad.jsonl"))
    for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.delenv(k)
    with pytest.raises(UserError, match="Unable to locate credentials. Credentials come from the environment: `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`"): load_rows(entry("s3://village/a.jsonl"))


FILESYSTEMS = sys.modules["fsspec.registry"]._registry # protocol -> class, of what is loaded


@pytest.mark.parametrize("url, package, extra", [("gs://b/x.jsonl", "gcsfs", "gcs"), ("gcs://b/x.jsonl", "gcsfs", "gcs"), ("az://b/x.jsonl", "adlfs", "azure"), ("abfss://b@a/x.jsonl", "adlfs", "azure"), ("s3://b/x.jsonl", "s3fs", "s3")])
def test_missing_extras_are_named(url, package, extra, monkeypatch):
    monkeypatch.delitem(FILESYSTEMS, url.split(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as e: load_rows(entry(url))
    assert f'pip install "tuneforge[{extra}]"' in str(e.value)


@pytest.mark.parametrize("protocol", ["gs", "gcs", "az", "abfs"])
def test_other_clouds_go_the_same_way(protocol, monkeypatch):
    "Through fsspec's filesystem for the protocol, whatever it is: here one in memory"
    fake = type("Fake", (MemoryFileSystem,), dict(protocol=protocol, store={}, pseudo_dirs=[""], _strip_protocol=classmethod(lambda cls, p: MemoryFileSystem._strip_protocol(str(p).replace(f"{protocol}://", "memory://")))))
    monkeypatch.setitem(FILESYSTEMS, protocol, fake)
    fake().pipe_file("/box/d/x.jsonl.gz", gzip.compress(lines(ROWS)))
    assert rows_of(entry(f"{protocol}://box/d/x.jsonl.gz"))==ROWS==rows_of(entry(f"{protocol}://box/d"))
    assert row_places(entry(f"{protocol}://box/d"), [2])==[f"{protocol}://box/d/x.jsonl.gz:2"]


# https

PAGES, LOG = {}, []


class Web(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        LOG.append(path)
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path[4:])
            return self.end_headers()
        page = PAGES.get(path)
        self.send_response(200 if page is not None else 404)
        if page is not None and "notag" not in path: self.send_header("ETag", hashlib.md5(page).hexdigest())
        self.send_header("Content-Type", "text/html" if "page" in path else "application/octet-stream")
        self.send_header("Content-Length", str(len(page or b"")+(100 if "short" in path else 10**15 if "huge" in path else 0)))
        self.end_headers()
        self.wfile.write(page or b"")
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    with serving(Web, tmp_path_factory.mktemp("ca")/"ca.pem") as url: yield url


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv.zst", "a.parquet", "notag.jsonl"])
def test_https(web, name):
    PAGES[f"/{name}"] = FORMS.get(name, lines)(ROWS)
    e = entry(f"{web}/{name}?key=s3cret")
    assert rows_of(e)==ROWS==streamed(e)
    assert row_places(e, [1])[0].startswith(f"{web}/{name}:") and "s3cret" not in row_places(e, [1])[0]
    first = fingerprint(e)
    PAGES[f"/{name}"] = FORMS.get(name, lines)(ROWS[::-1])
    assert fingerprint(e)!=first and rows_of(e)==ROWS[::-1]


@pytest.mark.parametrize("path, says", [("/gone.jsonl", "404"), ("/page.jsonl", "a web page, not data"), ("/short.jsonl", "bytes arrived|IncompleteRead"), ("/huge.jsonl", "larger than what is free"), ("/to/http://example.org/x.jsonl", "not https"),
    ("/to/https://169.254.169.254/x.jsonl", "a private address"), ("/to/https://localhost:1/x.jsonl", "a private address"), ("/to/https://10.0.0.1/x.jsonl", "a private address")])
def test_https_refuses(web, path, says, cache):
    PAGES.update({"/page.jsonl": b"<html>", "/short.jsonl": lines(ROWS), "/huge.jsonl": lines(ROWS)})
    with pytest.raises(UserError, match=says) as e: load_rows(entry(f"{web}{path}?key=s3cret"))
    assert "s3cret" not in str(e.value)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_http_and_others_are_refused():
    for url, says in (("http://127.0.0.1/x.jsonl", "only https"), ("ftp://x/y.jsonl", "ftp:// addresses cannot be read")):
        with pytest.raises(UserError, match=says): load_rows(entry(url))


# the hub, on loopback

COMMITS = {} # (dataset, revision) -> (commit, {name: bytes})


class Hub(BaseHTTPRequestHandler):
    def answer(self, body, **headers):
        self.send_response(200 if body is not None else 404)
        if body is None: self.send_header("X-Error-Code", "RepoNotFound" if "api" in self.path else "EntryNotFound")
        for k, v in dict(headers, **{"Content-Length": len(body or b"")}).items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command=="GET": self.wfile.write(body or b"")
    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2]==["api", "datasets"]:
            sha, files = COMMITS.get(("/".join(parts[2:4]), parts[5] if len(parts)>5 else "main"), (None, {}))
            return self.answer(sha and json.dumps(dict(id="/".join(parts[2:4]), sha=sha, siblings=[dict(rfilename=n) for n in files])).encode(), Content_Type="application/json")
        if parts[0]=="datasets" and parts[3]=="resolve":
            sha, files = next(((s, f) for (d, _), (s, f) in COMMITS.items() if d=="/".join(parts[1:3]) and s==parts[4]), (None, {}))
            body = files.get("/".join(parts[5:]))
            return self.answer(body, ETag=f'"{hashlib.sha256(body or b"").hexdigest()}"', X_Repo_Commit=sha)
        self.answer(None)
    do_HEAD = do_GET
    def log_message(self, *args): pass


ASK = """
import json, sys
from tuneforge.dataset import expand_entries
from tuneforge.files import as_rows
from tuneforge.options import DatasetOptions
from tuneforge.sources import *
from tuneforge.document import UserError
e = DatasetOptions(**json.loads(sys.argv[1]))
try: print(json.dumps([dict(rows=as_rows(read_rows(o)[:])[0], stream=[r for _,r,_ in stream_rows(o)], place=row_places(o, [1]), what=fingerprint(o)) for o in expand_entries([e])]))
except UserError as e: print(json.dumps(str(e)))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    readme = b"---\nconfigs:\n- config_name: easy\n  data_files: easy/*\n- config_name: hard\n  data_files:\n  - {split: train, path: hard/train.jsonl}\n  - {split: test, path: hard/test.jsonl}\n---\n"
    files = {"README.md": readme, "easy/a.csv": table(ROWS), "hard/train.jsonl": lines(ROWS[::-1]), "hard/test.jsonl": lines(ROWS[:3])}
    COMMITS.update({("me/village", "main"): ("1"*40, files), ("me/village", "1"*40): ("1"*40, files), ("me/village", "v0"): ("0"*40, {"train.jsonl": lines(ROWS[:5])}),
        ("me/plain", "main"): ("2"*40, {"README.md": b"# words", ".gitattributes": b"x", "data/train-00000-of-00002.parquet": parquet(ROWS[:9]), "data/train-00001-of-00002.parquet": parquet(ROWS[9:]), "data/test-00000-of-00001.parquet": parquet(ROWS[:2])})})
    with serving(Hub) as url:
        def ask(offline=False, **kw):
            res = run(sys.executable, "-c", ASK, json.dumps(kw), env=dict(HF_ENDPOINT=url, HF_HUB_OFFLINE=str(int(offline)), HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1"))
            assert res.returncode==0, res.stderr
            return json.loads(res.stdout.splitlines()[-1])
        yield ask


def test_hub(hub):
    got, = hub(path="me/plain")
    assert got["rows"]==ROWS==got["stream"] and got["place"]==["me/plain/data/train-00000-of-00002.parquet: row 1"] and all("2"*40 in o for o in got["what"])
    assert hub(path="me/plain", split="test[1:]+train[:2]")[0]["rows"]==ROWS[1:2]+ROWS[:2]
    assert hub(path="me/plain", data_files="data/test*")[0]["rows"]==ROWS[:2]


def test_hub_configurations_and_revisions(hub):
    easy, hard = hub(path="me/village", name=["easy", "hard"])
    assert (easy["rows"], hard["rows"])==(ROWS, ROWS[::-1]) and hard["place"]==["me/village/hard/train.jsonl:1"]
    assert hub(path="me/village", name="hard", split="test")[0]["rows"]==ROWS[:3]
    assert "say `name:` with one of easy, hard" in hub(path="me/village")
    old, = hub(path="me/village", revision="v0")
    assert old["rows"]==ROWS[:5] and "0"*40 in old["what"][0]
    assert "has no split dev; it has: train, test" in hub(path="me/village", name="hard", split="dev")
    assert "'me/nothing' is no local file, and on the hub: " in hub(path="me/nothing")


@pytest.mark.slow
def test_hub_offline_gives_the_same_and_never_another_revision(hub):
    online = hub(path="me/village", name="easy"), hub(path="me/village", revision="v0")
    assert (hub(True, path="me/village", name="easy"), hub(True, path="me/village", revision="v0"))==online
    assert "offline mode" in hub(True, path="me/village", revision="v1")
    COMMITS["me/village", "main"] = "3"*40, {"train.jsonl": lines(ROWS[:1])}
    assert hub(path="me/village")[0]["what"][0].split()[1]=="3"*40


# what is broken

BROKEN = {"cut.jsonl.gz": (gzip.compress(os.urandom(9000).hex().encode()+b"\n")[:-20], r"cut.jsonl.gz:\d+: the file is cut off or damaged here"), "cut.jsonl.zst": (zst(lines(ROWS)*99)[:-9], r"cut.jsonl.zst:\d+: the file is cut off"), "no.jsonl.gz": (lines(ROWS), "no.jsonl.gz: this is no gzip file: if it isn't compressed, take `.gz` off its name"), "no.csv.BZ2": (table(ROWS), "no.csv.BZ2: this is no bz2 file: .* take `.BZ2` off"), "no.txt.zst": (gzip.compress(b"x"), "no.txt.zst: this is no zstd file"),
    "utf.jsonl": (lines(ROWS[:1])+b'\n{"a": "\xff"}\n', "utf.jsonl:3: this is not UTF-8 text"), "utf.csv": (b"a,b\n1,2\n\xff,3\n", "utf.csv:3: this is not UTF-8 text"), "utf.txt": (b"a\n\n\xff\n", "utf.txt:3: this is not UTF-8 text"), "utf.json": (b'[{"a": "x"},\n{"a": "\xff"}]', "utf.json:2: this is not UTF-8"),
    "mid.jsonl": (lines(ROWS[:2])+b'{"a": \n'+lines(ROWS), "mid.jsonl:3:7: this line is not JSON"), "two.jsonl": (b'{"a": 1}\n{"a": 1} {"a": 2}\n', "two.jsonl:2:10: this line is not JSON: Extra data"), "half.jsonl": (b'{"a": "\\ud83d"}\n', "half.jsonl:1: half a character"), "nan.jsonl": (b'{"a": NaN}\n{"a": "x"}\n{"a": \n', "nan.jsonl:1: this line is not JSON: NaN is no number"),
    "list.jsonl": (b'{"a": 1}\n[1]\n', "list.jsonl:2: a row is a JSON object, this is list"), "array.json": (b'[{"a": 1},\n{"a" 2}]', "array.json:2:6: this is not JSON"), "array2.json": (b'[{"a": 1}, 5]', "array2.json: row 2: a row is a JSON object, this is int"), "deep.jsonl": (b'{"a": 1}\n'+b'{"a":'*100000+b'\n', "deep.jsonl:2: this line is not JSON"),
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"), "blank.jsonl": (b"\n \n", "blank.jsonl: there are no rows"), "head.csv": (b"a,b\n", "head.csv: there are no rows"), "none.json": (b"[]", "none.json: there are no rows"),
    "cells.csv": (b'a,b\n"1\n",2\n\n3\n', "cells.csv:5: 1 cells, but the header has 2"), "quote.csv": (b'a,b\n1,2\n"3,4\n5,6\n', "quote.csv:3: this is not CSV: unexpected end of data"), "twice.csv": (b"a,a\n1,2\n", "twice.csv:1: the header has 'a' twice"),
    "no.parquet": (b"PAR1xxxx", "no.parquet: no Parquet file, or a damaged one"), "cut.parquet": (parquet(ROWS)[:-50], "cut.parquet: no Parquet file"), "cut.arrow": (arrow(ROWS)[:400], "cut.arrow: no Arrow file, or a damaged one"), "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "lfs.parquet: this is only a pointer of Git LFS"),
    "x.bin": (b"x", "the suffix of x.bin does not tell what is in it; say `ds_type:`")}


@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.jsonl.gz"])
def test_wide_text_is_recognised(name, code, tmp_path):
    "One sentence for the file, rather than one for each line, however it is read"
    text = ("\ufeff"+{"x.csv": "a,b\n1,2\n", "x.tsv": "a\tb\n1\t2\n", "x.txt": "a\nb\n", "x.json": '[{"a": 1}]'}.get(name, '{"a": 1}\n{"a": 2}\n')).encode(code)
    (tmp_path/name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    for read in (lambda: load_rows(entry(tmp_path/name)), lambda: read_rows(entry(tmp_path/name), "skip"), lambda: list(stream_rows(entry(tmp_path/name)))):
        with pytest.raises(UserError, match=rf"{name}: this looks like {code[:6].upper()} text: save the file as UTF-8") as e: read()
        assert "\n" not in str(e.value)


def test_text_of_another_encoding_names_the_way_out(tmp_path):
    (tmp_path/"w.jsonl").write_bytes('{"a": "Käthe"}\n'.encode("cp1252")*3)
    with pytest.raises(UserError) as e: load_rows(entry(tmp_path/"w.jsonl"))
    assert str(e.value).count("this is not UTF-8 text")==3 and str(e.value).count("iconv -f WINDOWS-1252 -t UTF-8")==1


def test_broken_lines_name_the_way_out(tmp_path):
    (tmp_path/"x.jsonl").write_bytes(b'{"a": 1}\n'+b'{"a": \n'*12)
    with pytest.raises(UserError) as e: load_rows(entry(tmp_path/"x.jsonl"))
    assert str(e.value).endswith("… and 2 more\n`on_bad_row: skip` leaves such rows out")
    assert len(as_rows(read_rows(entry(tmp_path/"x.jsonl"), "skip")[:])[1])==12 # and it does


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path, cache):
    content, says = BROKEN[name]
    (tmp_path/name).write_bytes(content)
    for _ in range(2): # a second time, too
        with pytest.raises(UserError, match=says) as e: load_rows(entry(tmp_path/name))
        assert "Traceback" not in str(e.value) and len(str(e.value))<900
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("name, content, good", [("x.jsonl", b'{"a": "1"}\n\n{"a": "\xff"}\n{"a": \n[1]\n{"a": "2"}\n', {1: "1", 6: "2"}), ("x.csv", b'a,b\n1,x\n\xff,x\n\n2\n"3 " z,x\n"4\n5",x\n', {2: "1", 7: "4\n5"}), ("x.txt", b"1\n\n\xff\n2\n", {1: "1", 4: "2"})])
def test_bad_rows_may_stay_behind(name, content, good, tmp_path):
    "Each row that cannot be read has its place and its text; the others are what they are"
    (tmp_path/name).write_bytes(content)
    e = entry(tmp_path/name)
    ds = read_rows(e, "skip")
    rows, errors = as_rows(ds[:])
    places = row_places(e, list(range(1, len(ds)+1)))
    assert {int(p.rsplit(":", 1)[1]): r.get("a", r.get("text")) for i, (p, r) in enumerate(zip(places, rows)) if i not in errors}==good
    assert [p for p, r, _ in stream_rows(e) if r is None]==[places[i] for i in errors] and [str(errors[i]) for i in errors]==[err for *_, err in stream_rows(e) if err]
    assert [rows[i] for i in errors]==[{}]*len(errors) and "\\xff" in str([raw_row(ds[i]) for i in errors])
    with pytest.raises(UserError): load_rows(e)


def test_folders_that_are_not_clear(tmp_path):
    (tmp_path/"a.csv").write_bytes(table(ROWS))
    write_jsonl(tmp_path/"b.jsonl", ROWS[:3])
    with pytest.raises(UserError, match=r"several kinds \(csv: a.csv, json: b.jsonl\): choose with `ds_type` or `data_files`"): load_rows(entry(tmp_path))
    assert rows_of(entry(tmp_path, ds_type="csv"))==ROWS and rows_of(entry(tmp_path, data_files="b.jsonl"))==ROWS[:3]
    with pytest.raises(UserError, match="no parquet file in"): load_rows(entry(tmp_path, ds_type="parquet"))
    (tmp_path/"c").mkdir()
    for n in ("train", "words"): write_jsonl(tmp_path/"c"/f"{n}.jsonl", ROWS)
    with pytest.raises(UserError, match="names tell the splits of some files .train.jsonl., but not of words.jsonl"): load_rows(entry(tmp_path/"c"))
    (tmp_path/"e").mkdir()
    with pytest.raises(UserError, match="no data file in"): load_rows(entry(tmp_path/"e"))


def test_mixed_types_and_missing_columns_are_named_by_the_format(tmp_path):
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
    f = write_jsonl(tmp_path/"x.jsonl", [dict(instruction="a", output="b", id=1), dict(instruction="a", output=5, id="two"), dict(instruction="a", answer="b"), *ROWS])
    opts = lambda **kw: DataOptions(datasets=[entry(f)], dataset_prepared_path=str(tmp_path/"prepared"), **kw)
    with pytest.raises(UserError, match=r"x.jsonl:2: output is a number \(5\), but should be text"): prepare_data(opts(), tok)
    assert prepare_data(opts(on_bad_row="skip"), tok).report.sources[0].dropped=={"no good": 2}
    (tmp_path/"x.csv").write_bytes(table(ROWS).replace(b"output", b"answer", 1))
    with pytest.raises(UserError, match="x.csv:2: the row has no `output`"): prepare_data(DataOptions(datasets=[entry(tmp_path/"x.csv")], dataset_prepared_path=str(tmp_path/"prepared")), tok)


# content

def test_content_is_what_counts(tmp_path):
    a = write_jsonl(tmp_path/"a.jsonl", ROWS)
    first = fingerprint(entry(a))
    stat = a.stat()
    a.write_bytes(a.read_bytes().replace(b"answer 3", b"answer X"))
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns)) # as if nothing had happened
    assert fingerprint(entry(a))!=first and "answer X" in str(rows_of(entry(a)))
    b = write_jsonl(tmp_path/"b.jsonl", ROWS)
    assert fingerprint(entry(b))==first and rows_of(entry(b))==ROWS
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
    key = lambda **kw: data_key(DataOptions(datasets=[entry(b, **kw)]), tok)
    assert len({key(), key(split="train[:5]"), key(shards=2), key(shards=2, shards_idx=1)})==4


def test_a_table_is_read_once(tmp_path, monkeypatch):
    a, b = (write_jsonl(tmp_path/n, ROWS) for n in ("a.jsonl", "b.jsonl"))
    load_rows(entry(a))
    monkeypatch.setattr("tuneforge.files.write_tables", None)
    assert rows_of(entry(a))==ROWS==rows_of(entry(b))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_flat(tmp_path):
    "A hundred megabytes more to read are no hundred megabytes more in memory"
    code = """
import re, sys
from tuneforge.options import DatasetOptions
from tuneforge.sources import load_rows, stream_rows
read = load_rows if sys.argv[2]=="load" else lambda e: list(1 for _ in stream_rows(e))
print(len(read(DatasetOptions(path=sys.argv[1]))), int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])//1024)
"""
    row = {"x.jsonl": json.dumps(dict(a="x"*500, b="y"*500))+"\n", "x.csv": "x"*500+","+"y"*500+"\n"}
    for name, how in (("x.jsonl", "load"), ("x.csv", "load"), ("x.jsonl", "stream")):
        peaks = []
        for n in (30_000, 130_000):
            (tmp_path/name).write_text("a,b\n"*(name=="x.csv")+row[name]*n)
            count, mib = map(int, run(sys.executable, "-c", code, tmp_path/name, how, env=dict(HF_HOME=str(tmp_path/"home"))).stdout.split())
            assert count==n
            peaks.append(mib)
        assert peaks[1]-peaks[0]<40, (name, how, peaks)


def test_rows_with_long_texts_are_read_in_small_batches(tmp_path):
    from tuneforge.files import _batches
    (tmp_path/"x.txt").write_text(("x"*1000+"\n")*100)
    f = DataFile(tmp_path/"x.txt", "text", "x.txt")
    assert [len(b) for b in _batches(file_rows(f), size=3000)]==[3]*33+[1] and [len(b) for b in _batches(file_rows(f), rows=60)]==[60, 40]


def test_train_on_split_is_split():
    cfg = load_config(dict(base_model="tiny:llama", learning_rate=1e-4, datasets=[dict(path="x/y", type="alpaca", train_on_split="validation", shards=4, preprocess_shards=2, ds_type="tsv")]))
    assert cfg.datasets[0].split=="validation"


def test_pretraining_entries_are_sources(tmp_path):
    (tmp_path/"x.txt").write_text("one\ntwo\nthree\n")
    e = PretrainingDataset(path=str(tmp_path/"x.txt"))
    assert list(stream_rows(e, skip=1))==[(f"{tmp_path}/x.txt:2", dict(text="two"), None), (f"{tmp_path}/x.txt:3", dict(text="three"), None)]


# ---- what may not be read or written

def test_files_that_may_not_be_read_are_said(tmp_path):
    f = write_jsonl(tmp_path/"a.jsonl", ROWS)
    f.chmod(0)
    (tmp_path/"closed").mkdir()
    (tmp_path/"closed").chmod(0)
    opts = lambda p: DataOptions(datasets=[entry(p)], dataset_prepared_path=str(tmp_path/"prepared"))
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
    try:
        with permissions_hold():
            for read in (load_rows, lambda e: list(stream_rows(e))):
                with pytest.raises(UserError, match="a.jsonl: cannot be read: Permission denied. Give yourself"): read(entry(f))
            with pytest.raises(UserError, match="a.jsonl: cannot be read: Permission denied"): prepare_data(opts(f), tok)
            with pytest.raises(UserError, match="a folder on the way there cannot be read"): prepare_data(opts(tmp_path/"closed"/"a.jsonl"), tok)
    finally: (tmp_path/"closed").chmod(0o755)


@pytest.mark.parametrize("made", [False, True])
def test_a_cache_that_may_not_be_written_is_said(tmp_path, cache, made):
    f = write_jsonl(tmp_path/"a.jsonl", ROWS)
    if made: (folder := cache/"tuneforge"/"tables").mkdir(parents=True)
    for o in ([folder] if made else [cache]): o.chmod(0o555)
    try:
        with permissions_hold(), pytest.raises(UserError, match="the cache of `datasets` cannot be written: Permission denied. Set `HF_HOME`"): load_rows(entry(f))
    finally: (folder if made else cache).chmod(0o755)
    assert len(load_rows(entry(f)))==len(ROWS)
    with permissions_hold(): # what is there already is read
        cache.chmod(0o555)
        try: assert len(load_rows(entry(f)))==len(ROWS)
        finally: cache.chmod(0o755)


@pytest.mark.parametrize("path", ["x"*300, f"someone/{'x'*300}", f"a/{'x'*300}.jsonl"])
def test_names_that_no_file_can_have(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_local(path)==path.endswith(".jsonl")
    with pytest.raises(UserError): load_rows(entry(path))
