"""LoRA and DoRA as variables beside the weights they adapt, selected by a filter.

`attach_adapters` gives projections an `Adapter`; training with adapters is then training the variables of type
`AdapterParam` where full training trains those of type `nnx.Param`. Shapes come from the projection's einsum: A has
the contracted letters (the weight's input dims) and R, B has R and the produced letters (its output dims), DoRA's
magnitude the produced letters. Adapters act on activations, so a frozen weight needs no gradient.

Sources: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353; section 4.3: no gradient flows
through the norm). Without dropout this agrees with Hugging Face PEFT. With `after_norm` it agrees with Megatron-Bridge,
which applies the post-norm to the outputs of o and down before the adapter adds to them. Dropout acts on the inputs of
the low-rank branch only. PEFT does the same for LoRA; for DoRA it also drops the inputs of the frozen weight, in the
term by which the magnitude rescales that weight's output.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax import dims
from gemma2_jax.dims import Place
from gemma2_jax.mesh import constrain, constrain_stored, replicate
from gemma2_jax.model.gemma2 import (
    AdapterInputs,
    Einsum,
    Gemma2,
    activation_place,
    apply_weight,
    split_equation,
    weight_dims,
)
from gemma2_jax.model_config import AdapterConfig, ModelConfig, weight_name


class AdapterParam(nnx.Variable):
    """The type of every adapter variable; adapter training trains these."""


def trainable_filter(config: AdapterConfig) -> nnx.filterlib.Filter:
    """The filter that selects the variables that a run trains."""
    if config.kind == "none":
        return nnx.Param
    return nnx.Any(AdapterParam, lambda path, _: config.replaces("/".join(map(str, path))))


@dataclass(frozen=True)
class ProjectionDims:
    """The letters of a projection's einsum: of its input, weight and output, and those of its weight by their use."""

    inputs: str
    weight: str
    outputs: str

    @classmethod
    def of(cls, equation: str) -> "ProjectionDims":
        return cls(*split_equation(equation))

    @property
    def contracted(self) -> str:
        """The letters of the weight that are summed over."""
        return "".join(letter for letter in self.weight if letter not in self.outputs)

    @property
    def produced(self) -> str:
        """The letters of the weight that the output has."""
        return "".join(letter for letter in self.weight if letter in self.outputs)

    def column_norms(self, w, a, b, scale: jax.Array | float = 1.0, layers: Literal["L", ""] = "") -> jax.Array:
        """Column norms of W + scale * A B, float32 of the produced letters, without forming that matrix.

        |w + s A b|^2 = |w|^2 + 2 s b.(A^T w) + s^2 b.(A^T A) b, for each produced column. `layers` is "L" for arrays of
        all layers, with L in front, and "" for those of one layer. Q is R under a second letter, for A^T A.
        """
        w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
        weight, contracted, produced = layers + self.weight, layers + self.contracted, layers + self.produced
        low_rank = f"{layers}R{self.produced}"
        a_w = jnp.einsum(f"{contracted}R,{weight}->{low_rank}", a, w, precision="highest")
        gram = jnp.einsum(f"{contracted}R,{contracted}Q->{layers}RQ", a, a, precision="highest")
        if not layers:  # in a step, where XLA would otherwise move A between devices for these small sums
            gram, a_w = constrain(gram, "RR"), constrain(a_w, low_rank)
        b_gram = jnp.einsum(f"{layers}RQ,{layers}Q{self.produced}->{low_rank}", gram, b)
        square = jnp.einsum(f"{weight},{weight}->{produced}", w, w, precision="highest")
        cross = jnp.sum(b * (2 * scale * a_w + scale**2 * b_gram), axis=len(layers))
        return jnp.sqrt(square + cross)


class Adapter(nnx.Module):
    """The low-rank update of one projection, stacked over layers like its weight.

    For a projection "BTD,DNH->BTNH", the variables are a [L, D, R], uniform in +-1/sqrt(D); b [L, R, N, H], zero; and
    for DoRA m [L, N, H], the column norms of the weight. All are float32. A new adapter changes nothing.

    In layers that have no adapter all of them are zero, and stay zero in training: the gradients of A and B are
    products with each other, and a layer whose m is all zero leaves the output as it is, so that m has no gradient.
    """

    def __init__(self, base: Einsum, name: str, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.projection = ProjectionDims.of(base.equation)
        inputs, outputs = self.projection.inputs, self.projection.outputs
        contracted, produced = self.projection.contracted, self.projection.produced
        self.down_equation, self.up_equation = f"{inputs},{contracted}R->BTR", f"BTR,R{produced}->{outputs}"
        # Inputs and outputs of the model's width keep their positions spread as between blocks, so tensor shards
        # exchange only [B, T, R] for the adapter, and what they exchange for the projection itself does not change.
        self.input_place: Place = activation_place(inputs)
        self.output_place: Place = activation_place(outputs)
        self.scales = tuple(config.layer_scale(name, layer) for layer in range(model.layers))
        self.dropout, self.lacks_layers = config.dropout, bool(config.layers)
        self.after_norm = config.after_norm and produced == "D"  # only these projections have a norm after them
        self.letters = (("a", f"L{contracted}R"), ("b", f"LR{produced}"))
        # PEFT's start: A uniform in +-1/sqrt(fan-in) (Kaiming with a = sqrt(5)), B zero.
        bound = 1 / math.sqrt(math.prod(dims.weight_shape(contracted, model)))
        rank = config.stack_rank(name, model.layers)
        shape_a, shape_b = (dims.weight_shape(letters, model, rank) for _, letters in self.letters)
        absent = {*range(model.layers)} - {*(config.layers or range(model.layers))}
        ranks = [0 if layer in absent else config.layer_rank(name, layer) for layer in range(model.layers)]
        a = jax.random.uniform(rngs.params(), shape_a, jnp.float32, -bound, bound)
        self.a = AdapterParam(_keep_ranks(a, ranks))
        self.b = AdapterParam(jnp.zeros(shape_b))
        self.m: AdapterParam | None = nnx.data(None)
        if config.kind == "dora":
            self.letters += (("m", f"L{produced}"),)
            norms = self.projection.column_norms(
                base.w[...], self.a[...], self.b[...], layers="L"
            )  # of W alone: B is zero
            self.m = AdapterParam(_keep_ranks(norms[..., None], ranks)[..., 0])

    def __call__(self, x, y, w, inputs: AdapterInputs):
        """The adapted output, in the shape and dtype of y.

        Args:
          x: the projection's input, in the compute dtype, with the dims of its equation, such as [B, T, D].
          y: the projection's output; with `after_norm`, the post-norm's output.
          w: the projection's weight in this layer.
          inputs: the layer's number, and a key for dropout.
        """
        # The scale multiplies B, which is small, and not the activations.
        scale = self._layer_scale(inputs.layer)
        a, b = self.a[...], scale * self.b[...]
        if self.dropout and inputs.key is not None:
            keep = jax.random.bernoulli(inputs.key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        low_BTR = constrain(apply_weight(self.down_equation, x, a, self.input_place), "BTR", "between_blocks")
        low_BTR = constrain(low_BTR, "BTR", self.output_place)
        y = y + apply_weight(self.up_equation, low_BTR, b, self.output_place)
        if self.m is None:
            return y
        norm = jax.lax.stop_gradient(self.projection.column_norms(w, self.a[...], self.b[...], scale))
        return (y * self._magnitude_ratio(self.m[...], norm)).astype(y.dtype)

    def merged_weight(self, w_L: jax.Array, dtype, first: jax.Array | int = 0) -> jax.Array:
        """The weight `w_L` of layers from `first` on with the update added in float32, and rounded once to `dtype`.

        The variables are those of the same layers. Layers are taken one by one, as the whole stack in float32 would be
        twice the size of a bfloat16 weight.
        """
        weight, contracted, produced = self.projection.weight, self.projection.contracted, self.projection.produced
        contracted_dims = tuple(weight.index(letter) for letter in contracted)

        def merge_layer(inputs):
            w, a, b, m, layer = inputs
            update = jnp.einsum(f"{contracted}R,R{produced}->{weight}", a, b, precision="highest")
            w = w.astype(jnp.float32) + self._layer_scale(layer) * update
            if m is not None:
                norm = jnp.sqrt(jnp.sum(jnp.square(w), contracted_dims))
                w *= jnp.expand_dims(self._magnitude_ratio(m, norm), contracted_dims)
            return w.astype(dtype)

        m = None if self.m is None else self.m[...]
        return jax.lax.map(merge_layer, (w_L, self.a[...], self.b[...], m, first + jnp.arange(len(w_L))))

    def _layer_scale(self, layer) -> jax.Array | float:
        """What the low-rank product is multiplied by in a layer."""
        return self.scales[0] if len({*self.scales}) == 1 else jnp.asarray(self.scales, jnp.float32)[layer]

    def _magnitude_ratio(self, m, norm) -> jax.Array:
        """What DoRA multiplies the columns of one layer by."""
        return magnitude_ratio(m, norm) if self.lacks_layers else m / norm


def magnitude_ratio(m: jax.Array, norm: jax.Array) -> jax.Array:
    """What DoRA multiplies the columns of one layer by; 1 in a layer without an adapter, where m is all zero."""
    adapted = jnp.any(m != 0)
    return jnp.where(adapted, m / jnp.where(adapted, norm, 1), 1)


def _keep_ranks(x_LR: jax.Array, ranks: list[int]) -> jax.Array:
    """The stack [L, ..., R] with zeros beyond each layer's rank, so that a layer of rank 0 is all zero."""
    if min(ranks) >= x_LR.shape[-1]:
        return x_LR
    kept_LR = np.arange(x_LR.shape[-1]) < np.asarray(ranks)[:, None]
    return jnp.where(kept_LR.reshape(len(ranks), *[1] * (x_LR.ndim - 2), -1), x_LR, 0)


class TokenRows(nnx.Module):
    """Rows of the embedding that are trained, in place of the model's, while all its other rows are frozen.

    The variable w [E, D], float32, starts as the model's rows of the E tokens. The embedding and the output matrix,
    which is the same, both have these rows, as with PEFT's `trainable_token_indices`.
    """

    def __init__(self, tokens: tuple[int, ...], embedding_VD: jax.Array):
        self.tokens = tokens
        self.letters = (("w", "ED"),)
        self.w = AdapterParam(embedding_VD[np.asarray(tokens)].astype(jnp.float32))

    @property
    def rows_ED(self) -> jax.Array:
        """The rows, float32."""
        return self.w[...]

    def embed(self, x_BTD: jax.Array, tokens_BT: jax.Array, scale: jax.Array) -> jax.Array:
        """`x_BTD`, the model's own rows of `tokens_BT` times `scale`, with these rows times `scale` in their place."""
        index_BT = self._find(tokens_BT)
        rows_ED = replicate(self.rows_ED.astype(x_BTD.dtype))
        row_BTD = constrain(rows_ED.at[index_BT].get(mode="clip") * scale, "BTD", "between_blocks")
        return jnp.where((index_BT < len(self.tokens))[..., None], row_BTD, x_BTD)

    def add_gradient(self, total_ED: jax.Array, tokens_BT: jax.Array, d_BTD: jax.Array) -> jax.Array:
        """`total_ED` plus the gradient of the rows times a scale; `d_BTD` is that of `embed`'s result, times it."""
        return constrain_stored(total_ED.at[self._find(tokens_BT)].add(d_BTD, mode="drop"), "ED")

    def merged_embedding(self, embedding_VD: jax.Array) -> jax.Array:
        """The embedding with these rows, in its dtype."""
        return embedding_VD.at[np.asarray(self.tokens)].set(self.rows_ED.astype(embedding_VD.dtype))

    def _find(self, tokens_BT: jax.Array) -> jax.Array:
        """The number of the row that each token has, or E where it has none."""
        order = np.argsort(self.tokens)
        sorted_E = np.asarray(self.tokens, np.int32)[order]
        place_BT = jnp.searchsorted(sorted_E, tokens_BT)
        found_BT = jnp.asarray(sorted_E).at[place_BT].get(mode="clip") == tokens_BT
        return jnp.where(found_BT, jnp.asarray(order, jnp.int32).at[place_BT].get(mode="clip"), len(order))


def attach_adapters(model: Gemma2, config: AdapterConfig, *, rngs: nnx.Rngs) -> None:
    """Gives an `Adapter`, drawn from `rngs.params`, to every projection that `config.targets` match.

    The model gets `TokenRows` too if `config.trainable_tokens` has any. Does nothing for kind "none". Raises ValueError
    if the model lacks what a pattern, `config.layers` or `config.trainable_tokens` names.
    """
    if config.kind == "none":
        return
    bases = projections(model)
    weights = [weight_name(path) for path in weight_dims(model)]
    patterns = {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
    for field, names in {"targets": config.targets, "modules_to_save": config.modules_to_save, **patterns}.items():
        known = weights if field == "modules_to_save" else list(bases)
        layers = range(model.config.layers if field in patterns else 0)
        named = [*known, *(f"{layer}/{name}" for layer in layers for name in known)]
        for pattern in names:
            if not fnmatch.filter(named, pattern):
                raise ValueError(f"adapter.{field}: {pattern!r} matches nothing; there are {', '.join(known)}")
    if config.layers and config.layers[-1] >= model.config.layers:
        raise ValueError(f"adapter.layers has {config.layers[-1]}; the last of the model is {model.config.layers - 1}")
    for name, base in bases.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.targets):
            if config.replaces(f"blocks/{name}/w"):
                raise ValueError(f"adapter.modules_to_save and adapter.targets both have {name}; choose one of them")
            base.adapter = Adapter(base, name, config, model.config, rngs=rngs)
    if tokens := config.token_ids:
        _check_tokens(model, config)
        model.token_rows = TokenRows(tokens, model.embedding[...])


def _check_tokens(model: Gemma2, config: AdapterConfig) -> None:
    """Raises ValueError where the model lacks rows that are to be trained, or trains all of them."""
    if config.replaces("embedding"):
        raise ValueError(
            "adapter.modules_to_save has the embedding, and adapter.trainable_tokens some of its rows; choose one of "
            "the two"
        )
    if max(config.token_ids) >= model.config.vocab_size:
        raise ValueError(
            f"adapter.trainable_tokens has {max(config.token_ids)}, and the embedding has {model.config.vocab_size} "
            f"rows, 0 to {model.config.vocab_size - 1}"
        )


def merge_adapters(model: Gemma2) -> None:
    """Adds every adapter into its weight, in float32 and back to the weight's dtype, and removes it.

    Raises ValueError if an adapter is added after the post-norm.
    """
    bases = projections(model).items()
    adapted = [(name, base, base.adapter) for name, base in bases if isinstance(base.adapter, Adapter)]
    check_mergeable([name for name, _, adapter in adapted if adapter.after_norm])
    for _, base, adapter in adapted:
        base.w[...] = adapter.merged_weight(base.w[...], base.w.dtype)
        base.adapter = None
    if isinstance(model.token_rows, TokenRows):
        model.embedding[...] = model.token_rows.merged_embedding(model.embedding[...])
        model.token_rows = None


def check_mergeable(unmergeable: list[str]) -> None:
    """Raises ValueError if the adapter of any projection cannot be merged (`AdapterConfig.unmergeable_targets`)."""
    if unmergeable:
        names = " and ".join(unmergeable)
        raise ValueError(
            f"the adapter of {names} cannot be merged: it is added after the post-norm (adapter.after_norm), and no "
            "weight can do the same. Keep the adapter as it is with --to orbax, or train one without "
            f"adapter.after_norm, or one whose adapter.targets leave {names} out"
        )


def projections(model: Gemma2) -> dict[str, Einsum]:
    """Every projection by the name that targets match: attn/q, ..., mlp/down."""
    return {"/".join(map(str, path[1:])): node for path, node in nnx.iter_graph(model) if isinstance(node, Einsum)}
