"""The optimizer: AdamW with clipping, a warmup-cosine schedule, and a decay mask, as an optax chain."""

from typing import Any, cast

import jax
import optax

from gemma2_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate by steps already taken: linear up to `lr` at the last warmup step, then a cosine to `min_lr`.

    The first step takes lr / warmup_steps, not 0, and the last takes min_lr.
    """
    decay_steps = config.decay_steps or steps
    warmup = warmup_length(config, steps)
    curve = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.lr,
        peak_value=config.lr,
        warmup_steps=warmup,
        decay_steps=decay_steps,
        end_value=config.min_lr,
    )
    return lambda taken: curve(taken + 1)


def warmup_length(config: OptimConfig, steps: int) -> int:
    """Warmup steps in a run of `steps` steps: fewer than `warmup_steps` if the decay would have ended by then."""
    return min(config.warmup_steps, (config.decay_steps or steps) - 1)


def count_updates(state: optax.OptState) -> jax.Array:
    """Steps that the optimizer has taken, an int32 scalar: those of the run but for the ones that were skipped."""
    counts = optax.tree.get_all_with_path(state, "count")
    return cast(Any, counts[0][1])


def make_optimizer(config: OptimConfig, steps: int, letters: dict[str, str]) -> optax.GradientTransformation:
    """The chain for weights of these dims, by path. Vectors, which are norms and DoRA's magnitudes, do not decay."""
    decayed = {path: not path.endswith(("norm/w", "adapter/m")) for path in letters}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
