"""Sampling against transformers' processors, row by row, each row with settings of its own."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gemma2_jax.inference.sampling import (
    History,
    RowSettings,
    adjust_logits,
    filter_logits,
    sample_rows,
    score_tokens,
)
from gemma2_jax.inference.settings import GREEDY, Sampling

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 500)).astype(np.float32)


def stack_rows(*samplings: Sampling) -> RowSettings:
    return jax.tree.map(lambda *x: jnp.stack(x), *(RowSettings.of(sampling) for sampling in samplings))


def history_of(*rows: list[int], prompt: int = 0, length: int = 40) -> History:
    token = np.zeros((len(rows), length), np.int32)
    for padded, row in zip(token, rows, strict=True):
        padded[: len(row)] = row
    return History(
        token_BS=jnp.asarray(token),
        prompt_B=jnp.full(len(rows), prompt),
        total_B=jnp.array([len(row) for row in rows]),
    )


FILTERS = [(None, None, None), (1, None, None), (40, None, None), (900, None, None), (None, 0.3, None),
           (None, 0.95, None), (None, 1.0, None), (7, 0.8, None), (200, 0.99, None), (1, 0.01, None),
           (None, None, 0.05), (None, None, 1.0), (None, None, 0.0), (50, 0.9, 0.02)]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_distributions_are_those_of_transformers(temperature):
    """All filters at once, in rows of one batch."""
    logits = torch.tensor(LOGITS[:1])
    expected = []
    for top_k, top_p, min_p in FILTERS:
        warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
        if top_k is not None:
            warpers.append(transformers.TopKLogitsWarper(top_k))
        if top_p is not None:
            warpers.append(transformers.TopPLogitsWarper(top_p))
        if min_p is not None:
            warpers.append(transformers.MinPLogitsWarper(min_p))
        expected.append(warpers(torch.zeros((1, 1), dtype=torch.int64), logits).softmax(-1)[0].numpy())
    settings = stack_rows(*(Sampling(temperature=temperature, top_k=k, top_p=p, min_p=m) for k, p, m in FILTERS))
    scaled = np.tile(LOGITS[:1], (len(FILTERS), 1)) / np.float32(temperature)
    found = jax.nn.softmax(filter_logits(jnp.asarray(scaled), settings), axis=-1)
    np.testing.assert_array_equal(np.asarray(found) > 0, np.array(expected) > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_penalties_and_biases_are_those_of_transformers():
    """A row with biases and a repetition penalty, one with either, one with none."""
    rows = [[5, 9, 9, 400], [1, 2, 3], [7], [8, 8]]
    samplings = [
        Sampling(repetition_penalty=1.7, logit_bias=((5, 2.5), (17, -math.inf), (499, -3.0))),
        Sampling(repetition_penalty=0.6),
        Sampling(logit_bias=((3, 4.0),)),
        GREEDY,
    ]
    expected = []
    for row, sampling, logits in zip(rows, samplings, torch.tensor(LOGITS), strict=True):
        processors = transformers.LogitsProcessorList()
        if sampling.logit_bias:
            bias = {(token,): value for token, value in sampling.logit_bias}
            processors.append(transformers.SequenceBiasLogitsProcessor(bias))
        if sampling.repetition_penalty != 1:
            processors.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        expected.append(processors(torch.tensor([row]), logits[None])[0].numpy())
    found = adjust_logits(jnp.asarray(LOGITS), stack_rows(*samplings), history_of(*rows, prompt=1))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_presence_and_frequency_count_new_tokens_alone():
    logits = jnp.zeros((2, 8))
    settings = stack_rows(Sampling(presence_penalty=0.5, frequency_penalty=0.25), Sampling(frequency_penalty=-1.0))
    found = adjust_logits(logits, settings, history_of([3, 3, 5, 5, 5, 6], [3, 3, 1, 1, 2, 2], prompt=2))
    np.testing.assert_allclose(found, [[0, 0, 0, 0, 0, -1.25, -0.75, 0], [0, 2, 2, 0, 0, 0, 0, 0]])


def test_draws_have_their_distribution():
    """Twenty thousand samples of the same logits, drawn at once: counts lie within five standard deviations."""
    rows, logits = 20_000, jnp.asarray(LOGITS[0, :20])
    one = RowSettings.of(Sampling(temperature=1.3, top_k=12, top_p=0.9, seed=3))
    settings = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), one)
    settings = replace(settings, sample=jnp.arange(rows), bias_token_E=settings.bias_token_E[:, :1],
                       bias_E=settings.bias_E[:, :1])  # fmt: skip
    logits_BV = jnp.broadcast_to(logits, (rows, 20))
    probability = np.asarray(jax.nn.softmax(filter_logits(logits_BV[:1] / 1.3, stack_rows(
        Sampling(temperature=1.3, top_k=12, top_p=0.9))))[0])  # fmt: skip
    none = jnp.zeros(rows, jnp.int32)
    history = History(token_BS=jnp.zeros((rows, 1), jnp.int32), prompt_B=none, total_B=none + 7)
    counts = np.bincount(sample_rows(logits_BV, settings, history), minlength=20)
    assert 5 < np.count_nonzero(probability) < 12
    assert (counts[probability == 0] == 0).all()
    spread = np.sqrt(rows * probability * (1 - probability))
    assert (abs(counts - rows * probability) <= 5 * spread).all()


def test_rows_are_chosen_each_in_its_own_way():
    """A row with a bias, one that is drawn, one that is neither: the last has the most likely token."""
    samplings = [Sampling(logit_bias=((77, 100.0),)), Sampling(temperature=5.0, seed=1), GREEDY, GREEDY]
    found = sample_rows(jnp.asarray(LOGITS), stack_rows(*samplings), history_of([1], [1], [1], [1]))
    best = LOGITS.argmax(-1)
    assert found.tolist() == [77, int(found[1]), best[2], best[3]] and found[1] != best[1]


def test_scores_are_of_logits_as_they_are():
    scores = score_tokens(jnp.asarray(LOGITS), jnp.array([3, 4, 5, 6]))
    expected = torch.tensor(LOGITS).log_softmax(-1)
    values, tokens = expected.topk(20)
    np.testing.assert_allclose(scores.chosen, expected[range(4), [3, 4, 5, 6]], rtol=1e-5)
    np.testing.assert_array_equal(scores.tokens, tokens)
    np.testing.assert_allclose(scores.values, values, rtol=1e-5, atol=1e-6)


def test_scores_of_few_tokens():
    scores = score_tokens(jnp.zeros((1, 3)), jnp.array([1]))
    np.testing.assert_allclose(scores.values[0], [math.log(1 / 3)] * 3 + [-math.inf] * 17, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-300),
        ("top_k", 0),
        ("top_k", 10**11),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("seed", 10**20),
        ("seed", -1),
    ],
)
def test_bad_sampling_says_which(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (((-1, 1.0),), "for token -1"),
        (((5, math.nan),), "has nan"),
        (tuple((n, 1.0) for n in range(301)), "301 tokens"),
    ],
)
def test_bad_biases_say_which(bias, said):
    with pytest.raises(ValueError, match=said):
        Sampling(logit_bias=bias)
