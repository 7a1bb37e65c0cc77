"Tokens and masks, against the tokenizer alone"
import pytest
from hypothesis import given, settings, strategies as st
from tuneforge.config import TokenizerOptions, UserError
from tuneforge.prompts import Segment
from tuneforge.tokens import IGNORE, encode, load_tokenizer

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
segment = st.builds(Segment, text, st.booleans())


@settings(deadline=None)
@given(st.lists(st.lists(segment, min_size=1, max_size=4), min_size=1, max_size=4))
def test_apart_is_each_segment_alone(samples):
    enc = encode(TOK, samples)
    for o, ids, labels in zip(samples, enc["input_ids"], enc["labels"]):
        pieces = [TOK(s.text, add_special_tokens=False).input_ids for s in o]
        want = [TOK.bos_token_id]+[i for p in pieces for i in p]
        mask = [o[0].train]+[s.train for s, p in zip(o, pieces) for _ in p]
        if o[-1].train and want[-1]!=TOK.eos_token_id: want, mask = want+[TOK.eos_token_id], mask+[True]
        assert ids.tolist()==want
        assert labels.tolist()==[i if t else IGNORE for i, t in zip(want, mask)]


@settings(deadline=None)
@given(st.lists(segment, min_size=1, max_size=5).filter(lambda o: any(s.text for s in o)))
def test_joint_is_one_text(sample):
    whole = "".join(s.text for s in sample)
    enc = encode(TOK, [sample], joint=True)
    assert enc["input_ids"][0].tolist()==TOK(whole, add_special_tokens=False).input_ids
    owner = [s.train for s in sample for _ in s.text] # of each character
    starts = [a for a, _ in TOK(whole, add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
    assert (enc["labels"][0]!=IGNORE).tolist()==[owner[a] for a in starts]


def test_train_all_trains_all():
    enc = encode(TOK, [[Segment("a b c", False), Segment("d", True)]], train_all=True)
    assert (enc["labels"][0]==enc["input_ids"][0]).all()


def test_no_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer"): load_tokenizer(TokenizerOptions(base_model=str(tmp_path)))
    with pytest.raises(UserError, match="no tokenizer class `NoSuch`"): load_tokenizer(TokenizerOptions(base_model="tiny:llama", tokenizer_type="NoSuch"))
