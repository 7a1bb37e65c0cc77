"Prepared data: found when nothing that matters has changed, made once, never half"
import errno, json, os, resource, time
from pathlib import Path
import pytest
from tuneforge.config import Config, DataOptions, DatasetOptions, TokenizerOptions, UserError
from tuneforge.dataset import data_key, key_parts, prepare_data, prepared_place, why_miss
from tuneforge.store import changes, digest, disk_full, is_whole, made_once, read_manifest
from tuneforge.tokens import load_tokenizer
from tests.tools import FORKS, permissions_hold, tuneforge, write_jsonl

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
CHAT = [dict(role="user", content="Who?"), dict(role="assistant", content="Bagol.")]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


# ---- what is a miss, and what is a hit

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path/"a.jsonl", [dict(instruction=str(i), output="b") for i in range(5)])
    write_jsonl(tmp_path/"c.jsonl", [dict(messages=CHAT)]*3)
    (tmp_path/"t.jinja").write_text(TEMPLATE)
    (tmp_path/"mine.py").write_text("def f(row): return [('a', False), ('b', True)]")
    return tmp_path


BASE = dict(base_model="tiny:llama", learning_rate=1e-4, datasets=[dict(path="a.jsonl"), dict(path="c.jsonl", type="chat_template", chat_template_jinja="t.jinja"), dict(path="a.jsonl", type="mine:f")], val_set_size=0.2)


def entries(i, **kw): return dict(datasets=[e | kw if n==i else e for n, e in enumerate(BASE["datasets"])])


def key(**kw): return data_key(Config(**{k: v for k, v in (BASE | kw).items() if v is not None}), TOK)


def edit(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


MISS = [dict(sequence_len=513), dict(min_sample_len=3), dict(excess_length_strategy="truncate"), dict(on_untrained_row="keep"), dict(on_bad_row="skip"), dict(train_on_inputs=True), dict(dataset_exact_deduplication=True), dict(val_set_size=0.25),
    dict(dataset_shard_num=2, dataset_shard_idx=0), dict(seed=1), dict(default_system_message="Be kind."), dict(eot_tokens=["</s>"]), dict(shuffle_merged_datasets=False, shuffle_before_merging_datasets=True),
    dict(test_datasets=[dict(path="a.jsonl")], val_set_size=None), entries(0, type=dict(field_instruction="instruction")), entries(0, max_rows=3), entries(1, roles_to_train=["user"]), entries(1, roles_to_train=None), entries(1, train_on_eos="all"),
    entries(1, field_messages="conversations"), entries(1, drop_system_message=True), entries(1, chat_template_jinja=TEMPLATE+" "), entries(0, split="train[:3]"), entries(0, type="completion"), entries(0, type="completion", field="output"),
    dict(datasets=BASE["datasets"][::-1]), dict(datasets=BASE["datasets"][:2]), dict(datasets=[e | dict(weight=1) for e in BASE["datasets"]])]
HIT = [dict(learning_rate=1), dict(output_dir="elsewhere"), dict(dataset_prepared_path="elsewhere"), dict(dataset_processes=2), dict(num_epochs=9), dict(micro_batch_size=4), dict(sample_packing=True), dict(shuffle_merged_datasets=False), dict(shuffle_before_merging_datasets=True),
    dict(dropped_rows_stop=0.9, dropped_rows_warn=0.3), dict(adapter="lora", lora_target_linear=True), dict(optimizer="adamw_torch_fused"), dict(warmup_steps=3), dict(debug=True), dict(datasets=[dict(reversed(e.items())) for e in BASE["datasets"]]), entries(1, chat_template_jinja=TEMPLATE), entries(0, type="alpaca"),
    entries(0, path="./a.jsonl"), dict(reversed(BASE.items())), dict(save_steps=5), dict(gradient_checkpointing=True), dict(sequence_len=512)]


@pytest.mark.parametrize("kw", MISS, ids=lambda o: str(o)[:60])
def test_what_decides_about_a_token_is_a_miss(home, kw): assert key(**kw)!=key()


@pytest.mark.parametrize("kw", HIT, ids=lambda o: str(o)[:60])
def test_anything_else_is_a_hit(home, kw): assert key(**kw)==key()


def test_a_seed_that_draws_nothing_is_a_hit(home): assert key(val_set_size=None, seed=1)==key(val_set_size=None)


@pytest.mark.parametrize("file, old, new, says", [("a.jsonl", "3", "4", "content"), ("c.jsonl", "Who", "who", "content"), ("t.jinja", "</s>", "</s> ", "chat template"), ("mine.py", "'b'", "'c'", "own code")])
def test_one_character_of_a_file_is_a_miss(home, file, old, new, says):
    opts = Config(**BASE)
    before, parts = data_key(opts, TOK), key_parts(opts, TOK)
    edit(file, old, new)
    assert data_key(opts, TOK)!=before and all(says in c for c in changes(parts, key_parts(opts, TOK))) and changes(parts, key_parts(opts, TOK))
    edit(file, new, old)
    assert data_key(opts, TOK)==before


def test_moved_files_are_a_hit(home):
    before = key()
    for f in ("a.jsonl", "c.jsonl", "t.jinja"): (home/f).rename(home/f"moved{f}")
    moved = [e | dict(path=f"moved{e['path']}") | ({"chat_template_jinja": "movedt.jinja"} if "chat_template_jinja" in e else {}) for e in BASE["datasets"]]
    assert key(datasets=moved)==before


def test_tokenizers_count_by_what_they_do(home):
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama", special_tokens=dict(pad_token="<filler>")))
    opts = Config(**BASE)
    assert changes(key_parts(opts, TOK), key_parts(opts, tok))==["special tokens: changed", "tokenizer: changed"]
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
    tok("a"*99, truncation=True, max_length=5, padding="max_length") # which changes the state of its backend
    assert data_key(opts, tok)==data_key(opts, TOK)


def test_templates_that_nobody_reads_are_a_hit(home):
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama", chat_template="gemma"))
    plain = Config(**BASE | dict(datasets=BASE["datasets"][:1]))
    assert data_key(plain, tok)==data_key(plain, TOK)


def test_why_miss_names_the_part(home):
    ask = lambda **kw: why_miss(Config(**BASE | kw), TOK)
    assert "nothing had been prepared" in ask() and not (home/"last_run_prepared").exists()
    prepare_data(Config(**BASE), TOK)
    assert "prepared, and will be used" in ask()
    prepare_data(Config(**BASE | dict(sequence_len=300, min_sample_len=3)), TOK) # a less similar one, and newer
    edit("a.jsonl", "3", "4")
    assert [l.strip() for l in ask().splitlines()[1:]]==["datasets[0]: content of file 1: changed", "datasets[2]: content of file 1: changed"]
    edit("a.jsonl", "4", "3")
    (home/"c.yml").write_text(json.dumps(BASE | dict(sequence_len=200)))
    said = tuneforge("preprocess", "c.yml", "--why-miss", cwd=home).stdout
    assert said.splitlines()[1:]==["  sequence_len: 512 → 200"] and len(list((home/"last_run_prepared").iterdir()))==2


# ---- made once

def big(d, n=4000): return write_jsonl(d/"big.jsonl", [dict(instruction=f"question {i}", output=f"answer {i*i}") for i in range(n)])


def go(d, folder="prepared", entries=None, **kw):
    return prepare_data(DataOptions(datasets=[DatasetOptions(path=str(d/"big.jsonl"), **(entries or {}))], val_set_size=0.1, dataset_prepared_path=str(d/folder), **kw), TOK)


def content(data): return data.train["input_ids"][:], data.train["labels"][:], data.valid["input_ids"][:], str(data.report)


def work(d, kw):
    os.chdir(d)
    go(d, **kw)


def spawn(d, **kw):
    p = FORKS.Process(target=work, args=(d, kw))
    p.start()
    return p


def test_processes_that_start_together_do_the_work_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    big(tmp_path, 1500)
    (tmp_path/"counting.py").write_text("def f(row):\n    open('calls', 'a').write('.')\n    return [(row['instruction'], False), (row['output'], True)]\n")
    calls = lambda: (tmp_path/"calls").stat().st_size
    alone = spawn(tmp_path, folder="alone", entries=dict(type="counting:f"))
    alone.join()
    n = calls()
    assert alone.exitcode==0 and n>=1500
    many = [spawn(tmp_path, entries=dict(type="counting:f")) for _ in range(4)]
    for p in many: p.join()
    assert [p.exitcode for p in many]==[0]*4 and calls()==2*n
    assert len([f for f in (tmp_path/"prepared").iterdir() if f.is_dir()])==1


def whole_or_absent(folder):
    "Nothing under a final name but what is whole"
    for f in folder.iterdir() if folder.exists() else []:
        if f.is_dir() and not f.name.endswith(".part"): assert is_whole(f)


def wait_for_part(folder, process):
    "When the process began to write"
    known = set(folder.glob("*.part")) # halves of those that were killed before
    while process.is_alive() and not set(folder.glob("*.part"))-known: time.sleep(0.005)
    return time.monotonic()


@pytest.mark.parametrize("processes, n", [(1, 4), (2, 2), *[pytest.param(*o, marks=pytest.mark.slow) for o in ((1, 40), (2, 12))]])
def test_killed_at_any_moment(tmp_path, processes, n):
    big(tmp_path, 4000 if processes==1 else 10_001)
    want = content(go(tmp_path, "reference", dataset_processes=processes))
    p = spawn(tmp_path, folder="timed", dataset_processes=processes)
    writing = wait_for_part(tmp_path/"timed", p)
    p.join()
    whole, killed, halves = time.monotonic()-writing, 0, 0
    for i in range(n): # moments spread over the writing, from its first on: how long the start takes doesn't matter
        p = spawn(tmp_path, dataset_processes=processes)
        wait_for_part(tmp_path/"prepared", p)
        p.join(whole*i/n)
        killed += p.is_alive()
        p.kill()
        p.join()
        halves += any(f.name.endswith(".part") for f in (tmp_path/"prepared").glob("*"))
        whole_or_absent(tmp_path/"prepared")
        for f in (tmp_path/"prepared").glob("*"):
            if is_whole(f): f.rename(tmp_path/f"done{i}") # so that the next one has to work, too
    assert killed and halves
    data = go(tmp_path, dataset_processes=processes)
    assert content(data)==want and is_whole(data.path)
    if processes==1: assert not list((tmp_path/"prepared").glob("*.part"))
    for d in tmp_path.glob("done*"): assert read_manifest(d)["files"]==read_manifest(data.path)["files"]


def test_damage_is_found_and_mended(tmp_path, caplog):
    big(tmp_path, 50)
    data = go(tmp_path)
    want = content(data)
    tokens, = (data.path/"samples").rglob("tokens*.arrow")
    whole = tokens.read_bytes()
    tokens.unlink()
    tokens.write_bytes(whole[:len(whole)//2])
    again = go(tmp_path)
    assert content(again)==want and "damaged" in again.why and not list((tmp_path/"prepared").glob("*.part"))
    (data.path/"train.npy").unlink()
    assert content(go(tmp_path))==want
    assert "found" in go(tmp_path).why


# ---- a full disk

def full(d, limit, out):
    "Prepare with files of at most so many bytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: go(d); out.put("done")
    except UserError as e: out.put(str(e))


@pytest.mark.parametrize("limit", [1000, 100_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 50_000_000))])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, limit):
    big(tmp_path)
    want = content(go(tmp_path, "reference")) # now the rows are in the cache of `datasets`
    out = FORKS.Queue()
    p = FORKS.Process(target=full, args=(tmp_path, limit, out))
    p.start()
    said = out.get(timeout=120)
    p.join()
    if limit==50_000_000: assert said=="done"
    else: assert "no room left" in said and "dataset_prepared_path" in said and not [f for f in (tmp_path/"prepared").iterdir() if f.is_dir()]
    assert content(go(tmp_path))==want


def test_full_disks_come_in_many_clothes():
    def clothed(*errors):
        for e, cause in zip(errors, errors[1:]): e.__cause__ = cause
        return errors[0]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk_full(full) and disk_full(clothed(ValueError("x"), RuntimeError("y"), full)) and disk_full(OSError(f"write failed. Detail: [errno 28] {os.strerror(errno.ENOSPC)}"))
    assert not disk_full(OSError(errno.EACCES, "x")) and not disk_full(ValueError(os.strerror(errno.ENOSPC)))


def hold(d, i):
    def make(part):
        with open(d/"inside", "x"): time.sleep(0.02) # fails where another is inside
        (d/"inside").unlink()
        if i%3: raise KeyError(i)
        (part/"x").write_text("x")
    try: made_once(d/"a", dict(a=1), make)
    except KeyError: pass


def test_one_at_a_time_also_where_some_fail(tmp_path):
    many = [FORKS.Process(target=hold, args=(tmp_path, i)) for i in range(1, 8)]
    for p in many: p.start()
    for p in many: p.join()
    assert [p.exitcode for p in many]==[0]*7 and is_whole(tmp_path/"a") and {f.name for f in tmp_path.iterdir()}-{"a.lock"}=={"a"} # whoever waited may have left its lock, which is empty


def test_other_errors_come_as_they_are(tmp_path):
    def fail(part): (part/"x").write_text("x"); raise KeyError("y")
    with pytest.raises(KeyError): made_once(tmp_path/"a", dict(a=1), fail)
    assert not list(tmp_path.iterdir())
    assert made_once(tmp_path/"a", dict(a=1), lambda part: (part/"x").write_text("z"))[0] and (tmp_path/"a"/"x").read_text()=="z"


def test_a_place_that_cannot_be_written_still_reads(tmp_path):
    big(tmp_path, 50)
    data = go(tmp_path)
    (tmp_path/"prepared").chmod(0o555)
    before = (tmp_path/"prepared").stat().st_mtime_ns
    assert "found" in go(tmp_path).why and (tmp_path/"prepared").stat().st_mtime_ns==before # nothing is written where all is there
    assert prepared_place(DataOptions(datasets=[DatasetOptions(path=str(tmp_path/"big.jsonl"))], val_set_size=0.1, dataset_prepared_path=str(tmp_path/"prepared")), TOK)[0]==data.path


def test_digests_are_of_values(): assert digest(dict(a=1, b=[2]))==digest(dict(b=[2], a=1))!=digest(dict(a=1, b=["2"])) and digest("x")==digest(b"x") and len(digest("x"))==16


# ---- places that cannot be written, and long reasons

@pytest.mark.parametrize("place, says", [("/proc/zz/prepared", "No such file"), ("a.jsonl", "File exists"), ("a.jsonl/below", "Not a directory")])
def test_a_place_that_cannot_be_written_is_said(home, place, says):
    opts = DataOptions(datasets=[DatasetOptions(path="a.jsonl")], dataset_prepared_path=place)
    with pytest.raises(UserError) as e: prepare_data(opts, TOK)
    assert f"`dataset_prepared_path`: cannot write to {place}: {says}" in str(e.value) and "Name a folder" in str(e.value)


def test_changes_can_be_read():
    h, k = digest("a"), digest("b")
    told = lambda old, new: changes(dict(x=old), dict(x=new))
    assert [told(h, k), told(None, k), told(h, None), told(h, dict(a=1))]==[["x: changed"], ["x: new"], ["x: gone"], [f"x: '{h}' → a block with a"]]
    assert told(dict(a=1, b=dict(c="d")), dict(a=1, b=dict(c="e", f=None)))==["x.b.c: 'd' → 'e'"] and told("alpaca", dict(a=1))==["x: 'alpaca' → a block with a"]
    assert told({}, None)==["x: {} → not there"] and told({}, dict(a=None))==["x: {} → a block with a"] # whatever differs is told
    same = "You are a helpful assistant. "*9
    said, = told(same+"Be brief."+same, same+"Be kind."+same)
    assert "Be brief" in said and "Be kind" in said and len(said)<150 and said.count("…")==4
    assert told("a"*70, "b")==[f"x: '{'a'*59}… → 'b'"]


def test_unasked_only_the_names_are_told_and_only_of_a_few_changes(home):
    many = dict(sequence_len=300, seed=7, min_sample_len=3, val_set_size=0.5, dataset_exact_deduplication=True)
    assert [prepare_data(Config(**BASE | kw), TOK).why for kw in ({}, dict(sequence_len=300), many)]==["prepared now", "prepared now; since an earlier time, this has changed: sequence_len", "prepared now"]


def test_a_long_list_of_changes_is_cut(home):
    entry = lambda f: DatasetOptions(path=f)
    for i in range(9): write_jsonl(home/f"n{i}.jsonl", [dict(instruction=f"n{i}", output="b")]*3)
    prepare_data(DataOptions(datasets=[entry("a.jsonl")]), TOK)
    others = [entry(f"n{i}.jsonl") for i in range(9)]
    said = why_miss(DataOptions(datasets=others, sequence_len=100), TOK)
    assert "other datasets: none of their files is the same" in said and "sequence_len: " in said and "datasets[" not in said and said.count("\n")<8
    said = why_miss(DataOptions(datasets=[entry("a.jsonl"), *others]), TOK) # one file is shared: its entry is the same
    assert "other datasets" not in said and "datasets[1]" in said and "datasets[0]" not in said
    parts = [key_parts(DataOptions(datasets=o), TOK) for o in ([entry("a.jsonl")], [entry("a.jsonl"), *others])]
    assert said.splitlines()[-1]==f"  … and {len(changes(*parts))-10} more" and said.count("\n")==11


# ---- others' folders beside ours

PARTS = dict(a=1)

def fill(folder): (folder/"x").write_text("x")


@pytest.mark.parametrize("text", ['{"name": "web app"}', '{"name": ', "[1]", "", '{"parts": [], "files": {}, "made": ""}', "\udcff"])
def test_foreign_manifests_are_passed_over(tmp_path, text):
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert made_once(tmp_path/digest(PARTS), PARTS, fill)[0] and not made_once(tmp_path/digest(PARTS), PARTS, fill)[0]
    assert "; since an earlier time, this has changed: a" in made_once(tmp_path/"b", dict(a=2), fill)[1] # compared with ours


@pytest.mark.parametrize("text", ["", '{"parts": {}', "{}"])
def test_half_a_manifest_is_damage(tmp_path, text):
    made_once(tmp_path/"a", PARTS, fill)
    (tmp_path/"a"/"manifest.json").write_text(text)
    assert not is_whole(tmp_path/"a") and "damaged" in made_once(tmp_path/"a", PARTS, fill)[1] and is_whole(tmp_path/"a")


def test_what_others_keep_to_themselves(tmp_path):
    made_once(tmp_path/"a", PARTS, fill)
    (tmp_path/"a").chmod(0)
    try:
        with permissions_hold():
            assert made_once(tmp_path/"b", dict(a=2), fill)==(True, "prepared now")
            with pytest.raises(UserError, match="may not read.*dataset_prepared_path"): made_once(tmp_path/"a", PARTS, fill) # and it is not thrown away
    finally: (tmp_path/"a").chmod(0o755)
    assert is_whole(tmp_path/"a")
