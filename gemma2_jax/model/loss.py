"""Next-token cross-entropy on soft-capped logits that never exist all at once.

Logits are computed for a chunk of tokens at a time. The gradient is computed in the same pass, as a chunk's logits give
its share of the gradient at once: three matrix products in all, where recomputing the logits would take four, and no
logits are kept. The embedding's gradient is computed only if it is asked for, so a frozen embedding costs nothing.

Rows that take the place of some of the embedding's are a second matrix with a few columns of logits of its own, and the
embedding's logits of those tokens are left out. So no second embedding with these rows in it is ever made.
"""

from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma2_jax.mesh import axis_size, constrain

# With a softcap of no more than this, the exp of a logit and its sum over any vocabulary are finite in float32. Then no
# maximum is subtracted, which vocabulary shards would have to exchange before they sum.
LARGEST_SAFE_SOFTCAP = 60.0


class OutputMatrix(NamedTuple):
    """The tied embedding, and the rows that take the place of some of its rows, where there are any."""

    embedding_VD: jax.Array
    rows_ED: jax.Array | None = None
    tokens_E: jax.Array | None = None  # int32, whose rows they are


def cross_entropy(hidden_BTD, output: OutputMatrix, targets_BT, weights_BT, *, softcap: float | None, chunk: int):
    """The sum of weighted negative log-likelihoods (nats), a float32 scalar, with gradients of hidden and `output`.

    Args:
      hidden_BTD: final hidden states, in the compute dtype; logits are hidden @ embedding^T, accumulated in float32.
      output: the tied embedding and the rows in its place, cast to the compute dtype.
      targets_BT: int32 token ids to be predicted.
      weights_BT: float32; 0 leaves a position out.
      softcap: logits become softcap * tanh(logit / softcap); None leaves them.
      chunk: positions of each row whose [B, chunk, V] logits exist at one time.
    """
    return grouped_cross_entropy(hidden_BTD, output, targets_BT, weights_BT, None, softcap=softcap, chunk=chunk)[0]


def grouped_cross_entropy(
    hidden_BTD, output: OutputMatrix, targets_BT, weights_BT, groups_BJ, *, softcap: float | None, chunk: int
) -> tuple[jax.Array, jax.Array | None]:
    """The `cross_entropy`, and its parts by group of rows, float32 [J], of which there is no gradient.

    groups_BJ (float32) is 1 where a row is of the group, else 0; without groups, None, there are no parts.
    """
    T = targets_BT.shape[1]
    # Positions are spread over these shards; every chunk takes an equal number of positions from each.
    shards = axis_size("context") * axis_size("tensor")
    shards = shards if T % shards == 0 else 1
    count = -(-T // chunk)
    size = -(-T // (shards * count))

    def split_chunks(x_BT):
        B, _, *rest = x_BT.shape
        x_BT = x_BT.reshape(B, shards, T // shards, *rest)
        x_BT = jnp.pad(x_BT, ((0, 0), (0, 0), (0, count * size - T // shards)) + ((0, 0),) * len(rest))
        x_BT = jnp.moveaxis(x_BT.reshape(B, shards, count, size, *rest), 2, 0)
        return x_BT.reshape(count, B, shards * size, *rest)

    inputs = split_chunks(hidden_BTD), split_chunks(targets_BT), split_chunks(weights_BT.astype(jnp.float32))
    with jax.named_scope("loss"):
        matrices = [constrain(output.embedding_VD.astype(hidden_BTD.dtype), "VD")]
        if output.rows_ED is not None:
            matrices.append(constrain(output.rows_ED.astype(hidden_BTD.dtype), "ED"))
        return _chunked_loss(softcap, inputs[0], matrices, output.tokens_E, *inputs[1:], groups_BJ)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(softcap, hidden_CBTD, matrices, tokens_E, targets_CBT, weights_CBT, groups_BJ):
    """The loss summed over C chunks, and by group.

    `matrices` are the embedding and, if there are any, the rows in its place.
    """
    columns = _split_vocabulary(matrices, tokens_E)

    def step(totals, inputs):
        losses_BT, _ = _chunk_loss(softcap, columns, *inputs)
        return _add_losses(totals, losses_BT, groups_BJ), None

    return jax.lax.scan(step, _zero_totals(groups_BJ), (hidden_CBTD, targets_CBT, weights_CBT))[0]


def _zero_totals(groups_BJ):
    return jnp.float32(0), None if groups_BJ is None else jnp.zeros(groups_BJ.shape[1:], jnp.float32)


def _add_losses(totals, losses_BT, groups_BJ):
    """The totals with these losses added: of all rows, and of each group's."""
    total, total_J = totals
    if groups_BJ is not None:  # not a matrix product, which may round to fewer bits
        total_J += jnp.sum(jnp.sum(losses_BT, axis=1)[:, None] * groups_BJ, axis=0)
    return total + jnp.sum(losses_BT), total_J


def _chunked_loss_forward(softcap, hidden_CBTD, matrices, tokens_E, targets_CBT, weights_CBT, groups_BJ):
    """`_chunked_loss`, and its gradients, which the backward pass only multiplies with the loss's own gradient."""
    trained = [matrix.perturbed for matrix in matrices]
    columns = _split_vocabulary([matrix.value for matrix in matrices], None if tokens_E is None else tokens_E.value)
    groups_BJ = None if groups_BJ is None else groups_BJ.value

    def step(carry, inputs):
        totals, sums = carry
        hidden_BTD = inputs[0]
        losses_BT, logit_grads = _chunk_loss(softcap, columns, *inputs)
        products, new_sums = [], []
        for column, grad_BTV, grad_VD in zip(columns, logit_grads, sums, strict=True):
            grad_BTV = grad_BTV.astype(hidden_BTD.dtype)
            if grad_VD is not None:
                grad_DV = jnp.einsum("BTD,BTV->DV", hidden_BTD, grad_BTV, preferred_element_type=jnp.float32)
                # This order transposes the small operand where a library must transpose one.
                grad_VD = constrain(grad_VD + grad_DV.T, column.letters)
            new_sums.append(grad_VD)
            products.append(jnp.einsum("BTV,VD->BTD", grad_BTV, column.matrix_VD))
        totals = _add_losses(totals, losses_BT, groups_BJ)
        return (totals, new_sums), constrain(reduce(add, products), "BTD", "between_blocks")

    zeros = [
        jnp.zeros(column.matrix_VD.shape, jnp.float32) if wanted else None
        for column, wanted in zip(columns, trained, strict=True)
    ]
    inputs = hidden_CBTD.value, targets_CBT.value, weights_CBT.value
    (totals, sums), grad_CBTD = jax.lax.scan(step, (_zero_totals(groups_BJ), zeros), inputs)
    return totals, (grad_CBTD, sums)


def _chunked_loss_backward(softcap, gradients, cotangents):
    (grad_CBTD, sums), cotangent = gradients, cotangents[0]
    sums = [None if grad_VD is None else (cotangent * grad_VD).astype(grad_CBTD.dtype) for grad_VD in sums]
    return (cotangent * grad_CBTD).astype(grad_CBTD.dtype), sums, None, None, None, None


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward, symbolic_zeros=True)


class _Columns(NamedTuple):
    """Columns of the logits, which a matrix makes; V stands for E where it is that of rows in the embedding's place."""

    letters: str  # the matrix's dims
    matrix_VD: jax.Array
    tokens_V: jax.Array  # whose logits they are
    kept_V: jax.Array | None = None  # bool; those of other tokens are left out. None: all are kept

    def keep(self, x_BTV: jax.Array) -> jax.Array:
        """`x_BTV` with zeros in columns that are left out."""
        return x_BTV if self.kept_V is None else jnp.where(self.kept_V, x_BTV, 0)


def _split_vocabulary(matrices, tokens_E) -> list[_Columns]:
    """The columns of each matrix, every token among those of one."""
    embedding_VD, *rows = matrices
    tokens_V = jnp.arange(embedding_VD.shape[0])
    if not rows:
        return [_Columns("VD", embedding_VD, tokens_V)]
    kept_V = jnp.ones(tokens_V.shape, bool).at[tokens_E].set(False)
    return [_Columns("VD", embedding_VD, tokens_V, kept_V), _Columns("ED", rows[0], tokens_E)]


def _chunk_loss(softcap, columns: list[_Columns], hidden_BTD, targets_BT, weights_BT):
    """The losses of one chunk, and their gradients with respect to logits before the softcap, [B, T, V] each."""
    hidden_BTD = constrain(constrain(hidden_BTD, "BTD", "between_blocks"), "BTD", "for_logits")
    logits, slopes = zip(*(_squashed_logits(softcap, column, hidden_BTD) for column in columns), strict=True)
    log_z_BT = _log_normalizer(softcap, columns, logits)
    # The target's logit by a comparison and a sum, not a gather: both work within each shard of the vocabulary.
    hits = [column.keep(column.tokens_V == targets_BT[..., None]) for column in columns]
    targets = (jnp.sum(jnp.where(hit_BTV, x_BTV, 0), axis=-1) for hit_BTV, x_BTV in zip(hits, logits, strict=True))
    gradients = [
        column.keep((jnp.exp(x_BTV - log_z_BT[..., None]) - hit_BTV) * weights_BT[..., None]) * slope_BTV
        for column, x_BTV, hit_BTV, slope_BTV in zip(columns, logits, hits, slopes, strict=True)
    ]
    return (log_z_BT - reduce(add, targets)) * weights_BT, gradients


def _squashed_logits(softcap, column: _Columns, hidden_BTD):
    """Soft-capped logits, float32 [B, T, V], and their slope by the logits before that."""
    letters = f"BT{column.letters[0]}"
    raw_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, column.matrix_VD, preferred_element_type=jnp.float32)
    raw_BTV = constrain(raw_BTV, letters, "for_logits")
    if softcap is None:
        return raw_BTV, 1.0
    squashed_BTV = jnp.tanh(raw_BTV / softcap)
    return softcap * squashed_BTV, 1 - jnp.square(squashed_BTV)


def _log_normalizer(softcap, columns: list[_Columns], logits) -> jax.Array:
    """The logarithm of the sum of all tokens' exponentials, [B, T]."""
    if softcap is not None and softcap <= LARGEST_SAFE_SOFTCAP:
        exponentials = (column.keep(jnp.exp(x_BTV)) for column, x_BTV in zip(columns, logits, strict=True))
        return jnp.log(reduce(add, (jnp.sum(x_BTV, axis=-1) for x_BTV in exponentials)))
    parts = [
        jax.nn.logsumexp(x_BTV, axis=-1, where=column.kept_V) for column, x_BTV in zip(columns, logits, strict=True)
    ]
    return reduce(jnp.logaddexp, parts)
