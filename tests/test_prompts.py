"Every prompt format, against text written out by hand, on several kinds of tokenizers"
import json, sys
import pytest
from hypothesis import given, settings, strategies as st
from tuneforge.config import DatasetOptions, UserError
from tuneforge.prompts import FORMATS, STYLES, PromptFormat, code_of, fill, from_function, named_function, own_function, prompt_format, register
from tuneforge.tokens import IGNORE, disagreement, encode_rows, tokenise_rows
from tests.tokenizers import tokenizer
from tests.tools import ROOT, run

WITH = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request."
WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CONCISE = "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n"
CONCISE_WITH = "Below is an instruction from a USER that describes a task, paired with an input that provides further context. The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n"
CONTEXT = "Use the following contextual information to concisely answer the question.\n"
ROW = dict(instruction="I?", output="O.")
ROWI = ROW | dict(input="X")
CHOICE = dict(question="Q?", choices=["a", "b"], solution="S.")
ORCA = dict(question="Q?", response="R.", system_prompt="Sys.")

CASES = [ # type, row, prompt, response
    ("alpaca", ROW, f"{WITHOUT}\n\n### Instruction:\nI?\n\n### Response:\n", "O."),
    ("alpaca", ROWI, f"{WITH}\n\n### Instruction:\nI?\n\n### Input:\nX\n\n### Response:\n", "O."),
    ("alpaca", ROW | dict(input=""), f"{WITHOUT}\n\n### Instruction:\nI?\n\n### Response:\n", "O."),
    ("alpaca:chat", ROWI, f"SYSTEM: {WITH}\nUSER: I?\nX\nASSISTANT:", "O."),
    ("alpaca:chatml", ROWI, f"<|im_start|>system\n{WITH}<|im_end|>\n<|im_start|>user\nI?\nX<|im_end|>\n<|im_start|>assistant\n", "O."),
    ("alpaca:chatml", ROW, f"<|im_start|>system\n{WITHOUT}<|im_end|>\n<|im_start|>user\nI?<|im_end|>\n<|im_start|>assistant\n", "O."),
    ("alpaca:phi", ROW, f"<|system|>\n{WITHOUT}<|end|>\n<|user|>\nI?<|end|>\n<|assistant|>\n", "O."),
    ("alpaca:phi", ROWI, f"<|system|>\n{WITH}<|end|>\n<|user|>\nI?\nX<|end|>\n<|assistant|>\n", "O."),
    ("alpaca_instruct", ROW, f"{WITHOUT}\n\n### Instruction:\nI?\n\n### Response:\n", "O."),
    ("alpaca_instruct.load", ROW, f"{WITHOUT}\n\n### Instruction:\nI?\n\n### Response:\n", "O."),
    ("alpaca_instruct.load_no_prompt", ROWI, "### Instruction:\nI?\n\n### Input:\nX\n\n### Response:\n", "O."),
    ("alpaca_chat", ROW, f"SYSTEM: {WITHOUT}\nUSER: I?\nASSISTANT:", "O."),
    ("alpaca_chat.load_concise", ROW, f"SYSTEM: {CONCISE}\nUSER: I?\nASSISTANT:", "O."),
    ("alpaca_chat.load_concise", ROWI, f"SYSTEM: {CONCISE_WITH}\nUSER: I?\nX\nASSISTANT:", "O."),
    ("alpaca_chat.load_qa", dict(question="Q?", answer="A."), f"SYSTEM: {CONCISE}\nUSER: Q?\nASSISTANT:", "A."),
    ("alpaca_chat.load_camel_ai", dict(message_1="Q?", message_2="A."), f"SYSTEM: {CONCISE}\nUSER: Q?\nASSISTANT:", "A."),
    ("alpaca_chat.load_no_prompt", ROWI, "USER: I?\nX\nASSISTANT:", "O."),
    ("alpaca_w_system", ROW | dict(system="Sys."), "SYSTEM: Sys.\nUSER: I?\nASSISTANT:", "O."),
    ("alpaca_w_system.load_chat", ROW | dict(system=""), "USER: I?\nASSISTANT:", "O."),
    ("alpaca_w_system.load_instruct", ROWI | dict(system="Sys."), "Sys.\n\n### Instruction:\nI?\n\n### Input:\nX\n\n### Response:\n", "O."),
    ("alpaca_w_system.load_open_orca", ORCA, "### System:\nSys.\n### Human:\nQ?\n### Assistant:\n", "R."),
    ("alpaca_w_system.load_open_orca_chatml", ORCA, "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n", "R."),
    ("orcamini", ORCA, "### System:\nSys.\n\n### User:\nQ?\n\n### Response:\n", "R."),
    ("explainchoice", CHOICE, 'Choose the answer that best answers the question. Explain your reasoning.\n\n\n### Instruction:\nQ?\n\n### Input:\n- "a"\n- "b"\n\n### Response:\n', "S."),
    ("concisechoice", CHOICE | dict(solution=None, explanation="E."), 'Choose the answer that best answers the question. Be concise in your response.\n\nUSER: Q?\n- "a"\n- "b"\nASSISTANT:', "E."),
    ("summarizetldr", dict(article="Long.", summary="S."), "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:", "S."),
    ("jeopardy", dict(question="Q", category="C", answer="a town"), f"{WITH}\n\n### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n", "what is a town"),
    ("oasst", dict(INSTRUCTION="I?", RESPONSE="R."), f"{WITHOUT}\n\n### Instruction:\nI?\n\n### Response:\n", "R."),
    ("gpteacher", dict(instruction="I?", input="X", response="R."), f"{WITH}\n\n### Instruction:\nI?\n\n### Input:\nX\n\n### Response:\n", "R."),
    ("context_qa", dict(article="Art.", question="Q?", answer="A."), f"SYSTEM: {CONTEXT}\nUSER: Art.\n===\nQ?\nASSISTANT:", "A."),
    ("context_qa.load_404", dict(article="Art.", unanswerable_question="Q?"), f"SYSTEM: {CONTEXT}\nUSER: Art.\n===\nQ?\nASSISTANT:", "The context provided does not contain any information about your inquiry. Therefore, I'm unable to answer your question based on the given context."),
    ("context_qa.load_v2", dict(context="C.", question="Q?", answer="A."), "Context: C.\nQuestion: Q?\n", "Answer: A."),
    (dict(field_instruction="q", field_output="a", system_prompt="Sys.", system_format="[{system}] ", format="{{{instruction}}}|{input}|", no_input_format="Q {instruction}: "), dict(q="Q?", a="A.", input="X"), "[Sys.] {Q?}|X|", "A."),
    (dict(field_instruction="q", field_output="a"), dict(q="Q?", a="A."), "Q? ", "A."),
    (dict(field_instruction="q", field_output="a", format="Q: {instruction}\nA: "), dict(q="Q?", a="A."), "Q: Q?\nA: ", "A."), # meant for all rows
    (dict(field_instruction="q", field_output="a", format="Q: {instruction}\nA: "), dict(q="Q?", a="A.", input="X"), "Q: Q?\nA: ", "A."),
    (dict(field_instruction="q", field_output="a", format="{{input}} {instruction}:"), dict(q="Q?", a="A."), "{input} Q?:", "A."),
    (dict(field_instruction="q", field_output="a", format="Q: {instruction} {input}"), dict(q="Q?", a="A."), "Q? ", "A."), # as in Axolotl
    (dict(field_instruction="q", field_output="a"), dict(q="Q {input}", a="A.", system="S", input="X"), "SQ {input} X ", "A."),
]


def ids(tok, text): return tok(text, add_special_tokens=False).input_ids


def by_hand(tok, prompt, response, n_eos=1):
    "Prompt and response tokenised apart"
    p, r = ([tok.bos_token_id] if tok("").input_ids else [])+ids(tok, prompt), ids(tok, response)
    r += [tok.eos_token_id]*(n_eos-(r[-1:]==[tok.eos_token_id]))
    return dict(input_ids=p+r, labels=[IGNORE]*len(p)+r)


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("type, row, prompt, response", CASES, ids=[str(c[0])[:32] for c in CASES])
def test_instructions(type, row, prompt, response, kind, bos):
    tok = tokenizer(kind, bos)
    assert encode_rows([row], dict(type=type), tok)==[by_hand(tok, prompt, response)]
    both = encode_rows([row], dict(type=type), tok, train_on_inputs=True)[0]
    assert both["input_ids"]==both["labels"]==by_hand(tok, prompt, response)["input_ids"]
    fmt = prompt_format(DatasetOptions(path="x", type=type), tok)
    assert disagreement(fmt, tok, row, tokenise_rows([row], fmt, tok, 2048)[0][0]) is None


def test_every_format_is_tested():
    styled = {f"{n}:{s}" for n in ("alpaca", "explainchoice", "jeopardy", "oasst", "gpteacher", "reflection") for s in STYLES}
    others = {"completion", "pretrain", "input_output", "pygmalion", "llama2_chat", "metharme", "reflection", "creative_acr.load_answer", "creative_acr.load_critique", "creative_acr.load_revise",
        "chat_template", "sharegpt", "messages", "messages.chat", "alpaca_chat.load", "tokens"}
    assert set(FORMATS)-{c[0] for c in CASES if isinstance(c[0], str)}-styled-others-{"test:own"}==set()


def test_empty_response_teaches_to_stop():
    tok = tokenizer()
    enc = encode_rows([ROW | dict(output="")], dict(type="alpaca"), tok)[0]
    assert [i for i in enc["labels"] if i!=IGNORE]==[tok.eos_token_id]
    assert encode_rows([ROW | dict(output="O.</s>")], dict(type="alpaca"), tok)==encode_rows([ROW], dict(type="alpaca"), tok)


@pytest.mark.parametrize("size", [5, 12, 30])
def test_parts_are_cut_as_elsewhere(size): # such rows are longer than `sequence_len`, and counted as such
    tok = tokenizer()
    p, r = [tok.bos_token_id]+ids(tok, "I "*20), ids(tok, "O "*20)+[tok.eos_token_id]
    enc = encode_rows([dict(instruction="I "*20, output="O "*20)], dict(type=dict(no_input_format="{instruction}")), tok, sequence_len=size)[0]
    assert enc["input_ids"]==p[:size]+r[:size] and enc["labels"]==[IGNORE]*min(size, len(p))+r[:size]


def test_conversation_names_the_layout():
    tok = tokenizer()
    assert encode_rows([ROW], dict(type="alpaca_chat", conversation="chatml"), tok)==encode_rows([ROW], dict(type="alpaca:chatml"), tok)
    with pytest.raises(UserError, match="there is no `conversation: vicuna`"): encode_rows([ROW], dict(type="alpaca_chat", conversation="vicuna"), tok)


def test_reflection():
    row = ROW | dict(reflection="R", corrected="C")
    segs = prompt_format(DatasetOptions(path="x", type="reflection"))(row)
    assert segs[0].text.endswith("\n\n### Instruction:\nI?\n\n### Response:\n") and segs[1].text=="### Thought:\nO.\n\n### Agent Reflection:\nR\n\n### Final Response:\nC"
    assert prompt_format(DatasetOptions(path="x", type="reflection:chat"))(row)[1].text=="\nTHOUGHT: O.\nASSISTANT REFLECTION: R\nASSISTANT: C"


def test_creative_acr():
    row = dict(instruction="I?", answer="A.", revision="R.", scores=dict(depth=3, none=None), critiques=dict(depth="thin"))
    of = lambda n: prompt_format(DatasetOptions(path="x", type=f"creative_acr.{n}"))(row)
    assert of("load_answer")[0].text.endswith("\nUSER: I?\nASSISTANT:") and of("load_answer")[1].text=="R."
    assert of("load_critique")[0].text.endswith("Question: I?\nAnswer: A.\n\nASSISTANT:") and of("load_critique")[1].text=="depth: 3\ndepth: thin\n"
    assert "Evaluation:\ndepth: 3\ndepth: thin\n" in of("load_revise")[0].text and of("load_revise")[1].text=="R."


def test_metharme_ends_three_times():
    tok = tokenizer()
    row = dict(prompt="<|user|>Hi<|model|>", generation="Hello")
    assert encode_rows([row], dict(type="metharme"), tok)==[by_hand(tok, row["prompt"], "Hello", 3)]
    assert encode_rows([row | dict(generation="Hello</s>")], dict(type="metharme"), tok)==[by_hand(tok, row["prompt"], "Hello", 3)]
    assert encode_rows([row | dict(prompt="")], dict(type="metharme"), tok)==[by_hand(tok, "", "Hello", 3)]


@pytest.mark.parametrize("type, key", [("completion", "field"), ("pretrain", "text_column")])
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_plain_text_is_cut_and_loses_nothing(type, key, kind):
    tok = tokenizer(kind)
    text = "Bagol lives in Coldmere. "*30
    enc = encode_rows([dict(story=text), dict(story="Hi")], dict(type=type, **{key: "story"}), tok, sequence_len=16)
    whole = tok(text).input_ids+[tok.eos_token_id]
    assert [i for o in enc[:-1] for i in o["input_ids"]]==whole and all(len(o["input_ids"])<=16 for o in enc) and all(o["input_ids"]==o["labels"] for o in enc)
    assert enc[-1]["input_ids"]==tok("Hi").input_ids+[tok.eos_token_id]


def test_segments_from_the_data():
    tok = tokenizer()
    row = dict(segments=[dict(label=False, text="<s>Who? "), dict(label=True, text="Bagol.</s>"), dict(label=False, text=" Hm")])
    parts = [ids(tok, s["text"]) for s in row["segments"]]
    assert encode_rows([row], dict(type="input_output"), tok)==[dict(input_ids=sum(parts, []), labels=[IGNORE]*len(parts[0])+parts[1]+[IGNORE]*len(parts[2]))]
    assert encode_rows([row], dict(type="input_output"), tok, train_on_inputs=True)[0]["labels"]==sum(parts, [])


def test_prompts_of_several_segments_can_disagree():
    tok = tokenizer()
    row = dict(segments=[dict(label=False, text="In Cold"), dict(label=False, text="mere"), dict(label=True, text=".")])
    fmt = prompt_format(DatasetOptions(path="x", type="input_output"))
    assert "at character 2 inference asks" in disagreement(fmt, tok, row, tokenise_rows([row], fmt, tok, 99)[0][0])


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_pygmalion(kind):
    tok = tokenizer(kind)
    row = dict(conversations=[dict(role="system", value=" A potter.\n<START>"), dict(role="human", value="Who?"), dict(role="bot", value="Bagol."), dict(role="bot", value="Ha")])
    masked = [tok.bos_token_id]+ids(tok, "<|system|>Persona: A potter.")+ids(tok, "<|user|> Who?")
    bots = [ids(tok, f"<|model|> {v}")+[tok.eos_token_id] for v in ("Bagol.", "Ha")]
    n = len(ids(tok, "<|model|>"))
    assert encode_rows([row], dict(type="pygmalion"), tok)==[dict(input_ids=masked+bots[0]+bots[1], labels=[IGNORE]*len(masked)+[i for b in bots for i in [IGNORE]*n+b[n:]])]


def test_llama2_chat():
    tok = tokenizer()
    turns = [("system", "Sys."), ("human", " U1 "), ("gpt", "A1"), ("human", "U2"), ("gpt", " A2"), ("human", "U3")]
    enc = encode_rows([dict(conversations=[{"from": f, "value": v} for f, v in turns])], dict(type="llama2_chat"), tok)[0]
    text = "[INST] <<SYS>>\nSys.\n<</SYS>>\n\nU1[/INST] A1 </s><s>[INST] U2 [/INST] A2 </s><s>"
    assert enc["input_ids"]==tok(text).input_ids
    assert tok.decode([i for i in enc["labels"] if i!=IGNORE])==" A1 </s> A2 </s>"


def test_own_tokens_are_taken_as_they_are():
    tok = tokenizer()
    row = dict(input_ids=[5, 6, 7], labels=[IGNORE, 6, 7], attention_mask=[1, 1, 1])
    assert encode_rows([row], dict(type="alpaca"), tok)==[dict(input_ids=[5, 6, 7], labels=[IGNORE, 6, 7])]
    assert encode_rows([row | dict(attention_mask=[0, 1, 1])], {}, tok)==[dict(input_ids=[6, 7], labels=[6, 7])]
    for odd, says in [(dict(labels=[1]), "labels has 1 entries"), (dict(input_ids=[5, -1, 7]), r"input_ids\[1\] is -1"), (dict(input_ids=[5, 6, 10**6]), r"input_ids\[2\] is 1000000"), (dict(labels="x"), "labels is text")]:
        with pytest.raises(UserError, match=says): encode_rows([row | odd], {}, tok)


def test_own_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"riddles.py").write_text("def riddle(row, entry, tokenizer): return [(row[entry.field]+tokenizer.eos_token, False), (row['a'], True)]\ndef odd(row): return [1]\ndef none(row): return []\n")
    tok = tokenizer()
    assert encode_rows([dict(q="Q?", a="A.")], dict(type="riddles:riddle", field="q"), tok)==[by_hand(tok, "Q?</s>", "A.")]
    for f, says in [("riddles:nothing", "no function `nothing` in"), ("riddles:odd", "odd failed: TypeError"), ("riddles:none", "should return pairs"), ("nosuch:f", "unknown `type: nosuch:f`")]:
        with pytest.raises(UserError, match=says): encode_rows([dict(q="Q?", a="A.")], dict(type=f), tok)
    with pytest.raises(UserError, match="row 1 .*riddle failed: KeyError: 'a'"): encode_rows([dict(q="Q?")], dict(type="riddles:riddle", field="q"), tok)


OWN = """import functools, re
import beside
WORDS = {"one", "two", "three"}
CALLED = re.compile("x+")
def more(row): return row["a"]+SUFFIX
SUFFIX = "!"
class Kind:
    mark = "k"
    def of(self, row): return self.mark+row
    @property
    def name(self): return "name"
KIND = Kind()
KIND.own = 1
@functools.lru_cache
def slow(x): return x+"s"
half = functools.partial(more, dict(a="h"))
def outer(word):
    def inner(row): return word
    return inner
told = outer("w")
def other(): return "other"
def riddle(row, what="Q: "):
    ends = [x+y for x in "ab" for y in (lambda: "c")()]
    return [(what+row["q"], False), (more(row)+beside.end()+KIND.of("")+slow("")+half()+told(row)+CALLED.pattern+str("one" in WORDS), True)]
"""
EDITS = [("SUFFIX = \"!\"", "SUFFIX = \"?\""), ('row["a"]+SUFFIX', 'SUFFIX+row["a"]'), ('mark = "k"', 'mark = "K"'), ("self.mark+row", "row+self.mark"), ("KIND.own = 1", "KIND.own = 2"), ('x+"s"', 'x+"S"'), ('a="h"', 'a="H"'),
    ('outer("w")', 'outer("W")'), ("return word", "return word*2"), ('what="Q: "', 'what="Q? "'), ('lambda: "c"', 'lambda: "d"'), ('"two", "three"', '"two"'), ('"x+"', '"y+"'), ('"one" in', '"two" in'), ('return "name"', 'return "Name"')]
SAME = [("import functools, re", "# a comment\n\nimport functools, re"), ('return "other"', 'return "another"'), ("def riddle(", "def fourth(): pass\n\ndef riddle(")]

def test_what_own_code_is(tmp_path, monkeypatch):
    "The same in another process, with another seed of hashes; another after any edit of what the function uses, and after no other"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("riddles", "beside"): monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path/"beside.py").write_text("def end(): return 'end'\ndef never(): return 1\n")
    def code(text):
        (tmp_path/"riddles.py").write_text(text)
        return json.dumps(code_of(own_function("riddles:riddle")))
    was = code(OWN)
    for old, new in EDITS: assert old in OWN and code(OWN.replace(old, new))!=was, old
    for old, new in SAME: assert old in OWN and code(OWN.replace(old, new))==was, old
    assert code(OWN)==was
    other = run(sys.executable, "-c", "import json; from tuneforge.prompts import *; print(json.dumps(code_of(own_function('riddles:riddle'))))", cwd=tmp_path, env=dict(PYTHONHASHSEED="7", PYTHONPATH=str(ROOT)))
    assert other.stdout.strip()==was, other.stderr
    (tmp_path/"beside.py").write_text("def end(): return 'the end'\ndef never(): return 1\n")
    other = run(sys.executable, "-c", "import json; from tuneforge.prompts import *; print(json.dumps(code_of(own_function('riddles:riddle'))))", cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    assert other.stdout.strip() not in ("", was), other.stderr


def test_own_code_that_does_not_load(tmp_path, monkeypatch):
    "It is named with its line, leaves nothing behind, and is loaded as soon as it is mended; a built-in name is never looked for in a file"
    monkeypatch.chdir(tmp_path)
    f = tmp_path/"broken_riddles.py"
    for text, says in [("x = 1\ndef f(row) return 1\n", ":2: SyntaxError: "), ("import no_such_thing\n", ":1: ModuleNotFoundError: No module named 'no_such_thing'"), ("\n1/0\n", ":2: ZeroDivisionError")]:
        f.write_text(text)
        with pytest.raises(UserError, match="broken_riddles.py"+says): own_function("broken_riddles:f")
        assert "broken_riddles" not in sys.modules
    f.write_text("def f(row): return [('a', False), ('b', True)]\n")
    assert own_function("broken_riddles:f")({})==[("a", False), ("b", True)]
    (tmp_path/"alpaca.py").write_text("1/0")
    assert encode_rows([ROW], dict(type="alpaca:chat"), tokenizer()) and named_function("alpaca:chat")[1]


def test_registered_functions():
    @register("test:own")
    def own(opts, tokenizer): return from_function(lambda row: [(row["q"], False), (row["a"], True)], opts, tokenizer)
    tok = tokenizer()
    assert encode_rows([dict(q="Q?", a="A.")], dict(type="test:own"), tok)==[by_hand(tok, "Q?", "A.")]


@pytest.mark.parametrize("entry, says", [(dict(type="alpacca"), "did you mean `alpaca`"), (dict(type=dict(formt="x")), "unknown key `formt` under `datasets.0..type`, did you mean `format`"), (dict(type=dict(format="{instuction}")), "has a place {instuction}"), (dict(feild="x"), "unknown key `feild` under `datasets.0.`, did you mean `field`"), (dict(train_on_eos="maybe"), "train_on_eos")])
def test_entries_that_are_not_valid(entry, says):
    with pytest.raises(UserError, match=says): encode_rows([ROW], entry, tokenizer())


@pytest.mark.parametrize("type, row, says", [
    ("alpaca", dict(instruction="I?"), "the row has no `output`"), ("alpaca", dict(instruction="I?", output=None), "output is null or missing"), ("alpaca", dict(instruction="I?", output=5), r"output is a number \(5\)"), ("alpaca", ROW | dict(input=[1]), "input is a list"),
    ("explainchoice", CHOICE | dict(choices="a"), "choices is text"), ("explainchoice", CHOICE | dict(choices=["a", None]), r"choices\[1\] is null"), ("explainchoice", CHOICE | dict(solution=None), "explanation is null"),
    ("input_output", dict(segments=[dict(text="x")]), r"segments\[0\].label is null"), ("input_output", dict(segments=["x"]), r"segments\[0\] is text"),
    ("pygmalion", dict(conversations=[dict(role="gpt", value="x")]), r"conversations\[0\].role is 'gpt'"), ("pygmalion", dict(conversations=[]), "conversations is empty"),
    ("llama2_chat", dict(conversations=[{"from": "human", "value": "x"}]), "no question with an answer"), ("llama2_chat", dict(conversations=[{"from": "human", "value": "x"}]*2+[{"from": "gpt", "value": "x"}]), "human speaks twice"),
    (dict(field_output="a"), dict(instruction="x"), "the row has no `a`")])
def test_bad_rows_say_where(type, row, says):
    good = dict(ROW, a="x", question="Q", choices=["a"], solution="s", segments=[dict(text="x", label=True)])
    rows = [good, row] if type in ("alpaca", "explainchoice", "input_output") or isinstance(type, dict) else [row]
    with pytest.raises(UserError, match=rf"^row {len(rows)} \(rows\[{len(rows)-1}\]\): .*{says}"): encode_rows(rows, dict(type=type), tokenizer())


@pytest.mark.parametrize("entry, row, says, not_says", [
    (dict(type="alpaca"), dict(prompt="a", response="b"), ["the row has no `instruction`, which `type: alpaca` needs; the row has `prompt`, `response`. ", "a `type:` block: `field_instruction: …`, `field_output: …`"], "null"),
    (dict(type="alpaca"), dict(Instructions="a", output="b"), ["no `instruction`", "did you mean `Instructions`? Other names"], "null"),
    (dict(type=dict(field_instruction="Frag", field_output="Antwort")), dict(Frage="a", Antwort="b"), ["the row has no `Frag`, which `type:` needs; the row has `Frage`, `Antwort`, did you mean `Frage`? `field_instruction`"], "custom"),
    (dict(type="completion"), dict(body="a"), ["the row has no `text`", "`field: …` names another column"], "field_instruction"),
    (dict(type="alpaca"), dict(messages=[]), ["looks like `type: chat_template`"], "field_instruction"),
    (dict(type="alpaca"), {}, ["the row has no `instruction`", "the row is empty"], "did you mean"),
    (dict(type="chat_template", chat_template="chatml"), dict(message=[]), ["the row has no `messages`, did you mean `message`? It has `message`; `field_messages: …`"], "null")])
def test_a_missing_column_is_named_and_how_to_name_another(entry, row, says, not_says):
    with pytest.raises(UserError) as e: prompt_format(DatasetOptions(path="x", **entry), tokenizer())(row)
    for s in says: assert s in str(e.value)
    assert not_says not in str(e.value)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20)), max_size=5), st.sampled_from(["byte", "metaspace"]), st.booleans())
def test_whatever_rows_say(rows, kind, bos):
    clean = lambda s: s.encode("utf-8", "ignore").decode()
    tok = tokenizer(kind, bos)
    rows = [dict(zip(("instruction", "input", "output"), map(clean, r))) for r in rows]
    prompt = lambda r: f"{WITH if r['input'] else WITHOUT}\n\n### Instruction:\n{r['instruction']}\n\n"+(f"### Input:\n{r['input']}\n\n" if r["input"] else "")+"### Response:\n"
    assert encode_rows(rows, dict(type="alpaca"), tok)==[by_hand(tok, prompt(r), r["output"]) for r in rows]


def test_own_code_that_fails_is_a_bad_row():
    def boom(row): return 1/0
    fmt = from_function(boom, DatasetOptions(path="x"))
    with pytest.raises(UserError, match="boom failed: ZeroDivisionError"): fmt(dict(q="x"))
    with pytest.raises(UserError, match="returned a text"): from_function(lambda row: "text", DatasetOptions(path="x"))({})


def test_built_in_names_are_taken():
    with pytest.raises(UserError, match="called `alpaca` already"):
        @register("alpaca")
        def mine(opts, tokenizer): pass


@given(st.lists(st.one_of(st.sampled_from(["{{", "}}", "{a}", "{b}", "\n"]), st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), max_size=5))),
    st.text(max_size=5), st.sampled_from(["", "{a}", "{{", "plain"]))
def test_places_are_filled_as_python_does(pieces, a, b):
    template = "".join(pieces)
    assert fill(template, a=a, b=b)==template.format(a=a, b=b)
