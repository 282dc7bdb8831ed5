"""The attention kernels held against their meaning in float32, on cases of `cases`, by the measure of XLA's bfloat16.

It runs what it checks: a kernel that hangs or breaks the process takes the caller with it, so that a run which depends
on the answer asks for it in a process of its own (`cluster.kernel_check`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma2_jax.kernels import reference
from gemma2_jax.kernels.attention import attention
from gemma2_jax.kernels.decode import decode
from gemma2_jax.kernels.tiles import GPU, Build
from gemma2_jax.model.attention import xla as attention_xla
from gemma2_jax.model.attention.cases import Cached, Layer, Mask

# An error may be so many times that of XLA's bfloat16, as in FlashAttention's tests of its soft cap, and so much more.
# NVIDIA documents a relative error of 2^-11 for the GPU's own tanh: in XLA's place, that alone would need the 2e-3.
ERROR_FACTOR, ERROR_MARGIN = 3, {"exact": 5e-4, "approximate": 2e-3}
XLA_LIMIT = 0.03  # With a larger error XLA is wrong too, and no measure.
LSE_LIMIT = {"exact": 2e-4, "approximate": 50 * 2**-11}  # These are absolute: the cap multiplies the error of tanh.
# What a check is doing; compilation and run are those of the kernels.
type Phase = Literal["preparation", "compilation", "run", "reference"]
# What stands for the kernels of a GPU where there is none.
INTERPRETED = Build(operand_in="shared memory", tanh="exact", interpret=plgpu.InterpretGPUParams())


# Each attention below is (q, k, v, mask) -> [B, T, N, H] and the log-sum-exp, or None for it.


def kernel_attention(layer: Layer, build: Build = GPU) -> Callable:
    """The attention of the kernels."""
    run = partial(attention, scale=layer.shape.scale, softcap=layer.shape.softcap, build=build)
    return lambda q, k, v, mask: run(q, k, v, mask.first_BT, mask.last_BT)


def xla_attention(layer: Layer) -> Callable:
    """The attention that is used where the kernels cannot be: jnp in bfloat16."""
    block = attention_xla.BLOCKS["gpu"]
    run = partial(attention_xla.attend, scale=layer.shape.scale, softcap=layer.shape.softcap, block=block)
    return lambda q, k, v, mask: (run(q, k, v, mask.segments_BT, layer.reach), None)


def reference_attention(layer: Layer) -> Callable:
    """The attention of `kernels.reference`; it does not take the intervals that the kernels get, but finds its own."""
    position_BT = jnp.broadcast_to(jnp.arange(layer.length), (layer.rows, layer.length))
    start_BT = np.array([np.searchsorted(row, row) for row in layer.segments_BT], np.int32)
    intervals = reference.visible_mask(position_BT, position_BT, start_BT, layer.reach)
    settings = dict(scale=layer.shape.scale, softcap=layer.shape.softcap)
    return lambda q, k, v, mask: reference.attention(q, k, v, *intervals, **settings)


def run_both_passes(attend: Callable, q, k, v, d, mask: Mask) -> dict[str, Any]:
    """Returns results and gradients by their names: "out", "lse", "dq", "dk", "dv"."""
    out, pull, lse = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v, has_aux=True)
    dq, dk, dv = pull(d.astype(out.dtype))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def compute_reference(layer: Layer, inputs: tuple) -> dict[str, np.ndarray]:
    """Returns `run_both_passes` of the reference in float32, one key head at a time to hold only its scores."""
    q, k, v, d, mask = inputs
    groups = layer.shape.heads // layer.shape.kv_heads
    run = jax.jit(partial(run_both_passes, reference_attention(layer)))
    parts = []
    for head in range(layer.shape.kv_heads):
        q_heads, kv_heads = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
        arrays = q[:, :, q_heads], k[:, :, kv_heads], v[:, :, kv_heads], d[:, :, q_heads]
        parts.append(jax.device_get(run(*(x.astype(jnp.float32) for x in arrays), mask)))
    return {name: np.concatenate([part[name] for part in parts], 1 if name == "lse" else 2) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The check of one case with one build.

    Attributes:
      case, tanh: which case and which build.
      errors: of each result, against float32.
      xla: the errors of XLA's bfloat16, which has no log-sum-exp.
      same: whether the kernel gave the same bits twice.
    """

    case: str
    tanh: str
    errors: dict[str, float]
    xla: dict[str, float]
    same: bool

    @property
    def failures(self) -> list[str]:
        failures = [] if self.same else ["not the same bits twice"]
        for name, error in self.errors.items():
            xla_error = self.xla.get(name)
            limit = LSE_LIMIT[self.tanh] if xla_error is None else ERROR_FACTOR * xla_error + ERROR_MARGIN[self.tanh]
            if not error <= limit:  # NaN is not either.
                failures.append(f"{name} is off by {error:.1e}, of {limit:.1e} allowed")
            if xla_error is not None and not xla_error <= XLA_LIMIT:
                failures.append(f"{name} of XLA, the measure of it, is off by {xla_error:.1e}")
        return [f"{self.case}, {self.tanh} tanh: {failure}" for failure in failures]


def measure_errors(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Measures the relative L2 error of the worst head, and the largest error of log-sum-exps."""
    measured = {}
    for name, array in expected.items():
        if (x := results.get(name)) is None:
            continue
        off = np.asarray(x, np.float32) - array
        if name == "lse":
            measured[name] = float(np.abs(off).max())
        else:
            squares = [np.square(part).sum(axis=(1, 3), dtype=np.float64) for part in (off, array)]
            measured[name] = float(np.sqrt(squares[0] / squares[1]).max())
    return measured


def have_same_bits(left: Any, right: Any) -> bool:
    """Whether two trees of arrays are the same bit by bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def check_case(
    case: Layer | Cached, builds: Sequence[Build], enter: Callable[[Phase], None] = lambda phase: None
) -> Iterator[Check]:
    """Checks a case with each build of the kernels. `enter` is called as each phase of the work begins."""
    enter("preparation")
    inputs = (*case.inputs(), case.mask()) if isinstance(case, Layer) else case.inputs()
    results = {}
    for build in builds:
        enter("compilation")
        if isinstance(case, Layer):
            program = jax.jit(partial(run_both_passes, kernel_attention(case, build)))
        else:
            program = jax.jit(name_output(kernel_decode(case, build)))
        compiled = program.lower(*inputs).compile()
        enter("run")
        results[build.tanh] = [jax.device_get(compiled(*inputs)) for _ in range(2)]
    enter("reference")
    if isinstance(case, Layer):
        expected = compute_reference(case, inputs)
        xla = partial(run_both_passes, xla_attention(case))
    else:
        settings = dict(scale=case.shape.scale, softcap=case.shape.softcap)
        expected = {"out": np.asarray(jax.jit(partial(reference.decode, window=case.slots, **settings))(*inputs))}
        xla = name_output(xla_decode(case))
    xla_errors = measure_errors(jax.device_get(jax.jit(xla)(*inputs)), expected)
    for tanh, (result, repeated) in results.items():
        kernel_errors, same = measure_errors(result, expected), have_same_bits(result, repeated)
        yield Check(case=str(case), tanh=tanh, errors=kernel_errors, xla=xla_errors, same=same)


def name_output(step: Callable) -> Callable:
    """Makes a function that returns its result by the name "out"."""
    return lambda *inputs: {"out": step(*inputs)}


def kernel_decode(case: Cached, build: Build = GPU) -> Callable:
    """The decoding of the kernel: a function (q, k, v, position) -> [B, 1, N, H]."""
    return partial(decode, window=case.slots, scale=case.shape.scale, softcap=case.shape.softcap, build=build)


def xla_decode(case: Cached) -> Callable:
    """The decoding of jnp in bfloat16, as a function like that of the kernel."""
    run = partial(attention_xla.attend_cached, scale=case.shape.scale, softcap=case.shape.softcap)
    return lambda q, k, v, position: run(q[:, 0], k, v, position)[:, None]
