"""One layer of a step, forward in one tick of a pipeline and backward in a later one.

Between the two, what the backward pass needs is a pytree of arrays, `Residuals`, so that a pipeline can keep it in a
buffer. Which pass and which stage a layer works for is `pipeline`'s business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx

from gemma2_jax.config import ComputeConfig
from gemma2_jax.model.gemma2 import AdapterInputs, Block, Gemma2, Rope, Weights, rebuild_model

# The input [B, T, D] of the layer, and two pytrees in which `jax.vjp` keeps what `compute` says is kept beside it.
Residuals = tuple


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a layer takes beside weights and activations; no gradient is computed with respect to it."""

    rope: Rope
    segments_BT: jax.Array
    window: jax.Array  # int32 scalar
    adapter: AdapterInputs


class Layer:
    """A block of `skeleton`: its output, and the gradients with respect to its weights and its input.

    `compute` says what is kept: its `remat` and `kept_outputs`. The backward pass goes through `jax.vjp`'s gradient
    function, which holds three things: the arguments of the forward pass, what it computed and kept (its residuals),
    and the program of the backward pass. The program is no array, so a buffer cannot keep it from one tick to the next;
    and the weights should not be kept, as every live pass and layer would have its own copy. Therefore

      - `run` makes a gradient function that saves no weights and no `LayerInputs` (`saveable_args`), as the backward
        pass is given both again;
      - `residuals` takes the other arrays out of it: the layer's input, and what is kept beside it;
      - `gradients` traces the layer again for shapes only, which gives a gradient function with the same program and
        no arrays, and puts weights, inputs and residuals in. Of the forward pass, only what was not kept is computed
        again.
    """

    def __init__(self, skeleton: Gemma2, compute: ComputeConfig):
        assert isinstance(skeleton.blocks, Block)
        self.graph, self.attend_sequence = nnx.graphdef(skeleton.blocks), skeleton.attend_sequence
        self.remat, self.kept_outputs = compute.remat, compute.kept_outputs

    def run(self, trained: Weights, frozen: Weights, x_BTD, inputs: LayerInputs) -> tuple:
        """The layer's output [B, T, D], and its gradient function for `residuals`."""
        apply: Callable = self._apply
        match self.remat:
            case "dots":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)
            case "block" | "offload":
                policy = jax.checkpoint_policies.save_only_these_names(*self.kept_outputs)
                apply = jax.checkpoint(apply, policy=policy if self.kept_outputs else None, prevent_cse=False)
        arguments = trained, frozen, x_BTD, inputs
        # `in_nzs` says which arguments a gradient is asked for.
        return jax.vjp(apply, *arguments, saveable_args=(False, False, True, False), in_nzs=(True, False, True, False))

    def residuals(self, vjp) -> Residuals:
        """The arrays of a gradient function that the backward pass is not given anyway."""
        x_BTD = vjp.args_res[2]
        if self.remat == "offload":
            x_BTD = jax.device_put(x_BTD, jax.memory.Space.Host)
        return x_BTD, vjp.opaque_residuals, vjp.structured_residuals

    def gradients(
        self, trained: Weights, frozen: Weights, residuals: Residuals, d_y_BTD, inputs: LayerInputs
    ) -> tuple[Weights, jax.Array]:
        """Gradients with respect to `trained` and the layer's input; `d_y_BTD` is that with respect to its output."""
        vjp = jax.eval_shape(lambda *arguments: self.run(*arguments)[1], trained, frozen, d_y_BTD, inputs)
        if self.remat == "offload":
            residuals = jax.device_put(residuals, jax.memory.Space.Device)
        x_BTD, opaque, structured = residuals
        vjp = vjp.replace(
            args_res=[trained, frozen, x_BTD, inputs], opaque_residuals=opaque, structured_residuals=structured
        )
        d_trained, _, d_x_BTD, _ = vjp(d_y_BTD)
        return d_trained, d_x_BTD

    def _apply(self, trained: Weights, frozen: Weights, x_BTD, inputs: LayerInputs):
        block = rebuild_model(self.graph, trained, frozen)
        attend = partial(self.attend_sequence, inputs.segments_BT, inputs.window, None)
        return block(x_BTD, inputs.rope, attend, inputs.adapter)[0]
