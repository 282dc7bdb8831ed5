"""The chunked loss against the plain one, and what it does not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import OptimConfig
from gemma2_jax.model.loss import OutputMatrix, cross_entropy, grouped_cross_entropy
from gemma2_jax.training.optim import make_optimizer, make_schedule

B, T, D, V = 2, 37, 16, 50


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, embedding = 3 * jax.random.normal(keys[0], (B, T, D)), 3 * jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return hidden, embedding, targets, jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 3 > 0)


def plain(hidden, embedding, targets, weights, softcap):
    logits = hidden @ embedding.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.sum(nll * weights)


@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
def test_equals_the_plain_loss(problem, chunk, softcap):
    """Chunks that divide the row and that do not; loss and both gradients."""
    hidden, embedding, *rest = problem
    expected = jax.value_and_grad(plain, (0, 1))(hidden, embedding, *rest, softcap)

    def chunked(hidden, embedding):
        return cross_entropy(hidden, OutputMatrix(embedding), *rest, softcap=softcap, chunk=chunk)

    got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, embedding)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(hidden, embedding), expected[0], rtol=1e-6)


@pytest.mark.parametrize("softcap", [30.0, None])
def test_rows_take_the_place_of_the_embedding_s(problem, softcap):
    """The loss of the embedding with these rows in it, and its gradients: none of the rows that they replace."""
    hidden, embedding, *rest = problem
    tokens = jnp.asarray([49, 3, int(rest[0][0, 1])])
    rows = 3 * jax.random.normal(jax.random.key(1), (3, D))

    def replaced(hidden, embedding, rows):
        return plain(hidden, embedding.at[tokens].set(rows), *rest, softcap)

    def chunked(hidden, embedding, rows):
        return cross_entropy(hidden, OutputMatrix(embedding, rows, tokens), *rest, softcap=softcap, chunk=8)

    expected = jax.value_and_grad(replaced, (0, 1, 2))(hidden, embedding, rows)
    got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(hidden, embedding, rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.any(got[1][1][tokens])
    assert products(jax.grad(chunked, (0, 2)), hidden, embedding, rows) == 2 + 3


def test_gradients_scale_with_what_comes_from_above(problem):
    hidden, embedding, *rest = problem

    def halved(hidden, embedding):
        return 0.5 * cross_entropy(hidden, OutputMatrix(embedding), *rest, softcap=30.0, chunk=8)

    expected = jax.grad(lambda h, e: 0.5 * plain(h, e, *rest, 30.0), (0, 1))(hidden, embedding)
    for a, b in zip(jax.grad(halved, (0, 1))(hidden, embedding), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_losses_by_group_of_rows(problem):
    """Each group's is that of its rows alone; the total and its gradients are those without groups, to the last bit."""
    hidden, embedding, targets, weights = problem
    groups = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])

    def grouped(hidden, embedding, groups):
        return grouped_cross_entropy(hidden, OutputMatrix(embedding), targets, weights, groups, softcap=30.0, chunk=8)

    step = jax.value_and_grad(grouped, (0, 1), has_aux=True)
    (total, parts), gradients = step(hidden, embedding, groups)
    expected = [plain(hidden, embedding, targets, weights * rows[:, None], 30.0) for rows in groups.T]
    np.testing.assert_allclose(parts, expected, rtol=1e-5)
    (alone, nothing), same = step(hidden, embedding, None)
    assert nothing is None
    for a, b in zip(jax.tree.leaves((total, gradients)), jax.tree.leaves((alone, same)), strict=True):
        np.testing.assert_array_equal(a, b)


def products(function, *arguments) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_three_matrix_products_and_two_for_a_frozen_embedding(problem):
    hidden, embedding, *rest = problem

    def loss(hidden, embedding):
        return cross_entropy(hidden, OutputMatrix(embedding), *rest, softcap=30.0, chunk=8)

    assert products(loss, hidden, embedding) == 1
    assert products(jax.grad(loss, 0), hidden, embedding) == 2
    assert products(jax.grad(loss, (0, 1)), hidden, embedding) == 3


def test_logits_never_exist_all_at_once():
    """The step's temporaries are far below the logits of the sequence."""
    T, V = 4096, 32768

    def loss(hidden, embedding, targets, weights):
        return cross_entropy(hidden, OutputMatrix(embedding), targets, weights, softcap=30.0, chunk=64)

    shapes = [((1, T, 8), "float32"), ((V, 8), "float32"), ((1, T), "int32"), ((1, T), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * V * 4 / 8


def test_schedule():
    """Linear to the peak at the last warmup step, then a cosine that ends on the last step."""
    rate = make_schedule(OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4), steps=10)
    rates = [float(rate(taken)) for taken in range(12)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[6], 0.55, rtol=1e-6)  # halfway down
    np.testing.assert_allclose(rates[9:], [0.1, 0.1, 0.1], rtol=1e-6)
    constant = make_schedule(OptimConfig(lr=1.0, warmup_steps=0, decay_steps=20), steps=10)
    assert float(constant(0)) == pytest.approx(1.0, abs=0.01)
    assert float(make_schedule(OptimConfig(lr=1.0, warmup_steps=500), steps=3)(1)) == pytest.approx(1.0)


def test_decay_is_for_matrices_only():
    letters = {"embedding": "VD", "final_norm/w": "D", "blocks/attn/q/adapter/m": "LNH", "blocks/mlp/up/w": "LDF"}
    params = {path: jnp.ones((2,) * len(dims)) for path, dims in letters.items()}
    chain = make_optimizer(OptimConfig(lr=1.0, weight_decay=0.5, warmup_steps=0), 10, letters)
    updates, _ = chain.update({path: jnp.zeros_like(w) for path, w in params.items()}, chain.init(params), params)
    decayed = {path for path, update in updates.items() if float(jnp.abs(update).max()) > 0}
    assert decayed == {"embedding", "blocks/mlp/up/w"}
