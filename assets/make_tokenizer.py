"""Makes the tokenizer of the tiny model, beside this file: a byte-level BPE of 4096 entries.

It is trained on `gemma2_jax.data.python_docs`, and has Gemma's special tokens (the first four under Gemma's ids)
and Gemma's chat format. Bytes are the base alphabet, so that any text comes back as it went in. Run under the same
Python it writes the same files.

    python assets/make_tokenizer.py
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gemma2_jax.data import python_docs
from gemma2_jax.data.encoding import gemma_chat_template

_OUTPUT = Path(__file__).parent / "tiny-gemma2"
_ENTRIES = 4096
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_ENTRIES,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    talks = [message["content"] for talk in python_docs.python_instructions().values() for message in talk["messages"]]
    tokenizer.train_from_iterator([*python_docs.python_documents().values(), *talks], trainer)
    assert tokenizer.get_vocab_size() == _ENTRIES
    bos = ("<bos>", _SPECIAL.index("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[bos]
    )
    # Not GemmaTokenizer, which would put Gemma's own normalizer and byte fallback in place of what is above.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],  # transformers 4 and 5 both read this key
        "clean_up_tokenization_spaces": False,
    }
    _OUTPUT.mkdir(exist_ok=True)
    tokenizer.save(str(_OUTPUT / "tokenizer.json"), pretty=False)
    (_OUTPUT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (_OUTPUT / "chat_template.jinja").write_text(gemma_chat_template(), encoding="utf-8")


if __name__ == "__main__":
    main()
