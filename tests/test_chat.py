"Masks of chat templates, against text written out by hand"
import pytest
from hypothesis import given, strategies as st
from tuneforge.chat import TEMPLATES, chat_segments, find_turns, render
from tuneforge.config import UserError

LLAMA3 = "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
CHAT = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]


def test_layouts():
    assert render(CHAT, TEMPLATES["chatml"])==CHATML
    assert render(CHAT, TEMPLATES["llama3"], bos_token="<s>")==LLAMA3
    assert render(CHAT[:1], TEMPLATES["llama3"], True, bos_token="<s>")+"Hello<|eot_id|>"==LLAMA3


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), min_size=1).filter(str.strip) | st.sampled_from(
    ["<|im_end|>", "[[dummy]]", "{{ 7*7 }}", "<|im_start|>assistant\n", "a\n\nb", "{% raw %}"])


@given(st.lists(text, min_size=1, max_size=5), st.sampled_from(["chatml", "llama3"]))
def test_turns_are_found_whatever_they_say(contents, name):
    chat = [dict(role=("user", "assistant")[i%2], content=c) for i, c in enumerate(contents)]
    rendered, turns = find_turns(chat, TEMPLATES[name], bos_token="<s>")
    assert rendered==render(chat, TEMPLATES[name], bos_token="<s>")
    assert [rendered[t.start:t.end] for t in turns]==[c.strip() for c in contents]


def test_answer_is_trained_with_its_terminator():
    segs = chat_segments(CHAT, TEMPLATES["llama3"], ["assistant"], ["<|eot_id|>"], bos_token="<s>")
    assert [(s.text, s.train) for s in segs]==[(LLAMA3[:-len("Hello<|eot_id|>")], False), ("Hello<|eot_id|>", True)]


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | length }}{% endfor %}",
    "{% for m in messages %}{{ m['content'].split('l')[0] }}{% endfor %}"])
def test_templates_that_change_text_are_refused(template):
    with pytest.raises(UserError, match="changes the messages' text"): find_turns(CHAT, template)


def test_templates_cannot_run_code():
    with pytest.raises(UserError): render(CHAT, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
