"""Compares the weights of two checkpoints of any formats, and computes their logits.

Arrays are compared by our paths and layouts, a layer at a time, so that memory stays bounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax.config import ComputeConfig
from gemma2_jax.convert.checkpoints import Checkpoint, load_weights, read_array
from gemma2_jax.convert.files import orbax
from gemma2_jax.model import gemma2, lora
from gemma2_jax.model.attention.choice import choose_attention
from gemma2_jax.model.gemma2 import Gemma2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the arrays that two checkpoints have at a path compare."""

    path: str
    dtypes: tuple[str, str]
    unequal: int  # elements whose bits differ, or whose values differ if the dtypes do
    size: int  # elements
    largest: float  # the largest difference of two elements; NaN where one of them is NaN

    def within(self, tolerance: float) -> bool:
        """Whether the arrays count as the same. Without a tolerance their dtypes and all bits must be."""
        if not tolerance:
            return self.unequal == 0 and self.dtypes[0] == self.dtypes[1]
        return self.largest <= tolerance


def compare_checkpoints(
    first: Checkpoint, second: Checkpoint, progress: Callable[[float], None] = lambda size: None
) -> list[Difference]:
    """How every array compares.

    Args:
      progress: is told how many more bytes of `first` have been compared.

    Raises ValueError where one checkpoint lacks an array of the other, or has it in another shape.
    """
    for checkpoint in (first, second):
        if checkpoint.model is None:
            raise ValueError(
                f"{checkpoint.describe_missing_base()}; give the folder of the model's config.json as --hf-config"
            )
    shapes = first.shapes
    for path in [*shapes, *second.shapes]:
        pair = [tuple(x.shapes[path].shape) if path in x.shapes else None for x in (first, second)]
        if pair[0] != pair[1]:
            clauses = [f"has {path} with shape {shape}" if shape else f"has no {path}" for shape in pair]
            raise ValueError(f"{first.path} {clauses[0]}, and {second.path} {clauses[1]}")
    return [_compare_arrays(path, first, second, progress) for path in shapes]


def _compare_arrays(path: str, first: Checkpoint, second: Checkpoint, progress: Callable[[float], None]) -> Difference:
    stored = first.shapes[path]
    step = 1 if path.startswith("blocks/") else orbax.rows_at_once(stored, stacked=False)
    dtypes = stored.dtype.name, second.shapes[path].dtype.name
    unequal, largest = 0, 0.0
    for start in range(0, stored.shape[0], step):
        index = (slice(start, min(start + step, stored.shape[0])), *[slice(None)] * (len(stored.shape) - 1))
        a, b = (read_array(checkpoint, path, index) for checkpoint in (first, second))
        progress(a.nbytes)
        if dtypes[0] == dtypes[1]:
            bits = np.dtype(f"u{a.dtype.itemsize}")
            if np.array_equal(a.view(bits), b.view(bits)):
                continue
        a, b = a.astype(np.float32), b.astype(np.float32)
        equal = (a == b) & (np.signbit(a) == np.signbit(b))
        unequal += int(np.sum(~equal))
        largest = float(np.maximum(largest, np.max(np.abs(a - b))))  # np.maximum keeps a NaN
    size = int(np.prod(stored.shape, dtype=np.int64))
    return Difference(path=path, dtypes=dtypes, unequal=unequal, size=size, largest=largest)


def check_weights(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a checkpoint is an adapter alone, from which no logits can be computed."""
    if checkpoint.lacks_base:
        raise ValueError(
            f"{checkpoint.describe_missing_base()}, so it has no logits; put it on that model first with "
            f"python -m gemma2_jax.convert MODEL NEW --adapter {checkpoint.path} --to orbax"
        )


def compute_logits(checkpoint: Checkpoint, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] in float32 of T tokens, with the adapter. Raises ValueError where an adapter lacks its model."""
    check_weights(checkpoint)
    config = checkpoint.model
    assert config is not None
    attention, _ = choose_attention(config, ComputeConfig(dtype="float32"), jax.devices()[0])

    def create() -> Gemma2:
        gemma = Gemma2(config, attention=attention, dtype="float32", rngs=nnx.Rngs(0))
        lora.attach_adapters(gemma, checkpoint.adapter, rngs=nnx.Rngs(0))
        return gemma

    graph, shapes = nnx.split(nnx.eval_shape(create))
    wanted = {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in gemma2.flatten_state(shapes).items()}
    tokens_1T = jnp.asarray(tokens, jnp.int32)[None]

    @jax.jit
    def run(weights):
        return gemma2.rebuild_model(graph, weights)(tokens_1T)[0]

    return np.asarray(run(load_weights(checkpoint, wanted)))
