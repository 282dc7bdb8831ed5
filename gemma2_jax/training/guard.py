"""Steps that go wrong: what is skipped, when a run ends for it, and what is said of it.

`judge_step` and `find_nonfinite` are part of the compiled step: a step whose loss or gradient is not finite, or whose
gradient is far out of the ordinary, leaves the weights and the optimizer as they were. `Guard` reads each step's
verdict later, beside its other metrics, counts, warns of leaps of the loss, and says when too many steps in a row were
skipped. All that they have learned is part of a checkpoint.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import Config, GuardConfig
from gemma2_jax.model.gemma2 import Weights

LEARNING_STEPS = 25  # after which a gradient or a loss may be called out of the ordinary
MEMORY = 0.97  # of the means over steps: what one step has of it a step later (ZClip, arXiv:2504.02507)
SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 2, 40  # of a skipped batch on the console; skipped.jsonl has all of them
# The order of a block's weights in the forward pass.
_IN_BLOCK = ("pre_attn_norm", "attn/q", "attn/k", "attn/v", "attn/o", "post_attn_norm", "pre_mlp_norm")
_IN_BLOCK += ("mlp/gate", "mlp/up", "mlp/down", "post_mlp_norm")


def no_history() -> dict[str, np.float32]:
    """What is known of the gradient norms of earlier steps before there are any: float32 scalars."""
    return {name: np.float32(0) for name in ("count", "mean", "variance")}


def judge_step(
    config: GuardConfig, history: Mapping[str, jax.Array], loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether a step with this loss and gradient norm is taken (bool scalar), and the history with it.

    The history is of the steps that were taken: running mean and variance of their gradient norms, as ZClip has them
    (arXiv:2504.02507), which clips where this skips.
    """
    taken = jnp.isfinite(loss) & jnp.isfinite(norm)
    count, mean, variance = (history[name] for name in ("count", "mean", "variance"))
    if config.skip_deviations:
        bound = mean + config.skip_deviations * jnp.sqrt(variance)
        taken &= (count < LEARNING_STEPS) | (norm <= bound)
    rate = jnp.maximum(1 / (count + 1), 1 - MEMORY)
    mean, variance = _follow(mean, variance, norm, rate)
    followed = {"count": count + 1, "mean": mean, "variance": variance}
    return taken, {name: jnp.where(taken, followed[name], history[name]) for name in followed}


def _follow[Number: (float, jax.Array)](mean: Number, variance: Number, x: Number, rate: Number):
    """Mean and variance with one more observation, which counts for `rate` of them."""
    difference = x - mean
    return mean + rate * difference, (1 - rate) * (variance + rate * difference * difference)


def find_nonfinite(loss: jax.Array, gradients: Weights, weights: Weights) -> jax.Array:
    """What went wrong first in a step that is not finite, as an int32 scalar that `describe_place` reads.

    If the loss is finite, it is the first gradient of the backward pass that is not. If the loss is not, it is the
    first weight of the forward pass that is not, or -1 where all weights are finite.
    """
    gradient = _find_first(_list_faults(gradients)[::-1])
    weight = _find_first(_list_faults(weights))
    return jnp.where(jnp.isfinite(loss), gradient, weight)


def _find_first(faults: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(faults), jnp.argmax(faults), -1).astype(jnp.int32)


def _list_faults(weights: Weights) -> jax.Array:
    """Whether each of `list_places` has an element that is not finite."""
    before, stacked, after = _order_paths(weights)
    faults = {path: ~jnp.isfinite(w) for path, w in weights.items()}
    whole = {path: jnp.any(faults[path])[None] for path in (*before, *after)}
    layers = [jnp.any(faults[path], axis=tuple(range(1, faults[path].ndim))) for path in stacked]
    inner = [jnp.stack(layers, axis=1).ravel()] if layers else []
    return jnp.concatenate([*(whole[path] for path in before), *inner, *(whole[path] for path in after)])


def list_places(weights: Mapping[str, jax.ShapeDtypeStruct | jax.Array]) -> list[str]:
    """The weights in the order of the forward pass, those of stacked blocks once for each layer."""
    before, stacked, after = _order_paths(weights)
    layers = weights[stacked[0]].shape[0] if stacked else 0
    inner = [f"{path.removeprefix('blocks/')} of layer {layer}" for layer in range(layers) for path in stacked]
    return [*before, *inner, *after]


def _order_paths(weights: Mapping) -> tuple[list[str], list[str], list[str]]:
    """The paths of what comes before the blocks, in them and after them."""

    def place_in_block(path: str) -> int:
        return next(number for number, name in enumerate(_IN_BLOCK) if path.startswith(f"blocks/{name}"))

    stacked = sorted((path for path in weights if path.startswith("blocks/")), key=place_in_block)
    after = [path for path in weights if path.startswith("final_norm")]
    return [path for path in weights if path not in {*stacked, *after}], stacked, after


def describe_place(place: int, loss: float, gradients: Mapping, weights: Mapping) -> str:
    """What `find_nonfinite` found, in words."""
    if math.isfinite(loss):
        return f"the first gradient that is not finite is that of {list_places(gradients)[::-1][place]}"
    if place < 0:
        return "all weights are finite, so that it comes of activations too large"
    return f"the weight {list_places(weights)[place]} is not finite"


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A step that was skipped."""

    step: int
    loss: float  # nats per target token
    grad_norm: float
    reason: str

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}; {self.reason}"


class Guard:
    """Counts the steps that were skipped, and warns of losses out of the ordinary. Sees every step, in order."""

    def __init__(
        self,
        config: Config,
        describe: Callable[[Mapping[str, float]], str],  # why a step with these metrics was skipped
        list_documents: Callable[[int], list[dict]],  # what a step was of, as `data.inspection.list_documents` has it
    ):
        self._config, self._describe, self._list_documents = config.guard, describe, list_documents
        self._path = config.output / "skipped.jsonl"
        self.skipped = 0  # steps of the whole run
        self.row = 0  # steps that were skipped one after another, up to the last that was seen
        self.last: Skip | None = None  # the last that was skipped in this process
        self._count, self._mean, self._variance = 0, 0.0, 0.0  # of the losses of steps that were taken

    def get_state(self) -> dict:
        """What a checkpoint keeps, for JSON."""
        return {"skipped": self.skipped, "row": self.row, "losses": [self._count, self._mean, self._variance]}

    def set_state(self, state: dict) -> None:
        """Goes on from what `get_state` gave."""
        self.skipped, self.row = state["skipped"], state["row"]
        self._count, self._mean, self._variance = state["losses"]

    @property
    def is_exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that the run must end."""
        return self.row > self._config.skip_limit

    def see(self, step: int, values: Mapping[str, float]) -> str:
        """Takes the metrics of a step. Returns what is to be said of it, empty if nothing is."""
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        if not values["taken"]:
            self.skipped, self.row = self.skipped + 1, self.row + 1
            self.last = Skip(step=step, loss=loss, grad_norm=norm, reason=self._describe(values))
            return f"skipped: {self.last}{self._keep_documents(self.last)}"
        self.row = 0
        deviation = math.sqrt(self._variance)
        limit, mean = self._mean + self._config.spike_deviations * deviation, self._mean
        is_spike = self._config.spike_deviations and self._count >= LEARNING_STEPS and loss > limit
        self._count += 1
        rate = max(1 / self._count, 1 - MEMORY)
        self._mean, self._variance = _follow(self._mean, self._variance, loss, rate)
        if not is_spike:
            return ""
        return (
            f"the loss leapt to {loss:.4f}, from {mean:.4f} on average with a deviation of {deviation:.4f}; the step "
            "was taken (guard.spike_deviations)"
        )

    def _keep_documents(self, skip: Skip) -> str:
        """Writes the skip and the documents of its batch to skipped.jsonl, and returns the first of them in words."""
        if jax.process_index() != 0:
            return ""
        documents = self._list_documents(skip.step)
        line = {"step": skip.step, "loss": str(skip.loss), "grad_norm": str(skip.grad_norm), "reason": skip.reason}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({**line, "documents": documents}) + "\n")
        except OSError as error:
            return f"; its documents cannot be listed, as {self._path} cannot be written to ({error.strerror})"
        if not documents:
            return "; its documents cannot be listed, as a stream is not read twice"
        shown = ", ".join(f"{document['text'][:SHOWN_CHARACTERS]!r}" for document in documents[:SHOWN_DOCUMENTS])
        return f"; its batch has {len(documents)} document(s), {shown}, ..., which are listed in {self._path}"

    def describe_end(self) -> str:
        """Why the run ends, and what one can do."""
        assert self.last is not None
        return (
            f"{self.row} step(s) in a row were skipped, and guard.skip_limit is {self._config.skip_limit}; the last is "
            f"step {self.last.step}: {self.last}. No checkpoint was written since the first of them, and "
            f"{self._path} lists their documents. Look at these, and start again in another --workdir, with a lower "
            "optim.lr, a lower optim.clip_norm or more optim.warmup_steps where the documents are sound"
        )
