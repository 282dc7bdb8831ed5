"""Generation against transformers' `generate`, token for token; sampling against its distributions; the command."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import chain
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

from gemma2_jax import generate, mesh as meshes
from gemma2_jax.config import MeshConfig
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats.table import from_hf
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.inference import generator as generators
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.generator import CHUNK, Generator
from gemma2_jax.inference.sampling import Sampling, filter_logits, sample_tokens
from gemma2_jax.inference.text import TextStream, encode_prompt
from gemma2_jax.model import gemma2 as model
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import GEMMA2_TINY

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
CONFIGS = {name: replace(config, max_length=128) for name, config in BITING.items()}
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
def generator(name: str) -> Generator:
    return Generator(graph_of(name), weights_of(name))


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


def concatenate_chunks(chunks: list[list[list[int]]]) -> list[list[int]]:
    return [list(chain(*rows)) for rows in zip(*chunks, strict=True)]


@pytest.mark.parametrize("name", ["2b", "27b", pytest.param("9b", marks=pytest.mark.exhaustive)])
def test_greedy_equals_transformers(name):
    """From within the first window to far beyond it."""
    prompts = prompts_of(name, 5)
    expected = transformers_tokens(name, prompts)
    assert len(set(expected[0])) > 30
    assert generator(name).generate(prompts, max_new_tokens=NEW) == expected


def test_unequal_prompts_equal_transformers():
    """Shorter than the window of 8, as long, longer, and much longer."""
    prompts = prompts_of("27b", 1, 7, 8, 9, 20, 33)
    assert generator("27b").generate(prompts, max_new_tokens=NEW) == transformers_tokens("27b", prompts)


@jax.jit(static_argnums=(0, 2))
def logits_of(graph, weights, method, *inputs):
    """Logits of the hidden states that a method of the model gives, and its cache if it gives one."""
    whole = nnx.merge(graph, weights)
    found = method(whole, *inputs)
    hidden, cache = found if isinstance(found, tuple) else (found, None)
    return whole.logits(hidden), cache


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_a_forward_pass(name):
    """After prompts of 3 and 20 tokens, the second more than two windows long, a token at a time."""
    config, lengths = BITING[name], np.array([3, 20])
    whole = model.rebuild_model(graph_of(name), from_hf(state_dict(hf_model(config)), config))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 40))
    positions = np.broadcast_to(np.arange(40), tokens.shape)
    expected, _ = logits_of(*nnx.split(whole), Gemma2.hidden_states, tokens, positions, np.ones_like(tokens))
    graph, weights = nnx.split(model.unstack_layers(whole))
    logits, cache = logits_of(graph, weights, partial(Gemma2.prefill, slots=48), tokens[:, :20], lengths)
    rows = [[new[:length]] for new, length in zip(logits, lengths, strict=True)]
    for position in lengths + np.arange(20)[:, None]:
        new, cache = logits_of(graph, weights, Gemma2.decode_step, tokens[[0, 1], position], position, cache)
        rows = [[*row, logits[None]] for row, logits in zip(rows, new, strict=True)]
    for row, logits, length in zip(rows, expected, lengths, strict=True):
        # Logits reach 20. Against float64 arithmetic the cache is off by at most 1.7e-5, the whole pass by 2.6e-5.
        np.testing.assert_allclose(np.concatenate(row), logits[: length + 20], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
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
    made = generator("27b")
    tokens, lengths = np.full((2, 32), 5, np.int32), np.array([3, 20], np.int32)
    state, _ = generators._prefill(made.graph, made.weights, tokens, lengths, np.array([], np.int32), {}, slots=48)
    assert [k.shape for k, _ in state.cache] == [(2, 4, 8, 8), (2, 4, 48, 8)]


def test_blocks_apart_are_the_same_model():
    tokens = np.array(prompts_of("27b", 20))
    whole = model.rebuild_model(graph_of("27b"), weights_of("27b"))
    inputs = tokens, np.arange(20)[None], np.ones_like(tokens)
    expected, _ = logits_of(*nnx.split(whole), Gemma2.hidden_states, *inputs)
    found, _ = logits_of(*nnx.split(model.unstack_layers(whole)), Gemma2.hidden_states, *inputs)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


LOGITS = np.random.default_rng(0).normal(0, 3, (4, 500)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (40, None), (900, None), (None, 0.3),
                                              (None, 0.95), (None, 1.0), (7, 0.8), (200, 0.99), (1, 0.01)])  # fmt: skip
def test_distributions_are_those_of_transformers(temperature, top_k, top_p):
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    no_tokens = torch.zeros((4, 1), dtype=torch.int64)
    expected = warpers(no_tokens, torch.tensor(LOGITS)).softmax(-1).numpy()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = jax.nn.softmax(filter_logits(jnp.asarray(LOGITS), sampling.settings), axis=-1)
    np.testing.assert_array_equal(np.asarray(found) > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_draws_have_their_distribution():
    """Twenty thousand rows of the same logits, drawn at once: counts lie within five standard deviations."""
    rows, logits = 20_000, jnp.asarray(LOGITS[0, :20])
    settings = Sampling(temperature=1.3, top_k=12, top_p=0.9, seed=3).settings
    probability = np.asarray(jax.nn.softmax(filter_logits(logits[None], settings)[0]))
    drawn = sample_tokens(jnp.broadcast_to(logits, (rows, 20)), jnp.full(rows, 7), settings)
    counts = np.bincount(drawn, minlength=20)
    assert 5 < np.count_nonzero(probability) < 12
    assert (counts[probability == 0] == 0).all()
    spread = np.sqrt(rows * probability * (1 - probability))
    assert (abs(counts - rows * probability) <= 5 * spread).all()


def test_seeds_decide_the_draws():
    """A row draws the same whatever stands in the others; other rows and other seeds draw differently."""
    prompt, other = prompts_of("27b", 5, 9)
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=1)
    draw = partial(generator("27b").generate, max_new_tokens=30)
    both = draw([prompt, prompt], sampling=sampling)
    assert both[0] != both[1]
    assert both == draw([prompt, prompt], sampling=sampling)
    assert both[0] == draw([prompt, other], sampling=sampling)[0] == draw([prompt], sampling=sampling)[0]
    assert both != draw([prompt, prompt], sampling=replace(sampling, seed=2))


def test_stream_is_the_whole_in_pieces():
    prompts = prompts_of("27b", 5, 9)
    chunks = list(generator("27b").stream(prompts, max_new_tokens=NEW))
    assert [len(row) for row, _ in chunks] == [1, CHUNK, CHUNK, CHUNK, NEW - 1 - 3 * CHUNK]
    whole = generator("27b").generate(prompts, max_new_tokens=NEW)
    assert concatenate_chunks(chunks) == whole


def test_rows_end_with_a_stop_token():
    """Each at its own place, with the stop as its last token; the rest is padding, and nothing is left to do."""
    prompts = prompts_of("27b", 5, 9)
    whole = generator("27b").generate(prompts, max_new_tokens=NEW)
    stop = {whole[0][20], whole[1][2]}
    expected = [row[: 1 + min(row.index(token) for token in stop & set(row))] for row in whole]
    assert 3 <= len(expected[1]) < len(expected[0]) <= 21
    chunks = list(generator("27b").stream(prompts, max_new_tokens=NEW, stop=stop))
    assert concatenate_chunks(chunks) == expected
    assert len(chunks) == 1 + -(-(len(expected[0]) - 1) // CHUNK)
    first = {whole[0][0], whole[1][0]}
    assert generator("27b").generate(prompts, max_new_tokens=NEW, stop=first) == [row[:1] for row in whole]


def test_stopped_rows_are_padded():
    state, (tokens, counts, finished) = run_chunk("27b", rows=3, stopped=[True, False, False])
    assert counts.tolist() == [0, CHUNK, CHUNK] and not finished
    assert (tokens[0] == generators.PAD).all() and len(set(tokens[1].tolist())) > 5
    assert state.stopped_B.tolist() == [True, False, False]


def run_chunk(name: str, rows: int, stopped: list[bool], compiled_only: bool = False):
    """One chunk from prompts of one token; or its program."""
    made, none = generator(name), np.array([], np.int32)
    tokens, lengths = np.full((rows, 32), 5, np.int32), np.ones(rows, np.int32)
    state, _ = generators._prefill(made.graph, made.weights, tokens, lengths, none, {}, slots=48)
    state = replace(state, stopped_B=jnp.array(stopped))
    if compiled_only:
        return generators._decode.lower(made.graph, made.weights, state, CHUNK, none, {}).compile()
    return generators._decode(made.graph, made.weights, state, CHUNK, none, {})


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_do_not_copy_the_cache(rows):
    """In the compiled chunk the cache is changed where it lies: 48 slots for each of 4 heads."""
    program = run_chunk("27b", rows, [False] * rows, compiled_only=True).as_text()
    cached = f"f32[{rows},4,48,8]"
    assert cached in program
    assert not [line for line in program.splitlines() if cached in line and " copy(" in line]


def test_weights_are_cast_once_and_norms_are_not():
    weights = weights_of("27b")
    made = Generator(graph_of("27b", "bfloat16"), weights)
    assert not weights
    dtypes = {jax.tree_util.keystr(path): w.dtype for path, w in jax.tree.leaves_with_path(made.weights)}
    assert {dtype for path, dtype in dtypes.items() if "norm" in path} == {jnp.dtype("float32")}
    assert {dtype for path, dtype in dtypes.items() if "norm" not in path} == {jnp.dtype("bfloat16")}
    (found,) = made.generate(prompts_of("27b", 5), max_new_tokens=8)
    assert len(found) == 8


def test_a_mesh_gives_the_same_tokens():
    """Rows over data x fsdp, heads and vocabulary over tensor."""
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    prompts = prompts_of("27b", 5, 9, 12, 3)
    letters = model.weight_dims(model.rebuild_model(graph_of("27b"), weights_of("27b")))
    with jax.set_mesh(mesh):
        placed = {
            path: jax.device_put(w, meshes.stored_sharding(mesh, letters[path], w.shape))
            for path, w in weights_of("27b").items()
        }
        spread = Generator(graph_of("27b"), placed)
        found = spread.generate(prompts, max_new_tokens=20)
    assert {len(w.sharding.device_set) for w in jax.tree.leaves(spread.weights)} == {8}
    assert spread.weights["blocks"][0]["attn"]["q"]["w"].addressable_shards[0].data.shape == (20, 4, 8)
    assert found == generator("27b").generate(prompts, max_new_tokens=20)


def test_lengths_are_rounded_up_to_few():
    assert [generators.bucket_length(n) for n in (1, 32, 33, 48, 49, 65, 320, 6145, 8192)] == [
        32, 32, 48, 48, 64, 96, 384, 8192, 8192
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[5], [7] * 100], 40, "prompt 2 has 100 tokens, with 40 new ones 140, and the model's context is 128"),
        ([[5], []], 4, "prompt 2 is empty"),
        ([[5, 384]], 4, "tokens from 5 to 384, and the model's are 0 to 383"),
        ([], 4, "no prompts"),
        ([[5]], 0, "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_generated_says_why(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generator("27b").stream(prompts, max_new_tokens=new)


def test_a_full_context_can_be_generated():
    (found,) = generator("27b").generate(prompts_of("27b", 100), max_new_tokens=28)
    assert len(found) == 28


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-300),
        ("top_k", 0),
        ("top_k", 10**11),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", 10**20),
        ("seed", -1),
    ],
)
def test_bad_sampling_says_which(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})


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
    text = TextStream(tokenizer)
    pieces = [text.add([token]) for token in tokenizer(written, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text.whole == written
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces
    half = tokenizer("日", add_special_tokens=False)["input_ids"][:-1]
    assert (text.add(half), text.flush(), text.flush()) == ("", "\ufffd", "")


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
    text, speed = command("--checkpoint", checkpoint, "--prompt", "The", "--max-new-tokens", 40)
    assert text == transformers_text(checkpoint, "<bos>The", 40) + "\n"
    assert len(text) > 80
    assert re.fullmatch(
        r"a text ends with <eos> \(1\), or after 40 tokens\n"
        r"prefill 2 tokens at [\d,]+ tokens/s; decode 39 tokens at [\d,]+ tokens/s; compiled in [\d.]+ s\n",
        speed,
    )


def test_command_chats_with_several(checkpoint, command):
    asked = ["What does json.dumps do?", "Hi"]
    text, _ = command(
        "--checkpoint", checkpoint, "--chat", "--max-new-tokens", 30, *(x for a in asked for x in ("--prompt", a))
    )
    form = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    answers = [transformers_text(checkpoint, form.format(prompt), 30) for prompt in asked]
    assert text == f"[1] {asked[0]}\n{answers[0]}\n\n[2] {asked[1]}\n{answers[1]}\n\n"


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


def test_command_ends_with_a_sentence(checkpoint, command):
    with pytest.raises(SystemExit, match="error: prompt 1 has 2 tokens, with 600 new ones 602"):
        command("--checkpoint", checkpoint, "--prompt", "The", "--max-new-tokens", 600)


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from gemma2_jax import generate; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
