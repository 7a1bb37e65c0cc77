"Engines give the ids of Hugging Face's tokenizer, and spans are those of its offsets"
import json, pickle, random
import numpy as np
import pytest
from functools import cache
from hypothesis import given, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from tuneforge.document import UserError
from tuneforge.engines import ENGINES, Encoder, HFEngine, TokenBytes, choose_encoder, difference, nasty_texts, verified
from .tokenizers import SPECIAL, TEXT, tokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(model, pre, norm=None, trainer=trainers.BpeTrainer, special=SPECIAL, **kw):
    tok = Tokenizer(model)
    if pre: tok.pre_tokenizer = pre
    if norm: tok.normalizer = norm
    tok.train_from_iterator(TEXT*3, trainer(vocab_size=900, special_tokens=special, show_progress=False, **kw))
    return tok


def llama2():
    "A space is put in front of each part between special tokens"
    spec = json.loads(tokenizer("metaspace").backend_tokenizer.to_str())
    spec["pre_tokenizer"] = None
    spec["normalizer"] = dict(type="Sequence", normalizers=[dict(type="Prepend", prepend="▁"), dict(type="Replace", pattern=dict(String=" "), content="▁")])
    return Tokenizer.from_str(json.dumps(spec))


def words(norm=None):
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return trained(models.BPE(), pre, norm, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))


def greedy(): # special tokens that swallow white space, as Phi-3's do
    tok = words()
    tok.add_special_tokens([AddedToken("<|greedy|>", rstrip=True, lstrip=True)])
    return tok


KINDS = dict(gpt2=lambda: tokenizer("byte").backend_tokenizer, metaspace=lambda: tokenizer("metaspace").backend_tokenizer, llama2=llama2, words=words, nfc=lambda: words(normalizers.NFC()), greedy=greedy,
    prefix=lambda: trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())),
    lower=lambda: trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase(), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())),
    few=lambda: trained(models.BPE(unk_token="<unk>"), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    unigram=lambda: trained(models.Unigram(), pre_tokenizers.Metaspace(), normalizers.NFKC(), trainers.UnigramTrainer, unk_token="<unk>"),
    wordpiece=lambda: trained(models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), trainers.WordPieceTrainer))
EXACT = {"gpt2", "metaspace", "llama2", "words", "nfc", "greedy", "prefix"} # whose ids have bytes


@cache
def make(kind): return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(KINDS[kind]().to_str()))


def by_hand(tok, text):
    "(ids, starts, ends) in bytes, one id at a time, out of the offsets of Hugging Face's tokenizer; no gaps"
    enc, spans, at = tok.backend_tokenizer.encode(text, add_special_tokens=False), [], 0
    for i, (a, b) in enumerate(enc.offsets):
        a, b = len(text[:a].encode()), max(len(text[:b].encode()), at)
        spans.append((0 if i==0 else min(a, at), b))
        at = b
    return enc.ids, spans


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kinds_with_bytes(kind): assert (TokenBytes(make(kind)).kind is not None)==(kind in EXACT)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", sorted(ENGINES))
def test_what_is_chosen_is_equal(kind, name):
    tok, texts = make(kind), [t for t in nasty_texts(make(kind))[-1500:]]
    encoder = choose_encoder(tok, name)
    ids, counts = encoder.engine.encode(texts)
    want = tok.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    assert ids.tolist()==[i for e in want for i in e.ids] and counts.tolist()==[len(e.ids) for e in want]


def test_gigatoken_takes_bpe():
    for kind in ("gpt2", "words", "nfc", "metaspace", "llama2"): assert choose_encoder(make(kind)).engine.name=="gigatoken", kind
    for kind in ("unigram", "lower"): assert choose_encoder(make(kind), "gigatoken").engine.name=="hf"


CHARS = st.sampled_from([*"ab e.T", " ", "\n", "é", "e\u0301", "山", "🐐", "ﬁ", "▁", "\u00a0", "Hello", " What", "<|im_end|>", "[INST]", "<|greedy|>", "</s>"])


@given(st.sampled_from(sorted(KINDS)), st.lists(st.lists(CHARS, max_size=9).map("".join), min_size=1, max_size=4), st.booleans())
def test_spans(kind, texts, fast):
    tok = make(kind)
    enc, at = (choose(kind) if fast else Encoder(tok))(texts, spans=True), 0
    for text, n in zip(texts, enc.counts.tolist()):
        ids, spans = by_hand(tok, text)
        part = slice(at, at+n)
        assert enc.ids[part].tolist()==ids
        owner = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text]) # of each byte: its character
        chars = lambda spans: [(owner[a], owner[b-1]) if a<b else None for a, b in spans]
        got = chars(zip(enc.starts[part].tolist(), enc.ends[part].tolist()))
        assert [g for g, w in zip(got, chars(spans)) if g and w]==[w for g, w in zip(got, chars(spans)) if g and w]
        if n and kind in EXACT-{"greedy", "nfc"}: assert enc.ends[part][-1]==len(text.encode())
        at += n


@cache
def choose(kind): return choose_encoder(make(kind))


def test_a_wrong_engine_is_found_out(caplog):
    class Wrong(HFEngine):
        name = "gigatoken"
        def encode(self, texts): return super().encode([t.replace("Bagol", "Dimul") for t in texts])
    tok, old = make("gpt2"), ENGINES["gigatoken"]
    assert difference(Wrong(tok), tok, ["a", "Bagol lives"])=="Bagol lives"
    assert verified(Encoder(tok, Wrong(tok)), ["nobody"]).engine.name=="gigatoken"
    assert verified(Encoder(tok, Wrong(tok)), ["nobody", "Bagol"], "rows.jsonl").engine.name=="hf"
    assert "rows.jsonl: gigatoken gives other ids than Hugging Face's tokenizer for 'Bagol'" in caplog.text
    ENGINES["gigatoken"] = Wrong
    try: assert choose_encoder(tok, "gigatoken").engine.name=="hf" and choose_encoder(tok).engine.name=="tokie"
    finally: ENGINES["gigatoken"] = old


def test_engines_reach_workers():
    for name in ENGINES:
        encoder = pickle.loads(pickle.dumps(choose_encoder(make("gpt2"), name)))
        assert encoder(["Hello <|im_end|>"]).ids.tolist()==make("gpt2")("Hello <|im_end|>", add_special_tokens=False).input_ids


def test_not_installed(monkeypatch):
    import sys
    for m in ("gigatoken", "tokie"): monkeypatch.setitem(sys.modules, m, None)
    assert choose_encoder(make("gpt2")).engine.name=="hf"
    with pytest.raises(UserError, match=r"`tokenizer_engine: tokie` is not installed .*pip install 'tuneforge\[fast\]'"): choose_encoder(make("gpt2"), "tokie")
