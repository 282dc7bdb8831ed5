"""Gemma 2 in Flax NNX: Einsum, RMSNorm, RoPE, Attention, MLP, Block, Gemma2.

The modules describe one model and hold its weights with Hugging Face's values: the query scale, 1 + w of the norms
and sqrt(D) of the embedding are applied at run time. Layers differ in their window alone, so their weights are stacked
([L, ...]) and scanned over, with the window as data. Callers decide on the mesh, the implementation of attention,
training, and how long a cache lives.

Source: Gemma 2 (arXiv:2408.00118). Shapes are in the letters of `dims`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax import dims
from gemma2_jax.mesh import constrain, constrain_stored, replicate
from gemma2_jax.model.attention import xla as attention_xla
from gemma2_jax.model.attention.choice import Implementation
from gemma2_jax.model_config import TOKEN_ROWS, ModelConfig, is_adapter_path

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # from q, k, v to the output and the cache
Rope = tuple[jax.Array, jax.Array]  # cos and sin of the rotary angles: `rope_angles`
# Keys and values [B, K, S, H] of each layer: `attention.xla.attend_cached`. Those of a stack are [L, B, K, S, H].
Cache = list[tuple[jax.Array, jax.Array]] | tuple[jax.Array, jax.Array]

Weights = dict[str, jax.Array]  # arrays by path, such as "blocks/attn/q/w"

INIT_STD = 0.02


class AdapterInputs(NamedTuple):
    """What adapters take beside activations and weights."""

    layer: jax.Array | int  # its number
    key: jax.Array | None = None  # for dropout; None: there is none
    index_B: jax.Array | None = None  # int32: which of several adapters each row takes (`adapter_bank`)

    def split(self, count: int) -> "list[AdapterInputs]":
        """The same for so many parts of a layer, each with a key of its own."""
        keys = [None] * count if self.key is None else jax.random.split(self.key, count)
        return [self._replace(key=key) for key in keys]


class Update(Protocol):
    """What an adapter does to the output of a projection; see `lora`."""

    after_norm: bool  # whether it changes the output of the post-norm, and not that of the projection itself

    def __call__(self, x: jax.Array, y: jax.Array, w: jax.Array, inputs: AdapterInputs) -> jax.Array: ...


class RowOverride(Protocol):
    """Rows of the embedding in place of the model's; see `lora`."""

    tokens: tuple[int, ...]  # E ids

    @property
    def rows_ED(self) -> jax.Array: ...

    def embed(self, x_BTD: jax.Array, tokens_BT: jax.Array, scale: jax.Array) -> jax.Array: ...

    def add_gradient(self, total_ED: jax.Array, tokens_BT: jax.Array, d_BTD: jax.Array) -> jax.Array: ...


def split_equation(equation: str) -> tuple[str, str, str]:
    """The dims of input, weight and output: "BTD,DNH->BTNH" gives "BTD", "DNH" and "BTNH"."""
    inputs, weight, outputs = equation.replace("->", ",").split(",")
    return inputs, weight, outputs


def activation_place(letters: str) -> dims.Place:
    """The column of `dims.DIMS` for a projection's input or output: "between_blocks" if it has the model's width."""
    return "between_blocks" if "D" in letters else "used"


def _contract(equation: str, x: jax.Array, w: jax.Array, dtype=None) -> jax.Array:
    """`jnp.einsum(equation, x, w)` for a sum without batch dims, in which no large operand is transposed.

    XLA's libraries on CPU copy the first operand unless its last dims are summed over, and the second unless its first
    dims are; a fusion that computes an operand then computes it in the copy's order. Therefore x comes first and keeps
    the order of its summed dims, which einsum would sort, and the gradient with respect to w has the smaller of its
    operands first.
    """
    first, second, result = split_equation(equation)
    summed = [letter for letter in first if letter not in result]
    remaining = [letter for letter in first + second if letter not in summed]
    summed_dims = [first.index(letter) for letter in summed], [second.index(letter) for letter in summed]
    # Of one row XLA on GPUs makes products and a sum, and may write the products to memory. In float32 it does not.
    is_row = x.size == math.prod(x.shape[dim] for dim in summed_dims[0])
    summed_dtype = jnp.float32 if is_row and dtype is None else dtype
    contracted = jnp.tensordot(x, w, summed_dims, preferred_element_type=summed_dtype)
    contracted = contracted.astype(dtype or x.dtype)
    return jnp.transpose(contracted, [remaining.index(letter) for letter in result])


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def apply_weight(equation: str, x: jax.Array, w: jax.Array, place: dims.Place = "used") -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of x, with one layer's weight as it is stored.

    The weight is rounded to that dtype and then gathered. Its gradient is computed, and summed over shards, in the
    weight's own dtype. The gradient of the result is resharded to `place` once, for both products of the backward pass.
    """
    return _apply_weight_forward(equation, _Primal(x), _Primal(w), place)[0]


class _Primal(NamedTuple):
    """An argument as `defvjp(symbolic_zeros=True)` passes it: `perturbed` says whether its gradient is asked for."""

    value: jax.Array
    perturbed: bool = False


def _apply_weight_forward(equation, x, w, place):
    gathered = constrain(w.value.astype(x.value.dtype), split_equation(equation)[1])
    like_w = jnp.zeros((), w.value.dtype)
    return _contract(equation, x.value, gathered), (x.value, gathered, like_w, x.perturbed, w.perturbed)


def _apply_weight_backward(equation, place, residuals, grad):
    x, w, like_w, x_perturbed, w_perturbed = residuals
    inputs, weight, outputs = split_equation(equation)
    grad = constrain(grad, outputs, place)
    grad_x = _contract(f"{outputs},{weight}->{inputs}", grad, w) if x_perturbed else None
    if not w_perturbed:
        return grad_x, None
    if x.size <= grad.size:
        return grad_x, _contract(f"{inputs},{outputs}->{weight}", x, grad, like_w.dtype)
    return grad_x, _contract(f"{outputs},{inputs}->{weight}", grad, x, like_w.dtype)


apply_weight.defvjp(_apply_weight_forward, _apply_weight_backward, symbolic_zeros=True)


class Einsum(nnx.Module):
    """A projection: a weight applied by an einsum, whose letters also give the weight's shape and sharding.

    `equation` is like "BTD,DNH->BTNH". The stored weight has a leading L: one slice per layer, as `jax.lax.scan`
    takes them. Calling it gives the product of x and the weight; `adapt` applies its adapter, if it has one.
    """

    def __init__(self, equation: str, config: ModelConfig, *, std: float, rngs: nnx.Rngs):
        _, weight, self.outputs = split_equation(equation)
        self.equation = equation
        letters = f"L{weight}"
        self.letters = (("w", letters),)
        shape = dims.weight_shape(letters, config)
        self.w = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.scale: nnx.Param | None = nnx.data(None)  # float32, of each output; for a weight in int8 (`int8`)
        self.adapter: Update | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product of x and the weight, without the adapter."""
        if self.scale is None:
            return self._constrain(apply_weight(self.equation, x, self.w[...]))
        w = constrain(self.w[...].astype(x.dtype), split_equation(self.equation)[1])
        return self._constrain((_contract(self.equation, x, w) * self.scale[...]).astype(x.dtype))

    def adapt(self, y: jax.Array, x: jax.Array, inputs: AdapterInputs) -> jax.Array:
        """The output y for the input x, changed by the adapter.

        The positions of x may still be spread as between blocks. Without an adapter, this is y.
        """
        return y if self.adapter is None else self._constrain(self.adapter(x, y, self.w[...], inputs))

    def _constrain(self, y: jax.Array) -> jax.Array:
        return constrain(y, self.outputs, activation_place(self.outputs))


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + w) over D, in float32 and cast back (arXiv:1910.07467; Gemma's w is centered on zero)."""

    def __init__(self, config: ModelConfig, *, stacked: bool):
        letters = "LD" if stacked else "D"
        self.letters = (("w", letters),)
        self.eps = config.norm_eps
        self.w = nnx.Param(jnp.zeros(dims.weight_shape(letters, config)))

    @jax.named_scope("norm")
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * (1 + self.w[...].astype(jnp.float32))).astype(x_BTD.dtype)


def rope_angles(positions_BT: jax.Array, config: ModelConfig) -> Rope:
    """cos and sin of the rotary angles (arXiv:2104.09864), float32 [B, T, 1, H / 2]."""
    half = config.head_width // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Rotary position embedding of the whole head width, first half against second half, in float32."""
    cos, sin = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)


def _gather_positions(x_BTD: jax.Array) -> jax.Array:
    """x with all positions on every tensor shard, gathered once for all projections that read them."""
    return constrain(constrain(x_BTD, "BTD", "between_blocks"), "BTD")


# The names of `checkpoint_name` below are those of `compute.kept_outputs`. They change nothing that is computed.


def _project_to_stream(
    name: str, projection: Einsum, post_norm: RMSNorm, x: jax.Array, inputs: AdapterInputs
) -> jax.Array:
    """What a block adds to its residual stream, [B, T, D]: the projection of x, adapted before or after the norm."""
    y_BTD = checkpoint_name(projection(x), name)
    if projection.adapter is not None and projection.adapter.after_norm:
        return projection.adapt(post_norm(y_BTD), x, inputs)
    return post_norm(projection.adapt(y_BTD, x, inputs))


class Attention(nnx.Module):
    """The q, k, v and o projections around `attend`: attention of a sequence to itself, or of one token to a cache."""

    def __init__(self, config: ModelConfig, *, std_out: float, rngs: nnx.Rngs):
        make = partial(Einsum, config=config, rngs=rngs)
        self.q = make("BTD,DNH->BTNH", std=INIT_STD)
        self.k = make("BTD,DKH->BTKH", std=INIT_STD)
        self.v = make("BTD,DKH->BTKH", std=INIT_STD)
        self.o = make("BTNH,NHD->BTD", std=std_out)

    def __call__(self, x_BTD, rope: Rope, attend: Attend, post_norm: RMSNorm, inputs: AdapterInputs):
        inputs_q, inputs_k, inputs_v, inputs_o = inputs.split(4)
        with jax.named_scope("qkv"):
            gathered_BTD = _gather_positions(x_BTD)
            q_BTNH = apply_rope(self.q.adapt(checkpoint_name(self.q(gathered_BTD), "q"), x_BTD, inputs_q), rope)
            k_BTKH = apply_rope(self.k.adapt(checkpoint_name(self.k(gathered_BTD), "k"), x_BTD, inputs_k), rope)
            v_BTKH = self.v.adapt(checkpoint_name(self.v(gathered_BTD), "v"), x_BTD, inputs_v)
        with jax.named_scope("attend"):
            out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH)
            out_BTNH = constrain(out_BTNH, "BTNH")  # this also constrains its gradient
        with jax.named_scope("o"):
            return _project_to_stream("o", self.o, post_norm, out_BTNH, inputs_o), cache


class MLP(nnx.Module):
    """GeGLU: down(gelu_tanh(gate) * up) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, std_out: float, rngs: nnx.Rngs):
        make = partial(Einsum, config=config, rngs=rngs)
        self.gate = make("BTD,DF->BTF", std=INIT_STD)
        self.up = make("BTD,DF->BTF", std=INIT_STD)
        self.down = make("BTF,FD->BTD", std=std_out)

    def __call__(self, x_BTD, post_norm: RMSNorm, inputs: AdapterInputs):
        inputs_gate, inputs_up, inputs_down = inputs.split(3)
        with jax.named_scope("gate_up"):
            gathered_BTD = _gather_positions(x_BTD)
            gate_BTF = jax.nn.gelu(
                self.gate.adapt(checkpoint_name(self.gate(gathered_BTD), "gate"), x_BTD, inputs_gate), approximate=True
            )
            inner_BTF = gate_BTF * self.up.adapt(checkpoint_name(self.up(gathered_BTD), "up"), x_BTD, inputs_up)
        with jax.named_scope("down"):
            return _project_to_stream("down", self.down, post_norm, inner_BTF, inputs_down)


class Block(nnx.Module):
    """Attention and MLP on the residual stream, each with a norm before it and a norm after it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std_out = INIT_STD / math.sqrt(2 * config.layers)
        self.pre_attn_norm = RMSNorm(config, stacked=True)
        self.attn = Attention(config, std_out=std_out, rngs=rngs)
        self.post_attn_norm = RMSNorm(config, stacked=True)
        self.pre_mlp_norm = RMSNorm(config, stacked=True)
        self.mlp = MLP(config, std_out=std_out, rngs=rngs)
        self.post_mlp_norm = RMSNorm(config, stacked=True)

    def __call__(self, x_BTD, rope: Rope, attend: Attend, inputs: AdapterInputs):
        inputs_attn, inputs_mlp = inputs.split(2)
        with jax.named_scope("attention"):
            out_BTD, cache = self.attn(self.pre_attn_norm(x_BTD), rope, attend, self.post_attn_norm, inputs_attn)
            x_BTD = constrain(x_BTD + out_BTD, "BTD", "between_blocks")
        with jax.named_scope("mlp"):
            out_BTD = self.mlp(self.pre_mlp_norm(x_BTD), self.post_mlp_norm, inputs_mlp)
            x_BTD = constrain(x_BTD + out_BTD, "BTD", "between_blocks")
        return x_BTD, cache


class Gemma2(nnx.Module):
    """The whole model: tokens to logits (`__call__`) or to hidden states, and generation with a cache.

    `attention` comes from `choose_attention`, and `dtype` is that of activations and matrix products. Weights are drawn
    from `rngs.params` in float32, normal with standard deviation 0.02, less for o and down by sqrt(2 * layers); norms
    are zero.
    """

    def __init__(self, config: ModelConfig, *, attention: Implementation, dtype: str | jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.attention = attention
        self.letters = (("embedding", "VD"),)
        shape = dims.weight_shape("VD", config)
        self.embedding = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.embedding_letters = "VD"  # or "DV", which some machines multiply by faster (`transpose_embedding`)
        self.row_scale: nnx.Param | None = nnx.data(None)  # [V], float32; for an embedding in int8 (`int8`)
        self.token_rows: RowOverride | None = nnx.data(None)
        self.blocks: Block | nnx.List[Block] = Block(config, rngs=rngs)
        self.final_norm = RMSNorm(config, stacked=False)

    def __repr__(self) -> str:
        """One line. `nnx.display(model)` in a notebook, and `print(nnx.state(model))`, show every weight."""
        return f"{type(self).__name__}({'; '.join(self._describe())})"

    __str__ = __repr__  # NNX has another, with colors

    def _describe(self) -> list[str]:
        """The size, the dtypes and the adapters, in words."""
        sizes = Counter[tuple[str, str]]()
        for path, w in flatten_state(nnx.state(self)).items():
            sizes["of adapters" if is_adapter_path(path) else "parameters", str(w.dtype)] += w.size
        weights = " + ".join(f"{size:,} {kind} in {dtype}" for (kind, dtype), size in sizes.items())
        return [f"{self.config.layers} layers of width {self.config.width}", weights, f"computes in {self.dtype}"]

    def __call__(self, tokens_BT, positions_BT=None, segments_BT=None) -> jax.Array:
        """Logits of the token that follows each token, float32 [B, T, V].

        Args are those of `hidden_states`; without them, positions are 0 to T - 1 and a row is one segment.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segments_BT is None:
            segments_BT = jnp.zeros(tokens_BT.shape, jnp.int32)
        return self.logits(self.hidden_states(tokens_BT, positions_BT, segments_BT))

    def hidden_states(self, tokens_BT, positions_BT, segments_BT) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute dtype.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 positions for RoPE, from 0 in each document.
          segments_BT: int32; a token attends within its segment only. Padding is a segment of its own.
        """
        return self._run_layers(tokens_BT, positions_BT, partial(self.attend_sequence, segments_BT))[0]

    def attend_sequence(self, segments_BT, window, _, q, k, v):
        """The `attend` of a layer with this window: a whole sequence attends to itself. It takes and gives no cache."""
        return self._attend(self.attention.attend, q, k, v, segments_BT, window), None

    def empty_cache(self, rows: int, context: int) -> Cache:
        """A cache for so many rows of `context` tokens.

        A local layer's has room for its window alone, where layers are unstacked.
        """
        config = self.config
        is_stack = isinstance(self.blocks, Block)
        lengths = [context] * config.layers if is_stack else config.layer_windows(context)
        shapes = [(rows, config.kv_heads, length, config.head_width) for length in lengths]
        shapes = [(config.layers, *shapes[0])] if is_stack else shapes
        caches = [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for shape in shapes]
        return caches[0] if is_stack else caches

    def extend(self, tokens_BT, start_B, lengths_B, cache: Cache, adapter_B=None) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of the next tokens of each row, from position `start_B` on, and the cache with them.

        The cache holds the tokens before `start_B`; of those that are given, a row has the first `lengths_B`, and the
        others are padding. A prompt read in parts has the results of one read whole. `adapter_B` is the number of the
        adapter that each row takes, where the model has several (`adapter_bank`).
        """
        T = tokens_BT.shape[1]
        slots = max(x.shape[-2] for x in jax.tree.leaves(cache))

        def write_slots(cached_KSH, new_TKH, start, length):
            S, number_T = cached_KSH.shape[1], jnp.arange(T)
            is_kept_T = (number_T < length) & (number_T >= length - S)
            slot_T = jnp.where(is_kept_T, (start + number_T) % S, S)  # beyond the last nothing is written
            return cached_KSH.at[:, slot_T].set(jnp.swapaxes(new_TKH, 0, 1), mode="drop")

        def attend(window, cache, q, k, v):
            out_BTNH = self._attend(attention_xla.attend_extended, q, k, v, *cache, start_B, window)
            write = jax.vmap(write_slots)
            pairs = zip(cache, (k, v), strict=True)
            return out_BTNH, tuple(constrain(write(old, new, start_B, lengths_B), "BKSH") for old, new in pairs)

        positions_BT = start_B[:, None] + jnp.arange(T)
        return self._run_layers(tokens_BT, positions_BT, attend, cache, slots, adapter_B)

    def decode_step(self, token_B, position_B, cache: Cache, adapter_B=None) -> tuple[jax.Array, Cache]:
        """Hidden states [B, D] of one new token of each row, at `position_B`, and the cache with that token in it.

        `adapter_B` is as in `extend`.

        In a stack of layers the caches of local layers are as long as those of global ones, and their window is data:
        there jnp computes attention, as the kernels take no window.
        """
        slots = max(x.shape[-2] for x in jax.tree.leaves(cache))

        def write_slot(cached_KSH, new_1KH, position):
            return cached_KSH.at[:, position % cached_KSH.shape[1]].set(new_1KH[0])

        def attend(window, cache, q, k, v):
            pairs = zip(cache, (k, v), strict=True)
            cache = [constrain(jax.vmap(write_slot)(old, new, position_B), "BKSH") for old, new in pairs]
            # Without the barrier, XLA fuses the update into each of its readers, and copies the whole cache for it
            # (seen on CPU with one row).
            k, v = jax.lax.optimization_barrier(cache)
            if isinstance(self.blocks, Block):
                out_BNH = self._attend(attention_xla.attend_cached, q[:, 0], k, v, position_B, window)
            else:
                out_BNH = self._attend(self.attention.attend_cached, q[:, 0], k, v, position_B)
            return out_BNH[:, None], (k, v)

        hidden_BTD, cache = self._run_layers(token_B[:, None], position_B[:, None], attend, cache, slots, adapter_B)
        return hidden_BTD[:, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Soft-capped logits, float32 [..., V], of hidden states [..., D]."""
        logits = jnp.einsum(
            f"...D,{self.embedding_letters}->...V",
            hidden,
            self.embedding[...].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = logits if self.row_scale is None else logits * self.row_scale[...]
        if self.token_rows is not None:
            rows_ED = self.token_rows.rows_ED.astype(self.dtype)
            logits_E = jnp.einsum("...D,ED->...E", hidden, rows_ED, preferred_element_type=jnp.float32)
            logits = logits.at[..., np.asarray(self.token_rows.tokens)].set(logits_E)
        softcap = self.config.final_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def _attend(self, implementation, *inputs):
        scale = self.config.query_pre_attn_scalar**-0.5
        return implementation(*inputs, scale=scale, softcap=self.config.attn_softcap)

    def embed(self, tokens_BT) -> jax.Array:
        """The embedding's rows times sqrt(D), [B, T, D] in the compute dtype."""
        with jax.named_scope("embedding"):
            # Each shard looks all tokens up among the rows that it stores: tokens are fewer bytes than the table.
            tokens_BT = replicate(tokens_BT)
            if self.row_scale is None:
                row_BTD = self._look_up(self.embedding[...].astype(self.dtype), tokens_BT)
            else:
                scale_BT1 = self.row_scale[...][tokens_BT][..., None]
                row_BTD = (self._look_up(self.embedding[...], tokens_BT) * scale_BT1).astype(self.dtype)
            x_BTD = row_BTD * self._embedding_scale
            x_BTD = constrain(x_BTD, "BTD", "between_blocks")
            if self.token_rows is not None:
                x_BTD = self.token_rows.embed(x_BTD, tokens_BT, self._embedding_scale)
            return x_BTD

    def _look_up(self, embedding: jax.Array, tokens_BT) -> jax.Array:
        """Rows of the embedding, [B, T, D]."""
        if self.embedding_letters == "VD":
            return embedding[tokens_BT]
        return jnp.moveaxis(embedding[:, tokens_BT], 0, -1)

    def add_embedding_gradients(self, sums: Weights, tokens_BT, d_BTD) -> Weights:
        """The sums, float32 and by path, plus the gradients of the embedding, and of rows in its place, in `embed`.

        `d_BTD` is the gradient with respect to its result. Each shard of the embedding takes all tokens of its data
        shard, and adds the gradients of those whose rows it stores: nothing is left to sum over fsdp and context.
        """
        if sums.keys().isdisjoint(("embedding", TOKEN_ROWS)):
            return sums
        with jax.named_scope("embedding"):
            tokens_BT = replicate(tokens_BT)
            d_BTD = replicate(d_BTD).astype(jnp.float32) * self._embedding_scale.astype(jnp.float32)
            if "embedding" in sums:
                sums = sums | {"embedding": constrain_stored(sums["embedding"].at[tokens_BT].add(d_BTD), "VD")}
            if self.token_rows is not None:
                sums = sums | {TOKEN_ROWS: self.token_rows.add_gradient(sums[TOKEN_ROWS], tokens_BT, d_BTD)}
            return sums

    @property
    def _embedding_scale(self) -> jax.Array:
        return jnp.asarray(math.sqrt(self.config.width), self.dtype)

    def normalize_output(self, x_BTD) -> jax.Array:
        """The final norm of the last block's output."""
        with jax.named_scope("final_norm"):
            return self.final_norm(x_BTD)

    def _run_layers(
        self, tokens_BT, positions_BT, attend, cache: Sequence | None = None, length: int | None = None, adapter_B=None
    ) -> tuple[jax.Array, Any]:
        """Embedding, blocks and final norm: hidden states [B, T, D], and each layer's new cache.

        `attend(window, cache, q, k, v)` computes a layer's attention from its old cache, or None, and returns the
        output and the new cache. `length` is how many tokens there are to attend to, by default T.
        """
        rope = rope_angles(positions_BT, self.config)
        windows = self.config.layer_windows(length or tokens_BT.shape[1])
        run = self._scan_layers if isinstance(self.blocks, Block) else self._unroll_layers
        x_BTD, cache = run(self.embed(tokens_BT), rope, attend, windows, cache, adapter_B)
        return self.normalize_output(x_BTD), cache

    def _scan_layers(self, x_BTD, rope, attend, windows, cache, adapter_B):
        graph, weights = nnx.split(self.blocks)

        def layer(x_BTD, inputs):
            weights, window, number, old_cache = inputs
            adapter_inputs = AdapterInputs(number, index_B=adapter_B)
            return nnx.merge(graph, weights)(x_BTD, rope, partial(attend, window, old_cache), adapter_inputs)

        numbers = jnp.arange(len(windows))
        return jax.lax.scan(layer, x_BTD, (weights, jnp.asarray(windows, jnp.int32), numbers, cache))

    def _unroll_layers(self, x_BTD, rope, attend, windows, cache, adapter_B):
        assert isinstance(self.blocks, nnx.List)
        new_caches = []
        layers = zip(self.blocks, windows, cache or [None] * len(windows), strict=True)
        for number, (block, window, old_cache) in enumerate(layers):
            adapter_inputs = AdapterInputs(number, index_B=adapter_B)
            x_BTD, new_cache = block(x_BTD, rope, partial(attend, window, old_cache), adapter_inputs)
            new_caches.append(new_cache)
        return x_BTD, new_caches


def weight_dims(model: Gemma2) -> dict[str, str]:
    """The dims of every variable by its path: {"blocks/attn/q/w": "LDNH", ...}."""
    return {
        "/".join((*map(str, path), name)): letters
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        for name, letters in getattr(node, "letters", ())
    }


def flatten_state(state: nnx.State) -> Weights:
    """The arrays of a state by path, as everything outside the model holds them."""
    return cast(Weights, flatten_dict(nnx.to_pure_dict(state), sep="/"))


def rebuild_model[M: nnx.Module](graph: nnx.GraphDef[M], *weights: Weights) -> M:
    """The model, or part of a model, of this structure, with the arrays of all of `weights`."""
    return nnx.merge(graph, unflatten_dict({path: w for part in weights for path, w in part.items()}, sep="/"))


def transpose_embedding(model: Gemma2) -> Gemma2:
    """Changes the model to hold its embedding as [D, V]; returns it.

    On a CPU, XLA multiplies a few rows by such a matrix half again as fast as by one whose last dim is summed over.
    """
    model.embedding, model.embedding_letters = nnx.Param(jnp.transpose(model.embedding[...])), "DV"
    return model


def unstack_layers(model: Gemma2) -> Gemma2:
    """Changes the model to have one block per layer in place of the stack (blocks/0/attn/q/w and so on); returns it.

    Its compiled code is L times as long. Generation gets faster by it: a step uses each weight for few tokens, and
    cutting the weight out of the stack would take as long as using it.
    """
    assert isinstance(model.blocks, Block)
    graph, weights = nnx.split(model.blocks)
    layers = (jax.tree.map(itemgetter(index), weights) for index in range(model.config.layers))
    model.blocks = nnx.List([nnx.merge(graph, layer) for layer in layers])
    return model
