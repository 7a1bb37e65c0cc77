"Merging against PEFT's own merge, against the adapter's logits, and against what may go wrong"
import ctypes, io, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuneforge.all import *
from tuneforge.merge import Base, Stored, changed_base, empty_model, keep_ties, merged_tensors, put_adapter, stream, weight_files, write_shards
from tests.tools import ROOT, run, write_jsonl

QV = dict(lora_target_modules=["q_proj", "v_proj"])
ALL = dict(lora_target_linear=True)
UNTIED = dict(base_model="tiny:llama?tie_word_embeddings=false")
VARIANTS = {"lora": ALL, "rslora": dict(peft_use_rslora=True, **ALL), "dora": dict(peft_use_dora=True, **ALL),
    "patterns": dict(lora_rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6}, lora_alpha_pattern={"v_proj": 32}, **ALL),
    "embedding": dict(lora_target_modules=["embed_tokens", "q_proj"], **UNTIED), "dora on the embedding": dict(lora_target_modules=["embed_tokens", "q_proj"], peft_use_dora=True, **UNTIED),
    "one layer of two": dict(peft_layers_to_transform=[1], **QV), "trained in full": dict(lora_modules_to_save=["embed_tokens", "lm_head"], **QV),
    "only the head in full": dict(lora_modules_to_save=["lm_head"], **QV), "a norm in full": dict(lora_modules_to_save=["norm"], **QV),
    "layers repeated": dict(peft_layer_replication=[[0, 2], [1, 2]], **QV), "pissa, unfinished": dict(peft_init_lora_weights="pissa", **QV), "olora, unfinished": dict(peft_init_lora_weights="olora", **QV),
    "trained in full, and tied": dict(lora_modules_to_save=["embed_tokens"], peft_ensure_weight_tying=True, **QV),
    "some tokens": dict(peft_trainable_token_indices=[3, 5, 8], **QV), "some tokens, untied": dict(peft_trainable_token_indices=[3, 5, 8], **QV, **UNTIED)}


def config(out, **kw):
    base = dict(base_model="tiny:llama", datasets=[dict(path="train.jsonl")], learning_rate=1e-4, adapter="lora", lora_r=4, lora_alpha=16, output_dir=str(out))
    return load_config(base | kw)


def random_adapter(cfg, tokenizer=None, seed=0):
    "An adapter with random weights, in place of a trained one, saved in `output_dir`"
    torch.manual_seed(seed)
    model = add_adapter(load_model(cfg, tokenizer), cfg)
    for n, p in model.named_parameters():
        if p.requires_grad: p.data += torch.randn_like(p)*(0.1 if p.ndim>1 else 0.05)
    model.save_pretrained(cfg.output_dir)
    return model.eval()


def logits(model, n_vocab=500, seed=3):
    ids = torch.randint(0, n_vocab, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(): return model.eval()(input_ids=ids).logits.float()


def saved(folder): return {k: t for f in Path(folder).glob("*.safetensors") for k, t in load_file(f).items()}


def same_as_peft(cfg, tol=1e-5, **kw):
    "Our files give the adapter's logits, and hold the weights of PEFT's merge"
    adapted = random_adapter(cfg, load_tokenizer(cfg))
    want = logits(adapted)
    out, proof = merge(cfg, **kw)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(logits(merged), want, atol=tol*want.abs().max().item())
    theirs, mine = unshare(adapted).merge_and_unload(safe_merge=True).state_dict(), merged.state_dict()
    assert mine.keys()==theirs.keys()
    for k in theirs: assert torch.allclose(mine[k], theirs[k], atol=1e-5), k
    assert proof.holds and min(d.kl for d in proof.moved)>1e-5
    return out, merged


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_merged_as_peft_does(tmp_path, name): same_as_peft(config(tmp_path, **VARIANTS[name]))


def test_a_finished_pissa_is_merged_layer_by_layer(tmp_path, caplog):
    cfg = config(tmp_path, peft_init_lora_weights="pissa", **QV)
    first = first_factors(add_adapter(load_model(cfg), cfg))
    want = logits(random_adapter(cfg))
    whole = merge(cfg, tmp_path/"whole")[0]
    assert "in memory as a whole" in caplog.text
    caplog.clear()
    make_plain(tmp_path, first)
    for out in (whole, merge(cfg, tmp_path/"streamed")[0]): assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), want, atol=1e-4*want.abs().max().item())
    assert "as a whole" not in caplog.text


@pytest.mark.parametrize("name", ["trained in full", "only the head in full"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path, name, tied):
    cfg = config(tmp_path, base_model=f"tiny:llama?tie_word_embeddings={str(tied).lower()}", **VARIANTS[name])
    out, merged = same_as_peft(cfg)
    assert merged.config.tie_word_embeddings is False # torn apart, and said so
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_what_stays_tied_is_written_once(tmp_path):
    out, merged = same_as_peft(config(tmp_path, **ALL))
    assert merged.config.tie_word_embeddings and "lm_head.weight" not in saved(out)
    assert merged.lm_head.weight.data_ptr()==merged.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("base", ["mistral", "qwen2", "gemma2", "phi", "gpt_neox", "mixtral", *(pytest.param(b, marks=pytest.mark.slow) for b in ("falcon", "gptj", "bloom", "opt", "stablelm", "mpt"))])
def test_every_family(tmp_path, base):
    from tuneforge.tiny import tiny_model
    try: tiny_model(f"tiny:{base}")
    except UserError: pytest.skip(f"no tiny {base}")
    same_as_peft(config(tmp_path, base_model=f"tiny:{base}", **ALL))


def test_transposed_weights(tmp_path):
    same_as_peft(config(tmp_path, base_model="tiny:gpt2", lora_target_modules=["c_attn", "c_fc"], lora_fan_in_fan_out=True))


def test_mixture_of_experts_goes_the_other_way_and_says_so(tmp_path, caplog):
    same_as_peft(config(tmp_path, base_model="tiny:mixtral", **QV))
    assert "other names than its layers" in caplog.text


def test_both_ways_write_the_same(tmp_path):
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    a, b = (saved(merge(cfg.replace(merge_method=m), tmp_path/m)[0]) for m in ("memory_efficient", "legacy"))
    assert a.keys()==b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def half(tmp_path, dtype):
    "A base stored in another precision"
    folder = tmp_path/"base"
    tok = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))
    load_model(ModelOptions(base_model="tiny:llama")).to(dtype).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_of_the_files_is_kept_and_rounded_once(tmp_path, dtype):
    cfg = config(tmp_path/"out", base_model=half(tmp_path, dtype), bf16=False, **ALL)
    adapted = random_adapter(cfg)
    out, proof = merge(cfg)
    files, exact = saved(out), adapted.float().merge_and_unload(safe_merge=True).state_dict()
    assert {t.dtype for t in files.values()}=={dtype}
    for k, t in files.items(): assert torch.equal(t, exact[k].to(dtype)), k
    assert AutoModelForCausalLM.from_pretrained(out).dtype==dtype
    assert json.loads((out/"config.json").read_text())["dtype"]==str(dtype).removeprefix("torch.")


def test_new_tokens(tmp_path):
    data = write_jsonl(tmp_path/"t.jsonl", [dict(instruction="a", output="b")])
    cfg = config(tmp_path/"out", special_tokens=dict(eos_token="<|stop|>", pad_token="<|fill|>"), lora_modules_to_save=["embed_tokens", "lm_head"], **QV)
    tok = load_tokenizer(cfg)
    adapted = random_adapter(cfg, tok)
    n = len(tok)
    want = logits(adapted, n)
    out, _ = merge(cfg)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.get_input_embeddings().weight.shape[0]==n==merged.config.vocab_size
    assert torch.allclose(logits(merged, n), want, atol=1e-5*want.abs().max().item())


def test_a_padding_token_that_nobody_trained(tmp_path):
    cfg = config(tmp_path, special_tokens=dict(pad_token="<|fill|>"), **QV)
    tok = load_tokenizer(cfg)
    want = logits(random_adapter(cfg, tok), len(tok))
    merged = AutoModelForCausalLM.from_pretrained(merge(cfg)[0])
    assert torch.allclose(logits(merged, len(tok)), want, atol=1e-5*want.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_merged_as_training_saw_it(tmp_path, bits):
    cfg = config(tmp_path, **{f"load_in_{bits}bit": True}, **(dict(adapter="qlora") if bits==4 else {}), **ALL)
    adapted = random_adapter(cfg)
    want = logits(adapted)
    seen, original = (logits(AutoModelForCausalLM.from_pretrained(merge(cfg, tmp_path/str(o), original=o)[0])) for o in (False, True))
    near, far = ((a-want).norm()/want.norm() for a in (seen, original))
    if bits==4: assert near<1e-3 and far>20*near
    else: assert near<0.05 # the activations are rounded, too: no weights can say that
    assert not torch.equal(seen, original)


def test_double_quantisation_is_followed_exactly(tmp_path):
    "The dequantised weight, against the one that bitsandbytes makes when it loads the model"
    import bitsandbytes.functional as F
    cfg = config(tmp_path, adapter="qlora", load_in_4bit=True, **QV)
    base, loaded = Base(cfg, empty_model(cfg)), load_model(cfg)
    layer = loaded.model.layers[0].mlp.up_proj
    assert torch.equal(base["model.layers.0.mlp.up_proj.weight"], F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())


def test_eight_bits_are_followed_exactly(tmp_path):
    cfg = config(tmp_path, load_in_8bit=True, **QV)
    layer = load_model(cfg).model.layers[0].mlp.up_proj
    want = layer.weight.data.float()*layer.weight.SCB.float()[:, None]/127
    assert torch.equal(Base(cfg, empty_model(cfg))["model.layers.0.mlp.up_proj.weight"], want)


def test_weights_that_training_changed_are_the_base(tmp_path):
    "What ReLoRA and LoftQ keep beside the adapter, plain and in four bits"
    import bitsandbytes.functional as F
    cfg = config(tmp_path, **QV)
    adapted = random_adapter(cfg)
    name = "model.layers.0.self_attn.q_proj"
    layer = adapted.get_submodule("base_model.model."+name).base_layer
    new = torch.randn_like(layer.weight)*0.1
    save_file({f"{name}:weight": new}, tmp_path/"adapted_base.safetensors")
    layer.weight.data = new
    want = logits(adapted)
    got = logits(AutoModelForCausalLM.from_pretrained(merge(cfg)[0]))
    assert torch.allclose(got, want, atol=1e-5*want.abs().max().item())
    q, state = F.quantize_4bit(new, quant_type="nf4", compress_statistics=True)
    save_file({f"{name}:weight": q} | {f"{name}:weight.{k}": v for k, v in state.as_dict(packed=True).items()}, tmp_path/"adapted_base.safetensors")
    assert torch.equal(changed_base(tmp_path)[name+".weight"], F.dequantize_4bit(q, state))


def test_shards(tmp_path):
    tensors = {f"t{i}": torch.randn(100, 10, generator=torch.Generator().manual_seed(i)) for i in range(7)}
    assert write_shards(iter(tensors.items()), tmp_path, 9000)==28000
    files = sorted(f.name for f in tmp_path.iterdir())
    assert files==[f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]+["model.safetensors.index.json"]
    back = Stored(weight_files(tmp_path))
    assert set(back)==set(tensors) and all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert all((tmp_path/f).stat().st_size<10_000 for f in files[:4])


def test_a_base_in_several_files(tmp_path):
    load_model(ModelOptions(base_model="tiny:llama")).save_pretrained(tmp_path/"base", max_shard_size="100KB")
    load_tokenizer(TokenizerOptions(base_model="tiny:llama")).save_pretrained(tmp_path/"base")
    assert len(list((tmp_path/"base").glob("*.safetensors")))>2
    same_as_peft(config(tmp_path/"out", base_model=str(tmp_path/"base"), **ALL))
    next(iter((tmp_path/"base").glob("model-00002*"))).unlink()
    with pytest.raises(UserError, match="not whole"): merge(config(tmp_path/"out", base_model=str(tmp_path/"base"), **ALL))


def test_the_wrong_base_is_refused(tmp_path, caplog):
    cfg = config(tmp_path, **QV)
    random_adapter(cfg)
    for base, said in (("tiny:llama?hidden_size=32", "but this base needs"), ("tiny:llama?num_hidden_layers=1", "no place for"), ("tiny:llama?num_hidden_layers=3", "it has no"), ("tiny:gpt2", "cannot use the adapter")):
        with pytest.raises(UserError, match=said): merge(cfg.replace(base_model=base))
    assert not (tmp_path/"merged").exists() and "was trained on" in caplog.text
    caplog.clear()
    merge(cfg)
    assert "was trained on" not in caplog.text


def trained(tmp_path, base, **kw):
    data = write_jsonl(tmp_path/"t.jsonl", [dict(instruction="a", output="b")]*4)
    cfg = load_config(dict(base_model=str(base), datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(tmp_path/"prepared"), output_dir=str(tmp_path/"out"), learning_rate=1e-3, max_steps=1, save_strategy="no", adapter="lora", lora_r=4, lora_alpha=16, **QV) | kw)
    train(cfg)
    return cfg


def test_another_base_of_the_same_shape_is_refused(tmp_path, caplog):
    "Weights are known by what they are, not by their path"
    for name in ("base", "moved"): shutil.copytree(resolve_model("tiny:llama"), tmp_path/name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path/"base")
    for p in model.parameters(): p.data += 0.01
    model.save_pretrained(tmp_path/"other")
    load_tokenizer(TokenizerOptions(base_model="tiny:llama")).save_pretrained(tmp_path/"other")
    cfg = trained(tmp_path, tmp_path/"base")
    with pytest.raises(UserError, match="trained on other weights than those in .*other.*--other-base"): merge(cfg.replace(base_model=str(tmp_path/"other")))
    merge(cfg.replace(base_model=str(tmp_path/"moved")))
    assert "was trained on" not in caplog.text
    merge(cfg.replace(base_model=str(tmp_path/"other")), other_base=True)
    assert "is merged into" in caplog.text


def test_a_base_is_called_what_the_user_called_it(tmp_path, caplog):
    "PEFT knows only the folder in the cache that `tiny:llama` was made in"
    cfg = trained(tmp_path, "tiny:llama")
    assert str(resolve_model("tiny:llama")) in (tmp_path/"out"/"adapter_config.json").read_text()
    with pytest.raises(UserError, match=r"other weights than those in tiny:llama\?seed=2 \(on tiny:llama\)"): merge(cfg.replace(base_model="tiny:llama?seed=2"))
    with pytest.raises(UserError, match=r"it was trained on tiny:llama\n"): merge(cfg.replace(base_model="tiny:llama?num_hidden_layers=1"), other_base=True)
    merge(cfg.replace(base_model="tiny:llama?seed=2"), other_base=True)
    assert "the adapter was trained on tiny:llama, and is merged into tiny:llama?seed=2" in caplog.text


def test_a_run_without_an_adapter_has_nothing_to_merge(tmp_path):
    cfg = trained(tmp_path, "tiny:llama", adapter=None, lora_r=None, lora_alpha=None, lora_target_modules=None)
    with pytest.raises(UserError, match="out had no `adapter`.*nothing to merge.*holds the finished model"): merge(cfg)
    adapter = trained(tmp_path, "tiny:llama", output_dir=str(tmp_path/"lora"))
    with pytest.raises(UserError, match="no `adapter`"): merge(adapter.replace(lora_model_dir=str(tmp_path/"out")))
    (tmp_path/"lora"/"adapter_config.json").unlink()
    with pytest.raises(UserError, match="lora is no adapter folder: it has no adapter_config.json"): merge(adapter)
    with pytest.raises(UserError, match="no adapter folder: .*nowhere: train first, with `tuneforge train CONFIG.yml`"): merge(adapter.replace(output_dir=str(tmp_path/"nowhere")))
    with pytest.raises(UserError, match="no adapter folder: .*nowhere: correct `lora_model_dir`$"): merge(adapter.replace(lora_model_dir=str(tmp_path/"nowhere")))


def test_the_proof_fits_a_narrow_terminal():
    from rich.console import Console
    said = "prompt 1: "+repr("\n<|im_end|>\n<|im_start|>[/assistant]\n\n0123")
    proof, out = Proof([said, "random tokens 1"], [Drift(0.29, 1, 1), Drift(0.31, 1, 1)], [Drift(2.9e-08, 1e-6, 0.997), Drift(5.1e-9, 2e-6, 1)], 1e-3), io.StringIO()
    Console(width=80, file=out).print(proof)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines))<=80 and "".join(l.split("│")[1].strip() for l in lines if "│" in l).replace(" ", "")==(said+"random tokens 1").replace(" ", "")
    assert all(f in out.getvalue() for r in proof.rows() for f in r[1:])
    assert said in repr(proof).splitlines()[1] # a file has it whole, a line each


def test_tokens_that_the_config_lacks_are_named(tmp_path):
    cfg = trained(tmp_path, "tiny:llama", tokens=["<tool>", "</tool>"])
    given = {k: v for k, v in cfg.explicit().items() if k!="tokens"}
    with pytest.raises(UserError, match="trained with 2 tokens that this config does not add: <tool>, </tool>. Give the same `tokens`"): merge(Config(**given))


def test_a_broken_adapter_is_refused(tmp_path):
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    f = tmp_path/"adapter_model.safetensors"
    whole = load_file(f)
    save_file({k: v for i, (k, v) in enumerate(whole.items()) if i}, f)
    with pytest.raises(UserError, match="it has no"): merge(cfg)
    save_file({k: v*float("nan") if i==0 else v for i, (k, v) in enumerate(whole.items())}, f)
    with pytest.raises(UserError, match="cannot be merged|not finite"): merge(cfg)
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot use the adapter"): merge(cfg)
    assert not (tmp_path/"merged").exists() and not list(tmp_path.glob("*.part"))


def test_a_drift_over_the_threshold_leaves_the_older_merge(tmp_path, monkeypatch):
    "A merge that goes wrong: one weight is changed on its way to the file"
    import tuneforge.merge as room
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    out, _ = merge(cfg)
    before = {f: f.read_bytes() for f in out.iterdir()}
    true = room.merged_tensors
    monkeypatch.setattr(room, "merged_tensors", lambda *a: ((k, t+0.05*torch.randn_like(t) if k.endswith("0.mlp.up_proj.weight") else t) for k, t in true(*a)))
    with pytest.raises(UserError, match="nothing was written") as e: merge(cfg)
    assert "prompt" in str(e.value) and "random tokens 1" in str(e.value)
    assert {f: f.read_bytes() for f in out.iterdir()}==before and not list(tmp_path.glob("*.part"))


def test_folders_of_others_are_left_alone(tmp_path):
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    (tmp_path/"merged").mkdir()
    (tmp_path/"merged"/"thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"): merge(cfg)
    assert (tmp_path/"merged"/"thesis.txt").read_text()=="mine"
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="is a file"): merge(cfg, tmp_path/"file")
    with pytest.raises(UserError, match="would be replaced"): merge(cfg, "/")


def test_what_is_merged_is_not_replaced(tmp_path):
    "A merged model that is the base of the next merge, and what holds it or the adapter"
    cfg = config(tmp_path/"first", **ALL)
    random_adapter(cfg)
    base, _ = merge(cfg)
    cfg = config(tmp_path/"second", base_model=str(base), **ALL)
    random_adapter(cfg)
    was = (base/"model.safetensors").read_bytes()
    (tmp_path/"merge.json").write_text("{}"), (tmp_path/"second"/"merge.json").write_text("{}") # as if they were merged models
    for out, what in ((base, "the base"), (tmp_path/"first"/".."/"first"/"merged", "the base"), (tmp_path, "the base"), (tmp_path/"second", "the adapter")):
        with pytest.raises(UserError, match=f"holds {what} of this merge"): merge(cfg, out)
    assert (base/"model.safetensors").read_bytes()==was and (tmp_path/"second"/"adapter_config.json").is_file()


def test_a_link_and_this_folder_lead_to_the_model(tmp_path, monkeypatch):
    cfg = config(tmp_path/"out", **ALL)
    random_adapter(cfg)
    for d in ("real", "here"): (tmp_path/d).mkdir()
    (tmp_path/"link").symlink_to("real")
    for _ in range(2): merge(cfg, tmp_path/"link") # also into what it made
    monkeypatch.chdir(tmp_path/"here")
    merge(cfg, ".")
    assert (tmp_path/"link").is_symlink() and all((tmp_path/d/"merge.json").is_file() and not (tmp_path/d).is_symlink() for d in ("real", "here"))
    assert sorted(p.name for p in tmp_path.iterdir())==["here", "link", "out", "real"]


def test_a_killed_merge_is_put_right(tmp_path):
    "Killed while it writes, and between moving the older model aside and moving the new one in"
    from multiprocessing import get_context
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    out, _ = merge(cfg)
    was = (out/"model.safetensors").read_bytes()
    import tuneforge.merge as room
    def killed(moment):
        def die(*a): os.kill(os.getpid(), 9)
        if moment=="writing": room._dress = die
        else: room._replace = lambda part, out: (out.rename(out.with_name(f"{out.name}.{os.getpid()}.old")), die())
        merge(cfg)
    for moment, left in (("writing", ["merged", "merged.part"]), ("moving", ["merged.old", "merged.part"])):
        p = get_context("fork").Process(target=killed, args=(moment,))
        p.start(), p.join(120)
        assert p.exitcode==-9 and sorted(re.sub(r"\.\d+", "", f.name) for f in tmp_path.glob("merged*"))==left
        with pytest.raises(UserError, match="predicts something else"): merge(cfg, max_kl=-1) # comes to nothing, but for that
        assert [f.name for f in tmp_path.glob("*merged*")]==["merged"] and (out/"model.safetensors").read_bytes()==was


def test_a_full_disk_is_a_message(tmp_path, monkeypatch):
    import tuneforge.merge as room
    from safetensors import SafetensorError
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    for name, error in (("write_text", OSError(28, "No space left on device")), ("save_file", SafetensorError("No space left on device (os error 28)"))):
        def full(*a, **kw): raise error
        with monkeypatch.context() as m:
            m.setattr(room, name, full)
            with pytest.raises(UserError, match="has failed: .*No space left on device"): merge(cfg)
    assert not list(tmp_path.glob("*merged*"))


def test_two_merges_do_not_write_to_one_place(tmp_path):
    from tuneforge.merge import _alone
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    with _alone((tmp_path/"merged").resolve()):
        with pytest.raises(UserError, match="another merge is writing to"): merge(cfg)
    merge(cfg)


def test_no_room(tmp_path, monkeypatch):
    import shutil
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match="GiB left"): merge(cfg)


def test_golden_prompts_are_compared(tmp_path):
    cfg = config(tmp_path, **ALL)
    random_adapter(cfg)
    ids = load_tokenizer(cfg)("Where does Bagol live?").input_ids
    (tmp_path/"golden_prompts.json").write_text(json.dumps([dict(entry=0, row={}, text="Where does Bagol live?", ids=ids)]))
    out, proof = merge(cfg)
    assert proof.what[0]=="prompt 1: 'Where does Bagol live?'" and len(proof.what)==5
    assert (out/"golden_prompts.json").is_file() and json.loads((out/"merge.json").read_text())["proof"]["what"]==proof.what


def test_drift_by_hand():
    a, b = torch.tensor([[[0., 1.], [2., 0.]]]), torch.tensor([[[0., 1.], [0., 2.]]])
    p = torch.tensor([2., 0.]).softmax(-1)
    want = (p[0]*(p[0]/p[1]).log() + p[1]*(p[1]/p[0]).log()).item()/2
    d = drift(a, b)
    assert d.kl==pytest.approx(want, rel=1e-6) and d.logits==1 and d.same_token==0.5
    assert not Proof(["x"], [d], [drift(a, b*float("nan"))], 1e-3).holds # no number is no proof


def grown(work):
    "MiB that a fork of this process needs to do something, at most"
    from multiprocessing import get_context
    ctx = get_context("fork")
    ours, theirs = ctx.Pipe()
    def child():
        said = lambda key: int(re.search(key+r":\s+(\d+)", open("/proc/self/status").read())[1])/1024 # the highest mark of a fork begins at what it has
        ctypes.CDLL(None).mallopt(-3, 2**17) # M_MMAP_THRESHOLD: what is freed goes back at once, as larger tensors do by themselves
        before = said("VmRSS")
        work()
        theirs.send(said("VmHWM")-before)
    p = ctx.Process(target=child)
    p.start(), theirs.close()
    assert ours.poll(300), "the fork says nothing"
    got = ours.recv() # raises EOFError when it fails
    p.join()
    return got


@pytest.mark.skipif(sys.platform!="linux", reason="reads /proc")
def test_a_merge_holds_a_part_of_the_model(tmp_path, monkeypatch):
    "Its way through the files, beside the way through memory"
    import tuneforge.merge as room
    true = room.write_shards
    monkeypatch.setattr(room, "write_shards", lambda tensors, out: true(tensors, out, 4*2**20))
    cfg = config(tmp_path, base_model="tiny:llama?hidden_size=512&intermediate_size=1024&num_hidden_layers=8", **QV)
    grown(lambda: random_adapter(cfg))
    streamed, legacy = (grown(lambda: merge(cfg.replace(merge_method=m), tmp_path/m)) for m in ("memory_efficient", "legacy"))
    size = sum(f.stat().st_size for f in (tmp_path/"legacy").glob("*.safetensors"))/2**20
    assert legacy-streamed>size>50, (streamed, legacy, size) # beside what both need: code, hooks, a layer, a shard


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    "Peak memory of a process that merges a small and a four times larger model"
    code = """
import re, sys
from tuneforge.all import *
import tuneforge.merge as room
true = room.write_shards
room.write_shards = lambda tensors, out: true(tensors, out, 4*2**20)
cfg = load_config(dict(base_model=sys.argv[1], datasets=[dict(path="t.jsonl")], learning_rate=1e-4, adapter="lora", lora_r=2, lora_target_modules=["q_proj"], output_dir=sys.argv[2]))
merge(cfg) if len(sys.argv)>3 else add_adapter(load_model(cfg), cfg).save_pretrained(sys.argv[2])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])//1024) # getrusage would count the parent's, too
"""
    peak, size = {}, {}
    for n in (6, 54):
        name = f"tiny:llama?hidden_size=512&intermediate_size=1024&num_hidden_layers={n}"
        for step in ([], ["merge"]): res = run(sys.executable, "-c", code, name, tmp_path/str(n), *step, timeout=600, env=dict(MALLOC_MMAP_THRESHOLD_=str(2**17))) # what is freed goes back at once
        assert res.returncode==0, res.stderr
        peak[n], size[n] = int(res.stdout.split()[-1]), sum(f.stat().st_size for f in (tmp_path/str(n)/"merged").glob("*.safetensors"))/2**20
    assert size[54]-size[6]>300 # MiB
    assert peak[54]-peak[6]<(size[54]-size[6])/4, (peak, size)
