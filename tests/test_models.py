"Loading: whatever is wrong is said; what is promised (length, quantisation, new tokens, code that doesn't run) is compared with something independent"
import json, logging, shutil, sys
import pytest, torch
from hypothesis import given, settings, strategies as st
from tests.tools import run
from tuneforge.config import Config, ModelOptions, SpecialTokens, TokenizerOptions, UserError, load_config
from tuneforge.models import _why, check_length, finished, load_model, model_config, positions, untrained_tokens
from tuneforge.adapters import add_adapter
from tuneforge.infer import load_finetuned
from tuneforge.merge import merge, probe_logits
from tuneforge.precision import check_offload, keep_4bit_layout, placement, quantised_share
from tuneforge.tiny import tiny_model
from tuneforge.tokens import load_tokenizer, trusted
from tuneforge.vocabulary import fit_vocabulary


def options(**kw): return ModelOptions(**(dict(base_model="tiny:llama") | kw))
def config(**kw): return load_config(dict(base_model="tiny:llama", datasets=[dict(path="x.jsonl", type="completion")], learning_rate=1e-2) | kw)
def ids(seed=0): return torch.randint(8, 700, (2, 20), generator=torch.Generator().manual_seed(seed))


def says(**kw):
    with pytest.raises(UserError) as e: load_model(options(**kw))
    assert len(str(e.value).splitlines())==1
    return str(e.value)


@pytest.fixture
def folder(tmp_path): return shutil.copytree(tiny_model("tiny:llama"), tmp_path/"model")


# ---- files

@pytest.mark.parametrize("keep", [0, 4, 200, 5000, -1])
def test_a_file_that_was_cut_off(folder, keep):
    f = folder/"model.safetensors"
    f.write_bytes(f.read_bytes()[:keep])
    assert "model.safetensors" in says(base_model=str(folder)) and "cut off" in says(base_model=str(folder))


def test_a_header_that_is_nonsense(folder):
    f = folder/"model.safetensors"
    f.write_bytes(b"\xff"*8+f.read_bytes()[8:])
    assert "damaged" in says(base_model=str(folder))


def test_a_shard_that_is_missing(folder):
    load_model(options(base_model=str(folder))).save_pretrained(folder, max_shard_size="100KB")
    (folder/"model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards)>1 and load_model(options(base_model=str(folder)))
    shards[1].unlink()
    assert f"{shards[1].name} is missing" in says(base_model=str(folder))


def test_weights_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder/"model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder/"model.safetensors", metadata=dict(format="pt"))
    assert "model.layers.1.mlp.up_proj.weight would be random" in says(base_model=str(folder))


def test_other_shapes_than_the_config_says(folder):
    c = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(c | dict(intermediate_size=100)))
    said = says(base_model=str(folder))
    assert "model.layers.0.mlp.down_proj.weight is (64, 192) in the file and (64, 100) by the config" in said and "and 3 more" in said


def test_folders_that_hold_no_model(tmp_path, folder):
    assert "is no model folder: it has no config.json (it is empty)" in says(base_model=str(tmp_path/"model"/".."/"empty")) if (tmp_path/"empty").mkdir() is None else None
    (folder/"config.json").rename(folder/"adapter_config.json")
    assert "`lora_model_dir`" in says(base_model=str(folder))


def test_pickled_weights_are_not_read(folder):
    torch.save(dict(), folder/"pytorch_model.bin")
    (folder/"model.safetensors").unlink()
    assert "pickles" in says(base_model=str(folder))


def test_a_revision_without_a_network(): assert "at revision 'v9' (`revision_of_model`)" in says(base_model="me/tiny", revision_of_model="v9")


@pytest.mark.slow
def test_a_revision_that_is_not_there(tmp_path):
    "In a cache that has `main` only, without a network"
    repo = tmp_path/"models--me--tiny"
    shutil.copytree(tiny_model("tiny:llama"), repo/"snapshots"/("a"*40))
    (repo/"refs").mkdir()
    (repo/"refs"/"main").write_text("a"*40)
    code = "from tuneforge.models import load_model\nfrom tuneforge.config import ModelOptions, UserError\nfor r in (None, 'v9'):\n    try: print(type(load_model(ModelOptions(base_model='me/tiny', revision_of_model=r))).__name__)\n    except UserError as e: print(e)"
    res = run(sys.executable, "-c", code, env=dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"))
    ok, wrong = res.stdout.strip().splitlines()[-2:]
    assert ok=="LlamaForCausalLM" and "at revision 'v9' (`revision_of_model`)" in wrong, res.stderr


def test_a_revision_of_a_folder_has_no_effect(folder): assert "has no effect" in says(base_model=str(folder), revision_of_model="main")


# ---- names and values

@pytest.mark.parametrize("kw, said", [
    (dict(type_of_model="LlamaForCausalLMM"), "did you mean `LlamaForCausalLM`"), (dict(type_of_model="os"), "no model class `os`"), (dict(type_of_model="LlamaConfig"), "no model class"),
    (dict(cls_model_config="LlamaConfg"), "did you mean `LlamaConfig`"), (dict(type_of_model="MistralForCausalLM"), "is made for mistral"), (dict(base_model="tiny:lama"), "knows no architecture"),
    (dict(model_kwargs=dict(torch_dtype="float16")), "there is a key for that"), (dict(model_kwargs=dict(use_safetensors=False)), "there is a key for that"), (dict(model_kwargs=dict(hidden_size=3)), "overrides_of_model_config"),
    (dict(overrides_of_model_config=dict(hiden_size=3)), "did you mean `hidden_size`"), (dict(overrides_of_model_config=dict(auto_map={})), "`trust_remote_code`"),
    (dict(overrides_of_model_config=dict(rope_scaling=dict(type="linear"))), "needs a `factor`"), (dict(base_model="tiny:gpt2", overrides_of_model_config=dict(rope_scaling=dict(type="linear", factor=2))), "no rotary positions"),
    (dict(gptq=True), "not quantised"), (dict(device="tpu"), "not on this machine"), (dict(max_memory={9: "1GiB"}), "names GPU 9"), (dict(load_in_4bit=True, bnb_config_kwargs=dict(nonsense=1)), "no setting `nonsense`"),
], ids=str)
def test_bad_values(kw, said): assert said in says(**kw)


def test_class_and_config_may_be_named():
    a, b = load_model(options()), load_model(options(type_of_model="LlamaForCausalLM", cls_model_config="LlamaConfig", model_kwargs=dict(local_files_only=True)))
    assert torch.equal(probe_logits(a), probe_logits(b))


def test_another_config_for_the_same_weights(tmp_path):
    c = model_config(options())
    c.rms_norm_eps = 0.5
    c.save_pretrained(tmp_path)
    a, b, c = load_model(options()), load_model(options(base_model_config=str(tmp_path))), load_model(options(overrides_of_model_config=dict(rms_norm_eps=0.5)))
    assert torch.equal(probe_logits(b), probe_logits(c)) and not torch.allclose(probe_logits(a), probe_logits(b))


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, folder):
    monkeypatch.setattr("tuneforge.precision.find_spec", lambda name: None)
    assert "pip install 'tuneforge[quant]'" in says(load_in_4bit=True)
    c = json.loads((folder/"config.json").read_text())
    for method in ("gptq", "awq"):
        (folder/"config.json").write_text(json.dumps(c | dict(quantization_config=dict(quant_method=method, bits=4, group_size=128))))
        assert "pip install 'tuneforge[gptq]'" in says(base_model=str(folder)) and "already quantised" in says(base_model=str(folder), load_in_4bit=True)


def test_too_big_is_said_before_anything_is_read(monkeypatch, folder):
    monkeypatch.setattr("tuneforge.models.free_memory", lambda device, gpus=1: 400_000)
    monkeypatch.setattr("tuneforge.models._read", lambda *a: pytest.fail("was read"))
    said = says()
    assert "bfloat16: true" in said and "load_in_4bit: true" in said and "0.0 GiB" in said
    monkeypatch.setattr("tuneforge.models.free_memory", lambda device, gpus=1: 1000)
    assert "No precision makes it fit" in says()


def test_a_gpu_that_is_full_is_said_in_the_same_words(monkeypatch):
    def full(*a): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("tuneforge.models._read", full)
    assert "GiB for its weights" in says()


# ---- length

def test_linear_scaling_is_what_it_says():
    "Position 4·p of a model scaled by 4 is position p of the plain one"
    a, b = load_model(options()), load_model(options(overrides_of_model_config=dict(rope_scaling=dict(type="linear", factor=4.0))))
    assert torch.allclose(b.model.rotary_emb.inv_freq*4, a.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_both_spellings_load_the_same(kind):
    more = dict(low_freq_factor=1.0, high_freq_factor=4.0) if kind=="llama3" else {}
    old = options(overrides_of_model_config=dict(rope_scaling=dict(type=kind, factor=4.0) | more))
    new = options(overrides_of_model_config=dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, factor=4.0) | more))
    assert positions(model_config(old))==positions(model_config(new))==4*2048
    assert torch.equal(probe_logits(load_model(old)), probe_logits(load_model(new)))
    check_length(model_config(old), 4*2048)
    with pytest.raises(UserError): check_length(model_config(old), 4*2048+1)


def test_base_frequency_stays(folder):
    c = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps({k: v for k, v in c.items() if k!="rope_parameters"} | dict(rope_theta=5e5)))
    res = model_config(options(base_model=str(folder), overrides_of_model_config=dict(rope_scaling=dict(type="linear", factor=2.0)))).rope_parameters
    assert res["rope_theta"]==5e5 and res["factor"]==2


def test_sliding_layers_are_not_scaled():
    res = model_config(options(base_model="tiny:gemma3_text", overrides_of_model_config=dict(rope_scaling=dict(type="linear", factor=8.0)))).rope_parameters
    assert res["full_attention"]["factor"]==8 and res["sliding_attention"]["rope_type"]=="default"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["llama", "gpt2", "mpt", "rwkv", "jamba", "phi", "gptj"]), st.integers(1, 40000))
def test_what_is_advised_helps(arch, n):
    c = model_config(options(base_model=f"tiny:{arch}"))
    try: check_length(c, n); assert positions(c) is None or n<=positions(c)
    except UserError as e:
        assert n>positions(c) and f"`sequence_len: {positions(c)}`" in str(e)
        if arch in ("llama", "phi") and n<=64*positions(c):
            factor = float(str(e).split("factor: ")[1].split("}")[0])
            check_length(model_config(options(base_model=f"tiny:{arch}", overrides_of_model_config=dict(rope_scaling=dict(rope_type="yarn", factor=factor)))), n)
        if arch=="mpt": check_length(model_config(options(base_model="tiny:mpt", overrides_of_model_config=dict(max_seq_len=n))), n)


def test_training_refuses_it_before_data_are_prepared(tmp_path):
    from tuneforge.train import train
    with pytest.raises(UserError, match="rope_scaling"): train(config(sequence_len=9999, output_dir=str(tmp_path/"o")))
    assert not (tmp_path/"o").exists()


# ---- code that comes with a model

MODELING = '''
from transformers import LlamaConfig, LlamaForCausalLM
open({mark!r}, "a").write("ran ")
class OddConfig(LlamaConfig):
    model_type = "odd_one"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out
'''


@pytest.fixture
def odd(folder, tmp_path):
    "A stand-in for BTLM and XGen: an architecture that transformers does not know, in a folder with its code"
    c = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(c | dict(model_type="odd_one", architectures=["OddForCausalLM"], auto_map=dict(AutoConfig="modeling_odd.OddConfig", AutoModelForCausalLM="modeling_odd.OddForCausalLM"))))
    (folder/"modeling_odd.py").write_text(MODELING.format(mark=str(tmp_path/"mark")))
    return folder


def test_code_does_not_run_unasked(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    assert "Read it; then allow it with `trust_remote_code: true`" in says(base_model=str(odd))
    load_tokenizer(TokenizerOptions(base_model=str(odd))) # its class is one of transformers' own
    assert not (tmp_path/"mark").exists()


def test_code_of_the_hub_runs_only_if_it_is_pinned():
    "Unpinned, transformers is told to run none: of a model that it knows itself, nothing changes (Phi, Falcon, MPT)"
    asks = lambda **kw: trusted(ModelOptions(base_model="someone/model", trust_remote_code=True, **kw), "someone/model")
    assert not asks() and not asks(revision_of_model="main") and asks(revision_of_model="0"*40)
    assert "pin it with `revision_of_model`" in _why(ValueError("set the option `trust_remote_code=True` to remove this error"), ModelOptions(base_model="someone/model", trust_remote_code=True))


def test_code_in_a_folder_runs_when_asked(odd, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path/"modules"))
    monkeypatch.syspath_prepend(str(tmp_path/"modules"))
    monkeypatch.setattr(logging.getLogger("tuneforge"), "propagate", True)
    cfg = config(base_model=str(odd), trust_remote_code=True, adapter="lora", lora_target_linear=True, output_dir=str(tmp_path/"out"))
    tok = load_tokenizer(cfg)
    with caplog.at_level("WARNING"): model = load_model(cfg, tok)
    assert type(model).__name__=="OddForCausalLM" and (tmp_path/"mark").exists() and "modeling_odd.py runs (sha256" in caplog.text
    assert torch.equal(probe_logits(model), -probe_logits(load_model(options())))
    add_adapter(model, cfg).save_pretrained(tmp_path/"out")
    tok.save_pretrained(tmp_path/"out")
    out, drift = merge(cfg)
    assert drift.kl<1e-6 and torch.allclose(probe_logits(load_model(finished(cfg, out))), probe_logits(load_finetuned(cfg)[0]), atol=1e-4)


def test_a_folder_that_points_to_code_elsewhere(odd):
    c = json.loads((odd/"config.json").read_text())
    (odd/"config.json").write_text(json.dumps(c | dict(auto_map=dict(AutoConfig="someone/else--modeling_odd.OddConfig"))))
    assert "no fixed revision" in says(base_model=str(odd), trust_remote_code=True)


# ---- new tokens

FAMILIES = "llama llama?tie_word_embeddings=false mixtral gpt_neox gpt2 mpt falcon gptj?tie_word_embeddings=false phi?tie_word_embeddings=false rwkv qwen2 gemma jamba".split()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_grow_and_nothing_else_changes(name):
    tok = load_tokenizer(TokenizerOptions(base_model=f"tiny:{name}", tokens=["<a>", "<b>"]))
    a, b = load_model(options(base_model=f"tiny:{name}")), load_model(options(base_model=f"tiny:{name}"), tok)
    n = a.get_input_embeddings().weight.shape[0]
    assert b.get_input_embeddings().weight.shape[0]==b.get_output_embeddings().weight.shape[0]==b.config.get_text_config().vocab_size==len(tok)
    assert len(tok)-n==2+(name=="qwen2") # whose tokenizer has a token of its own over the model's rows
    x, y = a(input_ids=ids(), use_cache=False).logits, b(input_ids=ids(), use_cache=False).logits
    assert torch.equal(x, y[..., :n]) or torch.allclose(x, y[..., :n], atol=1e-5)
    assert torch.allclose(y[..., n:], x.mean(-1, keepdim=True).expand_as(y[..., n:]), atol=1e-4) # the mean of rows (and biases) says the mean of logits


def test_never_fewer_rows():
    model = load_model(options())
    model.resize_token_embeddings(1024)
    fit_vocabulary(model, load_tokenizer(TokenizerOptions(base_model="tiny:llama")), options(resize_token_embeddings_to_32x=True))
    assert model.get_input_embeddings().weight.shape[0]==1024


def test_rows_that_are_drawn_are_the_same_each_time():
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama", tokens=["<a>", "<b>"]))
    a, b = (load_model(options(mean_resizing_embeddings=True), tok).get_input_embeddings().weight for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a[-1], a[-2])


@pytest.mark.parametrize("name", ["llama", "llama?tie_word_embeddings=false"])
def test_a_token_in_a_spare_row_is_new(name, tmp_path):
    "As with Qwen: the embedding has more rows than the tokenizer tokens"
    model, tok = load_model(options(base_model=f"tiny:{name}")), load_tokenizer(TokenizerOptions(base_model=f"tiny:{name}"))
    model.resize_token_embeddings(800, mean_resizing=False)
    model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    cfg = config(base_model=str(tmp_path), tokens=["<a>"])
    tok = load_tokenizer(cfg)
    new = untrained_tokens(cfg, tok)
    assert new==[768] and tok.convert_ids_to_tokens(768)=="<a>"
    model = load_model(cfg, tok, new)
    for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert w.shape[0]==800 and torch.allclose(w[768], torch.cat([w[:768], w[769:]]).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama?tie_word_embeddings=false", "gpt_neox?tie_word_embeddings=false", "mpt"])
@pytest.mark.parametrize("bits", [{}, dict(load_in_4bit=True, adapter="qlora")], ids=["lora", "qlora"])
def test_an_adapter_trains_the_new_rows_and_no_others(name, bits, tmp_path):
    cfg = config(base_model=f"tiny:{name}", adapter="lora", lora_target_linear=True, tokens=["<a>"], special_tokens=dict(eos_token="<|end|>", pad_token="<|fill|>"), output_dir=str(tmp_path/"o")) if not bits else \
        config(base_model=f"tiny:{name}", lora_target_linear=True, tokens=["<a>"], special_tokens=dict(eos_token="<|end|>", pad_token="<|fill|>"), output_dir=str(tmp_path/"o"), **bits)
    tok = load_tokenizer(cfg)
    new = untrained_tokens(cfg, tok)
    assert set(tok.convert_ids_to_tokens(new))=={"<a>", "<|end|>"}
    model = add_adapter(load_model(cfg, tok, new), cfg, new)
    before = model.get_base_model().get_input_embeddings().weight.detach().clone()
    x = ids()
    x[:, -1], x[:, 3] = new[1], new[0]
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3): model(input_ids=x, labels=x).loss.backward(); opt.step(); opt.zero_grad()
    model.save_pretrained(cfg.output_dir); tok.save_pretrained(cfg.output_dir)
    again = load_finetuned(cfg)[0]
    assert torch.equal(model.eval()(input_ids=x).logits, again(input_ids=x).logits)
    out, drift = merge(cfg)
    merged = load_model(finished(cfg, out), tok)
    assert drift.kl<1e-5
    for w, old in ((merged.get_input_embeddings().weight, before),):
        same = (w[:len(old)]==old).all(1)
        assert sorted((~same).nonzero().flatten().tolist())==new
    assert merged.generation_config.eos_token_id==tok.eos_token_id and len(tok)==w.shape[0]


def test_finished_models_are_not_mended_again(tmp_path):
    cfg = config(fix_untrained_tokens=[7], overrides_of_model_config=dict(rope_scaling=dict(type="yarn", factor=2.0)), output_dir=str(tmp_path))
    tok = load_tokenizer(cfg)
    model = load_model(cfg, tok)
    with torch.no_grad(): model.get_input_embeddings().weight[7] = 0.123 # as if trained
    model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    again = load_finetuned(cfg)[0]
    assert torch.equal(probe_logits(model), probe_logits(again)) and again.config.rope_parameters==model.config.rope_parameters


# ---- tokenizers

def tokenizer(**kw): return load_tokenizer(TokenizerOptions(**(dict(base_model="tiny:llama") | kw)))


def test_a_new_bos_stands_before_each_text():
    tok = tokenizer(special_tokens=SpecialTokens(bos_token="<begin>"))
    assert tok("hi").tokens()[0]=="<begin>" and tok("hi", "ho").tokens().count("<begin>")==tokenizer()("hi", "ho").tokens().count("<s>") and "<s>" not in tok("hi").tokens()


@pytest.mark.parametrize("bad, said", [({9: "<x>"}, "is no added token"), ({3: "</s>"}, "already has")])
def test_bad_renames(bad, said):
    with pytest.raises(UserError, match=said): tokenizer(added_tokens_overrides=bad)


def test_renamed_tokens_keep_their_ids_and_survive_saving(tmp_path):
    from transformers import AutoTokenizer
    tok = tokenizer(added_tokens_overrides={2: "<filler>", 3: "<|user|>"})
    assert len(tok)==len(tokenizer()) and tok.pad_token=="<filler>" and tok.pad_token_id==2
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "a <|user|> b <|im_start|>"
    assert again(text).input_ids==tok(text).input_ids and tok.convert_tokens_to_ids("<|user|>")==3 and tok.unk_token_id is None
    assert untrained_tokens(config(added_tokens_overrides={3: "<|user|>"}), tok)==[3]


def test_more_special_tokens_do_not_push_out_the_old_ones():
    tok = tokenizer(special_tokens=SpecialTokens(additional_special_tokens=["<|tool|>"]))
    assert {"<|im_start|>", "<|tool|>"}<=set(tok.all_special_tokens) and tok.decode(tok("a<|tool|>b").input_ids, skip_special_tokens=True)=="ab"


@pytest.mark.parametrize("there, taken", [(["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"], "<|finetune_right_pad_id|>"), (["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"), ([], "<pad>")])
def test_the_pad_token_is_none_that_is_trained(there, taken, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={chr(97+i): i for i in range(26)}, merges=[])), eos_token="</s>", extra_special_tokens=there)
    tok.pad_token = "</s>"
    tok.save_pretrained(tmp_path)
    res = load_tokenizer(TokenizerOptions(base_model=str(tmp_path)))
    assert res.pad_token==taken and res.pad_token_id!=res.eos_token_id


def test_a_pad_token_that_the_user_names_is_taken(): assert tokenizer(special_tokens=SpecialTokens(pad_token="</s>")).pad_token_id==tokenizer().eos_token_id


# ---- four bits

def plain(w): # the numbers of a 4-bit layer, from its own tables
    import bitsandbytes.functional as F
    return F.dequantize_4bit(w.data, w.quant_state)


def test_evaluating_does_not_spoil_training_or_merging():
    "On CPUs with AVX512-BF16, bitsandbytes repacks weights at the first evaluation; afterwards gradients are wrong"
    model = load_model(options(load_in_4bit=True, float32=True))
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    was = plain(layer.weight).clone()
    with torch.no_grad(): model.eval()(input_ids=ids())
    assert torch.equal(plain(layer.weight), was)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, was.float().sum(0).expand_as(x), rtol=1e-2, atol=1e-2)
    assert keep_4bit_layout(model)==0


@pytest.mark.parametrize("arch", ["llama", "falcon", "mixtral", "gpt2", "rwkv"])
@pytest.mark.parametrize("keys", [dict(load_in_4bit=True), dict(load_in_8bit=True)], ids=["4", "8"])
def test_quantised_means_quantised(arch, keys):
    model = load_model(options(base_model=f"tiny:{arch}", float32=True, **keys))
    assert quantised_share(model)>0.9 or arch=="mixtral" and "load_in_8bit" in keys
    a, b = probe_logits(load_model(options(base_model=f"tiny:{arch}", float32=True))), probe_logits(model)
    assert 0<((a-b).norm()/a.norm())<0.6


@pytest.mark.parametrize("keys", [{}, dict(load_in_4bit=True), dict(load_in_8bit=True)], ids=["whole", "4", "8"])
def test_evaluation_does_not_touch_the_weights_of_rwkv(keys):
    "Its own way: weights of later blocks are halved in evaluation, without the adapter beside them; bits are not numbers that can be halved"
    cfg = config(base_model="tiny:rwkv?rescale_every=1", adapter="lora", lora_target_linear=True, float32=True, **keys)
    model = add_adapter(load_model(cfg), cfg)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    say = lambda: model(input_ids=ids()[:, :6], use_cache=False).logits
    stored = lambda: {n: p.detach().clone() for n, p in model.named_parameters()}
    a, was, b, now = model.train() and say(), stored(), model.eval() and say(), stored()
    assert all(torch.equal(was[n], now[n]) for n in was) and torch.allclose(a, b, atol=0.05 if "load_in_8bit" in keys else 1e-4)


def test_experts_may_stay_whole():
    whole = load_model(options(base_model="tiny:mixtral", load_in_4bit=True, quantize_moe_experts=False))
    assert quantised_share(whole)<0.2 and any(p.dim()==3 and p.is_floating_point() for p in whole.parameters())


def test_lora_on_four_bits_is_what_it_says():
    cfg = config(adapter="lora", load_in_4bit=True, lora_target_modules=["q_proj"])
    model = add_adapter(load_model(cfg), cfg)
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer).__name__=="Linear4bit"


# ---- placement

def test_limits_without_a_unit_are_gib(): assert placement(options(max_memory={0: 2, "cpu": "1GB"}), "cuda", 1)==dict(device_map="auto", max_memory={0: 2*2**30, "cpu": 10**9})


def test_device_map_auto_on_a_cpu():
    assert torch.equal(probe_logits(load_model(options(device_map="auto"))), probe_logits(load_model(options())))


def test_weights_that_find_no_room():
    model = load_model(options())
    for places, bad in (({"a": 0, "b": 1}, False), ({"": "cpu"}, False), ({"a": 0, "model.norm": "cpu"}, True), ({"a": "cpu", "lm_head": "disk"}, True)):
        model.hf_device_map = places
        if not bad: check_offload(model); continue
        with pytest.raises(UserError, match="leave no room for (model.norm|lm_head)"): check_offload(model)


# ---- GPTQ, where gptqmodel is installed

def test_gptq(tmp_path):
    pytest.importorskip("gptqmodel")
    from gptqmodel import GPTQModel, QuantizeConfig
    src = tiny_model("tiny:llama?hidden_size=128&intermediate_size=256&head_dim=32")
    model = GPTQModel.load(str(src), QuantizeConfig(bits=4, group_size=32))
    tok = load_tokenizer(TokenizerOptions(base_model=str(src)))
    model.quantize([tok(f"{i} a text about goats and hills, number {i}. "*4) for i in range(64)], batch_size=1)
    model.save(str(tmp_path)); tok.save_pretrained(tmp_path)
    cfg = config(base_model=str(tmp_path), gptq=True, adapter="lora", lora_target_linear=True, output_dir=str(tmp_path/"o"))
    model = add_adapter(load_model(cfg, tok), cfg)
    opt, x, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), ids(), []
    for _ in range(6):
        losses.append((l := model(input_ids=x, labels=x).loss).item())
        l.backward(); opt.step(); opt.zero_grad()
    assert losses[-1]<0.9*losses[0]
    model.save_pretrained(tmp_path/"o")
    assert torch.allclose(model.eval()(input_ids=x).logits, load_finetuned(cfg)[0](input_ids=x).logits, atol=1e-3)
    with pytest.raises(UserError, match="cannot be merged"): merge(cfg)
