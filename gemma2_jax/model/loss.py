"""Next-token cross-entropy on soft-capped logits that never exist all at once.

Logits are computed for a chunk of tokens at a time. The gradient is computed in the same pass, as a chunk's logits give
its share of the gradient at once: three matrix products in all, where recomputing the logits would take four, and no
logits are kept. The embedding's gradient is computed only if it is asked for, so a frozen embedding costs nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gemma2_jax.mesh import axis_size, constrain

# With a softcap of no more than this, the exp of a logit and its sum over any vocabulary are finite in float32. Then no
# maximum is subtracted, which vocabulary shards would have to exchange before they sum.
LARGEST_SAFE_SOFTCAP = 60.0


def cross_entropy(hidden_BTD, embedding_VD, targets_BT, weights_BT, *, softcap: float | None, chunk: int):
    """The sum of weighted negative log-likelihoods (nats), a float32 scalar, with gradients of hidden and embedding.

    Args:
      hidden_BTD: final hidden states, in the compute dtype; logits are hidden @ embedding^T, accumulated in float32.
      embedding_VD: tied embedding, cast to the compute dtype.
      targets_BT: int32 token ids to be predicted.
      weights_BT: float32; 0 leaves a position out.
      softcap: logits become softcap * tanh(logit / softcap); None leaves them.
      chunk: positions of each row whose [B, chunk, V] logits exist at one time.
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
        embedding_VD = constrain(embedding_VD.astype(hidden_BTD.dtype), "VD")
        return _chunked_loss(softcap, inputs[0], embedding_VD, *inputs[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(softcap, hidden_CBTD, embedding_VD, targets_CBT, weights_CBT):
    """The loss summed over C chunks."""

    def step(total, inputs):
        loss, _ = _chunk_loss(softcap, embedding_VD, *inputs)
        return total + loss, None

    return jax.lax.scan(step, jnp.float32(0), (hidden_CBTD, targets_CBT, weights_CBT))[0]


def _chunked_loss_forward(softcap, hidden_CBTD, embedding_VD, targets_CBT, weights_CBT):
    """`_chunked_loss`, and its gradients, which the backward pass only multiplies with the loss's own gradient."""
    trained = embedding_VD.perturbed
    embedding_VD = embedding_VD.value

    def step(carry, inputs):
        total, grad_VD = carry
        hidden_BTD = inputs[0]
        loss, grad_BTV = _chunk_loss(softcap, embedding_VD, *inputs)
        grad_BTV = grad_BTV.astype(hidden_BTD.dtype)
        if trained:
            grad_DV = jnp.einsum("BTD,BTV->DV", hidden_BTD, grad_BTV, preferred_element_type=jnp.float32)
            # This order transposes the small operand where a library must transpose one.
            grad_VD = constrain(grad_VD + grad_DV.T, "VD")
        total += loss
        grad_BTD = constrain(jnp.einsum("BTV,VD->BTD", grad_BTV, embedding_VD), "BTD", "between_blocks")
        return (total, grad_VD), grad_BTD

    start = jnp.float32(0), jnp.zeros(embedding_VD.shape, jnp.float32) if trained else None
    inputs = hidden_CBTD.value, targets_CBT.value, weights_CBT.value
    (total, grad_VD), grad_CBTD = jax.lax.scan(step, start, inputs)
    return total, (grad_CBTD, grad_VD)


def _chunked_loss_backward(softcap, gradients, cotangent):
    grad_CBTD, grad_VD = gradients
    if grad_VD is not None:
        grad_VD = (cotangent * grad_VD).astype(grad_CBTD.dtype)
    return (cotangent * grad_CBTD).astype(grad_CBTD.dtype), grad_VD, None, None


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward, symbolic_zeros=True)


def _chunk_loss(softcap, embedding_VD, hidden_BTD, targets_BT, weights_BT):
    """The loss of one chunk, and its gradient with respect to the logits before the softcap, float32 [B, T, V]."""
    hidden_BTD = constrain(constrain(hidden_BTD, "BTD", "between_blocks"), "BTD", "for_logits")
    raw_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, embedding_VD, preferred_element_type=jnp.float32)
    raw_BTV = constrain(raw_BTV, "BTV", "for_logits")
    logits_BTV, slope_BTV = raw_BTV, 1.0
    if softcap is not None:
        squashed_BTV = jnp.tanh(raw_BTV / softcap)
        logits_BTV, slope_BTV = softcap * squashed_BTV, 1 - jnp.square(squashed_BTV)
    if softcap is not None and softcap <= LARGEST_SAFE_SOFTCAP:
        log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
    else:
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # The target's logit by a comparison and a sum, not a gather: both work within each shard of the vocabulary.
    hit_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    nll_BT = log_z_BT - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), axis=-1)
    grad_BTV = (jnp.exp(logits_BTV - log_z_BT[..., None]) - hit_BTV) * weights_BT[..., None]
    return jnp.sum(nll_BT * weights_BT), grad_BTV * slope_BTV
