"""Single attention kernels with a tile of one's choice: run, held against float32, and timed, on inputs made once.

`checking` checks the kernels of a build together, as they are used. Here the backward kernels get the results of
float32 in place of the forward kernel's, so that nothing but the one kernel is compiled for a tile.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.kernels import reference
from gemma2_jax.kernels.attention import make_cotangents, pad_inputs
from gemma2_jax.kernels.backward import run_dkv, run_dq
from gemma2_jax.kernels.forward import run_forward
from gemma2_jax.kernels.tile_sizes import Direction, Tile, replace_tile
from gemma2_jax.kernels.tiles import Build, Settings
from gemma2_jax.model.attention import checking
from gemma2_jax.model.attention.cases import Cached, Layer
from gemma2_jax.model.attention.checking import Check

type Errors = dict[str, float]


class LayerTrials:
    """Trials of the forward and backward kernels, on layers of one shape that differ in what queries see."""

    def __init__(self, layers: Sequence[Layer], build: Build):
        self.build, self.shape = build, layers[0].shape
        q, k, v, d = layers[0].inputs()
        self.inputs: list[tuple] = []
        self.expected: list[dict[str, np.ndarray]] = []
        self.xla: list[Errors] = []
        for layer in layers:
            mask = layer.mask()
            expected = checking.compute_reference(layer, (q, k, v, d, mask))
            xla = jax.jit(partial(checking.run_both_passes, checking.xla_attention(layer)))(q, k, v, d, mask)
            self.xla.append(checking.measure_errors(jax.device_get(xla), expected))
            results = jnp.asarray(expected["out"], q.dtype), jnp.asarray(expected["lse"])
            self.inputs.append((q, k, v, d, *results, mask.first_BT, mask.last_BT))
            self.expected.append(expected)

    def make_program(self, direction: Direction, tile: Tile) -> Callable[..., dict[str, jax.Array]]:
        """A function of an entry of `inputs`, which returns the results of the kernel by name."""
        settings = Settings(scale=self.shape.scale, softcap=self.shape.softcap, build=self.build)
        tiles = replace_tile(self.shape.width, direction, tile)

        def run(q, k, v, d, out, lse, first, last) -> dict[str, jax.Array]:
            T, S = q.shape[1], k.shape[1]
            inputs = pad_inputs(q, k, v, (first, last), tiles)
            if direction == "forward":
                out, lse = run_forward(inputs, settings, tile)
                return {"out": out[:, :T], "lse": lse[:, :, :T]}
            pad_T = inputs.q_BTNH.shape[1] - T
            out, d = (jnp.pad(x, ((0, 0), (0, pad_T), (0, 0), (0, 0))) for x in (out, d))
            lse = jnp.pad(lse, ((0, 0), (0, 0), (0, pad_T)))
            cotangents = make_cotangents(out, lse, d, jnp.zeros_like(lse))
            if direction == "dq":
                return {"dq": run_dq(inputs, cotangents, settings, tile)[:, :T]}
            dk, dv = run_dkv(inputs, cotangents, settings, tile)
            return {"dk": dk[:, :S], "dv": dv[:, :S]}

        return run


class CacheTrials:
    """Trials of the decoding kernel, on caches of one shape that differ in the positions of their tokens."""

    def __init__(self, caches: Sequence[Cached], build: Build):
        self.build, self.case = build, caches[0]
        shape, slots = self.case.shape, self.case.slots
        q, k, v, _ = self.case.inputs()
        self.inputs = [(q, k, v, jnp.array(case.positions, jnp.int32)) for case in caches]
        decode = jax.jit(partial(reference.decode, window=slots, scale=shape.scale, softcap=shape.softcap))
        self.expected = [{"out": np.asarray(decode(*inputs))} for inputs in self.inputs]
        xla = jax.jit(checking.name_output(checking.xla_decode(self.case)))
        self.xla = [
            checking.measure_errors(jax.device_get(xla(*inputs)), expected)
            for inputs, expected in zip(self.inputs, self.expected, strict=True)
        ]

    def make_program(self, direction: Direction, tile: Tile) -> Callable[..., dict[str, jax.Array]]:
        """A function of an entry of `inputs`, which returns the result of the kernel by name."""
        build = replace(self.build, tiles=replace_tile(self.case.shape.width, direction, tile))
        return checking.name_output(checking.kernel_decode(self.case, build))


def try_tile(
    trials: LayerTrials | CacheTrials, direction: Direction, tile: Tile, enter: Callable[[checking.Phase], None]
) -> tuple[list[str], Callable[[], Any]]:
    """Runs a kernel with a tile. `enter` is called as each phase begins.

    Returns:
      What disagrees with float32 or between two runs; and a function that runs it once more, on the last of the inputs,
      to be timed.
    """
    enter("compilation")
    compiled = jax.jit(trials.make_program(direction, tile)).lower(*trials.inputs[0]).compile()
    failures = []
    for inputs, expected, xla in zip(trials.inputs, trials.expected, trials.xla, strict=True):
        enter("run")
        result, repeated = (jax.device_get(compiled(*inputs)) for _ in range(2))
        enter("reference")
        check = Check(
            case=f"{direction} {tile}",
            tanh=trials.build.tanh,
            errors=checking.measure_errors(result, expected),
            xla={name: xla[name] for name in result if name in xla},
            same=checking.have_same_bits(result, repeated),
        )
        failures += check.failures
    return failures, lambda: compiled(*trials.inputs[-1])
