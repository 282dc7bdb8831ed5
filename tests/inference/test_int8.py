"""Weights in int8: tokens and scores of the model with its rounded weights in float32, and close to its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generate import CONFIGS, decoder, graph_of, prompts_of, weights_of

from gemma2_jax import mesh as meshes
from gemma2_jax.config import MeshConfig
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.model.gemma2 import Weights, flatten_state, rebuild_model
from gemma2_jax.model.int8 import quantize, summed_dims
from gemma2_jax.model.lora import attach_adapters, projections
from gemma2_jax.model_config import AdapterConfig


def rounded_weights() -> Weights:
    """Those of the 27B shape after int8 and back, stacked, by the definition."""
    weights = weights_of("27b")
    parts = projections(rebuild_model(graph_of("27b"), weights))
    summed = {f"blocks/{name}/w": [1 + dim for dim in summed_dims(part.equation)] for name, part in parts.items()}
    for path, dims in (summed | {"embedding": [1]}).items():
        w = np.asarray(weights[path])
        scale = np.abs(w).max(axis=tuple(dims), keepdims=True) / 127
        weights[path] = jnp.asarray(np.round(w / scale) * scale)
    return weights


def run_requests(made: Decoder, new: int = 30) -> list[Request]:
    requests = [
        Request(prompt=prompt, max_new_tokens=new, alternatives=0, echo=True) for prompt in prompts_of("27b", 40, 12)
    ]
    return list(Engine(made, slots=2, context=CONFIGS["27b"].max_length).run(requests))


def scores_of(request: Request) -> list[float]:
    return [score.value for score in request.prompt_scores + request.scores]


@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.exhaustive), dict(data=1, tensor=4, fsdp=2)])
def test_int8_equals_its_rounded_weights(mesh):
    place = mesh and meshes.make_mesh(MeshConfig(**mesh))
    made = Decoder(graph_of("27b"), weights_of("27b"), place, int8=True)
    kinds = {str(w.dtype) for path, w in flatten_state_of(made).items() if re.search(r"(w|embedding)$", path)}
    assert kinds == {"int8", "float32"}  # norms
    found = run_requests(made)
    expected = run_requests(Decoder(graph_of("27b"), rounded_weights()))
    for request, reference in zip(found, expected, strict=True):
        assert request.tokens == reference.tokens
        np.testing.assert_allclose(scores_of(request), scores_of(reference), atol=2e-4, rtol=0)


def flatten_state_of(made: Decoder) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): w for path, w in jax.tree.leaves_with_path(made.weights)
    }


def test_int8_is_close_to_the_weights_themselves():
    """What rounding costs in log-probability, for random weights, whose scores are as far apart as those of text."""
    found, expected = (
        run_requests(Decoder(graph_of("27b"), weights_of("27b"), int8=True), 1),
        run_requests(decoder("27b"), 1),
    )
    cost = np.concatenate([np.subtract(scores_of(a), scores_of(b)) for a, b in zip(found, expected, strict=True)])
    assert 1e-4 < np.abs(cost).mean() < 0.2


def test_rounding_is_to_the_nearest():
    w = jnp.array([[1.0, -0.5], [0.26, 127.0], [0.0, 0.0]])
    rounded, scale = quantize(w, (1,))
    np.testing.assert_array_equal(rounded, [[127, -64], [0, 127], [0, 0]])
    np.testing.assert_allclose(scale, [1 / 127, 1.0, 1.0])


def test_an_adapter_beside_the_weights_is_refused():
    whole = rebuild_model(graph_of("27b"), weights_of("27b"))
    attach_adapters(whole, AdapterConfig(kind="lora", rank=2, after_norm=True), rngs=nnx.Rngs(0))
    graph, state = nnx.split(whole)
    with pytest.raises(ValueError, match="an adapter beside the weights works on them as they are"):
        Decoder(graph, flatten_state(state), int8=True)
