"""A program for any version of transformers: what each of the folders named gives for the same text, as JSON.

    python load_exports.py FOLDER ...

A folder with adapter_config.json is put on the model that it names, by peft.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

TEXT = "<start_of_turn>user\nWhat does json.dumps do?<end_of_turn>\n<start_of_turn>model\n  héllo\t<eos> x " * 8
TALK = [{"role": "user", "content": "What is <b>?"}, {"role": "assistant", "content": " A tag. "}]


def describe(folder: Path) -> dict:
    """The tokens and the template's text of the folder's tokenizer, and the model's logits of the last token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else folder
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    eos = model.generation_config.eos_token_id
    if adapter.is_file():
        import peft

        model = peft.PeftModel.from_pretrained(model, folder)
    tokens = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1]
    return {
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "plain": tokenizer.decode(tokens, skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True),
        "eos": eos,
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"version": transformers.__version__} | {name: describe(Path(name)) for name in sys.argv[1:]}))
