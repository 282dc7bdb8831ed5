"""Whether two checkpoints, of whatever formats, hold the same weights, and make the same logits.

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
from gemma2_jax.convert.files import orbax as arrays
from gemma2_jax.model import gemma2 as model, lora
from gemma2_jax.model.attention.choice import choose_attention
from gemma2_jax.model.gemma2 import Gemma2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two arrays of one path compare."""

    path: str
    dtypes: tuple[str, str]
    unequal: int  # elements whose bits differ, or values where the dtypes do
    size: int  # elements
    largest: float  # difference of two elements; NaN where one of them is

    def within(self, tolerance: float) -> bool:
        """Whether they count as the same: bit by bit, dtype and all, unless there is a tolerance."""
        if not tolerance:
            return self.unequal == 0 and self.dtypes[0] == self.dtypes[1]
        return self.largest <= tolerance


def compare_checkpoints(
    one: Checkpoint, other: Checkpoint, moved: Callable[[float], None] = lambda size: None
) -> list[Difference]:
    """How every array compares. Raises ValueError where one has an array that the other lacks, or in another shape.

    `moved` is told of bytes of `one` that have been compared.
    """
    for checkpoint in (one, other):
        if checkpoint.model is None:
            raise ValueError(
                f"{checkpoint.describe_missing_base()}; give the folder of the model's config.json as --hf-config"
            )
    shapes, theirs = one.shapes, other.shapes
    for path in [*shapes, *theirs]:
        have = [tuple(found[path].shape) if path in found else None for found in (shapes, theirs)]
        if have[0] != have[1]:
            says = [f"has {path} with shape {shape}" if shape else f"has no {path}" for shape in have]
            raise ValueError(f"{one.path} {says[0]}, and {other.path} {says[1]}")
    return [_compare(path, one, other, moved) for path in shapes]


def _compare(path: str, one: Checkpoint, other: Checkpoint, moved: Callable[[float], None]) -> Difference:
    want = one.shapes[path]
    step = 1 if path.startswith("blocks/") else arrays.rows_at_once(want, stacked=False)
    dtypes = want.dtype.name, other.shapes[path].dtype.name
    unequal, largest = 0, 0.0
    for at in range(0, want.shape[0], step):
        index = (slice(at, min(at + step, want.shape[0])), *[slice(None)] * (len(want.shape) - 1))
        ours, theirs = (read_array(found, path, index) for found in (one, other))
        moved(ours.nbytes)
        if dtypes[0] == dtypes[1]:
            bits = np.dtype(f"u{ours.dtype.itemsize}")
            if np.array_equal(ours.view(bits), theirs.view(bits)):
                continue
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        same = (ours == theirs) & (np.signbit(ours) == np.signbit(theirs))
        unequal += int(np.sum(~same))
        largest = float(np.maximum(largest, np.max(np.abs(ours - theirs))))  # which keeps a NaN
    return Difference(
        path=path, dtypes=dtypes, unequal=unequal, size=int(np.prod(want.shape, dtype=np.int64)), largest=largest
    )


def check_weights(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a checkpoint is an adapter alone, from which no logits can be computed."""
    if checkpoint.lacks_base:
        raise ValueError(
            f"{checkpoint.describe_missing_base()}, so it has no logits; put it on that model first with "
            f"python -m gemma2_jax.convert MODEL NEW --adapter {checkpoint.path} --to orbax"
        )


def logits(checkpoint: Checkpoint, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a row of tokens in float32, adapter included. Raises ValueError for an adapter alone."""
    check_weights(checkpoint)

    config = checkpoint.model
    assert config is not None
    attention, _ = choose_attention(config, ComputeConfig(dtype="float32"), jax.devices()[0])

    def create() -> Gemma2:
        whole = Gemma2(config, attention=attention, dtype="float32", rngs=nnx.Rngs(0))
        lora.attach_adapters(whole, checkpoint.adapter, rngs=nnx.Rngs(0))
        return whole

    graph, shapes = nnx.split(nnx.eval_shape(create))
    wanted = {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in model.flatten_state(shapes).items()}
    row_1T = jnp.asarray(tokens, jnp.int32)[None]

    @jax.jit
    def run(weights):
        whole = model.rebuild_model(graph, weights)
        return whole(row_1T)[0]

    return np.asarray(run(load_weights(checkpoint, wanted)))
