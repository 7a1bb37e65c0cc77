"Tiny models of many architectures: made, saved, loaded, run; the same from the same name"
import hashlib, os, shutil
import pytest, torch
from tuneforge.config import ModelOptions, TokenizerOptions, UserError
from tuneforge.models import load_model
from tuneforge.tiny import TinyName, tiny_model
from tuneforge.tokens import load_tokenizer
from tests.tools import run
import sys

ARCHITECTURES = ["llama", "mistral", "mixtral", "gpt_neox", "gptj", "falcon", "mpt", "phi", "phi3", "rwkv", "qwen2", "qwen3", "qwen2_moe", "gemma", "gemma2", "gemma3_text",
    "jamba", "gpt2", "bloom", "opt", "stablelm", "starcoder2", "cohere", "olmo2", "mamba", "mamba2"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch):
    name = f"tiny:{arch}"
    tok = load_tokenizer(TokenizerOptions(base_model=name))
    model = load_model(ModelOptions(base_model=name), tok)
    out = model(input_ids=torch.tensor([tok("Where does Bagol live?").input_ids]))
    assert out.logits.isfinite().all() and out.logits.shape[-1]>=len(tok)
    assert model.num_parameters()<5_000_000
    assert type(model).__name__.lower().startswith(arch.replace("_text", "").replace("_", "").replace("gptneox", "gptneox"))


CODE = """
import hashlib, sys
from tuneforge.tiny import tiny_model
f = tiny_model("tiny:qwen2?seed=3")
print(hashlib.sha256((f/"model.safetensors").read_bytes()+(f/"tokenizer.json").read_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_name_gives_the_same_model_everywhere(tmp_path):
    a, b = (run(sys.executable, "-c", CODE, env=dict(XDG_CACHE_HOME=str(tmp_path/n), PYTHONHASHSEED=s)) for n, s in (("a", "1"), ("b", "2")))
    assert a.returncode==0, a.stderr
    assert a.stdout==b.stdout and len(a.stdout)==65


def test_names():
    assert TinyName.parse("tiny:llama?a=1&b=0.5&c=true&d=x")==TinyName("llama", 0, dict(a=1, b=0.5, c=True, d="x"))
    with pytest.raises(UserError, match="names no architecture"): TinyName.parse("tiny:")
    with pytest.raises(UserError, match="knows no architecture 'lama'"): tiny_model("tiny:lama")
    with pytest.raises(UserError, match="has no hiden_size"): tiny_model("tiny:llama?hiden_size=8")


@pytest.mark.parametrize("name, said", [("llama?seed=1.2.3", "the seed is '1.2.3', but should be a whole number"), ("llama?seed=abc", "the seed is 'abc'"), ("llama?seed=1.5", "the seed is 1.5"), ("llama?num_hidden_layers=two", "with num_hidden_layers=two: .*expected int"),
    ("llama?hidden_size=63", "with hidden_size=63: .*not a multiple"), ("llama?hidden_size=-4", "with hidden_size=-4: "), ("llama?num_attention_heads=3", "with num_attention_heads=3: .*not a multiple"), ("llama?tie_word_embeddings=maybe", "expected bool"),
    ("llama?intermediate_size=-3", "with intermediate_size=-3: .*negative"), ("llama?vocab_size=x", "with vocab_size=x: "), ("mamba2?num_heads=3", "with num_heads=3: Inconsistent"), ("t5", "'t5' is no model that goes on writing")])
def test_settings_that_cannot_be(tmp_path, monkeypatch, name, said):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=said): tiny_model("tiny:"+name)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_failed_model_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Exception): tiny_model("tiny:llama?num_attention_heads=7")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_another_machine_may_have_the_same_process_number(tmp_path, monkeypatch):
    "Containers on one disk: what the other one is writing is neither taken nor thrown away"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny_model("tiny:llama?num_hidden_layers=1")
    shutil.rmtree(folder)
    (other := folder.with_name(f"{folder.name}.{os.getpid()}.part")).mkdir()
    (other/"half").write_text("of a model")
    assert tiny_model("tiny:llama?num_hidden_layers=1")==folder and not (folder/"half").exists() and (other/"half").is_file()
