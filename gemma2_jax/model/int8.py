"""Weights in int8 with a scale for each output channel, for generation: half the bytes of bfloat16 to read for a token.

Only weights are rounded, to the nearest of 255 values evenly spread over the largest of their channel; activations stay
in the compute dtype, and products are summed as ever, then scaled. Norms and adapters stay as they are. The embedding
has a scale for each row, which serves the lookup and the logits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gemma2_jax.model.gemma2 import Gemma2, split_equation
from gemma2_jax.model.lora import projections

LARGEST = 127


@partial(jax.jit, static_argnums=1)
def quantize(w: jax.Array, dims: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The weight as int8, and its scales, float32, whose product is about w; `dims` are those summed over in use."""
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=dims, keepdims=True) / LARGEST
    scale = jnp.where(scale == 0, 1, scale)
    return jnp.round(w / scale).astype(jnp.int8), jnp.squeeze(scale, dims)


def summed_dims(equation: str) -> tuple[int, ...]:
    """The dims of a projection's weight that are summed over: (0,) of "BTD,DNH->BTNH"."""
    _, weight, outputs = split_equation(equation)
    return tuple(number for number, letter in enumerate(weight) if letter not in outputs)


def quantize_model(model: Gemma2) -> Gemma2:
    """Changes a model with unstacked layers to have its projections and its embedding in int8; returns it."""
    for projection in projections(model).values():
        w, scale = quantize(projection.w[...], summed_dims(projection.equation))
        projection.w, projection.scale = nnx.Param(w), nnx.Param(scale)
    embedding, row_scale = quantize(model.embedding[...], (1,))
    model.embedding, model.row_scale = nnx.Param(embedding), nnx.Param(row_scale)
    return model
