"""How the next token is chosen from logits: the most likely one, or a draw after temperature, top-k and top-p."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_LOWEST_TEMPERATURE = 1e-6  # a logit over less would come near the end of float32, and none differs from 0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. A new value of a setting needs no compilation; setting one that was unset does."""

    temperature: float = 0.0  # logits are divided by it; 0 takes the most likely token, whatever else is set
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # draw from the fewest most likely of those whose probabilities sum up to this
    seed: int = 0  # of the draws; the draws of a row do not depend on the other rows

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; use 0 for the most likely token, or a finite number of at least "
                f"{_LOWEST_TEMPERATURE}"
            )
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise ValueError(
                f"top_k is {self.top_k}; it must be at least 1 and below 2**31, or unset to draw from all tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or unset")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**31")

    @property
    def settings(self) -> dict[str, float]:
        """The settings that have an effect, by name: names are compiled in, values are arguments."""
        if self.temperature == 0:
            return {}
        fields = {"temperature": self.temperature, "seed": self.seed, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in fields.items() if value is not None and (name, value) != ("top_p", 1)}


GREEDY = Sampling()


@partial(
    jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p", "seed", "sample"], meta_fields=[]
)
@dataclass(frozen=True, kw_only=True)
class RowSettings[Array]:
    """How the tokens of rows are drawn, each in its own way: arrays [B], or scalars of one row."""

    temperature: Array  # float32; 0 takes the most likely token
    top_k: Array  # int32; as many as there are, or more: no limit
    top_p: Array  # float32; above 1: no limit
    seed: Array  # int32
    sample: Array  # int32: of several draws with one seed, which of them

    @classmethod
    def of(cls, sampling: Sampling, sample: int) -> "RowSettings[np.generic]":
        """Those of one row."""
        settings = sampling.settings
        return RowSettings(
            temperature=np.float32(sampling.temperature),
            top_k=np.int32(settings.get("top_k", 2**31 - 1)),
            top_p=np.float32(settings.get("top_p", math.inf)),
            seed=np.int32(sampling.seed),
            sample=np.int32(sample),
        )


def sample_rows(logits_BV: jax.Array, position_B: jax.Array, settings: RowSettings) -> jax.Array:
    """The token of each row for its `position_B`, int32 [B]; a draw depends on nothing of the other rows."""
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_drawn_B = settings.temperature > 0

    def draw_rows():
        columns = {"temperature": jnp.where(is_drawn_B, settings.temperature, 1.0)[:, None]}
        columns |= {"top_k": settings.top_k[:, None], "top_p": settings.top_p[:, None]}

        def draw(seed, sample, position, logits_V):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
            return jax.random.categorical(key, logits_V)

        filtered_BV = filter_logits(logits_BV, columns)
        return jax.vmap(draw)(settings.seed, settings.sample, position_B, filtered_BV).astype(jnp.int32)

    drawn_B = jax.lax.cond(is_drawn_B.any(), draw_rows, lambda: best_B)
    return jnp.where(is_drawn_B, drawn_B, best_B)


def filter_logits(logits_BV: jax.Array, settings: dict) -> jax.Array:
    """Logits divided by the temperature, -inf for tokens that top_k, then top_p exclude; of equal ones, none or all."""
    logits_BV = logits_BV / settings["temperature"]
    if settings.keys().isdisjoint(("top_k", "top_p")):
        return logits_BV
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if "top_k" in settings:
        rank_V = jnp.arange(logits_BV.shape[-1])
        descending_BV = jnp.where(rank_V < settings["top_k"], descending_BV, -jnp.inf)
    if "top_p" in settings:
        probability_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        descending_BV = jnp.where(before_BV < settings["top_p"], descending_BV, -jnp.inf)
    least_B1 = jnp.min(descending_BV, axis=-1, keepdims=True, where=descending_BV > -jnp.inf, initial=jnp.inf)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def sample_tokens(logits_BV: jax.Array, position_B: jax.Array, settings: dict) -> jax.Array:
    """The token for `position_B`, int32 [B]: the most likely one, or a draw that depends on seed, row and position."""
    if not settings:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(row, position, logits_V):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings["seed"]), row), position)
        return jax.random.categorical(key, logits_V)

    rows_B = jnp.arange(logits_BV.shape[0])
    return jax.vmap(draw)(rows_B, position_B, filter_logits(logits_BV, settings)).astype(jnp.int32)
