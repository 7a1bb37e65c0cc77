"Scores against those computed by hand, a token and a row at a time, and everything that cannot be scored"
import collections, csv, io, json, math, re, shutil
from importlib import util
import numpy as np, pytest, torch
from tuneforge.all import *
from tuneforge.generate import questions_and_answers
from tuneforge.score import by_dataset, check_unseen, choice_prompt, find_tasks, harness, losses, read_bench, text_scores
from tests.tools import command, write_jsonl

VILLAGE = Village()


@pytest.fixture(scope="module")
def tok(): return load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
@pytest.fixture(scope="module")
def model(tok): return load_model(ModelOptions(base_model="tiny:llama"), tok).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A run on two data sets, one of them plain text"
    d = tmp_path_factory.mktemp("home")
    people = list(VILLAGE.people)
    write_jsonl(d/"near.jsonl", VILLAGE.questions(people[:5]))
    write_jsonl(d/"plain.jsonl", [dict(text=f"{p} goes for a walk, and comes back at {i}.") for i, p in enumerate(people[:12])])
    (d/"c.yml").write_text(f"""base_model: tiny:llama
datasets:
  - path: {d/"near.jsonl"}
    type: alpaca
  - path: {d/"plain.jsonl"}
    type: completion
val_set_size: 0.3
dataset_prepared_path: {d/"prepared"}
sequence_len: 256
micro_batch_size: 4
max_steps: 4
learning_rate: 3e-3
adapter: lora
lora_r: 4
lora_target_linear: true
output_dir: {d/"out"}
save_strategy: no
""")
    train(load_config(d/"c.yml"))
    return d


@pytest.fixture
def cfg(home): return load_config(home/"c.yml")


# Loss, perplexity, token accuracy

def by_hand(model, rows):
    "A row at a time, in float64, a token at a time"
    nll, right = [], []
    for r in rows:
        with torch.no_grad(): logits = model(input_ids=torch.tensor([r["input_ids"]])).logits[0].double().numpy()
        for i, label in enumerate(r["labels"][1:]):
            if label==-100: continue
            x = logits[i]
            nll.append(math.log(np.exp(x-x.max()).sum())+x.max()-x[label])
            right.append(int(x.argmax())==label)
    return dict(loss=sum(nll)/len(nll), perplexity=math.prod(math.exp(n/len(nll)) for n in nll), token_accuracy=sum(right)/len(right), rows=len(rows), tokens=len(nll))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_losses_by_hand(tok, model, batch_size):
    from datasets import Dataset
    g = torch.Generator().manual_seed(1)
    rows = []
    for n in (2, 31, 7, 19, 7, 40, 12):
        ids = torch.randint(3, 500, (n,), generator=g).tolist()
        with torch.no_grad(): guess = [0, *model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()[:-1]]
        rows.append(dict(input_ids=ids, labels=[i if k%3 else g_ if k%2 else -100 for k, (i, g_) in enumerate(zip(ids, guess))])) # some labels are what the model says
    got, want = losses(model, Dataset.from_list(rows), tok.pad_token_id, batch_size), by_hand(model, rows)
    assert got==pytest.approx(want, rel=1e-5) and 0.1<got["token_accuracy"]<0.9


def test_dropout_is_off_and_comes_back(tok, home):
    model = add_adapter(load_model(ModelOptions(base_model="tiny:llama"), tok), LoraOptions(adapter="lora", lora_dropout=0.5, lora_target_linear=True))
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(std=0.1)
    ds = prepare_data(load_config(home/"c.yml"), tok).valid
    model.train()
    assert losses(model, ds, tok.pad_token_id)==losses(model, ds, tok.pad_token_id) and model.training


def test_rows_without_a_trained_token(tok, model):
    from datasets import Dataset
    with pytest.raises(UserError, match="no token of these rows is trained"): losses(model, Dataset.from_list([dict(input_ids=[1, 2], labels=[-100, -100])]), tok.pad_token_id)


# Data set by data set

@pytest.mark.parametrize("kw", [dict(val_set_size=0.3), dict(val_set_size=0.3, weights=(1, 3)), dict(val_set_size=0.5, shuffle_merged_datasets=False), dict(test=True)], ids=str)
def test_rows_are_those_of_their_data_set(tmp_path, tok, kw):
    "By a word that only one of them has"
    files = [write_jsonl(tmp_path/f"{n}.jsonl", [dict(instruction=f"{i}?", output=word+" "+str(i)) for i in range(n)]) for n, word in ((9, "apple"), (14, "pear"), (6, "plum"))]
    weights, test = kw.pop("weights", (None, None)), kw.pop("test", False)
    entries = [dict(path=str(f), type="alpaca") | (dict(weight=w) if w else {}) for f, w in zip(files, weights)]
    kw |= dict(test_datasets=[dict(path=str(files[2]), type="alpaca")]) if test else {}
    data = prepare_data(load_config(dict(base_model="tiny:llama", datasets=entries, learning_rate=1e-4, dataset_prepared_path=str(tmp_path/"p"), **kw)), tok)
    words = dict(zip(map(str, files), ("apple", "pear", "plum")))
    for split, ds in (("train", data.train), ("valid", data.valid)):
        parts = by_dataset(data, split)
        assert sum(map(len, parts.values()))==len(ds) and set(parts)==({str(files[2])} if test and split=="valid" else {*map(str, files[:2])})
        for path, rows in parts.items(): assert all(words[path] in tok.decode(r["input_ids"]) for r in rows), path


def test_answers_are_scored_under_any_name_of_a_path(home, cfg, tok, tmp_path, monkeypatch):
    "Prepared data are found again under another spelling, a folder's name may end like the number of a double, and there is no folder for the scores yet; its name today is said"
    (tmp_path/"fold (1)").mkdir()
    write_jsonl(tmp_path/"v.jsonl", VILLAGE.questions(list(VILLAGE.people)[20:22]))
    shutil.copy(tmp_path/"v.jsonl", tmp_path/"fold (1)"/"x.jsonl")
    monkeypatch.chdir(tmp_path)
    kw = dict(val_set_size=0.0, dataset_prepared_path="prepared", lora_model_dir=str(home/"out"), output_dir="not/yet")
    for names in (["v.jsonl", "fold (1)"], ["./v.jsonl", "fold (1)/x.jsonl"]):
        rows = evaluate(cfg.replace(test_datasets=[dict(path=p, type="alpaca") for p in names], **kw), max_answers=2).rows
        assert [(r["dataset"], r["answered"]) for r in rows]==[(p, 2) for p in names]
    assert (tmp_path/"not"/"yet"/"evaluation.json").is_file()
    with pytest.raises(UserError, match="cannot write the scores to `output_dir: v.jsonl/x`"): evaluate(cfg.replace(**kw | dict(output_dir="v.jsonl/x", val_set_size=0.3)))


def test_rows_that_were_trained_are_refused(cfg, home, tok, tmp_path, caplog):
    for kw in (dict(val_set_size=0.6), dict(seed=7)):
        other = cfg.replace(**kw)
        with pytest.raises(UserError, match=r"\d+ of \d+ rows to evaluate on were trained.*val_set_size: 0.3") as e: evaluate(other)
        unseen = prepare_data(other, tok)
        trained = {tuple(r["input_ids"]) for r in prepare_data(cfg, tok).train}
        assert str(e.value).startswith(f"{sum(tuple(r['input_ids']) in trained for r in unseen.valid)} of {len(unseen.valid)} rows")
    twice = write_jsonl(tmp_path/"twice.jsonl", [dict(text="Again and again.")]*10)
    double = cfg.replace(datasets=[DatasetOptions(path=str(twice), type="completion")], output_dir=str(tmp_path/"out"))
    data = prepare_data(double, tok)
    assert check_unseen(double, data, tok)==0 and "has no run.json" in caplog.text
    train(double.replace(max_steps=1))
    assert check_unseen(double, data, tok)==3==len(data.valid) and "as doubles" in caplog.text


# Chats: every trained turn is an answer

def village_chats(n=3):
    "A system prompt, an answer that is always the same, and one that cannot be guessed"
    turn = lambda role, content, **kw: dict(role=role, content=content, **kw)
    return [dict(messages=[turn("system", "Be brief."), turn("user", f"Do you know {p}?"), turn("assistant", "Yes.", train=False), turn("user", "Of which colour is the door?"),
        turn("assistant", f"white, number {(i*37+11)%90}", train=True)]) for i, p in enumerate(list(VILLAGE.people)[:n])]


def chat_config(path, template="chatml", eos="<|im_end|>", **kw):
    entry = {k: kw.pop(k) for k in ("train_on_eos", "roles_to_train", "message_field_training") if k in kw}
    return load_config(dict(base_model="tiny:llama?num_hidden_layers=1", special_tokens=dict(eos_token=eos, pad_token="<pad>"), chat_template=template, datasets=[dict(path=str(path), type="chat_template") | entry],
        dataset_prepared_path=str(path.parent/"prepared"), sequence_len=256, learning_rate=1e-2, micro_batch_size=4, save_strategy="no", warmup_steps=0) | kw)


def greedily(model, tok, ids, n):
    "A token at a time, each from the whole text before it"
    ends, new = model.generation_config.eos_token_id, []
    while len(new)<n and (not new or new[-1] not in (ends if isinstance(ends, list) else [ends])):
        with torch.no_grad(): new.append(int(model(input_ids=torch.tensor([ids+new])).logits[0, -1].argmax()))
    return tok.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("template, eos", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
@pytest.mark.parametrize("asked, options", [((2, 4), {}), ((2, 4), dict(train_on_eos="last")), ((2, 4), dict(train_on_eos="all")), ((2, 4), dict(train_on_eos="none")), ((4,), dict(message_field_training="train")),
    ((1, 3), dict(roles_to_train=["user"])), ((1, 2, 3, 4), dict(roles_to_train=["user", "assistant"]))], ids=str)
def test_every_trained_turn_is_asked(tmp_path, template, eos, asked, options):
    "The question is what the template writes before a turn, the answer what the turn says, what is said a greedy loop by hand"
    chats = village_chats()
    cfg = chat_config(write_jsonl(tmp_path/"c.jsonl", chats), template, eos, **options)
    tok = load_tokenizer(cfg)
    model, ds = load_model(cfg, tok).eval(), prepare_data(cfg, tok).train
    got, longest = answer_all(model, tok, ds, batch_size=2, progress=False).rows, max(len(a) for r in ds for _, a in questions_and_answers(r, tok))
    want = []
    for chat in chats:
        for i in asked:
            before, turn = chat["messages"][:i], chat["messages"][i]
            if turn["role"]=="assistant": ids = tok.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            else: ids = tok(tok.apply_chat_template(before+[dict(role="user", content="\0")], tokenize=False).partition("\0")[0], add_special_tokens=False).input_ids
            want.append((tok.decode(ids, skip_special_tokens=True), turn["content"], greedily(model, tok, ids, longest+4)))
    assert sorted(got)==sorted(want)


def test_a_turn_that_is_always_the_same_is_not_the_whole_score(tmp_path):
    "`Yes.` is learnt at once, the number of a house that was never seen is not: one answer of two is right, and the table says of how many rows"
    chats = village_chats(9)
    for name, rows in (("train", chats[:6]), ("test", chats[6:])): write_jsonl(tmp_path/f"{name}.jsonl", rows)
    cfg = chat_config(tmp_path/"train.jsonl", test_datasets=[dict(path=str(tmp_path/"test.jsonl"), type="chat_template")], output_dir=str(tmp_path/"out"), max_steps=40)
    train(cfg)
    scores = evaluate(cfg, compare=True)
    assert [(r["model"], r["exact_match"], r["answered"], r["answered_rows"], r["rows"]) for r in scores.rows]==[("base", 0, 6, 3, 3), ("tuned", 0.5, 6, 3, 3)]
    assert json.loads((tmp_path/"out"/"evaluation.json").read_text())==scores.rows
    heads, lines = scores.table()
    assert "answered rows" not in heads and [l[heads.index("answered")] for l in lines]==["6 in 3 rows"]*2


def test_one_answer_a_row_as_ever(tok, model, home):
    "Rows with one trained stretch are cut where the first and only one begins and ends; what has no question stays as it is"
    for r in prepare_data(load_config(home/"c.yml"), tok).train:
        trained = [i for i, l in enumerate(r["labels"]) if l!=-100]
        assert trained==list(range(trained[0], trained[-1]+1))
        assert questions_and_answers(r, tok)==[(r["input_ids"][:trained[0]], r["input_ids"][trained[0]:trained[-1]+1])]
    end = tok.eos_token_id
    assert questions_and_answers(dict(input_ids=[5, end], labels=[-100, end]), tok)==[([5], [end])] # an empty answer is one
    assert questions_and_answers(dict(input_ids=[5, 6], labels=[5, 6]), tok)==[([], [5, 6])]
    assert questions_and_answers(dict(input_ids=[5, 6, 7], labels=[5, -100, 7]), tok)==[([5, 6], [7])] # the rest of an answer that was cut
    assert questions_and_answers(dict(input_ids=[5], labels=[-100]), tok)==[([], [])]


# Scores of texts

def ngrams(x, n): return collections.Counter(tuple(x[i:i+n]) for i in range(len(x)-n+1))


def chrf(said, expected, n=6, beta=2):
    "Popović 2015, on characters without blanks, over a corpus; orders that neither side has are left out"
    ps, rs = [], []
    for k in range(1, n+1):
        pairs = [(ngrams(s.replace(" ", ""), k), ngrams(e.replace(" ", ""), k)) for s, e in zip(said, expected)]
        same, a, b = sum((x&y).total() for x, y in pairs), sum(x.total() for x, _ in pairs), sum(y.total() for _, y in pairs)
        if a and b: ps.append(same/a), rs.append(same/b)
    p, r = sum(ps)/len(ps), sum(rs)/len(rs)
    return 100*(1+beta**2)*p*r/(beta**2*p+r)


def bleu(said, expected):
    "Papineni 2002, over a corpus of words"
    logs = []
    for k in range(1, 5):
        pairs = [(ngrams(s.split(), k), ngrams(e.split(), k)) for s, e in zip(said, expected)]
        logs.append(math.log(sum((x&y).total() for x, y in pairs)/sum(x.total() for x, _ in pairs)))
    a, b = sum(len(s.split()) for s in said), sum(len(e.split()) for e in expected)
    return 100*math.exp(sum(logs)/4+min(0, 1-b/a))


def test_text_scores_by_hand():
    expected = ["the old miller lives in the house by the river", "she sells green apples and pears on market days"]
    said = ["the old miller lives in a house by the sea", "she sells green apples and plums on days"]
    got = text_scores(Answers(list(zip("??", expected, said))))
    assert got==pytest.approx(dict(sacrebleu=bleu(said, expected), chrf=chrf(said, expected), ter=100*(2+2)/(10+9))) # two words replaced; one replaced, one left out
    assert text_scores(Answers([("?", "a b c d e", " a b c d e\n")]), ["sacrebleu", "ter"])=={"sacrebleu": pytest.approx(100), "ter": 0}
    assert text_scores(Answers([("?", "a", "b")]), ["perplexity"])=={}


# Multiple choice

def ask_alone(model, tok, text, n):
    "The likeliest of the letters, one question at a time"
    with torch.no_grad(): p = model(input_ids=torch.tensor([[tok.bos_token_id]*(tok("a").input_ids[0]==tok.bos_token_id)+tok(text, add_special_tokens=False).input_ids])).logits[0, -1].softmax(-1)
    return max("ABCDEFG"[:n], key=lambda l: p[tok(" "+l, add_special_tokens=False).input_ids[-1]].item())


@pytest.fixture
def questions(tmp_path):
    rows = [dict(question=f"Where does {p} live{' now'*(i%4)}?", choices=["Coldmere", "Stonefield", "Nowhere", "Here"][:2+i%3], answer="ABCD"[i%(2+i%3)] if i%2 else i%(2+i%3), subject=["north", "south"][i%2], split="eval" if i<20 else "dev") for i, p in enumerate(VILLAGE.people)]
    return write_jsonl(tmp_path/"bench.jsonl", rows), rows


def test_accuracy_by_brute_force(tok, model, questions):
    path, rows = questions
    read = read_bench(EvalOptions(do_bench_eval=True, bench_dataset=str(path)))
    assert len(read)==20 and [r["answer"] for r in read]==["ABCD"[i%(2+i%3)] for i in range(20)]
    letters = [ask_alone(model, tok, choice_prompt(r), len(r["choices"])) for r in rows[:20]]
    for r, l in zip(read[::2], letters[::2]): r["answer"] = l # half of them as the model has it, so that the score is none of the ends
    right = [l==r["answer"] for l, r in zip(letters, read)]
    for size in (1, 3, 50):
        got = bench(model, tok, read, size)
        assert got==dict(bench_accuracy=sum(right)/20, bench_north=sum(right[::2])/10, bench_south=sum(right[1::2])/10)
    assert got["bench_north"]==1>got["bench_accuracy"]


def test_questions_that_are_written_out(tmp_path):
    f = tmp_path/"dharma.json"
    f.write_text(json.dumps([dict(input="Who? A. He B. She\nAnswer: ", output="b.", subject="x")]))
    assert read_bench(EvalOptions(do_bench_eval=True, bench_dataset=str(f)))==[dict(text="Who? A. He B. She\nAnswer:", answer="B", n=7, subject="x")]


@pytest.mark.parametrize("text, said", [('{"question": "a", "choices": ["x"], "answer": 0}', "row 1: a question needs"), ('{"question": "a", "choices": ["x", "y"], "answer": 2}', "row 1: a question"),
    ('{"input": "a", "output": "A", "split": "dev"}\n{"input": "a", "output": "Z", "split": "eval"}', "row 2: a question"), ('{"input": "a", "output": "A", "split": "dev"}', "no rows of the split 'eval'"), ("[1", "no JSON"),
    *((json.dumps(dict(question="a", choices=["x", "y"], answer="A") | kw), "row 1: "+said) for kw, said in ((dict(question=None), "a question"), (dict(question=5), "a question"), (dict(choices=5), "a question"), (dict(choices=[["x"], "y"]), "a question"),
    (dict(answer=True), "a question"), (dict(question=None, input="a"), "a question"), (dict(subject=["x"]), "`subject` is"), (dict(subject="accuracy"), "`subject` is 'accuracy'")))])
def test_questions_that_are_none(tmp_path, text, said):
    f = tmp_path/"b.jsonl"
    f.write_text(text)
    with pytest.raises(UserError, match=said): read_bench(EvalOptions(do_bench_eval=True, bench_dataset=str(f)))
    with pytest.raises(UserError, match="no file here"): read_bench(EvalOptions(do_bench_eval=True, bench_dataset="mmlu-zs"))
    (tmp_path/"b.json").write_text("{}")
    with pytest.raises(UserError, match="list of objects"): read_bench(EvalOptions(do_bench_eval=True, bench_dataset=str(tmp_path/"b.json")))


# The table

def shown(what, width):
    from rich.console import Console
    out = Console(width=width, file=io.StringIO())
    out.print(what)
    return out.file.getvalue()


@pytest.mark.parametrize("models", [("tuned",), ("base", "tuned")])
def test_a_narrow_terminal_shows_every_figure_whole(models):
    figure = iter(range(1000, 9999))
    rows = [dict(model=m, split="valid", dataset=d, loss=next(figure)/1, perplexity=next(figure)/1, token_accuracy=0.5, rows=next(figure), tokens=next(figure), exact_match=0.25, answered=523, answered_rows=200)
        for d in ("data/[red]near[/].jsonl", "data/far/"*20) for m in models]+[dict(model=m, split="harness", dataset="homes/acc", score=next(figure)/1) for m in models]
    narrow, wide = (shown(Evaluation(rows), w) for w in (80, 400))
    assert max(map(len, narrow.splitlines()))<=80 and len(wide.splitlines())==4+len(rows)
    for text in (narrow, wide):
        for r in rows:
            for k in r.keys()&{"loss", "perplexity", "score"}: assert f" {r[k]:.4g} " in text, (k, text)
            for k in r.keys()&{"rows", "tokens"}: assert f" {r[k]:,} " in text, (k, text)
        assert "data/[red]near[/].jsonl" in text and text.count("523 in 200 rows")==2*len(models)
    for r in rows[:2]: # a figure stands under its model
        line = next(l for l in narrow.splitlines() if f" {r['rows']:,} " in l).split("│")
        head = next(l for l in narrow.splitlines() if "tuned" in l).split("┃")
        assert head[[i for i, c in enumerate(line) if f" {r['rows']:,} " in c][0]].strip()==r["model"]


# The harness

TASK = """task: village_homes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_a_task_of_ones_own(tok, model, tmp_path):
    "The harness against the likelihood of each answer, by hand"
    pytest.importorskip("lm_eval")
    places = ["Coldmere", "Stonefield by the sea", "Nowhere"]
    rows = [dict(question=f"Where does {p} live?", choices=places, answer=i%3) for i, p in enumerate(list(VILLAGE.people)[:6])]
    (tmp_path/"tasks").mkdir()
    (tmp_path/"tasks"/"homes.yaml").write_text(TASK.format(file=write_jsonl(tmp_path/"q.jsonl", rows)))
    def likelihood(q, c):
        a, ids = len(tok(q).input_ids), tok(f"{q} {c}").input_ids
        with torch.no_grad(): p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(p[i-1, ids[i]].item() for i in range(a, len(ids)))
    said = [max(range(3), key=lambda k: likelihood(r["question"], places[k])) for r in rows]
    rows[0]["answer"] = said[0]
    write_jsonl(tmp_path/"q.jsonl", rows)
    manager = find_tasks(["village_homes"], str(tmp_path/"tasks"))
    assert harness(model, tok, ["village_homes"], manager, batch_size=2)=={"village_homes/acc": sum(s==r["answer"] for s, r in zip(said, rows))/6}
    assert harness(model, tok, ["village_homes"], manager, limit=1)=={"village_homes/acc": 1.0}


@pytest.mark.slow
def test_a_task_that_nobody_has(tmp_path):
    with pytest.raises(UserError, match="no task nonsense_task; own tasks"): find_tasks(["nonsense_task"])
    with pytest.raises(UserError, match="no task nonsense_task, and neither has"): find_tasks(["nonsense_task"], str(tmp_path))


# What is not there

@pytest.fixture
def without(monkeypatch):
    "Make libraries missing"
    import tuneforge.score as room
    return lambda *names: monkeypatch.setattr(room, "find_spec", lambda n, *a: None if n in names else util.find_spec(n, *a))


def test_missing_libraries_are_named_before_anything_is_computed(cfg, without, tmp_path, monkeypatch):
    import tuneforge.score as room
    monkeypatch.setattr(room, "load_finetuned", lambda *a: pytest.fail("too late"))
    without("sacrebleu", "lm_eval")
    with pytest.raises(UserError, match=r"ter need sacrebleu: pip install 'tuneforge\[metrics\]'"): evaluate(cfg.replace(do_causal_lm_eval=True, eval_causal_lm_metrics=["ter"]))
    with pytest.raises(UserError, match=r"tuneforge\[harness\]"): evaluate(cfg, tasks=dict(tasks=["mmlu"]))
    with pytest.raises(UserError, match="no file here"): evaluate(cfg.replace(do_bench_eval=True, bench_dataset="mmlu"))
    with pytest.raises(UserError, match="nothing to evaluate on"): evaluate(cfg.replace(val_set_size=0.0))
    with pytest.raises(UserError, match="`comet` scores with a model of its own"): cfg.replace(do_causal_lm_eval=True, eval_causal_lm_metrics=["comet"])


def test_a_folder_of_tasks_that_is_none(cfg):
    with pytest.raises(UserError, match="no folder /nowhere"): evaluate(cfg, tasks=dict(tasks=["mmlu"], folder="/nowhere"))


def test_perplexity_needs_no_library(cfg, without, tmp_path):
    without("sacrebleu")
    scores = evaluate(cfg.replace(do_causal_lm_eval=True, eval_causal_lm_metrics=["perplexity"]), max_answers=1)
    assert all(r["perplexity"]==pytest.approx(math.exp(r["loss"])) for r in scores.rows)


def test_an_untrained_run(cfg, tmp_path):
    with pytest.raises(UserError, match="no adapter folder"): evaluate(cfg.replace(output_dir=str(tmp_path)+"/nowhere"))


# The command

def test_before_and_after(home, cfg, tok, questions, tmp_path):
    "Every figure of the table against the model of the run, and the base, by hand"
    code, out, err = command("evaluate", home/"c.yml", "--compare", "--train-rows", 5, "--max-answers", 3, "--do-causal-lm-eval", "--do-bench-eval", "--bench-dataset", questions[0])
    assert code==0, err
    lines = [l.split() for l in out.strip().splitlines()]
    assert lines[0][:3]==["model", "split", "dataset"] and [l[0] for l in lines[1:]]==["base", "tuned"]*5
    rows = json.loads((home/"out"/"evaluation.json").read_text())
    data, models = prepare_data(cfg, tok), dict(base=load_finetuned(cfg, "base")[0], tuned=load_finetuned(cfg)[0])
    for r in rows:
        if r["split"]=="bench": assert r["bench_accuracy"]==bench(models[r["model"]], tok, read_bench(EvalOptions(do_bench_eval=True, bench_dataset=str(questions[0]))))["bench_accuracy"]; continue
        ds = by_dataset(data, r["split"])[r["dataset"]]
        if r["split"]=="train": ds = ds.select(np.linspace(0, len(ds)-1, 5).astype(int))
        assert {k: r[k] for k in ("loss", "perplexity", "token_accuracy", "rows", "tokens")}==pytest.approx(by_hand(models[r["model"]], ds), rel=1e-4), r
        assert ("exact_match" in r)==("sacrebleu" in r)==(r["split"]=="valid" and "near" in r["dataset"]) # plain text has no answers
    with open(home/"out"/"eval_summary.csv") as f: table = {r["metric"]: r for r in csv.DictReader(f)}
    mean = lambda split: sum(r["loss"]*r["tokens"] for r in rows if (r["split"], r["model"])==(split, "tuned"))/sum(r["tokens"] for r in rows if (r["split"], r["model"])==(split, "tuned"))
    for split, column in (("train", "training"), ("valid", "validation")):
        assert float(table["loss"][column])==pytest.approx(mean(split), rel=1e-4) and float(table["perplexity"][column])==pytest.approx(math.exp(mean(split)), rel=1e-4)


def test_a_streamed_run(tok, tmp_path):
    "Nothing of a stream is held out: the rows of `test_datasets` are scored, as by hand; what was trained is no rows to come back to"
    people, near = list(VILLAGE.people), DatasetOptions(path=str(tmp_path/"near.jsonl"), type="alpaca")
    write_jsonl(tmp_path/"docs.jsonl", [dict(text=f"{p} goes for a walk, and comes back at {i}.") for i, p in enumerate(people[:12])])
    rows = VILLAGE.questions(people[12:14])
    write_jsonl(tmp_path/"near.jsonl", rows)
    (tmp_path/"c.yml").write_text(f"""base_model: tiny:llama?num_hidden_layers=1
pretraining_dataset:
  - path: {tmp_path/"docs.jsonl"}
test_datasets:
  - path: {near.path}
    type: alpaca
dataset_prepared_path: {tmp_path/"prepared"}
sequence_len: 128
sample_packing: true
micro_batch_size: 1
max_steps: 1
learning_rate: 3e-3
output_dir: {tmp_path/"out"}
save_strategy: no
""")
    train(load_config(tmp_path/"c.yml"))
    code, out, err = command("evaluate", tmp_path/"c.yml", "--max-answers", 1)
    assert code==0, err
    got, = json.loads((tmp_path/"out"/"evaluation.json").read_text())
    want = by_hand(load_finetuned(load_config(tmp_path/"c.yml"))[0], encode_rows(rows, near, tok))
    assert (got["split"], got["dataset"], got["answered"])==("valid", near.path, 1) and {k: got[k] for k in want}==pytest.approx(want, rel=1e-4)
    code, _, err = command("evaluate", tmp_path/"c.yml", "--train-rows", 2)
    assert code==2 and "a stream has no rows to come back to" in err


@pytest.mark.parametrize("args, said", [(["--harness-path", "x"], "needs --harness"), (["--eval-causal-lm-metrics", "[chrf]"], "has no effect without"), (["--do-causal-lm-eval", "--eval-causal-lm-metrics", "[comet]"], "of its own"), (["--do-causal-lm-eval", "--eval-causal-lm-metrics", "[rouge]"], "rouge")])
def test_bad_arguments(home, args, said):
    code, _, err = command("evaluate", home/"c.yml", *args)
    assert code==2 and said in err, err
