"""Generation against transformers' `generate`, token for token; sampling against its distributions; the command."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from peers import BITING, hf_model, state_dict
from strange_folders import configure

from gemma2_jax import generate
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats.table import from_hf
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.source import Source, load_source, open_source
from gemma2_jax.inference.steps import bucket_length
from gemma2_jax.inference.text import TextStream, encode_prompt
from gemma2_jax.model import gemma2 as model
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import GEMMA2_TINY

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
CONFIGS = {name: replace(config, max_length=128) for name, config in BITING.items()}
CONFIGS["wide"] = replace(CONFIGS["27b"], window=100)
NEW = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are faster so, much faster where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def peer(name: str) -> transformers.Gemma2ForCausalLM:
    """A model that does not repeat itself: the larger its embeddings, the more a token likes to follow itself."""
    whole = hf_model(CONFIGS[name])
    with torch.no_grad():
        whole.model.embed_tokens.weight.mul_(0.1)
    whole.generation_config.eos_token_id = None
    return whole


def graph_of(name: str, dtype="float32") -> nnx.GraphDef:
    def create() -> Gemma2:
        return Gemma2(CONFIGS[name], attention=IMPLEMENTATIONS["xla"], dtype=dtype, rngs=nnx.Rngs(0))

    return nnx.graphdef(nnx.eval_shape(create))


def weights_of(name: str) -> model.Weights:
    return {path: jnp.asarray(w) for path, w in from_hf(state_dict(peer(name)), CONFIGS[name]).items()}


@cache
def decoder(name: str) -> Decoder:
    return Decoder(graph_of(name), weights_of(name))


def prompts_of(name: str, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(3, CONFIGS[name].vocab_size, length).tolist() for length in lengths]


def transformers_tokens(name: str, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, padded on the left; every choice must have been a clear one."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = peer(name).generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4  # a hundred times what float32 sums differ by here
    return found.sequences[:, width:].tolist()


@jax.jit(static_argnums=(0, 2))
def logits_of(graph, weights, method, *inputs):
    """Logits of the hidden states that a method of the model gives, and its cache if it gives one."""
    whole = nnx.merge(graph, weights)
    found = method(whole, *inputs)
    hidden, cache = found if isinstance(found, tuple) else (found, None)
    return whole.logits(hidden), cache


@pytest.mark.parametrize("name", BITING)
def test_cached_logits_equal_a_forward_pass(name):
    """After prompts of 3 and 20 tokens, the second more than two windows long, a token at a time."""
    config, lengths = BITING[name], np.array([3, 20])
    whole = model.rebuild_model(graph_of(name), from_hf(state_dict(hf_model(config)), config))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 40))
    positions = np.broadcast_to(np.arange(40), tokens.shape)
    expected, _ = logits_of(*nnx.split(whole), Gemma2.hidden_states, tokens, positions, np.ones_like(tokens))
    graph, weights = nnx.split(model.unstack_layers(whole))
    cache = whole.empty_cache(2, 48)
    logits, cache = logits_of(graph, weights, Gemma2.extend, tokens[:, :20], np.zeros(2, int), lengths, cache)
    rows = [[new[:length]] for new, length in zip(logits, lengths, strict=True)]
    for position in lengths + np.arange(20)[:, None]:
        new, cache = logits_of(graph, weights, Gemma2.decode_step, tokens[[0, 1], position], position, cache)
        rows = [[*row, logits[None]] for row, logits in zip(rows, new, strict=True)]
    for row, logits, length in zip(rows, expected, lengths, strict=True):
        # Logits reach 20. Against float64 arithmetic the cache is off by at most 1.7e-5, the whole pass by 2.6e-5.
        np.testing.assert_allclose(np.concatenate(row), logits[: length + 20], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", BITING)
def test_prompts_read_in_parts_equal_a_forward_pass(name):
    """In parts longer and shorter than the window, each row at its own pace: rings of 8 slots wrap several times."""
    config, total = BITING[name], 40
    whole = model.rebuild_model(graph_of(name), from_hf(state_dict(hf_model(config)), config))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, total))
    positions = np.broadcast_to(np.arange(total), tokens.shape)
    expected, _ = logits_of(*nnx.split(whole), Gemma2.hidden_states, tokens, positions, np.ones_like(tokens))
    graph, weights = nnx.split(model.unstack_layers(whole))
    cache = [
        tuple(jnp.full((2, config.kv_heads, slots, config.head_width), 9.0) for _ in range(2))  # of another prompt
        for slots in config.layer_windows(48)
    ]
    starts, rows = np.zeros(2, np.int32), [[], []]
    for lengths in ((5, 16), (0, 3), (16, 1), (11, 16), (8, 4)):
        lengths = np.array(lengths, np.int32)
        part = np.stack([np.resize(row[start:], 16) for row, start in zip(tokens, starts, strict=True)])
        logits, cache = logits_of(graph, weights, Gemma2.extend, part, starts, lengths, cache)
        for row, new, length in zip(rows, logits, lengths, strict=True):
            row.extend(new[:length])
        starts = starts + lengths
    assert starts.tolist() == [total, total]
    np.testing.assert_allclose(np.array(rows), expected, atol=5e-5, rtol=0)


def test_local_layers_keep_no_more_than_their_window():
    """8 tokens in layer 0, all of the 48 asked for in layer 1."""
    whole = model.unstack_layers(model.rebuild_model(graph_of("27b"), weights_of("27b")))
    assert [k.shape for k, _ in whole.empty_cache(2, 48)] == [(2, 4, 8, 8), (2, 4, 48, 8)]


def test_blocks_apart_are_the_same_model():
    tokens = np.array(prompts_of("27b", 20))
    whole = model.rebuild_model(graph_of("27b"), weights_of("27b"))
    inputs = tokens, np.arange(20)[None], np.ones_like(tokens)
    expected, _ = logits_of(*nnx.split(whole), Gemma2.hidden_states, *inputs)
    found, _ = logits_of(*nnx.split(model.unstack_layers(whole)), Gemma2.hidden_states, *inputs)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_weights_are_cast_once_and_norms_are_not():
    weights = weights_of("27b")
    made = Decoder(graph_of("27b", "bfloat16"), weights)
    assert not weights
    dtypes = {jax.tree_util.keystr(path): w.dtype for path, w in jax.tree.leaves_with_path(made.weights)}
    assert {dtype for path, dtype in dtypes.items() if "norm" in path} == {jnp.dtype("float32")}
    assert {dtype for path, dtype in dtypes.items() if "norm" not in path} == {jnp.dtype("bfloat16")}


def test_lengths_are_rounded_up_to_few():
    assert [bucket_length(n) for n in (1, 32, 33, 48, 49, 65, 320, 6145, 8192)] == [
        32, 32, 48, 48, 64, 96, 384, 8192, 8192
    ]  # fmt: skip


@pytest.mark.parametrize(("prompt", "said"), [(None, "give a string"), ("\udcff\udcfe", "bytes that are not UTF-8")])
def test_prompts_that_are_no_text(prompt, said):
    with pytest.raises(ValueError, match=said):
        encode_prompt(prompt, load_tokenizer(str(ASSETS)), chat=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for x %}", "expected token 'in'"),
        ("{{ raise_exception('no way') }}", "no way; mend the template, or leave out --chat"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ 'x' * 2000000 }}", "it writes 2,000,000 characters for 2;"),
        (5, "TypeError: "),
    ],
)
def test_chat_templates_that_fail(template, said):
    tokenizer = load_tokenizer(str(ASSETS))
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"^the chat template of .*: .*{re.escape(said)}.*$"):
        encode_prompt("hi", tokenizer, chat=True)


def test_text_comes_in_whole_characters():
    """Token by token, each of them at most a byte of some characters."""
    tokenizer = load_tokenizer(str(ASSETS))
    written = "Naïve café, 日本語 and 😀 in one line."
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(written, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == stream.text == written
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces
    half = tokenizer("日", add_special_tokens=False)["input_ids"][:-1]
    assert [stream.add(token) for token in half] == [""] * len(half)
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face folder with a model that says much, and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    whole = hf_model(replace(GEMMA2_TINY, layers=2, width=48, mlp_width=64, head_width=16, query_pre_attn_scalar=16))
    with torch.no_grad():
        whole.model.embed_tokens.weight.mul_(0.1)
    whole.save_pretrained(folder)
    load_tokenizer(str(ASSETS)).save_pretrained(folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process; gives what it wrote to standard output and error."""

    def run(*arguments) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        generate.main()
        return tuple(capsys.readouterr())

    return run


def transformers_text(folder: Path, text: str, new: int, adapter: Path | None = None) -> str:
    """What transformers, or peft, says after a text that starts with <bos>."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = transformers.Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if adapter is not None:
        whole = peft.PeftModel.from_pretrained(whole, adapter)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    found = whole.generate(**tokens, do_sample=False, max_new_tokens=new)
    return tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def test_command_says_what_transformers_says(checkpoint, command):
    idle = "--top-k", 3, "--seed", 7
    text, speed = command("--checkpoint", checkpoint, "--prompt", "The", "--max-new-tokens", 40, *idle)
    assert text == transformers_text(checkpoint, "<bos>The", 40) + "\n"
    assert len(text) > 80
    assert re.fullmatch(
        r"a text ends with <eos> \(1\), or after 40 tokens\n"
        r"note: --top-k and --seed without --temperature: of no effect, as the most likely token is taken\n"
        r"prefill 2 tokens at [\d,]+ tokens/s; decode 39 tokens at [\d,]+ tokens/s; compiled in [\d.]+ s\n",
        speed,
    )


def test_command_chats_with_several(checkpoint, command):
    asked = ["What does json.dumps do?", "Hi"]
    settings = "--chat", "--max-new-tokens", 30, "--tensor", 2, "--data", 2
    text, _ = command("--checkpoint", checkpoint, *settings, *(x for a in asked for x in ("--prompt", a)))
    form = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    answers = [transformers_text(checkpoint, form.format(prompt), 30) for prompt in asked]
    assert text == f"[1] {asked[0]}\n{answers[0]}\n\n[2] {asked[1]}\n{answers[1]}\n\n"


def test_command_answers_a_file(checkpoint, command, tmp_path):
    """A text and a conversation, which end before a stop string or as in transformers."""
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "B"},
    ]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "The"}) + "\n" + json.dumps({"messages": talk}) + "\n")
    form = "<bos>{0}user\nHi{1}{0}model\nYes?{1}{0}user\nB{1}{0}model\n".format("<start_of_turn>", "<end_of_turn>\n")
    expected = [transformers_text(checkpoint, text, 30) for text in ("<bos>The", form)]
    stop = expected[0][40:44]
    assert stop not in expected[1]
    files = "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out.jsonl"
    command("--checkpoint", checkpoint, *files, "--max-new-tokens", 30, "--stop", stop)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in found] == [expected[0][: expected[0].index(stop)], expected[1]]
    assert [line["reason"] for line in found] == ["stop", "length"]


def test_command_gives_several_samples(checkpoint, command):
    # As many slots and as long a context as the file of prompts above has, whose compiled programs serve.
    settings = "--samples", 2, "--temperature", 1, "--max-new-tokens", 50, "--stop", "\0"
    text, _ = command("--checkpoint", checkpoint, "--prompt", "The", *settings)
    first, second = re.fullmatch(r"\[1.1\] The\n(.*)\n\n\[1.2\] The\n(.*)\n\n", text, re.DOTALL).groups()
    assert first != second


def write_generation(folder: Path, checkpoint: Path, **settings) -> Path:
    """A copy of a checkpoint with another generation_config.json."""
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_command_ends_with_any_eos_token_of_the_checkpoint(checkpoint, command, tmp_path):
    """With the first of a list that comes, as in transformers; how to draw is suggested and not done."""
    whole = transformers_text(checkpoint, "<bos>The", 40)
    ids = load_tokenizer(checkpoint)(whole, add_special_tokens=False)["input_ids"]
    drawing = dict(do_sample=True, temperature=0.7, top_k=64, top_p=0.95)
    folder = write_generation(tmp_path / "hf", checkpoint, eos_token_id=[1, ids[20], ids[12]], **drawing)
    text, said = command("--checkpoint", folder, "--prompt", "The", "--max-new-tokens", 40)
    assert text == transformers_text(folder, "<bos>The", 40) + "\n"
    assert 0 < len(text) < len(whole) / 2
    ending, suggestion, _ = said.splitlines()[-3:]
    assert all(f"({token})" in ending for token in (1, ids[20], ids[12]))
    assert suggestion == (
        "the most likely tokens are taken; the checkpoint suggests drawing them (do_sample), with --temperature 0.7 "
        "--top_k 64 --top_p 0.95"
    )
    configure(tie_word_embeddings=False)(folder)
    _, said = command("--checkpoint", folder, "--prompt", "The", "--max-new-tokens", 40, "--temperature", 0.7)
    assert "suggests" not in said
    assert "note: its config unties the output matrix, which is the embedding all the same\n" in said


INSTRUCT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end_of_turn>\n{% endfor %}"


@pytest.mark.parametrize(
    ("config", "generation", "template", "chat", "expected"),
    [
        (1, None, INSTRUCT, False, {1}),
        (1, None, INSTRUCT, True, {1, 5}),
        (7, [8, 9], INSTRUCT, True, {1, 5, 7, 8, 9}),
        ([7, 6], 8, INSTRUCT, False, {1, 6, 7, 8}),
        (None, None, INSTRUCT.replace("<end_of_turn>", "<unk>"), True, {1, 3}),
        (None, None, INSTRUCT.replace("<end_of_turn>", ""), True, {1}),
        (None, None, "{{ raise_exception('no') }}", True, {1}),
        (None, None, "{{ bos_token }}", True, {1}),
    ],
)
def test_tokens_that_end_a_text(tmp_path, config, generation, template, chat, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = load_tokenizer(ASSETS)
    tokenizer.chat_template = template
    found = Checkpoint(
        format="huggingface", path=tmp_path, hf={"eos_token_id": config}, generation=tmp_path / "generation_config.json"
    )
    assert stop_tokens(found, tokenizer, chat=chat) == expected


def test_an_eos_token_id_that_is_none_is_an_error(checkpoint, command, tmp_path):
    folder = write_generation(tmp_path / "hf", checkpoint, eos_token_id=[1, "<eos>"])
    with pytest.raises(
        SystemExit, match=r"error: .*generation_config.json: eos_token_id is \[1, '<eos>'\]; it must be"
    ):
        command("--checkpoint", folder, "--prompt", "The")


def test_command_adds_an_adapter(checkpoint, command, tmp_path, monkeypatch):
    """A DoRA adapter on a prompt from standard input: merged here, beside the weights in peft."""
    whole = transformers.Gemma2ForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(whole, config).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("The"))
    text, _ = command("--checkpoint", checkpoint, "--adapter", tmp_path, "--max-new-tokens", 40)
    assert text == transformers_text(checkpoint, "<bos>The", 40, tmp_path) + "\n"
    assert text != transformers_text(checkpoint, "<bos>The", 40) + "\n"


def test_the_devices_that_are_asked_for(checkpoint):
    def load(**sizes):
        source = Source(checkpoint=str(checkpoint), **sizes)
        return load_source(source, open_source(source)[0])

    spread = load(data=2, tensor=2)
    assert spread.place == "4 x cpu; mesh data 2 x tensor 2"
    assert {len(w.sharding.device_set) for w in jax.tree.leaves(spread.weights)} == {4}
    with pytest.raises(ValueError, match="tensor 2 x data 8 are 16 devices, and this process has 8"):
        load(data=8, tensor=2)
    with pytest.raises(ValueError, match="tensor 8 does not divide the"):
        load(tensor=8)
    with pytest.raises(ValueError, match="data is 0; it must be at least 1"):
        Source(checkpoint="x", data=0)


def test_command_ends_with_a_sentence(checkpoint, command):
    with pytest.raises(SystemExit, match="error: the prompt has 2 tokens, with 600 new ones 602"):
        command("--checkpoint", checkpoint, "--prompt", "The", "--max-new-tokens", 600)


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from gemma2_jax import chat, generate; "
        "sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
