"""Adapters added after the post-norm, as Megatron-Bridge trains them, against its formula written out in numpy."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx
from peers import BITING, hf_model, state_dict, training_gradients

from gemma2_jax import config as configs, config_text, recipes
from gemma2_jax.config import MeshConfig
from gemma2_jax.convert import __main__ as command
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats.table import from_hf
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.inference.loaded import load_decoder
from gemma2_jax.inference.source import Source, open_source
from gemma2_jax.model import gemma2 as model, lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import AdapterConfig, ModelConfig
from gemma2_jax.training import resume
from gemma2_jax.training.checkpoint import Checkpoints

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
CONFIG = replace(BITING["27b"], attn_softcap=5.0, final_softcap=5.0)  # 8 heads of 8, width 40, window 8
ADAPTERS = {kind: AdapterConfig(kind=kind, rank=4, alpha=8.0, after_norm=True) for kind in ("lora", "dora")}
TOKENS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 28))
EVERYWHERE = np.broadcast_to(np.arange(28), TOKENS.shape), np.ones_like(TOKENS)  # positions, segments


@cache
def weights_of(kind: str) -> dict[str, np.ndarray]:
    """Random weights that bite, those of norms and of every B among them; float32, by path."""
    ours = nnx.eval_shape(partial(create, ADAPTERS[kind]))
    rng = np.random.default_rng(1)
    found = from_hf(state_dict(hf_model(CONFIG)), CONFIG)
    for path, shape in model.flatten_state(nnx.state(ours)).items():
        if path not in found:
            noise = rng.normal(0, {"a": 0.1, "b": 0.2, "m": 0.3}[path[-1]], shape.shape)
            found[path] = (noise + (path[-1] == "m")).astype(np.float32)
    return found


def create(adapter: AdapterConfig) -> Gemma2:
    ours = Gemma2(CONFIG, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=nnx.Rngs(0))
    lora.attach_adapters(ours, adapter, rngs=nnx.Rngs(1))
    return ours


def model_of(adapter: AdapterConfig) -> Gemma2:
    graph = nnx.graphdef(nnx.eval_shape(partial(create, adapter)))
    return model.rebuild_model(graph, {path: jnp.asarray(w) for path, w in weights_of(adapter.kind).items()})


def norms(weights, scale: float) -> dict[str, np.ndarray]:
    """Of every adapted projection, |W + scale A B| over its inputs: [L, out]."""
    found = {}
    for path, a in weights.items():
        if path.endswith("/adapter/a"):
            name, rank = path.removesuffix("/adapter/a"), a.shape[-1]
            A, B = a.reshape(len(a), -1, rank), weights[f"{name}/adapter/b"].reshape(len(a), rank, -1)
            found[name] = np.linalg.norm(weights[f"{name}/w"].reshape(len(a), A.shape[1], -1) + scale * A @ B, axis=1)
    return found


def reference(config: ModelConfig, adapter: AdapterConfig, weights, tokens, fixed=None) -> np.ndarray:
    """Logits [B, T, V], float64; `fixed` stands in for the norms of DoRA, which are constants to the gradient."""
    weights = {path: w.astype(np.float64) for path, w in weights.items()}
    fixed = fixed or norms(weights, adapter.scale)

    def norm(path: str, layer, x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * (1 + weights[path][layer])

    def project(name: str, layer: int, x, post: Callable = lambda y: y):
        at = f"blocks/{name}"
        W, A = (weights[f"{at}/{part}"][layer].reshape(x.shape[-1], -1) for part in ("w", "adapter/a"))
        added = adapter.scale * x @ A @ weights[f"{at}/adapter/b"][layer].reshape(A.shape[1], -1)
        share = 1.0
        if adapter.kind == "dora":
            share = weights[f"{at}/adapter/m"][layer].reshape(-1) / fixed[at][layer]
        return share * (post(x @ W) + added) if adapter.after_norm else post(share * (x @ W + added))

    B, T = tokens.shape
    H, groups = config.head_width, config.query_groups
    angle = np.arange(T)[:, None, None] * config.rope_theta ** (-np.arange(H // 2) / (H // 2))

    def turn(x):
        first, second = np.split(x.reshape(B, T, -1, H), 2, axis=-1)
        sine, cosine = np.sin(angle), np.cos(angle)
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)

    def cap(x, limit):
        return limit * np.tanh(x / limit)

    x = weights["embedding"][tokens] * config.width**0.5
    back = np.arange(T)[:, None] - np.arange(T)
    for layer, window in enumerate(config.layer_windows(T)):
        h = norm("blocks/pre_attn_norm/w", layer, x)
        q, k = turn(project("attn/q", layer, h)), turn(project("attn/k", layer, h)).repeat(groups, 2)
        v = project("attn/v", layer, h).reshape(B, T, -1, H).repeat(groups, 2)
        scores = cap(np.einsum("bqnh,bknh->bnqk", q, k) * config.query_pre_attn_scalar**-0.5, config.attn_softcap)
        chance = np.exp(np.where((back >= 0) & (back < window), scores, -np.inf))
        chance /= chance.sum(-1, keepdims=True)
        out = np.einsum("bnqk,bknh->bqnh", chance, v).reshape(B, T, -1)
        x = x + project("attn/o", layer, out, partial(norm, "blocks/post_attn_norm/w", layer))
        h = norm("blocks/pre_mlp_norm/w", layer, x)
        gate, up = project("mlp/gate", layer, h), project("mlp/up", layer, h)
        inner = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
        x = x + project("mlp/down", layer, inner, partial(norm, "blocks/post_mlp_norm/w", layer))
    return cap(norm("final_norm/w", ..., x) @ weights["embedding"].T, config.final_softcap)


@pytest.mark.parametrize(("kind", "after"), [("lora", True), ("dora", False)])
def test_logits_equal_the_formula(kind, after):
    adapter, other = (replace(ADAPTERS[kind], after_norm=choice) for choice in (after, not after))
    expected, elsewhere = (reference(CONFIG, choice, weights_of(kind), TOKENS) for choice in (adapter, other))
    logits = jax.jit(lambda ours: ours(TOKENS))(model_of(adapter))
    np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=0)
    assert np.abs(expected - elsewhere).max() > 0.1 * np.abs(expected).max()


def test_gradients_equal_slopes_of_the_formula():
    """A sharded step's, of adapters alone, against differences of the loss along a random direction for each."""
    adapter, weights = ADAPTERS["dora"], weights_of("dora")
    targets, counted = np.roll(TOKENS, -1, axis=1), np.ones(TOKENS.shape, np.float32)
    mesh = MeshConfig(data=1, stage=2, tensor=2)
    loss, gradients = training_gradients(CONFIG, adapter, weights, TOKENS, *EVERYWHERE, targets, counted, mesh=mesh)
    assert {*gradients} == {path for path in weights if "/adapter/" in path}
    fixed = norms({path: w.astype(np.float64) for path, w in weights.items()}, adapter.scale)

    def loss_of(changes) -> float:
        logits = reference(CONFIG, adapter, weights | changes, TOKENS, fixed)
        total = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return total.mean()

    np.testing.assert_allclose(loss, loss_of({}), rtol=1e-5)
    rng = np.random.default_rng(2)
    for path, gradient in gradients.items():
        step = 1e-4 * rng.standard_normal(gradient.shape)
        ends = [loss_of({path: weights[path] + sign * step}) for sign in (1, -1)]
        slope, expected = (np.asarray(gradient, np.float64) * step).sum(), (ends[0] - ends[1]) / 2
        least = 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(step) / step.size**0.5  # of a usual slope
        assert abs(slope - expected) < max(least, 1e-3 * abs(expected)), path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    """A model with an adapter as an Orbax folder, made of a run's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    base = folder / "base"
    hf_model(CONFIG).save_pretrained(base)
    train = configs.TrainConfig(sequence_length=8)
    config = recipes.finetune("x", CONFIG, str(base), "dora", adapter=ADAPTERS["dora"], train=train)
    trained_run(folder / "run", config, {p: w for p, w in weights_of("dora").items() if "/adapter/" in p})
    write_checkpoint(Job(source=open_checkpoint(folder / "run"), to="orbax"), folder / "orbax")
    return open_checkpoint(folder / "orbax")


def trained_run(folder: Path, config: configs.Config, params) -> None:
    """What training leaves of an adapter."""
    folder.mkdir()
    (folder / "config.txt").write_text(config_text.to_text(config))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, {p: jnp.asarray(w) for p, w in params.items()}, {"count": jnp.zeros(())}, {})


def test_generation_equals_the_formula(checkpoint):
    """Of a folder: a prompt of a window and a half, then a token at a time."""
    assert (checkpoint.format, checkpoint.adapter.unmergeable_targets) == ("orbax", ["attn/o", "mlp/down"])
    made = load_decoder(checkpoint)

    @partial(jax.jit, static_argnums=0)
    def logits_of(method, weights, *inputs):
        whole = nnx.merge(made.graph, weights)
        hidden, cache = method(whole, *inputs)
        return whole.logits(hidden), cache

    cache = nnx.merge(made.graph, made.weights).empty_cache(2, 32)
    logits, cache = logits_of(Gemma2.extend, made.weights, TOKENS[:, :12], np.zeros(2, int), np.full(2, 12), cache)
    rows = [*np.moveaxis(logits, 1, 0)]
    for position in range(12, 28):
        logits, cache = logits_of(Gemma2.decode_step, made.weights, TOKENS[:, position], np.full(2, position), cache)
        rows.append(logits)
    expected = reference(CONFIG, ADAPTERS["dora"], weights_of("dora"), TOKENS)
    np.testing.assert_allclose(np.stack(rows, 1), expected, atol=5e-5, rtol=0)


def test_what_cannot_be_merged_is_refused(checkpoint):
    ours = nnx.eval_shape(partial(create, ADAPTERS["dora"]))
    refused = r"adapter of attn/o and mlp/down cannot be merged: .*Keep the adapter as it is with --to orbax"
    with pytest.raises(ValueError, match=refused):
        lora.merge_adapters(ours)
    assert all(base.adapter for base in lora.projections(ours).values()), "some were merged"
    for choices in ({"to": "hf"}, {"to": "hf", "merge": True}, {"to": "orbax", "merge": True}):
        with pytest.raises(ValueError, match=refused):
            Job(source=checkpoint, **choices)
    config = recipes.finetune("x", CONFIG, str(checkpoint.path), "sft", train=configs.TrainConfig(sequence_length=8))
    with pytest.raises(ValueError, match=rf"give its model, {re.escape(checkpoint.base)}, as --init") as error:
        resume.open_source(config)
    assert "--merge" not in str(error.value)
    subset = replace(ADAPTERS["dora"], targets=("attn/[qkv]", "mlp/gate", "mlp/up"))
    nnx.eval_shape(lambda: lora.merge_adapters(create(subset)))
    Job(source=replace(checkpoint, adapter=subset), to="hf", merge=True)


def test_peft_is_told_nothing_and_the_user_is(checkpoint, tmp_path, capsys):
    for source, to in ((checkpoint.path, "peft"), (checkpoint.path, "orbax"), (tmp_path / "peft", "orbax")):
        target = tmp_path / (to if to == "peft" else f"{source.name}-again")
        command._convert(command.Convert(src=str(source), dst=target, to=to))
        said, warned = capsys.readouterr()
        after = source == checkpoint.path
        assert (
            "on attn/q, attn/k, attn/v, attn/o, mlp/gate, mlp/up, mlp/down (attn/o and mlp/down after" in said
        ) == after
        assert ("attn/o and mlp/down was trained to be added after the post-norm" in warned) == (to == "peft")
        if to == "peft":
            assert set(peft.LoraConfig.from_pretrained(target).target_modules) >= {"o_proj", "down_proj"}  # no warning
        else:
            assert open_checkpoint(target).adapter == replace(checkpoint.adapter, after_norm=after)


def test_the_command_says_why_a_step_is_slow(tmp_path, capsys):
    config = replace(recipes.load_recipe("tiny_lora"), init=str(ASSETS))
    config = replace(config, adapter=replace(config.adapter, after_norm=True, targets=("mlp/down",), rank=2))
    size = config.model
    shapes = {"a": (size.layers, size.mlp_width, 2), "b": (size.layers, 2, size.width)}
    params = {f"blocks/mlp/down/adapter/{part}": np.ones(shape, np.float32) for part, shape in shapes.items()}
    trained_run(tmp_path / "run", config, params)
    open_source(Source(checkpoint=str(tmp_path / "run")))
    assert capsys.readouterr().err.count("the adapter of mlp/down is added after the post-norm") == 1
