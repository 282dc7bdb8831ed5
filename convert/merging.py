"""Adds an adapter into the weights of a projection, as `model.lora` does.

`job` imports this module where there is something to merge, as importing the model takes a third of a second.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx

from gemma2_jax.model import lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import AdapterConfig, ModelConfig


def create_merge(model: ModelConfig, adapter: AdapterConfig) -> Callable[..., jax.Array]:
    """The merging of one projection, as a function of arrays: `merge(name, dtype, layer, w=, a=, b=, m=)`.

    Its arrays are of layers from `layer` on.
    """
    skeleton = nnx.eval_shape(partial(_create_adapted, model, adapter))
    adapters = {name: projection.adapter for name, projection in lora.projections(skeleton).items()}

    @partial(jax.jit, static_argnums=(0, 1))
    def merge(name: str, dtype: np.dtype, layer: int, w: jax.Array, **variables: jax.Array) -> jax.Array:
        adapter = adapters[name]
        assert isinstance(adapter, lora.Adapter)
        graph, _ = nnx.split(adapter)
        return nnx.merge(graph, nnx.State(variables)).merged_weight(w, dtype, layer)

    return merge


def _create_adapted(model: ModelConfig, adapter: AdapterConfig) -> Gemma2:
    rngs = nnx.Rngs(0)
    gemma = Gemma2(model, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=rngs)
    lora.attach_adapters(gemma, adapter, rngs=rngs)
    return gemma
