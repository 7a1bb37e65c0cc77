"Asking: alone and together, in a conversation, from files, on a page, and everything that may be asked wrongly"
import copy, json, os, re, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch
from tuneforge.all import *
from tuneforge.talk import answer_file, command, converse, jsonl_rows
from tests.tools import bin, command as shell, run, tuneforge, write_jsonl


@pytest.fixture(scope="module")
def tok(): return load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
@pytest.fixture(scope="module")
def model(tok): return load_model(ModelOptions(base_model="tiny:llama"), tok)


ALPACA, CHAT = DatasetOptions(path="x", type="alpaca"), DatasetOptions(path="x", type="chat_template")
CONFIG = """base_model: tiny:llama
datasets:
  - path: train.jsonl
    type: {type}
dataset_prepared_path: prepared
sequence_len: 256
micro_batch_size: 4
max_steps: 3
learning_rate: 3e-3
adapter: lora
lora_r: 4
lora_target_linear: true
output_dir: out
save_strategy: no
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A trained adapter"
    d = tmp_path_factory.mktemp("home")
    write_jsonl(d/"train.jsonl", [dict(messages=[dict(role="user", content=r["instruction"]), dict(role="assistant", content=r["output"])]) for r in Village().questions(list(Village().people)[:4])])
    (d/"c.yml").write_text(CONFIG.format(type="chat_template"))
    code, _, err = shell("train", "c.yml", cwd=d)
    assert code==0, err
    return d


# Answers

def by_hand(model, ids, n, eos):
    "Greedy decoding without a cache, a token at a time"
    out = []
    for _ in range(n):
        with torch.no_grad(): t = model(input_ids=torch.tensor([ids+out]), use_cache=False).logits[0, -1].argmax().item()
        out.append(t)
        if t in eos: break
    return out


def test_batches_answer_as_one_by_one_and_as_by_hand(tok, model):
    prompts = [tok(t).input_ids for t in ("Bagol", "Where does Bagol live, and why?", "a b c d e f g h i j", "山")]
    alone = [generate(model, tok, [p], max_new_tokens=9)[0] for p in prompts]
    assert generate(model, tok, prompts, max_new_tokens=9)==alone==generate(model, tok, prompts[::-1], max_new_tokens=9)[::-1]
    assert alone==[tok.decode(by_hand(model, p, 9, {tok.eos_token_id}), skip_special_tokens=True) for p in prompts]


def test_a_neighbour_with_a_long_prompt_cuts_no_answer(tok):
    "A model of 64 tokens: a prompt of 60 has room for 4, the others for what was asked; exact match is that of one by one"
    from datasets import Dataset
    name = "tiny:llama?num_hidden_layers=1&max_position_embeddings=64"
    small, q = load_model(ModelOptions(base_model=name), tok).eval(), tok("Bagol").input_ids
    new = by_hand(small, q, 14, set())
    k = next(i for i in range(13, 5, -1) if new[i] not in new[:i])
    small.generation_config.eos_token_id = new[k]
    row = lambda q, a: dict(input_ids=q+a, labels=[-100]*len(q)+a)
    ds = Dataset.from_list([row(q, new[:k+1]), row([10]*60, [11]), row([10]*9, [12])])
    alone, both = (answer_all(small, tok, ds, batch_size=n, progress=False) for n in (1, 3))
    assert alone.rows==both.rows and both.exact_match>=1/3
    with pytest.raises(UserError, match="leaves no room"): generate(small, tok, [q, [10]*64])


def test_a_model_that_takes_padding_for_text_hears_none(tok):
    "RWKV reads no mask: after a few steps of training, what it says after a prompt is what it says after that prompt alone"
    rwkv = load_model(ModelOptions(base_model="tiny:rwkv"), tok)
    torch.manual_seed(0)
    steps = torch.optim.AdamW(rwkv.parameters(), lr=1e-2)
    for r in Village().texts(1)[:16]:
        ids = tok(r["text"], return_tensors="pt").input_ids[:, :32]
        rwkv(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        steps.step(), steps.zero_grad()
    prompts = [tok(f"{w} {n}").input_ids for n in list(Village().people)[:3] for w in ("Where does", "Bagol lives in Dunholm. The home of")]
    want = [tok.decode(by_hand(rwkv.eval(), p, 4, {tok.eos_token_id}), skip_special_tokens=True) for p in prompts]
    assert generate(rwkv, tok, prompts, max_new_tokens=4)==want and len(set(map(len, prompts)))>1


def test_what_the_model_says_of_itself_does_not_choose_tokens(tok, model):
    "Greedily is greedily, whatever the base's generation_config says; also piece by piece, where beams cannot be"
    said = model.generation_config
    want = tok.decode(by_hand(model, ids := tok("Bagol").input_ids, 8, {tok.eos_token_id}), skip_special_tokens=True)
    torch.manual_seed(0)
    drawn = generate(model, tok, [ids], max_new_tokens=8, temperature=1.5)
    try:
        model.generation_config = type(said)(eos_token_id=said.eos_token_id, do_sample=True, num_beams=3, num_return_sequences=2, repetition_penalty=5.0, typical_p=0.1, epsilon_cutoff=0.1, eta_cutoff=0.1,
            top_k=1, top_p=1e-6, min_p=1.0, no_repeat_ngram_size=1, min_new_tokens=4, suppress_tokens=by_hand(model, ids, 1, {}), guidance_scale=3.0)
        pieces = []
        assert generate(model, tok, [ids], max_new_tokens=8, streamer=word_streamer(tok, pieces.append))==[want]==["".join(pieces)]
        torch.manual_seed(0)
        assert generate(model, tok, [ids], max_new_tokens=8, temperature=1.5)==drawn!=[want]
    finally: model.generation_config = said


def test_drawing(tok, model):
    def draw(**kw):
        torch.manual_seed(0)
        return generate(model, tok, ["Bagol"], max_new_tokens=12, **kw)[0]
    greedy = draw()
    assert draw(temperature=1.5)==draw(temperature=1.5)!=greedy
    assert draw(temperature=1.5, top_k=1)==greedy==draw(temperature=2.0, top_p=1e-6)==draw(temperature=1.0, min_p=1.0)
    assert draw(repetition_penalty=5.0)!=greedy
    assert greedy.startswith(generate(model, tok, ["Bagol"], max_new_tokens=2)[0])


def test_stop_texts_are_cut_and_never_shown(tok, model):
    whole = generate(model, tok, ["Bagol"], max_new_tokens=20)[0]
    stop, pieces = whole[10:14], []
    got = generate(model, tok, ["Bagol"], max_new_tokens=20, stop=[stop], streamer=word_streamer(tok, pieces.append, [stop]))[0]
    assert got==whole[:whole.index(stop)]=="".join(pieces)
    assert generate(model, tok, ["Bagol"], max_new_tokens=20, stop=["l"+whole[0]])[0]==whole # begins in the prompt
    assert cut_at("one two three", ["three", "two"])=="one " and cut_at("one", None)=="one"


def test_no_room_and_nothing_asked(tok, model):
    with pytest.raises(UserError, match="leaves no room"): generate(model, tok, [[5]*100_000])
    with pytest.raises(UserError, match="prompt is empty"): generate(model, tok, [[]])


# Conversations

def test_a_conversation_is_rendered_as_in_training(tok, model):
    talk = Talk(model, tok, CHAT, SamplingOptions(max_new_tokens=5), "Be brief.")
    a, b = talk.say("One?"), talk.say("Two?")
    row = dict(messages=[dict(role="system", content="Be brief."), dict(role="user", content="One?"), dict(role="assistant", content=a), dict(role="user", content="Two?"), dict(role="assistant", content=b)])
    assert talk.row()==row
    trained = encode_rows([row], CHAT, tok)[0]["input_ids"]
    want = Talk(model, tok, CHAT, system="Be brief.", turns=talk.turns[:2]).prompt("Two?")
    assert trained[:len(want)]==want


def script(*lines):
    left = list(lines)
    def read(mark):
        if not left: raise EOFError
        if isinstance(left[0], BaseException): raise left.pop(0)
        return left.pop(0)
    return read


def test_told_nothing_is_nothing(tok, model):
    "A format's own system message is where a conversation begins; `/system` takes it away, and says so truly"
    brief = CHAT.model_copy(update=dict(default_system_message="Be brief."))
    talk = Talk(model, tok, brief)
    row = dict(messages=[dict(role="user", content="One?"), dict(role="assistant", content="x")])
    trained = encode_rows([row], brief, tok)[0]["input_ids"]
    assert "Be brief." in tok.decode(ids := talk.prompt("One?")) and trained[:len(ids)]==ids
    assert command(talk, "/system")=="the model is told nothing" and talk.prompt("One?")==Talk(model, tok, CHAT).prompt("One?")!=ids
    assert Talk(model, tok, brief, system="").prompt("One?")==talk.prompt("One?") and talk.row()["messages"]==[]


def test_what_is_no_text_is_told_and_the_conversation_goes_on(tok, model):
    talk, said = Talk(model, tok, CHAT, SamplingOptions(max_new_tokens=2)), []
    converse(talk, script("a\udcff", "/system \ud800", "One?", "and\\"), said.append)
    assert "".join(said).count("the text is not UTF-8, or holds half a character: ")==2 and talk.system is None
    assert [t for r, t in talk.turns if r=="user"]==["One?", "and"] # the last line goes on in one that does not come


def test_commands(tok, model, tmp_path):
    talk, said = Talk(model, tok, CHAT, SamplingOptions(max_new_tokens=3)), []
    f = tmp_path/"talk.jsonl"
    converse(talk, script("One?", "/system Be brief.", "/set temperature 0.5", "/set top_p none", "/set temperature hot", "/set stop END", "/undo", "Two?", "/save "+str(f), "/save", "/save /nowhere/x", "/nonsense", "/help", "/quit", "never"), said.append)
    text = "".join(said)
    assert [t for r, t in talk.turns if r=="user"]==["Two?"] and talk.system=="Be brief."
    assert (talk.sampling.temperature, talk.sampling.stop, talk.sampling.top_p)==(0.5, ["END"], None)
    for part in ("`temperature` is 'hot', but should be a number", "taken back: One?\n", "there is no command /nonsense", "/reset", "name a file", "cannot write to /nowhere/x"): assert part in text, part
    assert jsonl_rows(f)==[talk.row()]
    converse(talk, script("/reset", KeyboardInterrupt()), said.append)
    for line, want in (("/set stop none", "stop is None"), ("/set top_p 0.5", "top_p is 0.5"), ("/set temperature 0", "`top_p` has no effect without `temperature`: /set top_p none first"), ("/set top_p none", "top_p is None"),
        ("/set temperature 0", "temperature is 0.0"), ("/set min_p 0.1", "`min_p` has no effect without `temperature`: /set temperature 0.7 first"), ("/set max_new_tokens none", "`max_new_tokens` is blank")): assert want in command(talk, line), line
    assert (talk.sampling.top_p, talk.sampling.min_p, talk.sampling.max_new_tokens)==(None, None, 3)
    assert not talk.turns and "no place for a system message" in command(Talk(model, tok, ALPACA), "/system x")


def mute(model, tok):
    "A model that ends each answer with its first token"
    quiet = copy.deepcopy(model)
    quiet.generate = lambda input_ids, **kw: torch.nn.functional.pad(input_ids, (0, 1), value=tok.eos_token_id)
    return quiet


def test_an_empty_answer_is_told_and_stays_in_the_conversation(tok, model, caplog, tmp_path):
    talk, said = Talk(mute(model, tok), tok, CHAT), []
    converse(talk, script("One?", "/history", "Two?", "/undo", "/history", "/undo", "/undo", "/system Be brief.", "/history"), said.append)
    assert [r.getMessage() for r in caplog.records]==["(the model ended its answer at once)"]*2 and "ended" not in "".join(said)
    one = "user: One?\nassistant: (empty)\n"
    assert "".join(said)=="\n"+one+"\n"+"taken back: Two?\n"+one+"taken back: One?\nnothing was said yet\nthe model is told: Be brief.\nsystem: Be brief.\n\n"
    write_jsonl(tmp_path/"in.jsonl", rows_of(["Bagol", "Tamsin", "Bagol"]))
    caplog.clear()
    answer_file(talk.model, tok, CHAT, tmp_path/"in.jsonl", tmp_path/"o.jsonl", batch_size=2)
    assert [r.getMessage() for r in caplog.records]==["empty answers, which the model ended at once: 3 of 3"]


def test_an_answer_that_is_stopped_before_its_first_word_is_not_told(tok, model, caplog):
    quiet = mute(model, tok)
    def stopped(**kw): signal.raise_signal(signal.SIGINT); return type(quiet).generate(model, **kw)
    quiet.generate = stopped
    converse(talk := Talk(quiet, tok, CHAT), script("One?"), [].append)
    assert len(talk.turns)==2 and not caplog.records


def test_a_missing_system_message_is_told(home, tmp_path):
    system = dict(role="system", content="You know the village.")
    rows = [dict(messages=[system, *r["messages"]]) for r in map(json.loads, (home/"train.jsonl").read_text().splitlines())]
    golden = json.loads((home/"out"/"golden_prompts.json").read_text())
    assert not misses_system(home/"out", CHAT)
    for key, row in (("messages", rows[0]), ("conversations", dict(conversations=[{"from": "system", "value": "x"}]))):
        (tmp_path/"golden_prompts.json").write_text(json.dumps([dict(golden[0], row=row)]))
        assert misses_system(tmp_path, CHAT) and not misses_system(tmp_path, ALPACA)
    assert not misses_system(tmp_path, CHAT.model_copy(update=dict(default_system_message="x"))) and not misses_system(tmp_path/"gone", CHAT)


def test_a_conversation_that_is_too_long_goes_on(tok, model):
    talk, said = Talk(model, tok, CHAT, SamplingOptions(max_new_tokens=2)), []
    converse(talk, script("a "*3000, "One?"), said.append)
    assert "leaves no room" in "".join(said) and [t for r, t in talk.turns if r=="user"]==["One?"]


def test_an_answer_that_is_stopped_is_kept(tok, model):
    said, opts, before = [], SamplingOptions(max_new_tokens=100, repetition_penalty=2.0), signal.getsignal(signal.SIGINT)
    def write(piece):
        said.append(piece)
        if len(said)==3: signal.raise_signal(signal.SIGINT)
    converse(talk := Talk(model, tok, CHAT, opts), script("One?", "/set max_new_tokens 2"), write)
    answer, whole = talk.turns[1][1], Talk(model, tok, CHAT, opts).say("One?")
    assert whole.startswith(answer) and 0<len(answer)<len(whole)/2 and talk.sampling.max_new_tokens==2
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_of_two_models_that_is_stopped_ends_no_conversation(tok, model, monkeypatch, capsys):
    import tuneforge.talk as room
    from tuneforge.cli import _show_both
    true, asked = room.generate, []
    def interrupted(*a, **kw):
        asked.append(a)
        if len(asked)==1: signal.raise_signal(signal.SIGINT)
        return true(*a, **kw)
    monkeypatch.setattr(room, "generate", interrupted)
    converse(talk := Talk(model, tok, CHAT, SamplingOptions(max_new_tokens=4)), script("One?", "Two?"), None, _show_both(model))
    assert len(talk.turns)==4 and len(asked)==4 and len(talk.turns[1][1])<len(Talk(model, tok, CHAT, talk.sampling).say("One?"))


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_conversation(tmp_path):
    pexpect = pytest.importorskip("pexpect")
    code = """
from tuneforge.all import *
from tuneforge.talk import converse
tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
talk = Talk(load_model(ModelOptions(base_model="tiny:llama"), tok), tok, DatasetOptions(path="x", type="chat_template"), SamplingOptions(max_new_tokens=1900, temperature=2.0))
talk.model.generation_config.eos_token_id = None # it never ends by itself
converse(talk)
print("TURNS", len(talk.turns))
"""
    p = pexpect.spawn(sys.executable, ["-c", code], timeout=180, encoding="utf-8")
    p.expect("> ")
    p.sendline("One?")
    p.expect(r"\w+ \w*") # an answer is being written
    time.sleep(1)
    p.sendintr()
    p.expect("> ")
    p.sendline("/set max_new_tokens 2")
    p.expect("max_new_tokens is 2")
    p.sendeof()
    p.expect("TURNS 2")


# The command

def test_the_faces_of_inference(home):
    def ask(*args, stdin="Where does Bagol live?", code=0):
        got, out, err = shell("inference", "c.yml", "--max-new-tokens", "6", *args, cwd=home, stdin=stdin)
        assert got==code, err
        return out if code==0 else err
    pipe = ask()
    assert pipe.strip()
    (home/"q.txt").write_text("Where does Bagol live?\n")
    assert ask("--prompt-file", "q.txt")==pipe
    assert ask("--chat", stdin="Where does Bagol live?\n/system Be brief.\n/quit\n")==pipe+"the model is told: Be brief.\n"
    said = ask("--chat", stdin="/set temperature 0.5\n/set stop END\n/set\n/quit\n") # the keys of sampling alone, not of the whole config
    assert said=="temperature is 0.5\nstop is ['END']\n"+", ".join(f"{k} {v}" for k, v in SamplingOptions(max_new_tokens=6, temperature=0.5, stop=["END"]))+"\n"
    (home/"q.txt").write_bytes(b"\xef\xbb\xbfWhere does Bagol live?\r\n") # a byte order mark, as some editors write it
    assert ask("--prompt-file", "q.txt")==pipe
    both = ask("--compare")
    assert "base" in both and "tuned" in both
    (home/"q.txt").write_bytes(b"\xff")
    assert "q.txt is not UTF-8" in ask("--prompt-file", "q.txt", code=2) and "not UTF-8, or holds half" in ask(stdin="a \ud800", code=2)
    other = ("--use", "base", "--default-system-message", "Be brief. "*20)
    assert ask(*other)==ask(*other, "--chat", stdin="Where does Bagol live?\n/quit\n")!=ask("--use", "base")
    assert ask("--use", "base").strip()
    assert "merge-lora" in ask("--use", "merged", code=2)
    code, out, err = shell("merge-lora", "c.yml", cwd=home)
    assert code==0 and "prompt 1" in out, err
    assert ask("--use", "merged")==pipe
    assert "nothing to answer" in ask(stdin=" \n", code=2)
    assert "no adapter folder: out/nosuch: train first, with `tuneforge train CONFIG.yml`" in ask("--output-dir", "out/nosuch", code=2)
    assert "no adapter folder: nosuch: correct `lora_model_dir`" in ask("--lora-model-dir", "nosuch", code=2)


def test_the_context_of_one_question(home, tok, model, capsys):
    "It stands in the prompt of both models, as in training; a format without a place for it, and a face with many questions, refuse it"
    from tuneforge.talk import ask_both
    asked = tok.decode(Talk(model, tok, ALPACA).prompt("Who?", "In Dunholm."))
    assert "Who?" in asked and "In Dunholm." in asked
    talk = Talk(model, tok, ALPACA, SamplingOptions(max_new_tokens=6))
    with_it, without = (ask_both(Talk(model, tok, ALPACA, talk.sampling), "Who?", model, context=c) for c in ("In Dunholm.", ""))
    assert with_it.base==with_it.tuned==ask(model, tok, ALPACA, "Who?", "In Dunholm.", max_new_tokens=6)!=without.base
    for entry in (CHAT, DatasetOptions(path="x", type="completion")):
        with pytest.raises(UserError, match="has no place for a context"): ask(model, tok, entry, "Who?", "In Dunholm.")
    for args in (["--context", "x"], ["--compare", "--context", "x"]):
        code, _, err = shell("inference", "c.yml", *args, cwd=home, stdin="Who?")
        assert code==2 and "`type: chat_template` has no place for a context" in err


def rows_of(people): return [dict(prompt=f"Where does {p} live?", id=i) for i, p in enumerate(people)]


def test_a_file_of_questions_goes_on(home, tmp_path):
    "From every place where a run may have been cut off"
    rows = rows_of(list(Village().people)[:5])
    write_jsonl(tmp_path/"in.jsonl", rows)
    args = ["inference", "c.yml", "--input", tmp_path/"in.jsonl", "--max-new-tokens", "5", "--batch-size", "2", "--output", out := tmp_path/"out.jsonl"]
    code, said, err = shell(*args, cwd=home)
    assert code==0 and "5 rows answered\n" in said, err
    assert set(json.loads((tmp_path/"out.jsonl.settings.json").read_text()))=={"model", "compared", *SamplingOptions.model_fields} # no key that answers do not depend on
    whole = out.read_bytes()
    assert [(r["id"], r["prompt"]) for r in jsonl_rows(out)]==[(r["id"], r["prompt"]) for r in rows]
    assert (now := json.loads((tmp_path/"out.jsonl.settings.json").read_text())["model"]).startswith("tuned of out (") and " on tiny:llama (" in now
    for cut in (0, 10, whole.index(b"\n"), whole.index(b"\n")+1, len(whole)-1, len(whole)):
        out.write_bytes(whole[:cut])
        code, said, err = shell(*args, cwd=home)
        there = whole[:cut].count(b"\n")
        assert code==0 and f": {5-there} row{'s'*(5-there!=1)} answered"+(f", {there} were there already" if there else "") in said, err
        assert out.read_bytes()==whole


@pytest.mark.slow
def test_a_file_of_questions_goes_on_after_kill(home, tmp_path):
    rows = rows_of(list(Village().people)[:12])
    write_jsonl(tmp_path/"in.jsonl", rows)
    args = ["inference", "c.yml", "--input", tmp_path/"in.jsonl", "--max-new-tokens", "5", "--batch-size", "2", "--output"]
    assert shell(*args, tmp_path/"whole.jsonl", cwd=home)[0]==0
    p = subprocess.Popen([bin("tuneforge"), *map(str, args), str(tmp_path/"out.jsonl")], cwd=home, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while p.poll() is None and not (out := tmp_path/"out.jsonl").is_file() or p.poll() is None and out.stat().st_size==0: time.sleep(0.01)
    p.send_signal(signal.SIGKILL), p.wait()
    code, said, err = shell(*args, out, cwd=home)
    assert code==0 and "were there already" in said, err
    assert out.read_text()==(tmp_path/"whole.jsonl").read_text()


def test_answers_of_two_models_are_not_mixed(tok, model, tmp_path):
    write_jsonl(tmp_path/"in.jsonl", [dict(prompt="a"), dict(prompt="b")])
    kw = dict(sampling=SamplingOptions(max_new_tokens=2))
    assert answer_file(model, tok, ALPACA, tmp_path/"in.jsonl", tmp_path/"o.jsonl", **kw)==(2, 0)
    assert answer_file(model, tok, ALPACA, tmp_path/"in.jsonl", tmp_path/"o.jsonl", **kw)==(0, 2)
    with pytest.raises(UserError, match="max_new_tokens: then 2, now 3"): answer_file(model, tok, ALPACA, tmp_path/"in.jsonl", tmp_path/"o.jsonl", SamplingOptions(max_new_tokens=3))
    with pytest.raises(UserError, match="model: then , now other"): answer_file(model, tok, ALPACA, tmp_path/"in.jsonl", tmp_path/"o.jsonl", name="other", **kw)
    write_jsonl(tmp_path/"in.jsonl", [dict(prompt="c"), dict(prompt="b")])
    with pytest.raises(UserError, match="o.jsonl:1: this answer belongs to another row"): answer_file(model, tok, ALPACA, tmp_path/"in.jsonl", tmp_path/"o.jsonl", **kw)


def test_answers_of_a_model_that_was_trained_again_are_not_mixed(home, tmp_path):
    "A folder's name stays, its weights do not; neither does another base of the same adapter, or of `--use base`"
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(home, tmp_path/"h")
    write_jsonl(tmp_path/"in.jsonl", rows_of(["Bagol", "Tamsin"]))
    def go_on(out, *args):
        if out.is_file(): out.write_text(out.read_text().splitlines()[0]+"\n")
        code, _, err = shell("inference", "c.yml", "--input", tmp_path/"in.jsonl", "--max-new-tokens", 2, "--output", out, *args, cwd=tmp_path/"h")
        return err if code else None
    other = ["--base-model", "tiny:llama?seed=3"]
    assert go_on(base := tmp_path/"b.jsonl", "--use", "base") is None and "base tiny:llama?seed=3" in go_on(base, "--use", "base", *other)
    assert go_on(out := tmp_path/"o.jsonl") is None and go_on(out) is None and "made otherwise (model: then tuned of out (" in go_on(out, *other)
    weights = tmp_path/"h"/"out"/"adapter_model.safetensors"
    save_file({k: v+0.1 for k, v in load_file(weights).items()}, weights, metadata=dict(format="pt"))
    assert "made otherwise (model: then tuned of out (" in go_on(out)


def test_answers_may_hold_any_separator(tok, model, tmp_path, monkeypatch):
    import tuneforge.talk as room
    monkeypatch.setattr(room, "generate", lambda *a: ["a\u2028b\x85c\x1ed\ne"]) # all of which `str.splitlines` cuts at
    write_jsonl(tmp_path/"in.jsonl", [dict(prompt="a"), dict(prompt="b")])
    for done in ((2, 0), (0, 2)): assert answer_file(model, tok, ALPACA, tmp_path/"in.jsonl", tmp_path/"o.jsonl", batch_size=1)==done


def test_brackets_are_shown_as_they_are():
    from rich.console import Console
    from tuneforge.talk import Compared
    console = Console(width=80)
    with console.capture() as c: console.print(Compared("[INST] Who? [/INST]", "[/b] he", "[red]she[/red]"))
    assert all(t in c.get() for t in ("[INST] Who? [/INST]", "[/b] he", "[red]she[/red]"))


def test_bad_files(tok, model, tmp_path):
    f, out = tmp_path/"in.jsonl", tmp_path/"o.jsonl"
    for text, said in (("", "no rows"), ('{"a": 1\n', "in.jsonl:1: no JSON"), ('{"prompt": "a"}\n[1]\n', "in.jsonl:2: a row is an object"), ('{"prompt": "a"}\n{"question": "b"}\n', "row 2")):
        f.write_text(text)
        with pytest.raises(UserError, match=re.escape(said)): answer_file(model, tok, ALPACA, f, out)
    f.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"): answer_file(model, tok, ALPACA, f, out)
    write_jsonl(f, [dict(prompt="a")])
    with pytest.raises(UserError, match="input itself"): answer_file(model, tok, ALPACA, f, f)
    with pytest.raises(UserError, match="no folder"): answer_file(model, tok, ALPACA, f, tmp_path/"gone"/"o.jsonl")
    with pytest.raises(UserError, match="no such file"): answer_file(model, tok, ALPACA, tmp_path/"gone.jsonl", out)
    with pytest.raises(UserError, match="is a folder: name a file"): answer_file(model, tok, ALPACA, f, tmp_path)
    for bad, said in (("a "*3000, "row 2: a prompt of .* leaves no room"), ("a \ud800", "row 2: the text is not UTF-8, or holds half a character")):
        write_jsonl(f, [dict(prompt="a"), dict(prompt=bad), dict(prompt="c")])
        with pytest.raises(UserError, match=said): answer_file(model, tok, ALPACA, f, out)
    assert sorted(p.name for p in tmp_path.rglob("*"))==["in.jsonl"]


@pytest.mark.parametrize("args, said", [(["--input", "q.jsonl"], "needs --output"), (["--output", "o.jsonl"], "needs --input"), (["--chat", "--gradio"], "only one of"), (["--prompt-file", "gone.txt"], "no such file"),
    (["--use", "best"], "there is no model 'best'"), (["--temperature", "-1"], "temperature"), (["--top-p", "0.5"], "has no effect without"),
    (["--chat", "--context", "x"], "--context goes with one question"), (["--gradio", "--context", "x"], "--context goes with one question"), (["--input", "c.yml", "--output", "o", "--context", "x"], "--context goes with one question"),
    (["--gradio", "--compare"], "--compare does not go with --gradio"), (["--batch-size", "2"], "--batch-size needs --input"), *((["--input", "c.yml", "--output", "o", "--batch-size", n], f"`--batch-size` is {n}, but should be 1 or more") for n in ("0", "-1"))])
def test_bad_arguments(home, args, said):
    code, _, err = shell("inference", "c.yml", *args, cwd=home)
    assert code==2 and said in err, err


def test_golden_prompts_are_verified(home, tmp_path, caplog):
    import shutil
    shutil.copytree(home, tmp_path/"h")
    cfg = load_config(home/"c.yml").replace(output_dir=str(tmp_path/"h"/"out"))
    load_finetuned(cfg)
    kept = tmp_path/"h"/"out"/"golden_prompts.json"
    with pytest.raises(UserError, match="no longer those of the training"): load_finetuned(cfg.replace(chat_template="llama3"))
    kept.write_text("[{")
    with pytest.raises(UserError, match="golden_prompts.json is broken"): load_finetuned(cfg)
    kept.unlink()
    load_finetuned(cfg)
    assert "has no golden_prompts.json" in caplog.text


def test_an_adapter_of_another_base(home):
    with pytest.raises(UserError, match="it does not fit"): load_finetuned(load_config(home/"c.yml").replace(base_model="tiny:llama?hidden_size=32", output_dir=str(home/"out")))


# The page

def test_the_page_is_for_this_machine_alone(tok, model, capsys):
    "Where it listens, what a taken port says, and that its answers are those of the model"
    import gradio
    from gradio_client import Client
    from tuneforge.web import build_page, serve
    opts = GradioOptions(gradio_title="The village", gradio_max_new_tokens=6, gradio_temperature=0)
    assert opts.gradio_server_name=="127.0.0.1" and opts.gradio_share is False
    page = build_page(talk := Talk(model, tok, CHAT, SamplingOptions(max_new_tokens=6)), opts)
    try:
        address = serve(page, opts, block=False)
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)[1])
        line = capsys.readouterr().out
        assert address in line and "shared" not in line and page.share is False
        assert not any("share" in (c.get("props", {}).get("buttons") or []) for c in page.config["components"]) # no button sends a conversation away
        shown = lambda p: next(c["props"]["visible"] for c in p.config["components"] if c["props"].get("label")=="System message")
        assert shown(page) and not shown(build_page(Talk(model, tok, ALPACA), opts)) # a format that has no place for it
        assert _listens("127.0.0.1", port) and not _listens("127.0.0.2", port) and not _listens(_own_address(), port) # every address of 127/8 is this machine: bound to all of them, it would answer
        assert Client(address, verbose=False, analytics_enabled=False).predict("Where does Bagol live?", "", 0, 6, api_name="/chat")==talk.say("Where does Bagol live?")
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .*leave the port out"): serve(page, opts.model_copy(update=dict(gradio_server_port=port)), block=False)
    finally: page.close()


@pytest.mark.slow
def test_the_page_in_a_browser(home, tmp_path):
    "Started by the command, opened in headless chromium, asked through its own interface; nobody else is asked for anything"
    import shutil
    from gradio_client import Client
    p = subprocess.Popen([bin("tuneforge"), "inference", "c.yml", "--gradio", "--gradio-title", "The village", "--gradio-max-new-tokens", "6", "--gradio-temperature", "0"], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = p.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        assert "shared" not in line
        said = Client(address, verbose=False, analytics_enabled=False).predict("Where does Bagol live?", "", 0, 6, api_name="/chat")
        want = tuneforge("inference", "c.yml", "--max-new-tokens", "6", cwd=home, stdin="Where does Bagol live?").stdout.rstrip("\n")
        assert said==want
        port = int(address.rsplit(":", 1)[1])
        assert not _listens(_own_address(), port) # only here
        taken = tuneforge("inference", "c.yml", "--gradio", "--gradio-server-port", port, cwd=home)
        assert taken.returncode==2 and "cannot listen on 127.0.0.1" in taken.stderr, taken.stderr
        if chromium := shutil.which("chromium"):
            res = run(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom", f"--user-data-dir={tmp_path/'c'}", address, timeout=180)
            assert "The village" in res.stdout and "System message" in res.stdout
            assert not {h for h in re.findall(r"(?:src|href)=\"https?://([^/\":]+)", res.stdout)}-{"127.0.0.1"}
    finally: p.terminate(), p.wait(20)


def _own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try: s.connect(("10.255.255.255", 1))
        except OSError: return "127.0.0.2"
        return s.getsockname()[0]


def _listens(host, port):
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex((host, port))==0
