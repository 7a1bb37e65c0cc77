"Golden prompts: kept by training, carried along by merging, checked when the model is loaded to be asked"
import json
import pytest
from tuneforge.all import UserError, Village, load_config, load_finetuned, merge, prompt_ids, prompt_format, train, user_row
from tests.tools import write_jsonl


def test_prompts_are_those_of_the_training(tmp_path):
    village = Village()
    rows = [dict(messages=[dict(role="user", content=q["instruction"]), dict(role="assistant", content=q["output"])]) for q in village.questions(list(village.people)[:4])]
    f = write_jsonl(tmp_path/"chat.jsonl", rows)
    cfg = load_config(dict(base_model="tiny:llama", datasets=[dict(path=str(f), type="chat_template")], chat_template="chatml", default_system_message="Be brief.", dataset_prepared_path=str(tmp_path/"prepared"),
        output_dir=str(tmp_path/"out"), learning_rate=1e-3, max_steps=1, adapter="lora", lora_target_linear=True, save_strategy="no"))
    train(cfg)
    golden = json.loads((tmp_path/"out"/"golden_prompts.json").read_text())
    assert len(golden)==3 and golden[0]["row"]["messages"][0]==rows[0]["messages"][0] and golden[0]["text"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    model, tokenizer = load_finetuned(cfg)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert im_end in model.generation_config.eos_token_id
    assert merge(cfg)[0].joinpath("golden_prompts.json").is_file()
    for changed in (dict(chat_template="llama3"), dict(default_system_message="Be long.")):
        with pytest.raises(UserError, match="prompts are no longer those of the training"): load_finetuned(cfg.model_copy(update=changed))


@pytest.mark.parametrize("type", ["alpaca", "alpaca_chat.load_qa", "context_qa", "orcamini", "metharme", "pygmalion", "llama2_chat", "input_output", "chat_template", "sharegpt", "messages", "explainchoice", dict(field_instruction="q", format="{instruction}|{input}:")])
def test_questions_in_every_format(type):
    from tuneforge.config import DatasetOptions
    from tests.tokenizers import tokenizer
    tok, opts = tokenizer(), DatasetOptions(path="x", type=type, chat_template="chatml")
    text = prompt_format(opts, tok).prompt(user_row(opts, "Who?", "A town."))
    assert "Who?" in text and (prompt_ids(prompt_format(opts, tok), tok, user_row(opts, "Who?", "A town.")))
    if type in ("alpaca", "context_qa", "explainchoice"): assert "A town." in text
