"""llama.cpp loads the GGUF files that are written here, and computes what this program computes.

It takes the extra `llama`, which compiles llama.cpp in minutes, so that it is not in the suite:

    pip install -e '.[llama]' && pytest -m exhaustive tests/convert/test_llama_cpp.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_convert_gguf import CONFIG, LORA, TINY, peft_folder, write
from test_gguf_tokenizer import gemma_tokenizer

from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data import python_docs
from gemma2_jax.inference.loaded import LoadedModel, load_model

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install 'gemma2-jax[llama]' compiles llama.cpp")
pytestmark = pytest.mark.exhaustive

DOCUMENTS = list(python_docs.python_documents().values())
PROMPTS = [
    "What does json.dumps do?",
    "The quick brown fox — naïve café 🙂 12345  two  spaces\n\n\ttab",
    "<start_of_turn>user\nWhat is a list?<end_of_turn>\n<start_of_turn>model\n",
    "def f(x):\n    return x",
    " leading space",
    DOCUMENTS[5][:600],  # longer than the window of 128
    DOCUMENTS[40][:1500],  # three windows and more
    "It's they're we'll I'd",
]
NEW = 24  # tokens of a continuation
# The largest difference of a logit; the largest logits are 20. llama.cpp takes GELU from a table in float16, multiplies
# bfloat16 weights with activations in bfloat16, and Q8_0's with activations in 8 bits.
TOLERANCES = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.5}


def continue_prompts(path: Path, lora: Path | None = None) -> list[tuple[list[int], np.ndarray, list[int]]]:
    """Of every prompt its tokens, their logits [T, V], and the tokens that llama.cpp continues it with."""
    model = llama_cpp.Llama(
        str(path), lora_path=lora and str(lora), n_ctx=CONFIG.max_length, n_batch=CONFIG.max_length, n_threads=1,
        logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False,
    )  # fmt: skip
    found = []
    for prompt in PROMPTS:
        tokens = model.tokenize(prompt.encode(), add_bos=True, special=True)
        model.reset()
        model.eval(tokens)
        logits, new = model.scores[: len(tokens)].copy(), []
        for _ in range(NEW):
            new.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(new[-1:])
        found.append((tokens, logits, new))
    model.close()
    return found


def assert_same(model: LoadedModel, path: Path, tolerance: float, lora: Path | None = None) -> None:
    """llama.cpp splits the prompts as the model's tokenizer does, has its logits, and continues greedily as it does."""
    for prompt, (tokens, logits, new) in zip(PROMPTS, continue_prompts(path, lora), strict=True):
        assert tokens == model.tokenizer(prompt)["input_ids"], prompt
        row = np.zeros((1, CONFIG.max_length), np.int32)  # one shape for all prompts
        row[0, : len(tokens) + NEW] = [*tokens, *new]
        expected = np.asarray(model(row))[0]
        np.testing.assert_allclose(logits, expected[: len(tokens)], atol=tolerance, rtol=0)
        likeliest = expected[len(tokens) - 1 : len(tokens) + NEW - 1]
        if tolerance < 0.05:
            assert new == likeliest.argmax(-1).tolist(), prompt
        chosen = likeliest[np.arange(NEW), new]  # of several that are as likely either may be taken
        assert (likeliest.max(-1) - chosen).max() < 2 * tolerance


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_model_is_the_same_model(dtype, tmp_path):
    path = write(TINY, tmp_path / "model.gguf", dtype=dtype)
    assert_same(load_model(open_checkpoint(path)), path, TOLERANCES[dtype])


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_the_same_adapter(rslora, tmp_path):
    """Merged, and as a file of its own."""
    adapter = replace(LORA, alpha=0.05, rslora=rslora)
    source = open_checkpoint(peft_folder(tmp_path / "peft", adapter))
    merged = write(source, tmp_path / "merged.gguf", merge=True, dtype="float32")
    base = write(TINY, tmp_path / "base.gguf", dtype="float32")
    lora = write(source, tmp_path / "lora.gguf", "gguf-adapter")
    model = load_model(source, dtype="float32")
    assert_same(model, merged, TOLERANCES["float32"])
    assert_same(model, base, TOLERANCES["float32"], lora)
    plain = load_model(open_checkpoint(TINY))([[5, 6, 7]])
    assert np.abs(np.asarray(model([[5, 6, 7]])) - np.asarray(plain)).max() > 0.5  # it is not too small to be seen


def test_gemma_s_kind_of_tokenizer_splits_texts_the_same_way(tmp_path):
    source = replace(open_checkpoint(TINY), tokenizer=gemma_tokenizer(tmp_path / "tokenizer"))
    path = write(source, tmp_path / "model.gguf")
    model, tokenizer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False), load_model(source).tokenizer
    for text in ("abc ab  c", " aabbcc abcabc\nbc", "<end_of_turn>abé", "   ab   🙂", "<mask> bca cab"):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text
    model.close()
