"""LoRA and DoRA as variables beside the weights they adapt, selected by a filter.

`attach_adapters` gives projections an `Adapter`; training with adapters is then training the variables of type
`AdapterParam` where full training trains those of type `nnx.Param`. Shapes come from the projection's einsum: A has
the contracted letters and R, B has R and the produced letters, DoRA's magnitude the produced letters. Adapters act
on activations, so a frozen weight needs no gradient.

Sources: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353; section 4.3: the norm is a
constant to the gradient). Agrees with Hugging Face PEFT without dropout, and with `after_norm` with Megatron-Bridge,
which norms what o and down put out before the adapter adds to it; with dropout, our DoRA drops inputs of the low-rank
branch only.
"""

import fnmatch
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma2_jax import dims
from gemma2_jax.config import AdapterConfig, ModelConfig
from gemma2_jax.mesh import constrain
from gemma2_jax.model.gemma2 import Einsum, Gemma2, product


class AdapterParam(nnx.Variable):
    """A variable of an adapter: the filter of adapter training."""


def trainable_filter(config: AdapterConfig) -> type[nnx.Variable]:
    """The filter that says which variables a run trains."""
    return nnx.Param if config.kind == "none" else AdapterParam


class Adapter(nnx.Module):
    """The low-rank update of one projection, stacked over layers like its weight."""

    def __init__(self, base: Einsum, config: AdapterConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        inputs, rest = base.equation.split(",")
        weight, outputs = rest.split("->")
        contracted = "".join(letter for letter in weight if letter not in outputs)
        produced = "".join(letter for letter in weight if letter in outputs)
        self.weight, self.contracted, self.produced = weight, contracted, produced
        # Between blocks positions are spread further (P). An adapter works there, so that what tensor shards sum up for
        # it is no wider than R, and the sums of the products beside it are left to themselves.
        inputs, outputs = (letters.replace("BTD", "BPD") for letters in (inputs, outputs))
        into, out = inputs.replace(contracted, "R"), outputs.replace(produced, "R")
        self.down, self.up = f"{inputs},{contracted}R->{into}", f"{out},R{produced}->{outputs}"
        self.scale, self.dropout = config.scale, config.dropout
        self.after_norm = config.after_norm and produced == "D"  # what blocks add to their stream is normed first
        self.letters = (("a", f"L{contracted}R"), ("b", f"LR{produced}"))
        # PEFT's start: A uniform in +-1/sqrt(fan-in) (Kaiming with a = sqrt(5)), B zero.
        bound = 1 / math.sqrt(math.prod(dims.weight_shape(contracted, model)))
        shape_a, shape_b = (dims.weight_shape(letters, model, config.rank) for _, letters in self.letters)
        self.a = AdapterParam(jax.random.uniform(rngs.params(), shape_a, jnp.float32, -bound, bound))
        self.b = AdapterParam(jnp.zeros(shape_b))
        self.m: AdapterParam | None = nnx.data(None)
        if config.kind == "dora":
            self.letters += (("m", f"L{produced}"),)
            self.m = AdapterParam(self._norm(base.w[...], self.a[...], self.b[...], "L"))

    def __call__(self, x, y, w, key):
        """Adapted output, from the projection's input x, output y (`after_norm`: normed) and weight w (one layer's)."""
        # The scale goes into B, which is small, and not over the activations.
        a, b = self.a[...], self.scale * self.b[...]
        if self.dropout and key is not None:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        low_BPR = constrain(product(self.down, x, a), "BPR")
        y = y + product(self.up, constrain(low_BPR, self.up.split(",")[0]), b)
        if self.m is None:
            return y
        norm = jax.lax.stop_gradient(self._norm(w, self.a[...], self.b[...], ""))
        return (y * (self.m[...] / norm)).astype(y.dtype)

    def merged_weight(self, w_L: jax.Array, dtype) -> jax.Array:
        """The stacked weight with the update added in float32, and rounded once to `dtype`: it needs no adapter.

        Layers are taken one by one, as the whole stack in float32 would be twice the weight itself.
        """
        axes = tuple(self.weight.index(letter) for letter in self.contracted)

        def layer(inputs):
            w, a, b, m = inputs
            update = jnp.einsum(f"{self.contracted}R,R{self.produced}->{self.weight}", a, b, precision="highest")
            w = w.astype(jnp.float32) + self.scale * update
            if m is not None:
                w *= jnp.expand_dims(m / jnp.sqrt(jnp.sum(jnp.square(w), axes)), axes)
            return w.astype(dtype)

        return jax.lax.map(layer, (w_L, self.a[...], self.b[...], None if self.m is None else self.m[...]))

    def _norm(self, w, a, b, stack: str) -> jax.Array:
        """Column norms of W + scale * A B, float32 [*stack, produced], without forming that matrix.

        |w + s A b|^2 = |w|^2 + 2 s b.(A^T w) + s^2 b.(A^T A) b, for each produced column.
        """
        w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
        W, C, P = stack + self.weight, stack + self.contracted, stack + self.produced
        product = jnp.einsum(f"{C}R,{W}->{stack}R{self.produced}", a, w, precision="highest")
        gram = jnp.einsum(f"{C}R,{C}Z->{stack}RZ", a, a, precision="highest")
        if not stack:  # a layer of a step, where XLA left to itself moves A about for these small sums
            gram, product = constrain(gram, "RR"), constrain(product, f"R{self.produced}")
        b_gram = jnp.einsum(f"{stack}RZ,{stack}Z{self.produced}->{stack}R{self.produced}", gram, b)
        square = jnp.einsum(f"{W},{W}->{P}", w, w, precision="highest")
        cross = jnp.sum(b * (2 * self.scale * product + self.scale**2 * b_gram), axis=len(stack))
        return jnp.sqrt(square + cross)


def attach_adapters(model: Gemma2, config: AdapterConfig, *, rngs: nnx.Rngs) -> None:
    """Gives the projections that `config.targets` match an adapter; kind "none" gives none.

    Raises ValueError where a target matches no projection.
    """
    if config.kind == "none":
        return
    found = projections(model)
    for pattern in config.targets:
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"adapter.targets: {pattern!r} matches nothing; there are {', '.join(found)}")
    for name, base in found.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.targets):
            base.adapter = Adapter(base, config, model.config, rngs=rngs)


def merge_adapters(model: Gemma2) -> None:
    """Adds every adapter into its weight, in float32 and back to the weight's dtype, and removes it.

    Raises ValueError where `check_mergeable` does.
    """
    found = projections(model).items()
    adapted = [(name, base, base.adapter) for name, base in found if isinstance(base.adapter, Adapter)]
    check_mergeable([name for name, _, adapter in adapted if adapter.after_norm])
    for _, base, adapter in adapted:
        base.w[...] = adapter.merged_weight(base.w[...], base.w.dtype)
        base.adapter = None


def check_mergeable(apart: list[str]) -> None:
    """Raises ValueError if an adapter comes after a norm (`AdapterConfig.unmergeable_targets`)."""
    if apart:
        raise ValueError(
            f"the adapter of {' and '.join(apart)} cannot be merged: it is added after the post-norm "
            "(adapter.after_norm), where no weight can take it in. Keep it apart, with --to orbax, or train one "
            "without after_norm, or with adapter.targets that leave those out"
        )


def projections(model: Gemma2) -> dict[str, Einsum]:
    """Every projection by the name that targets match: attn/q, ..., mlp/down."""
    return {"/".join(map(str, path[1:])): node for path, node in nnx.iter_graph(model) if isinstance(node, Einsum)}
