"Tokenizers made on the spot: byte-level and SentencePiece-like, with and without BOS"
from functools import cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>", "<|model|>"]
TEXT = ["Where does Bagol live? In Coldmere, the town of potters.", "Below is an instruction that describes a task.", "### Instruction:\n### Response:\n", "Hello there. What is it? 3 hills, no road."]


@cache
def tokenizer(kind="byte", bos=True):
    "`byte`: byte-level BPE; `metaspace`: SentencePiece-like, words begin with ▁; unknown characters as bytes"
    byte = kind=="byte"
    tok = Tokenizer(models.BPE() if byte else models.BPE(unk_token="<unk>", byte_fallback=True))
    if byte: tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte else list("▁ abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!#:<>|/[]_\n")
    extra = [] if byte else [f"<0x{i:02X}>" for i in range(256)]
    tok.train_from_iterator(TEXT*3, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL+extra, initial_alphabet=sorted(alphabet), show_progress=False))
    if not byte: # bytes are plain tokens, not special ones
        import json
        spec = json.loads(tok.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
        tok = Tokenizer.from_str(json.dumps(spec))
    if bos: tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=SPECIAL[3:])
