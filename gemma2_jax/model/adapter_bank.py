"""Several adapters at a time on one model whose layers are unstacked, of which each row of a batch takes its own.

A bank has the adapters of one projection in one layer, padded to the highest rank; number 0 is no adapter. A step
gathers those of its rows, so that one batch serves many adapters, and its program knows only how many there are. LoRA
and DoRA are the same here: what DoRA multiplies the output by is constant once nothing is trained.

Sources: Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285), which gather adapters by row on GPUs.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax import dims
from gemma2_jax.dims import Place
from gemma2_jax.mesh import constrain
from gemma2_jax.model.gemma2 import AdapterInputs, Einsum, Gemma2, activation_place, split_equation
from gemma2_jax.model.lora import AdapterParam, FrozenAdapter, projections


class AdapterBank(nnx.Module):
    """The adapters of one projection in one layer.

    The variables are a [M, contracted letters, R], b [M, R, produced letters] and, if any adapter is DoRA, ratio
    [M, produced letters], where M counts the adapters and no adapter; all in the compute dtype.
    """

    def __init__(self, base: Einsum, adapters: Sequence[FrozenAdapter | None], layer: int, dtype, mesh: Mesh):
        """`adapters` are what each does to this projection, in all layers; None where one does nothing."""
        inputs, weight, outputs = split_equation(base.equation)
        contracted = "".join(letter for letter in weight if letter not in outputs)
        produced = "".join(letter for letter in weight if letter in outputs)
        self.down_equation, self.up_equation = f"{inputs},B{contracted}R->BTR", f"BTR,BR{produced}->{outputs}"
        self.output_place: Place = activation_place(outputs)
        present = [adapter for adapter in adapters if adapter is not None]
        self.after_norm = present[0].after_norm
        rank = max(adapter.a_L.shape[-1] for adapter in present)

        def stack(letters: str, arrays: Sequence[jax.Array | None], missing: float) -> AdapterParam:
            """This layer of the arrays, after no adapter; those that are None have `missing` alone."""
            shape = [rank if letter == "R" else base_sizes[letter] for letter in letters]
            whole = np.full((1 + len(arrays), *shape), missing, np.float32)
            for number, x_L in enumerate(arrays, 1):
                if x_L is not None:
                    whole[(number, *map(slice, x_L.shape[1:]))] = x_L[layer]
            spec = PartitionSpec(None, *dims.stored_spec(letters, shape, mesh.shape))
            return AdapterParam(jax.device_put(whole.astype(dtype), NamedSharding(mesh, spec)))

        base_sizes = dict(zip(weight, base.w.shape, strict=True))
        self.a = stack(f"{contracted}R", [x.a_L if x else None for x in adapters], 0)
        self.b = stack(f"R{produced}", [x.b_L if x else None for x in adapters], 0)
        ratios = [x.ratio_L if x else None for x in adapters]
        has_ratio = any(ratio is not None for ratio in ratios)
        self.ratio: AdapterParam | None = nnx.data(stack(produced, ratios, 1) if has_ratio else None)

    def __call__(self, x: jax.Array, y: jax.Array, w: jax.Array, inputs: AdapterInputs) -> jax.Array:
        """The output y for the input x, each row adapted by its own adapter, in the shape and dtype of y."""
        assert inputs.index_B is not None
        a, b = (variable[...][inputs.index_B].astype(x.dtype) for variable in (self.a, self.b))
        low_BTR = constrain(jnp.einsum(self.down_equation, x, a), "BTR", self.output_place)
        y = y + jnp.einsum(self.up_equation, low_BTR, b)
        return y if self.ratio is None else (y * self.ratio[...][inputs.index_B][:, None]).astype(y.dtype)


def attach_banks(model: Gemma2, adapters: Mapping[str, Mapping[str, FrozenAdapter]], mesh: Mesh) -> None:
    """Gives every projection that any adapter changes a bank of them all, on the mesh.

    Args:
      model: with unstacked layers, and no adapters.
      adapters: by name, what each does to projections (attn/q, ..., mlp/down).
      mesh: that of the model's weights.

    Raises ValueError where one adapter is added after a norm and another before it.
    """
    for path, base in projections(model).items():
        layer, _, projection = path.partition("/")
        found = [adapter.get(projection) for adapter in adapters.values()]
        places = {adapter.after_norm for adapter in found if adapter is not None}
        if len(places) > 1:
            raise ValueError(
                f"of the adapters {', '.join(adapters)}, some are added to {projection} after the post-norm "
                "(adapter.after_norm) and some before it; serve them apart"
            )
        if places:
            base.adapter = AdapterBank(base, found, int(layer), model.dtype, mesh)
