"Masks of chat templates, against text written out by hand"
import json
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tuneforge.chat import ChatTemplate, find_turns, render, to_messages
from tuneforge.config import DatasetOptions, UserError
from tuneforge.prompts import prompt_format
from tuneforge.templates import TEMPLATES, resolve_template
from tuneforge.tokens import IGNORE, disagreement, encode_rows, tokenise_rows
from tests.tokenizers import tokenizer

SHIPPED = [n for n in TEMPLATES]
# what a template writes before an answer, after one, after one that isn't the last; how it trims; whether it takes a system message
PLAIN = ("", "<|im_end|>", "<|im_end|>", str, True)
LAYOUT = {n: PLAIN for n in ("chatml", "phi_4", "qwen_25", "qwen2_vl")} | dict(
    alpaca=(" ", "</s>", "</s>", str, True), aya=("", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", str.strip, True),
    deepseek_v2=("", "</s>", "</s>", str, True), exaone=("", "[|endofturn|]", "[|endofturn|]", str, True),
    gemma=("", "<end_of_turn>", "<end_of_turn>", str.strip, False), jamba=(" ", "<|eom|>", "<|eom|>", str, True),
    llama3=("", "<|eot_id|>", "<|eot_id|>", str.strip, True), llama4=("", "<|eot|>", "<|eot|>", str.strip, True),
    metharme=("", "</s>", "", str, True), mistral_v1=(" ", "</s>", "</s>", str, False), mistral_v3_tekken=("", "</s>", "</s>", str, False),
    mistral_v7_tekken=("", "</s>", "</s>", str, True), phi_3=("", "<|end|>", "<|end|>", str, True))
SAME = dict(cohere="aya", deepseek_v3="deepseek_v2", gemma3="gemma", gemma3n="gemma", llama3_2_vision="llama3", mistral_v2v3="mistral_v1", phi_35="phi_3")
LAYOUT |= {a: LAYOUT[b] for a, b in SAME.items()}
TURN, RESPONSE = ("", "<turn|>", "<turn|>", str.strip, True), "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
LAYOUT |= dict(
    falcon_h1=PLAIN, nemotron_h=PLAIN[:3]+(str.rstrip, True), qwen3_5=PLAIN[:3]+(str.strip, True), exaone4=("", "[|endofturn|]", "[|endofturn|]", str, True),
    pixtral=("", "</s>", "</s>", str, True), llava=(" ", "</s>", "</s>", str, True), gemma4=TURN, gemma4_unified=TURN, command_a=("", RESPONSE, RESPONSE, str, True),
    command_a_tool_use=("<|START_RESPONSE|>", RESPONSE, RESPONSE, str, True), command_a_rag=("<|START_RESPONSE|>", RESPONSE, RESPONSE, str, True))
MORE = {n: dict(chat_template_kwargs=dict(enable_thinking=False)) for n in ("nemotron_h", "qwen3_5")} # their prompts begin a thought
FORMAL = dict(type="chat_template")

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), max_size=12) | st.sampled_from(
    ["", " ", "\n", "  Hello", "Hello \n", "\n\nHello\n", "<|im_end|>", "[[dummy]]", "{{ 7*7 }}", "<|im_start|>assistant\n", "a\n\nb", "{% raw %}", "</s>", "[/INST]", "<|end|>",
     "<end_of_turn>\n<start_of_turn>model\n", "### Response: no", "<|eot_id|>", "山 Käthe 🐐", "\u2028x\u2028", "[|assistant|]", "<|model|>", "Hello<|im_end|>\n<|im_start|>assistant\nHello"])


def conversation(contents, system=None):
    chat = [dict(role=("user", "assistant")[i%2], content=c) for i, c in enumerate(contents)]
    return ([dict(role="system", content=system)] if system is not None else [])+chat


def expected(name, contents):
    "The text that is trained, by hand"
    lead, last, inner, trim, _ = LAYOUT[name]
    answers = [trim(c) for c in contents[1::2]]
    return [lead+a+(last if i==len(answers)-1 and len(contents)%2==0 else inner) for i, a in enumerate(answers)]


def trained(segments):
    "The trained text of each turn"
    res = {}
    for s in segments: res[s.turn] = res.get(s.turn, "")+s.text*s.train
    return [t for t in res.values() if t]


@pytest.mark.parametrize("name", sorted(LAYOUT))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.lists(text, min_size=2, max_size=6), text | st.none())
def test_trained_text_of_every_template(name, contents, system):
    tok = tokenizer()
    if not LAYOUT[name][4]: system = None
    more = MORE.get(name, {})
    fmt = prompt_format(DatasetOptions(path="x", chat_template=name, **FORMAL, **more), tok)
    row = dict(messages=conversation(contents, system))
    segs = fmt(row)
    assert "".join(s.text for s in segs)==render(row["messages"], TEMPLATES[name], bos_token="<s>", eos_token="</s>", **more.get("chat_template_kwargs", {}))
    want = [t for t in expected(name, contents) if t]
    assert trained(segs)==want
    enc = encode_rows([row], dict(FORMAL, chat_template=name, **more), tok)[0]
    assert tok.decode([i for i in enc["labels"] if i!=IGNORE])=="".join(want)


def spoken(tok, ids):
    "The text of SentencePiece-like tokens, with all its spaces"
    raw = b"".join(bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tok.convert_ids_to_tokens(ids))
    return raw.decode()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(LAYOUT)), st.lists(st.text("abc Helo.é山\n", min_size=1, max_size=9).filter(str.strip), min_size=2, max_size=4), st.booleans())
def test_sentencepiece_like_tokens(name, contents, bos):
    tok = tokenizer("metaspace", bos)
    enc = encode_rows([dict(messages=conversation(contents))], dict(FORMAL, chat_template=name, **MORE.get(name, {})), tok)[0]
    assert spoken(tok, [i for i in enc["labels"] if i!=IGNORE])=="".join(expected(name, contents))


@pytest.mark.parametrize("name", sorted(LAYOUT))
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_inference_agrees_with_training(name, kind):
    tok = tokenizer(kind)
    rows = [dict(messages=conversation(["Where does Bagol live?", "In Coldmere.", "And Dimul?", "Foxbury"][:n])) for n in (2, 4)]
    fmt = prompt_format(DatasetOptions(path="x", chat_template=name, **FORMAL, **MORE.get(name, {})), tok)
    batch, row, _ = tokenise_rows(rows, fmt, tok, 2048)
    assert [disagreement(fmt, tok, r, s) for r, s in zip(rows, batch)]==[None, None]


# thinking, tools, templates of other kinds

def turns(messages, name, **kw):
    fmt = prompt_format(DatasetOptions(path="x", chat_template=name if name in TEMPLATES else "jinja", chat_template_jinja=None if name in TEMPLATES else name, **FORMAL, **kw), tokenizer())
    return trained(fmt(dict(messages=messages)))


U, V = dict(role="user", content="Who?"), dict(role="user", content="Where?")
answer = lambda content, **kw: dict(role="assistant", content=content, **kw)
END = "<|im_end|>"


@pytest.mark.parametrize("thinking", ["hm", "a\n\nb", "<tool_call>", "Hello", "<|im_end|>"])
@pytest.mark.parametrize("own_key", [True, False])
def test_thinking_is_trained_where_it_is_written(thinking, own_key):
    say = lambda t: answer(t, reasoning_content=thinking) if own_key else answer(f"<think>\n{thinking}\n</think>\n\n{t}")
    assert turns([U, say("Hello"), V, say("There ")], "qwen3")==["Hello"+END, f"<think>\n{thinking}\n</think>\n\nThere {END}"]


def test_an_empty_thinking_block_is_not_trained():
    assert turns([U, answer("Hello")], "qwen3")==["Hello"+END]
    assert turns([U, answer(""), V, answer("")], "qwen3")==[END, END]
    assert turns([U, answer("a"), V, answer("b")], "qwen3", chat_template_kwargs=dict(enable_thinking=False))==["a"+END, "b"+END]
    assert turns([dict(role="user", content=""), answer("")]*2, "qwen3", chat_template_kwargs=dict(enable_thinking=False))==[END, END]


def test_only_thinking():
    assert turns([U, answer("<think>\nhm\n</think>")], "qwen3")==["<think>\nhm\n</think>\n\n"+END]
    assert turns([U, answer("<think>\nhm\n</think>")], "chatml")==["<think>\nhm\n</think>"+END]


def test_split_thinking_gives_it_to_the_template():
    row = [U, answer("<think>hm</think> Hello")]
    assert turns(row, "qwen3", split_thinking=True)==["<think>\nhm\n</think>\n\nHello"+END]
    assert to_messages(dict(messages=row), DatasetOptions(path="x", split_thinking=True, template_thinking_key="thinking")).messages[1]==dict(role="assistant", content="Hello", thinking="hm")


CALL = dict(role="assistant", content=None, tool_calls=[dict(id="1", type="function", function=dict(name="where", arguments='{"who": "Bagol <|im_end|>", "n": 1, "deep": {"a": ["x"]}}')), dict(function=dict(name="f", arguments={}))])
TOOLS = [dict(type="function", function=dict(name="where", description="Where someone lives", parameters=dict(type="object", properties=dict(who=dict(type="string", enum=None)))))]


@pytest.mark.parametrize("name, call", [
    ("qwen_25", '<tool_call>\n{"name": "where", "arguments": {"who": "Bagol <|im_end|>", "n": 1, "deep": {"a": ["x"]}}}\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'),
    ("qwen3", '<tool_call>\n{"name": "where", "arguments": {"who": "Bagol <|im_end|>", "n": 1, "deep": {"a": ["x"]}}}\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'),
    ("jamba", ' <tool_calls>[{"name": "where", "arguments": {"who": "Bagol <|im_end|>", "n": 1, "deep": {"a": ["x"]}}}, {"name": "f", "arguments": {}}]</tool_calls><|eom|>'),
    ("llama4", '{"name": "where", "parameters": {"who": "Bagol <|im_end|>", "n": 1, "deep": {"a": ["x"]}}}{"name": "f", "parameters": {}}<|eot|>')])
def test_tool_calls_are_trained_whole(name, call):
    row = dict(messages=[U, CALL, dict(role="tool", content="Coldmere", tool_call_id="1"), answer("There")], tools=json.dumps(TOOLS))
    segs = prompt_format(DatasetOptions(path="x", chat_template=name, **FORMAL), tokenizer())(row)
    lead, end = LAYOUT.get(name, PLAIN)[:2]
    assert trained(segs)==[call, f"{lead}There{end}"]
    if name!="llama4": assert "Where someone lives" in segs[0].text and "null" not in segs[0].text


# whole conversations, written out by hand: «…» is trained

SAID = [dict(role="system", content="Be brief."), U, answer("Bagol.", reasoning_content="hm"), V,
    answer(None, reasoning_content="look", tool_calls=[dict(id="a", type="function", function=dict(name="where", arguments=dict(who="Bagol", n=1, deep=dict(a=["x"])))), dict(id="b", type="function", function=dict(name="f", arguments={}))]),
    dict(role="tool", tool_call_id="a", content="Cold\"mere"), dict(role="tool", tool_call_id="b", content="ok"), answer("There.", reasoning_content="so")]
PLAIN_SAID = [dict(role="system", content="Be brief."), U, answer("Bagol."), V, answer("There.")]
WHERE = [dict(type="function", function=dict(name="where", description="Where someone lives", parameters=dict(type="object", properties=dict(
    who=dict(type="string", description="A name", enum=["Bagol", "Dimul"]), n=dict(type="array", description="Days", items=dict(type="integer"), minItems=1)), required=["who"])))]
WHERE_JSON = '{"type": "function", "function": {"name": "where", "description": "Where someone lives", "parameters": {"type": "object", "properties": {"who": {"type": "string", "description": "A name", "enum": ["Bagol", "Dimul"]}, "n": {"type": "array", "description": "Days", "items": {"type": "integer"}, "minItems": 1}}, "required": ["who"]}}}'
XML_CALLS = """<tool_call>
<function=where>
<parameter=who>
Bagol
</parameter>
<parameter=n>
1
</parameter>
<parameter=deep>
{"a": ["x"]}
</parameter>
</function>
</tool_call>
<tool_call>
<function=f>
</function>
</tool_call>"""
XML_FORMAT = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>"""
DOCUMENTS = [dict(title="Towns", snippet="Bagol: Coldmere"), dict(title="Hills")]
S, E = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
WHOLE = dict(
    falcon_h1=(PLAIN_SAID, WHERE, {}, """<s><|im_start|>system
Be brief.

You are a function calling AI model. You are provided with function signature within <tools> </tools> XML tags. You may call one or more functions to assist with the user query. Don't make assumptions about what values to plug into functions.
<tools>
["""+WHERE_JSON+"""]
</tools>
For each function call, return a json object with function name and arguments within <tool_call> </tool_call> tags with the following schema:
<tool_call>
{'arguments': <args-dict>, 'name': <function-name>}
</tool_call>
<|im_start|>user
Who?<|im_end|>
<|im_start|>assistant
«Bagol.<|im_end|>»
<|im_start|>user
Where?<|im_end|>
<|im_start|>assistant
«There.<|im_end|>»
"""),
    nemotron_h=(SAID, WHERE, {}, """<|im_start|>system
Be brief.

# Tools

You have access to the following functions:

<tools>
<function>
<name>where</name>
<description>Where someone lives</description>
<parameters>
<parameter>
<name>who</name>
<type>string</type>
<description>A name</description>
<enum>["Bagol", "Dimul"]</enum>
</parameter>
<parameter>
<name>n</name>
<type>array</type>
<description>Days</description>
<items>{"type": "integer"}</items>
<minItems>1</minItems>
</parameter>
<required>["who"]</required>
</parameters>
</function>
</tools>"""+XML_FORMAT+"""<|im_end|>
<|im_start|>user
Who?<|im_end|>
<|im_start|>assistant
<think></think>«
Bagol.<|im_end|>»
<|im_start|>user
Where?<|im_end|>
<|im_start|>assistant
<think>
«look
</think>
"""+XML_CALLS+"""
<|im_end|>»
<|im_start|>user
<tool_response>
Cold"mere
</tool_response>
<tool_response>
ok
</tool_response>
<|im_end|>
<|im_start|>assistant
<think>
«so
</think>
There.<|im_end|>»
"""),
    qwen3_5=(SAID, WHERE, {}, """<|im_start|>system
# Tools

You have access to the following functions:

<tools>
"""+WHERE_JSON+"""
</tools>"""+XML_FORMAT+"""

Be brief.<|im_end|>
<|im_start|>user
Who?<|im_end|>
<|im_start|>assistant
«Bagol.<|im_end|>»
<|im_start|>user
Where?<|im_end|>
<|im_start|>assistant
<think>
«look
</think>

"""+XML_CALLS+"""<|im_end|>»
<|im_start|>user
<tool_response>
Cold"mere
</tool_response>
<tool_response>
ok
</tool_response><|im_end|>
<|im_start|>assistant
<think>
«so
</think>

There.<|im_end|>»
"""),
    exaone4=(SAID, WHERE, {}, """[|system|]
Be brief.

# Available Tools
You can use none, one, or multiple of the following tools by calling them as functions to help with the user’s query.
Here are the tools available to you in JSON format within <tool> and </tool> tags:
<tool>"""+WHERE_JSON+"""</tool>

For each function call you want to make, return a JSON object with function name and arguments within <tool_call> and </tool_call> tags, like:
<tool_call>{"name": function_1_name, "arguments": {argument_1_name: argument_1_value, argument_2_name: argument_2_value}}</tool_call>
<tool_call>{"name": function_2_name, "arguments": {...}}</tool_call>
...[|endofturn|]
[|user|]
Who?[|endofturn|]
[|assistant|]
<think>

</think>

«Bagol.[|endofturn|]»
[|user|]
Where?[|endofturn|]
[|assistant|]
<think>

</think>

«<tool_call>{"name": "where", "arguments": {"who": "Bagol", "n": 1, "deep": {"a": ["x"]}}}</tool_call>
<tool_call>{"name": "f", "arguments": {}}</tool_call>[|endofturn|]»
[|tool|]
<tool_result>{"result": "Cold\\"mere"}</tool_result>
<tool_result>{"result": "ok"}</tool_result>[|endofturn|]
[|assistant|]
<think>

</think>

«There.[|endofturn|]»
"""),
    pixtral=(PLAIN_SAID, None, {}, "<s>[INST]Who?[/INST]«Bagol.</s>»[INST]Be brief.\n\nWhere?[/INST]«There.</s>»"),
    llava=(PLAIN_SAID, None, {}, "<s>Be brief. USER: Who? ASSISTANT:« Bagol.</s>»USER: Where? ASSISTANT:« There.</s>»"),
    gemma4=(SAID, WHERE, dict(enable_thinking=True), """<s><|turn>system
<|think|>
Be brief.<|tool>declaration:where{description:<|"|>Where someone lives<|"|>,parameters:{properties:{n:{description:<|"|>Days<|"|>,items:{type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>},who:{description:<|"|>A name<|"|>,enum:[<|"|>Bagol<|"|>,<|"|>Dimul<|"|>],type:<|"|>STRING<|"|>}},required:[<|"|>who<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>
<|turn>user
Who?<turn|>
<|turn>model
«Bagol.<turn|>»
<|turn>user
Where?<turn|>
<|turn>model
«<|channel>thought
look
<channel|><|tool_call>call:where{deep:{a:[<|"|>x<|"|>]},n:1,who:<|"|>Bagol<|"|>}<tool_call|><|tool_call>call:f{}<tool_call|><|tool_response>»response:where{value:<|"|>Cold"mere<|"|>}<tool_response|><|tool_response>response:f{value:<|"|>ok<|"|>}<tool_response|>«<|channel>thought
so
<channel|>There.<turn|>»
"""),
    command_a=(PLAIN_SAID, None, {}, f"<s>{S}<|SYSTEM_TOKEN|># Developer Preamble\nBe brief.{E}{S}<|USER_TOKEN|>Who?{E}{S}<|CHATBOT_TOKEN|><|START_RESPONSE|>«Bagol.<|END_RESPONSE|>{E}»{S}<|USER_TOKEN|>Where?{E}{S}<|CHATBOT_TOKEN|><|START_RESPONSE|>«There.<|END_RESPONSE|>{E}»"),
    command_a_tool_use=(SAID, WHERE, {}, "<s>"+S+"""<|SYSTEM_TOKEN|># System Preamble

## Available Tools
```json
[
    {"name": "where", "description": "Where someone lives", "parameters": {"type": "object", "properties": {"who": {"type": "string", "description": "A name", "enum": ["Bagol", "Dimul"]}, "n": {"type": "array", "description": "Days", "items": {"type": "integer"}, "minItems": 1}}, "required": ["who"]}, "responses": null}
]
```

# Developer Preamble
"""+f"Be brief.{E}{S}<|USER_TOKEN|>Who?{E}{S}<|CHATBOT_TOKEN|>«<|START_RESPONSE|>Bagol.<|END_RESPONSE|>{E}»{S}<|USER_TOKEN|>Where?{E}{S}<|CHATBOT_TOKEN|>«<|START_THINKING|>look<|END_THINKING|><|START_ACTION|>["+"""
    {"tool_call_id": "0", "tool_name": "where", "parameters": {"who": "Bagol", "n": 1, "deep": {"a": ["x"]}}},
    {"tool_call_id": "1", "tool_name": "f", "parameters": {}}
]<|END_ACTION|><|END_OF_TURN_TOKEN|>»"""+S+"""<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[
    {
        "tool_call_id": "0",
        "results": {
            "0": "Cold\\"mere"
        },
        "is_error": null
    },
    {
        "tool_call_id": "1",
        "results": {
            "0": "ok"
        },
        "is_error": null
    }
]<|END_TOOL_RESULT|>"""+f"{E}{S}<|CHATBOT_TOKEN|>«<|START_RESPONSE|>There.<|END_RESPONSE|>{E}»"),
    command_a_rag=([U | dict(documents=DOCUMENTS), answer(""), V, answer("There.")], None, {}, "<s>"+S+"""<|SYSTEM_TOKEN|># System Preamble

## Available Tools
```json
[
    {"name": "direct-injected-document", "description": "Hands over documents that the user gave. Never call it yourself.", "parameters": {"type": "object", "properties": {}, "required": []}, "responses": null}
]
```"""+f"{E}{S}<|USER_TOKEN|>Who?{E}{S}<|CHATBOT_TOKEN|><|START_THINKING|>I will look through the document to address the users needs.<|END_THINKING|><|START_ACTION|>["+"""
    {"tool_call_id": "0", "tool_name": "direct-injected-document", "parameters": {}}
]<|END_ACTION|>"""+E+S+"""<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[
    {
        "tool_call_id": "0",
        "results": {
            "0": {"title": "Towns", "snippet": "Bagol: Coldmere"},
            "1": {"title": "Hills"}
        },
        "is_error": null
    }
]<|END_TOOL_RESULT|>"""+f"{E}{S}<|CHATBOT_TOKEN|>«<|START_RESPONSE|><|END_RESPONSE|>{E}»{S}<|USER_TOKEN|>Where?{E}{S}<|CHATBOT_TOKEN|>«<|START_RESPONSE|>There.<|END_RESPONSE|>{E}»"))
WHOLE["gemma4_unified"] = WHOLE["gemma4"]


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_whole_conversations(name):
    messages, tools, values, want = WHOLE[name]
    opts, tok = DatasetOptions(path="x", chat_template=name, chat_template_kwargs=values, **FORMAL), tokenizer()
    fmt, row = prompt_format(opts, tok), dict(messages=messages, tools=tools)
    assert "".join(f"«{s.text}»" if s.train else s.text for s in fmt(row)).replace("»«", "")==want
    for n in [i for i, m in enumerate(messages) if m["role"]=="assistant"]: # each answer's prompt begins the text that is trained
        part = dict(row, messages=messages[:n+1])
        batch, row_of, _ = tokenise_rows([part], fmt, tok, 10000)
        if messages[n].get("reasoning_content") or name not in MORE: assert disagreement(fmt, tok, part, batch[0]) is None


PICTURE = dict(role="user", content=[dict(type="text", text="What is it?"), dict(type="image")])


@pytest.mark.parametrize("name, want", [
    ("pixtral", "<s>[INST]What is it?[IMG][/INST]A hill.</s>"), ("llava", "<s>USER: <image>\nWhat is it? ASSISTANT: A hill.</s>"),
    ("gemma4", "<s><|turn>user\nWhat is it?<|image|><turn|>\n<|turn>model\nA hill.<turn|>\n"), ("gemma4_unified", "<s><|turn>user\nWhat is it?<|image|><turn|>\n<|turn>model\nA hill.<turn|>\n"),
    ("qwen3_5", "<|im_start|>user\nWhat is it?<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA hill.<|im_end|>\n")])
@pytest.mark.parametrize("as_parts", [False, True])
def test_pictures_stand_where_they_are_asked_about(name, want, as_parts):
    said = answer([dict(type="text", text="A hill.")] if as_parts else "A hill.")
    assert render([PICTURE, said], TEMPLATES[name], bos_token="<s>", eos_token="</s>")==want


@pytest.mark.parametrize("name, values, want", [
    ("qwen3_5", {}, "hm\n</think>\n\nHello"+END), ("nemotron_h", {}, "hm\n</think>\nHello"+END), ("exaone4", {}, "Hello[|endofturn|]"),
    ("exaone4", dict(skip_think=False, enable_thinking=True), "hm\n</think>\n\nHello[|endofturn|]"), ("exaone4", dict(skip_think=False), "<think>\nhm\n</think>\n\nHello[|endofturn|]"),
    ("gemma4", {}, "<|channel>thought\nhm\n<channel|>Hello<turn|>")])
def test_thinking_by_key(name, values, want):
    assert turns([U, answer("Hello", reasoning_content="hm")], name, chat_template_kwargs=values)==[want]


@pytest.mark.parametrize("name, values, want", [
    ("qwen3_5", {}, ["a"+END, "\n</think>\n\nb"+END]), ("qwen3_5", dict(enable_thinking=False), ["a"+END, "b"+END]), ("nemotron_h", {}, ["a"+END, "b"+END]),
    ("gemma4", dict(enable_thinking=False), ["a<turn|>", "b<turn|>"])])
def test_no_thinking_in_the_data(name, values, want):
    assert turns([U, answer("a"), V, answer("b")], name, chat_template_kwargs=values)==want


def test_what_stands_beside_a_call_is_kept():
    assert turns([ASK, LOOK], "gemma4")==["Let me look.<|tool_call>call:weather{town:<|\"|>Avenford<|\"|>}<tool_call|><|tool_response>"]
    assert "<|START_THINKING|>Let me look.<|END_THINKING|>" in turns([ASK, LOOK], "command_a_tool_use")[0]


GENERATION = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role']=='assistant' %}{% generation %}{{ m['content'] | upper }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"


def test_generation_blocks_are_believed(): # even where the template shouts
    assert turns([U, answer("Hello"), V, answer("There")], GENERATION)==["HELLO"+END, "THERE"+END]
    whole = GENERATION.replace("{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n", "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}")
    assert turns([U, answer("Hello"), V, answer("There")], whole)==["HELLO"+END, "THERE"+END]


@pytest.mark.parametrize("template, says", [
    ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "changes the messages' text"),
    ("{% for m in messages %}{{ m['content'] | length }}{% endfor %}", "changes the messages' text"),
    ("{% for m in messages %}{{ m['content'][:-1] + '.' }}{% endfor %}", "changes the messages' text"),
    ("{% for m in messages if m['role']=='user' %}{{ m['content'] }}{% endfor %}", "leaves out what it says")])
def test_templates_that_change_text_are_refused(template, says):
    with pytest.raises(UserError, match=says): find_turns([U, answer("Hello")], ChatTemplate(template), {1})


def test_templates_that_look_at_questions_may(): # marks in a question would change what this template does
    t = "{% for m in messages %}{{ '?' if m['content'].startswith('W') else '' }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    text, found = find_turns([U, answer("Hello")], ChatTemplate(t), {1})
    assert [text[o.start:o.end] for o in found if o.index==1]==["Hello"]
    with pytest.raises(UserError, match="hides where some turns end"): turns([U, answer("Hello")], t, train_on_eos="all")


def test_templates_cannot_run_code():
    with pytest.raises(UserError): render([U], "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError): render([U], "{{ messages.append(1) }}")


# what is trained

CHAT = [dict(role="system", content="Be brief."), U, answer("Bagol."), V, answer("Coldmere.")]
CONTENT = {"system": "Be brief.", "user": ["Who?", "Where?"]}


@pytest.mark.parametrize("options, want", [
    (dict(roles_to_train=None), ["Coldmere."+END]),
    (dict(roles_to_train=["user"]), ["Who?"+END, "Where?"+END]),
    (dict(roles_to_train=["human", "gpt"]), ["Who?"+END, "Bagol."+END, "Where?"+END, "Coldmere."+END]),
    (dict(train_on_eos="none"), ["Bagol.", "Coldmere."]),
    (dict(train_on_eos="last"), ["Bagol.", "Coldmere."+END]),
    (dict(train_on_eos="all"), [END, END, "Bagol."+END, END, "Coldmere."+END]),
    (dict(train_on_eot="none"), ["Bagol.", "Coldmere."]),
    (dict(train_on_eos="none", train_on_eot="turn"), ["Bagol."+END, "Coldmere."+END]),
    (dict(drop_system_message=True, train_on_eos="all"), [END, "Bagol."+END, END, "Coldmere."+END])])
def test_masks_by_role(options, want): assert turns(CHAT, "chatml", **options)==want


def test_train_on_inputs_trains_words_not_headers():
    tok = tokenizer()
    enc = encode_rows([dict(messages=CHAT)], dict(FORMAL, chat_template="chatml"), tok, train_on_inputs=True)[0]
    assert tok.decode([i for i in enc["labels"] if i!=IGNORE])=="".join(m["content"]+END for m in CHAT)


def test_masks_by_message_and_by_character():
    rows = [U, answer("Bagol.", train=False), V | dict(train=True), answer("In Coldmere.", part=json.dumps([dict(begin_offset=3, end_offset=10, train=True)]))]
    assert turns(rows, "chatml", message_field_training="train")==["Where?"+END, "In Coldmere."+END]
    assert turns(rows, "chatml", message_field_training_detail="part")==["Bagol."+END, "Coldmere"+END]
    parts = [dict(type="text", text="In "), dict(type="text", text="Coldmere", weight=1), dict(type="text", text=".", train=False)]
    assert turns([U, answer(parts)], "llama3")==["In Coldmere<|eot_id|>"]


def test_default_system_message_and_column():
    opts = DatasetOptions(path="x", default_system_message="Be kind.")
    assert [m["content"] for m in to_messages(dict(messages=[U]), opts).messages]==["Be kind.", "Who?"]
    assert [m["content"] for m in to_messages(dict(messages=[U], system="Be rude."), opts).messages]==["Be rude.", "Who?"]
    assert to_messages(dict(messages=CHAT), opts).messages==CHAT


def test_names_of_keys():
    row = dict(talk=[dict(speaker="bot", text="Hi", mood="calm", gone=None)])
    opts = DatasetOptions(path="x", field_messages="talk", message_property_mappings=dict(role="speaker", content="text", tone="mood"), roles=dict(assistant=["bot"]))
    assert to_messages(row, opts).messages==[dict(role="assistant", content="Hi", tone="calm")]
    assert to_messages(dict(messages=json.dumps([U])), DatasetOptions(path="x")).messages==[U]


@pytest.mark.parametrize("kind", ["sharegpt", "sharegpt:chat", "sharegpt.load_role", "messages", "messages.chat", "chat_template"])
def test_old_chats_are_recognised(kind):
    role = "role" if kind=="sharegpt.load_role" else "from"
    row = dict(conversations=[{role: "human", "value": "Who?"}, {role: "gpt", "value": "Bagol."}])
    segs = prompt_format(DatasetOptions(path="x", type=kind, chat_template="chatml"), tokenizer())(row)
    assert trained(segs)==["Bagol."+END]


def test_weights_of_internal_messages():
    row = dict(messages=[U, answer("Bagol.", weight=0), V, answer("Coldmere.", weight=1)])
    assert trained(prompt_format(DatasetOptions(path="x", type="messages", chat_template="chatml"), tokenizer())(row))==["Coldmere."+END]


@pytest.mark.parametrize("row, says", [
    (dict(text="x"), "the row has no `messages`. It has `text`; `field_messages: …` names"), (dict(text="x", messages=None), "messages is null, but should be a list; the row has `text`"),
    (dict(messages=[]), "messages is empty"),
    (dict(messages="["), "messages is no JSON"),
    (dict(messages=[U, "Hi"]), r"messages\[1\] is text \('Hi'\), but should be an object"),
    (dict(messages=[U, answer(None)]), r"messages\[1\].content is null"),
    (dict(messages=[U, answer(7)]), r"messages\[1\].content is a number \(7\)"),
    (dict(messages=[dict(content="x")]), r"messages\[0\].role is null"),
    (dict(messages=[dict(role="narrator", content="x")]), r"messages\[0\].role is 'narrator', which is none of"),
    (dict(messages=[U, answer("x", tool_calls=[dict(function=dict(name="f", arguments="{"))])]), r"messages\[1\].tool_calls\[0\].function.arguments is no JSON"),
    (dict(messages=[U], tools="no"), "tools is no JSON"),
    (dict(messages=[U], tools=["{"]), r"tools\[0\] is no JSON"),
    (dict(messages=[U], tools=3), "tools is a number")])
def test_bad_rows_say_where(row, says):
    with pytest.raises(UserError, match=f"row 1 .*{says}"): encode_rows([row], dict(FORMAL, chat_template="chatml"), tokenizer())


def test_template_choices(tmp_path):
    (tmp_path/"t.jinja").write_text("{{ messages }}")
    assert resolve_template("jinja", str(tmp_path/"t.jinja"), None)=="{{ messages }}"
    assert resolve_template("tokenizer_default_fallback_gemma", None, None)==TEMPLATES["gemma"]
    assert resolve_template(None, None, "mine")=="mine"
    for choice, says in [("tokenizer_default", "has none"), ("jinja", "needs `chat_template_jinja`"), ("tokenizer_default_fallback_x", "unknown")]:
        with pytest.raises(UserError, match=says): resolve_template(choice, None, None)
    with pytest.raises(UserError, match="neither a Jinja text nor a file"): resolve_template("jinja", "no/such.jinja", None)


def test_every_template_is_tested(): assert set(LAYOUT) | {"qwen3"}>=set(SHIPPED)


LOOK = dict(role="assistant", content="Let me look.", tool_calls=[dict(type="function", function=dict(name="weather", arguments=dict(town="Avenford")))])
ASK = dict(role="user", content="Weather?")


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi_3", "falcon_h1", "llava", "command_a", "command_a_rag"])
def test_a_template_that_drops_tool_calls_is_refused(name):
    with pytest.raises(UserError, match="messages.1..tool_calls: this chat template leaves them out"):
        encode_rows([dict(messages=[ASK, LOOK])], FORMAL | dict(chat_template=name), tokenizer())


@pytest.mark.parametrize("name", [n for n, t in sorted(TEMPLATES.items()) if "tool_calls" not in t])
def test_a_template_that_cannot_write_tool_calls_says_so(name):
    "A call without content: the message is named, or else what the template has against tools"
    row = dict(messages=[U, LOOK | dict(content=None)])
    with pytest.raises(UserError) as e: prompt_format(DatasetOptions(path="x", type="chat_template", chat_template=name), tokenizer())(row)
    assert str(e.value).startswith("messages[1].tool_calls: this chat template ") and "take one that writes them" in str(e.value)


def test_a_template_that_reads_the_content_of_a_call_says_so(tmp_path):
    (tmp_path/"t.jinja").write_text("{% for m in messages %}{{ m['content'] + (m.tool_calls|string) }}{% endfor %}")
    with pytest.raises(UserError, match=r"^messages\[1\] has no content, but this chat template reads it: give the message an empty text"):
        prompt_format(DatasetOptions(path="x", type="chat_template", chat_template_jinja=str(tmp_path/"t.jinja")), tokenizer())(dict(messages=[U, LOOK | dict(content=None)]))


def test_a_template_that_writes_tool_calls_trains_them():
    tok = tokenizer()
    row = encode_rows([dict(messages=[ASK, LOOK])], FORMAL | dict(chat_template="qwen_25"), tok)[0]
    said = tok.decode([i for i in row["labels"] if i!=IGNORE])
    assert "Let me look." in said and "weather" in said and "Avenford" in said


@pytest.mark.parametrize("answer", ["pre <think>x</think> post", "<think>a</think>b<think>c</think>d"])
def test_an_answer_that_is_written_in_part_is_refused(answer):
    with pytest.raises(UserError, match="leaves out what it says, or a part of it"):
        encode_rows([dict(messages=[ASK, dict(role="assistant", content=answer)])], FORMAL | dict(chat_template="qwen3"), tokenizer())


@pytest.mark.parametrize("detail, says", [
    ([dict(begin_offset=8, end_offset=2)], "goes from 8 to 2"), ([dict(begin_offset=-2, end_offset=2)], "goes from -2"), ([dict(begin_offset=0, end_offset=99)], "after the end of the content"),
    ([dict(begin_offset=0, end_offset=3), dict(begin_offset=3, end_offset=5)], "overlap"), ([dict(begin_offset=0, end_offset=1, train="no")], "should be true or false"), ([dict(begin_offset=0, end_offset=1, weight=0)], "has a key `weight`")])
def test_parts_to_train_that_are_none(detail, says):
    row = dict(messages=[ASK, dict(role="assistant", content="0123456789", detail=detail)])
    with pytest.raises(UserError, match=says): encode_rows([row], FORMAL | dict(chat_template="chatml", message_field_training_detail="detail"), tokenizer())


DATED = """{% if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}Today is {{ date_string }}.
{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

@pytest.mark.parametrize("more, day", [({}, "26 Jul 2024"), (dict(chat_template_kwargs=dict(date_string="1 May 1999")), "1 May 1999")])
def test_the_date_of_a_template_does_not_change_overnight(more, day):
    "As Llama's templates write it: the tokens of today are those of any other day, also of prompts"
    fmt = prompt_format(DatasetOptions(path="x", type="chat_template", chat_template_jinja=DATED, **more), tokenizer())
    row = dict(messages=[U, dict(role="assistant", content="Hello")])
    assert fmt.prompt(row)==f"Today is {day}.\n<|user|>{U['content']}</s><|assistant|>"
    assert "".join(s.text for s in fmt(row)).startswith(f"Today is {day}.\n<|user|>")


def test_keys_of_messages_are_those_that_a_row_has():
    "A table gives all rows the keys of all"
    rows = [dict(conversations=[{"from": "human", "value": "Q", "role": None, "content": None}, {"from": "gpt", "value": "A", "role": None, "content": None}]),
        dict(conversations=[{"from": None, "value": None, "role": "user", "content": "Q"}, {"from": None, "value": None, "role": "assistant", "content": "A"}])]
    one, two = encode_rows(rows, FORMAL | dict(chat_template="chatml"), tokenizer())
    assert one==two==encode_rows([dict(messages=[dict(role="user", content="Q"), dict(role="assistant", content="A")])], FORMAL | dict(chat_template="chatml"), tokenizer())[0]


@pytest.mark.parametrize("entry, says", [(dict(chat_template_kwargs=dict(enable_thnking=False)), "knows no `enable_thnking`"), (dict(chat_template_kwargs=dict(messages=[])), "is given by the data"), (dict(roles_to_train=["assistnt"]), "did you mean `assistant`")])
def test_options_that_would_do_nothing(entry, says):
    with pytest.raises(UserError, match=says): encode_rows([dict(messages=[ASK])], FORMAL | dict(chat_template="qwen3") | entry, tokenizer())
