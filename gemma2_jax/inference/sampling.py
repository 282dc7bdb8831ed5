"""How the next token is chosen from logits: the most likely one, or a draw from what the settings leave.

The order is that of transformers' `generate`: biases, penalties, temperature, top-k, top-p, min-p. Every row of a batch
has settings of its own, as arrays, so that one program serves all; what no row of a step asks for costs nothing there.
"""

import math
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.inference.settings import MOST_BIASES, Sampling
from gemma2_jax.mesh import replicate

MOST_ALTERNATIVES = 20  # tokens of one position whose log-probabilities are given: as many as OpenAI's API gives


@dataclass(frozen=True, kw_only=True)
class RowSettings[Array]:
    """How the tokens of rows are chosen, each in its own way: arrays [B], or scalars of one row; biases have an E."""

    temperature: Array  # float32; 0 takes the most likely token
    top_k: Array  # int32; as many as there are, or more: no limit
    top_p: Array  # float32; above 1: no limit
    min_p: Array  # float32; 0: no limit
    repetition_penalty: Array  # float32; 1: none
    presence_penalty: Array  # float32
    frequency_penalty: Array  # float32
    bias_token_E: Array  # int32; beyond the vocabulary where there are fewer
    bias_E: Array  # float32
    seed: Array  # int32
    sample: Array  # int32: of several draws with one seed, which of them

    @classmethod
    def of(cls, sampling: Sampling, sample: int = 0) -> "RowSettings[np.ndarray | np.generic]":
        """Those of one row."""
        has_top_p = sampling.top_p is not None and sampling.top_p < 1
        bias_token_E = np.full(MOST_BIASES, 2**31 - 1, np.int32)
        bias_E = np.zeros(MOST_BIASES, np.float32)
        for number, (token, bias) in enumerate(sampling.logit_bias):
            bias_token_E[number], bias_E[number] = token, bias
        return RowSettings(
            temperature=np.float32(sampling.temperature),
            top_k=np.int32(sampling.top_k or 2**31 - 1),
            top_p=np.float32(sampling.top_p if has_top_p else math.inf),
            min_p=np.float32(sampling.min_p or 0),
            repetition_penalty=np.float32(sampling.repetition_penalty),
            presence_penalty=np.float32(sampling.presence_penalty),
            frequency_penalty=np.float32(sampling.frequency_penalty),
            bias_token_E=bias_token_E,
            bias_E=bias_E,
            seed=np.int32(sampling.seed),
            sample=np.int32(sample),
        )


jax.tree_util.register_dataclass(RowSettings, [field.name for field in fields(RowSettings)], [])


@dataclass(frozen=True, kw_only=True)
class History:
    """The tokens of rows before the one that is chosen."""

    token_BS: jax.Array  # int32: by position
    prompt_B: jax.Array  # int32: how many of them are the prompt's
    total_B: jax.Array  # int32: how many of them there are


jax.tree_util.register_dataclass(History, ["token_BS", "prompt_B", "total_B"], [])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of tokens, before any setting has changed them."""

    chosen: jax.Array  # float32 [...], of the token that was taken
    tokens: jax.Array  # int32 [..., MOST_ALTERNATIVES], the most likely ones
    values: jax.Array  # float32 [..., MOST_ALTERNATIVES], theirs


jax.tree_util.register_dataclass(Scores, ["chosen", "tokens", "values"], [])


def empty_scores(*shape: int) -> Scores:
    """Zeros for so many positions."""
    tokens = jnp.zeros((*shape, MOST_ALTERNATIVES), jnp.int32)
    return Scores(chosen=jnp.zeros(shape), tokens=tokens, values=jnp.zeros(tokens.shape))


def score_tokens(logits: jax.Array, token: jax.Array) -> Scores:
    """The log-probabilities of tokens [...] and of the most likely ones, by logits [..., V]."""
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, tokens = jax.lax.top_k(logits, min(MOST_ALTERNATIVES, logits.shape[-1]))
    missing = [(0, 0)] * token.ndim + [(0, MOST_ALTERNATIVES - tokens.shape[-1])]
    return Scores(
        chosen=(jnp.take_along_axis(logits, token[..., None], axis=-1) - log_z)[..., 0],
        tokens=jnp.pad(tokens, missing),
        values=jnp.pad(values - log_z, missing, constant_values=-jnp.inf),
    )


def sample_rows(logits_BV: jax.Array, settings: RowSettings, history: History) -> jax.Array:
    """The next token of each row, int32 [B]; a draw depends on its position, and on nothing of the other rows."""
    logits_BV = jax.lax.cond(
        _is_adjusted(settings).any(), lambda: adjust_logits(replicate(logits_BV), settings, history), lambda: logits_BV
    )
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_drawn_B = settings.temperature > 0

    def draw_rows() -> jax.Array:
        scaled_BV = replicate(logits_BV) / jnp.where(is_drawn_B, settings.temperature, 1.0)[:, None]
        filtered_BV = jax.lax.cond(
            (is_drawn_B & _is_filtered(settings, logits_BV.shape[-1])).any(),
            lambda: filter_logits(scaled_BV, settings),
            lambda: scaled_BV,
        )

        def draw(seed, sample, position, logits_V):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
            return jax.random.categorical(key, logits_V)

        return jax.vmap(draw)(settings.seed, settings.sample, history.total_B, filtered_BV).astype(jnp.int32)

    drawn_B = jax.lax.cond(is_drawn_B.any(), draw_rows, lambda: best_B)
    return jnp.where(is_drawn_B, drawn_B, best_B)


def _is_adjusted(settings: RowSettings) -> jax.Array:
    has_penalty_B = (settings.presence_penalty != 0) | (settings.frequency_penalty != 0)
    return has_penalty_B | (settings.repetition_penalty != 1) | (settings.bias_E != 0).any(-1)


def _is_filtered(settings: RowSettings, vocabulary: int) -> jax.Array:
    return (settings.top_k < vocabulary) | (settings.top_p <= 1) | (settings.min_p > 0)


def adjust_logits(logits_BV: jax.Array, settings: RowSettings, history: History) -> jax.Array:
    """Logits with biases, then penalties for the tokens before.

    The repetition penalty is for tokens of prompt and text (arXiv:1909.05858, section 4.1); the presence and the
    frequency penalty are for those of the text alone, as OpenAI's API defines them.
    """
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    logits_BV = logits_BV.at[rows_B1, settings.bias_token_E].add(settings.bias_E, mode="drop")
    position_S = jnp.arange(history.token_BS.shape[1])
    is_token_BS = position_S < history.total_B[:, None]
    is_new_BS = is_token_BS & (position_S >= history.prompt_B[:, None])
    count_BV = jnp.zeros(logits_BV.shape, jnp.int32)
    is_seen_BV = count_BV.at[rows_B1, history.token_BS].add(is_token_BS.astype(jnp.int32)) > 0
    count_BV = count_BV.at[rows_B1, history.token_BS].add(is_new_BS.astype(jnp.int32))
    repetition_B1, presence_B1, frequency_B1 = (
        x[:, None] for x in (settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty)
    )
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(is_seen_BV, repeated_BV, logits_BV)
    return logits_BV - presence_B1 * (count_BV > 0) - frequency_B1 * count_BV


def filter_logits(logits_BV: jax.Array, settings: RowSettings) -> jax.Array:
    """Logits, -inf for tokens that top_k, then top_p, then min_p exclude; of equal ones, none or all."""
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    rank_V = jnp.arange(logits_BV.shape[-1])
    descending_BV = jnp.where(rank_V < settings.top_k[:, None], descending_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(descending_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    descending_BV = jnp.where(before_BV < settings.top_p[:, None], descending_BV, -jnp.inf)
    is_likely_BV = probability_BV >= settings.min_p[:, None] * probability_BV[:, :1]
    descending_BV = jnp.where(is_likely_BV, descending_BV, -jnp.inf)
    least_B1 = jnp.min(descending_BV, axis=-1, keepdims=True, where=descending_BV > -jnp.inf, initial=jnp.inf)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
