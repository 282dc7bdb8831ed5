"""The model against transformers with eager attention: logits, loss, gradients, padding, packing, bfloat16."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peers import BITING, hf_model, rows_of, state_dict, training_gradients

from gemma2_jax.convert.formats.table import from_hf, to_hf
from gemma2_jax.model import gemma2 as model
from gemma2_jax.model.attention import xla as attention
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2, Weights
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_27B, AdapterConfig, ModelConfig

pytestmark = pytest.mark.usefixtures("optimized")


def build(config: ModelConfig, dtype: str = "float32"):
    def create() -> Gemma2:
        return Gemma2(config, attention=IMPLEMENTATIONS["xla"], dtype=dtype, rngs=nnx.Rngs(0))

    return nnx.graphdef(nnx.eval_shape(create))


def weights_of(peer, config: ModelConfig) -> Weights:
    return {path: jnp.asarray(w) for path, w in from_hf(state_dict(peer), config).items()}


@jax.jit(static_argnums=0)
def logits_of(graph, weights, tokens, positions, segments):
    ours = model.rebuild_model(graph, weights)
    return ours(tokens, positions, segments)


def scores_of(peer, tokens):
    """Largest attention score before the cap, in any layer, of the peer's forward pass."""
    seen = []

    def record(module, _, kwargs, __):
        x = kwargs["hidden_states"]
        q, k = (proj(x).unflatten(-1, (-1, module.head_dim)) for proj in (module.q_proj, module.k_proj))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        seen.append((torch.einsum("btnh,bsnh->bnts", q, k) * module.scaling).abs().max().item())

    hooks = [layer.self_attn.register_forward_hook(record, with_kwargs=True) for layer in peer.model.layers]
    with torch.no_grad():
        peer(torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    return max(seen)


@pytest.mark.parametrize("name", BITING)
def test_logits_equal_transformers(name):
    config = BITING[name]
    peer = hf_model(config)
    tokens, positions, segments = rows_of(config)
    assert scores_of(peer, tokens) > config.attn_softcap, "the cap of attention does not bite"
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.7 * config.final_softcap, "the cap of logits does not bite"
    got = logits_of(build(config), weights_of(peer, config), tokens, positions, segments)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", ["window", "attn_softcap", "final_softcap", "query_pre_attn_scalar", "norm_eps"])
def test_every_trait_matters(change):
    """The configs bite: a model that got one trait wrong would not pass the test above."""
    config = BITING["2b"]
    peer = hf_model(config)
    wrong = replace(
        config,
        **{
            change: {"window": 9, "attn_softcap": None, "final_softcap": None, "query_pre_attn_scalar": 17.0}.get(
                change, 1e-2
            )
        },
    )
    tokens, positions, segments = rows_of(config)
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    got = logits_of(build(wrong), weights_of(peer, config), tokens, positions, segments)
    assert np.abs(got - expected).max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side):
    config = BITING["9b"]
    peer = hf_model(config)
    tokens, positions, segments = (np.array(x) for x in rows_of(config, batch=3))
    for row, padding in enumerate((0, 5, 13)):
        gap = np.s_[:padding] if side == "left" else np.s_[tokens.shape[1] - padding :]
        tokens[row, gap], segments[row, gap] = 0, 0
        positions[row] = np.maximum(np.cumsum(segments[row]) - 1, 0)
    with torch.no_grad():
        expected = peer(torch.tensor(tokens), attention_mask=torch.tensor(segments)).logits.numpy()
    got = logits_of(build(config), weights_of(peer, config), tokens, positions, segments)
    real = segments == 1
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BITING)
def test_loss_and_gradients_equal_transformers(name):
    config = BITING[name]
    peer = hf_model(config)
    tokens, positions, segments = rows_of(config)
    labels = torch.tensor(tokens)
    labels[:, :4] = -100
    loss = peer(torch.tensor(tokens), labels=labels).loss
    loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    targets, counted = np.roll(tokens, -1, axis=1), (np.roll(labels.numpy(), -1, axis=1) >= 0).astype(np.float32)
    counted[:, -1] = 0
    got_loss, gradients = training_gradients(
        config, AdapterConfig(), weights_of(peer, config), tokens, positions, segments, targets, counted
    )
    np.testing.assert_allclose(got_loss, loss.item(), rtol=1e-5)
    got = to_hf(jax.device_get(gradients), config)
    assert got.keys() == expected.keys()
    for path, gradient in expected.items():
        assert np.linalg.norm(gradient) > 0, path
        error = np.linalg.norm(got[path] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-4, f"{path}: relative L2 error {error:.2e}"


def test_packed_documents_equal_the_same_documents_apart():
    config = BITING["2b"]
    weights = weights_of(hf_model(config), config)
    tokens, _, _ = rows_of(config, batch=1, length=40)
    lengths = [17, 1, 14, 8]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    packed = np.asarray(logits_of(build(config), weights, tokens, positions, segments))[0]
    start = 0
    for n in lengths:
        document = tokens[:, start : start + n]
        alone = logits_of(build(config), weights, document, np.arange(n)[None], np.ones_like(document))
        np.testing.assert_allclose(packed[start : start + n], alone[0], atol=2e-5, rtol=0)
        start += n


@pytest.mark.parametrize("name", BITING)
def test_bfloat16_is_within_the_error_of_torch(name):
    """Our bf16 logits are as near to the f32 ones as torch's bf16 logits are."""
    config = BITING[name]
    # Milder scores: where the softmax is a hard choice, one rounding flips it in either program.
    peer = hf_model(config, gain=0.3).to(torch.bfloat16)
    weights = {path: w.astype(jnp.bfloat16) for path, w in weights_of(peer, config).items()}
    tokens, positions, segments = rows_of(config, batch=8)
    with torch.no_grad():
        peer_logits = peer(torch.tensor(tokens)).logits.float().numpy()
        exact = peer.float()(torch.tensor(tokens)).logits.numpy()
    ours = logits_of(build(config, "bfloat16"), weights, tokens, positions, segments)
    error, allowed = (np.sqrt(np.mean((x - exact) ** 2)) for x in (np.asarray(ours), peer_logits))
    assert error <= allowed, f"ours {error:.3e}, torch's {allowed:.3e}"


@pytest.mark.parametrize("real", [GEMMA2_2B, pytest.param(GEMMA2_27B, marks=pytest.mark.exhaustive)], ids=["2b", "27b"])
def test_logits_at_the_real_widths(real):
    """Two layers and a cut vocabulary; everything else is the real model."""
    config = replace(real, layers=2, vocab_size=512)
    torch.manual_seed(0)
    peer = hf_model(config)
    tokens, positions, segments = rows_of(config, batch=1, length=12)
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    got = logits_of(build(config), weights_of(peer, config), tokens, positions, segments)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_window_boundary():
    """One-hot values show exactly which keys a query sees: the last W, itself included."""
    T, W = 11, 4
    q = k = jnp.ones((1, T, 1, T))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (1, T, 1, T))
    out = attention.attend(q, k, v, jnp.ones((1, T), jnp.int32), W, scale=1.0, softcap=50.0)
    seen = np.asarray(out[0, :, 0] > 0).astype(int)
    assert seen[2].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert seen[3].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert seen[4].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert seen[10].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert GEMMA2_27B.layer_windows(8192)[:3] == [4096, 8192, 4096]
    assert GEMMA2_2B.layer_windows(100)[:2] == [100, 100]


@pytest.mark.parametrize("T", [64, pytest.param(128, marks=pytest.mark.exhaustive), 300])
def test_blocked_attention_equals_unblocked(T):
    """Queries in blocks, the last of them short, against one block; forward and backward."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (2 * jax.random.normal(key, (2, T, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=False))
    cotangent = jax.random.normal(keys[3], q.shape)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, T)), axis=1))
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    mask = (distance >= 0) & (distance < 70) & (segments[:, :, None] == segments[:, None])

    def blocked(q, k, v):
        return attention.attend(q, k, v, segments, 70, scale=0.5, softcap=5.0, block=64)

    def whole(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))  # two queries share each head
        scores = 5.0 * jnp.tanh(jnp.einsum("BTNH,BSNH->BNTS", q, k) * 0.5 / 5.0)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v)

    def differentiate(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(cotangent)

    for got, expected in zip(*(jax.jit(partial(differentiate, f))() for f in (blocked, whole)), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_attention_holds_no_square_of_scores():
    """At 8192 tokens no array as large as [T, T] exists, forward or backward."""
    T = 8192
    shapes = [(1, T, 2, 16), (1, T, 1, 16), (1, T, 1, 16)]

    def loss(q, k, v):
        segments = jnp.ones((1, T), jnp.int32)
        return attention.attend(q, k, v, segments, 4096, scale=0.25, softcap=50.0).sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    memory = step.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * T * T * 4 / 2, "of two heads' f32 scores, half would already be too much"


EQUATIONS = ("BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,DR->BTR", "BTR,RNH->BTNH")


@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_equal_einsum(equation):
    sizes = dict(B=2, T=16, D=12, N=3, H=4, F=20, R=2)
    inputs, weight, _ = equation.replace("->", ",").split(",")
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (
        jax.random.normal(k, [sizes[c] for c in letters]) for k, letters in zip(keys, (inputs, weight), strict=True)
    )

    def differentiate(product, x, w):
        out, pull = jax.vjp(partial(product, equation), x, w)
        return out, *pull(jnp.cos(out))

    products = model.apply_weight, partial(jnp.einsum, precision="highest")
    for got, expected in zip(*(jax.jit(partial(differentiate, f))(x, w) for f in products), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["BTF,FR->BTR", "BTR,RF->BTF"])
def test_products_transpose_no_large_operand(equation):
    """Compiled for CPU, the gradient of an adapter makes no copy of the activations."""
    B, T, F, R = 4, 64, 96, 8
    x, w = ((B, T, F), (F, R)) if equation.startswith("BTF") else ((B, T, R), (R, F))
    gradients = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(model.apply_weight(equation, jnp.exp(x), w)))))
    text = gradients.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (w, x))).compile().as_text()
    assert f"f32[{B * T},{F}]" in text
    assert f"f32[{F},{B * T}]" not in text
