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
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax import dims
from gemma2_jax.config import AdapterConfig, ModelConfig, weight_name
from gemma2_jax.dims import Place
from gemma2_jax.mesh import constrain
from gemma2_jax.model.gemma2 import Einsum, Gemma2, activation_place, apply_weight, split_equation, weight_dims


class AdapterParam(nnx.Variable):
    """The type of every adapter variable; adapter training trains these."""


def trainable_filter(config: AdapterConfig) -> nnx.filterlib.Filter:
    """The filter that selects the variables that a run trains."""
    if config.kind == "none":
        return nnx.Param
    return nnx.Any(AdapterParam, lambda path, _: config.replaces("/".join(map(str, path))))


class Adapter(nnx.Module):
    """The low-rank update of one projection, stacked over layers like its weight.

    For a projection "BTD,DNH->BTNH", the variables are a [L, D, R], uniform in +-1/sqrt(D); b [L, R, N, H], zero; and
    for DoRA m [L, N, H], the column norms of the weight. All are float32. A new adapter changes nothing.

    In layers that have no adapter all of them are zero, and stay zero in training: the gradients of A and B are
    products with each other, and a layer whose m is all zero leaves the output as it is, so that m has no gradient.
    """

    def __init__(self, base: Einsum, name: str, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        inputs, weight, outputs = split_equation(base.equation)
        contracted = "".join(letter for letter in weight if letter not in outputs)
        produced = "".join(letter for letter in weight if letter in outputs)
        self.weight, self.contracted, self.produced = weight, contracted, produced
        self.down_equation, self.up_equation = f"{inputs},{contracted}R->BTR", f"BTR,R{produced}->{outputs}"
        # Inputs and outputs of the model's width keep their positions spread as between blocks, so tensor shards
        # exchange only [B, T, R] for the adapter, and what they exchange for the projection itself does not change.
        self.input_place: Place = activation_place(inputs)
        self.output_place: Place = activation_place(outputs)
        self.scale, self.dropout = config.projection_scale(name), config.dropout
        self.lacks_layers = bool(config.layers)
        self.after_norm = config.after_norm and produced == "D"  # only these projections have a norm after them
        self.letters = (("a", f"L{contracted}R"), ("b", f"LR{produced}"))
        # PEFT's start: A uniform in +-1/sqrt(fan-in) (Kaiming with a = sqrt(5)), B zero.
        bound = 1 / math.sqrt(math.prod(dims.weight_shape(contracted, model)))
        rank = config.projection_rank(name)
        shape_a, shape_b = (dims.weight_shape(letters, model, rank) for _, letters in self.letters)
        a = jax.random.uniform(rngs.params(), shape_a, jnp.float32, -bound, bound)
        self.a = AdapterParam(_keep_layers(a, config.layers))
        self.b = AdapterParam(jnp.zeros(shape_b))
        self.m: AdapterParam | None = nnx.data(None)
        if config.kind == "dora":
            self.letters += (("m", f"L{produced}"),)
            norms = self._column_norms(base.w[...], self.a[...], self.b[...], "L")
            self.m = AdapterParam(_keep_layers(norms, config.layers))

    def __call__(self, x, y, w, key):
        """The adapted output, in the shape and dtype of y.

        Args:
          x: the projection's input, in the compute dtype, with the dims of its equation, such as [B, T, D].
          y: the projection's output; with `after_norm`, the post-norm's output.
          w: the projection's weight in this layer.
          key: for dropout; None for no dropout.
        """
        # The scale multiplies B, which is small, and not the activations.
        a, b = self.a[...], self.scale * self.b[...]
        if self.dropout and key is not None:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        low_BTR = constrain(apply_weight(self.down_equation, x, a, self.input_place), "BTR", "between_blocks")
        low_BTR = constrain(low_BTR, "BTR", self.output_place)
        y = y + apply_weight(self.up_equation, low_BTR, b, self.output_place)
        if self.m is None:
            return y
        norm = jax.lax.stop_gradient(self._column_norms(w, self.a[...], self.b[...], ""))
        return (y * self._magnitude_ratio(self.m[...], norm)).astype(y.dtype)

    def merged_weight(self, w_L: jax.Array, dtype) -> jax.Array:
        """The weight `w_L` of all layers with the update added in float32, and rounded once to `dtype`.

        Layers are taken one by one, as the whole stack in float32 would be twice the size of a bfloat16 weight.
        """
        contracted_dims = tuple(self.weight.index(letter) for letter in self.contracted)

        def merge_layer(inputs):
            w, a, b, m = inputs
            update = jnp.einsum(f"{self.contracted}R,R{self.produced}->{self.weight}", a, b, precision="highest")
            w = w.astype(jnp.float32) + self.scale * update
            if m is not None:
                norm = jnp.sqrt(jnp.sum(jnp.square(w), contracted_dims))
                w *= jnp.expand_dims(self._magnitude_ratio(m, norm), contracted_dims)
            return w.astype(dtype)

        return jax.lax.map(merge_layer, (w_L, self.a[...], self.b[...], None if self.m is None else self.m[...]))

    def _magnitude_ratio(self, m, norm) -> jax.Array:
        """What DoRA multiplies the columns of one layer by; 1 in a layer without an adapter, where m is all zero."""
        if not self.lacks_layers:
            return m / norm
        adapted = jnp.any(m != 0)
        return jnp.where(adapted, m / jnp.where(adapted, norm, 1), 1)

    def _column_norms(self, w, a, b, layers: Literal["L", ""]) -> jax.Array:
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
        cross = jnp.sum(b * (2 * self.scale * a_w + self.scale**2 * b_gram), axis=len(layers))
        return jnp.sqrt(square + cross)


def _keep_layers(x_L: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """The stack with zeros in all layers but these; empty `layers` keep all."""
    if not layers:
        return x_L
    kept = np.isin(np.arange(len(x_L)), layers)
    return jnp.where(kept.reshape(-1, *[1] * (x_L.ndim - 1)), x_L, 0)


def attach_adapters(model: Gemma2, config: AdapterConfig, *, rngs: nnx.Rngs) -> None:
    """Gives an `Adapter`, drawn from `rngs.params`, to every projection that `config.targets` match.

    Does nothing for kind "none". Raises ValueError if the model lacks what a pattern or `config.layers` names.
    """
    if config.kind == "none":
        return
    bases = projections(model)
    weights = [weight_name(path) for path in weight_dims(model)]
    patterns = {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
    for field, names in {"targets": config.targets, "modules_to_save": config.modules_to_save, **patterns}.items():
        known = weights if field == "modules_to_save" else list(bases)
        for pattern in names:
            if not fnmatch.filter(known, pattern):
                raise ValueError(f"adapter.{field}: {pattern!r} matches nothing; there are {', '.join(known)}")
    if config.layers and config.layers[-1] >= model.config.layers:
        raise ValueError(f"adapter.layers has {config.layers[-1]}; the last of the model is {model.config.layers - 1}")
    for name, base in bases.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.targets):
            if config.replaces(f"blocks/{name}/w"):
                raise ValueError(f"adapter.modules_to_save and adapter.targets both have {name}; choose one of them")
            base.adapter = Adapter(base, name, config, model.config, rngs=rngs)


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
