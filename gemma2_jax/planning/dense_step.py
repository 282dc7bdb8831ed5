"""A training step of any dense decoder as a schedule, from its sizes alone: no program, no compiler.

It is for models that this package does not have, whose published times say how good the estimates of `speed` are, and
to check that a compiled step does the FLOPs that it should. The kernels are those that a good program would launch: one
for each product, with its inputs and outputs read and written once, and one for each chain of elementwise operations.
The mesh is as `mesh` has it. Shards of fsdp and context gather a layer's weights while they compute the layer before;
tensor shards sum their parts of the output of each half of a layer, stages hand activations to each other, context
shards exchange keys and values, and copies of the model sum their gradients once a step: all of these wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gemma2_jax.planning.schedule import Item, Loop, Pass, Product, Send, Wait, Work
from gemma2_jax.planning.traffic import SENT

if TYPE_CHECKING:
    from gemma2_jax.model_config import ModelConfig

_BYTES = 2  # bfloat16
_SUMMED = (
    "attention/o",
    "mlp/down",
)  # products whose inputs are split over tensor shards, and whose outputs are summed
_ADDED_BYTES = 10  # read and written for each trained weight, in float32, where a pass adds its gradient
_STATE_BYTES = 28  # read and written by AdamW for each trained weight: weight, two moments and gradient in float32


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """The sizes of a decoder with a gated MLP and grouped-query attention."""

    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_width: int
    layers: int
    vocab_size: int
    windows: tuple[int | None, ...] = (None,)  # of the layers, by turns; None sees all before it
    norms: int = 2  # of a layer

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The inputs and outputs of each product with weights in a layer."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "attention/qkv": (self.width, queries + 2 * keys),
            "attention/o": (queries, self.width),
            "mlp/gate_up": (self.width, 2 * self.mlp_width),
            "mlp/down": (self.mlp_width, self.width),
        }

    def count_pairs(self, length: int) -> float:
        """Pairs of a query and a key that it sees, in one head of an average layer and one row."""
        spans = [min(window or length, length) for window in self.windows]
        return sum(span * (span + 1) / 2 + (length - span) * span for span in spans) / len(spans)


def describe_gemma(config: ModelConfig) -> DenseModel:
    """The sizes of a Gemma 2."""
    names = ("width", "mlp_width", "heads", "kv_heads", "head_width", "layers", "vocab_size")
    windows = (config.window, None) if config.layers % 2 == 0 else (config.window, None) * (config.layers // 2)
    return DenseModel(**{name: getattr(config, name) for name in names}, windows=windows, norms=4)


@dataclass(frozen=True, kw_only=True)
class DenseStep:
    """How a step trains the model on one of its GPUs."""

    model: DenseModel
    rows: int  # of a pass, on one GPU
    length: int
    passes: int = 1
    data: int = 1
    stage: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    rank: int = 0  # of LoRA adapters on the projections; 0 trains all weights
    adapted: tuple[str, ...] = ()  # projections with adapters
    remat: Literal["none", "block"] = "block"
    gradient_bytes: int = _BYTES  # of each element of the gradients that shards sum
    overlaps: bool = True  # weights are gathered beside the work of another layer, and gradients go
    gathers: int = 2  # times in a pass that a layer's weights are gathered
    attention_products: int = 7  # of the attention kernels' backward pass: 5 in one kernel, 7 in two

    def describe(self) -> tuple[Item, ...]:
        """The step as a schedule: of a pipeline, that of a stage, which computes in idle ticks too."""
        layers = -(-self.model.layers // self.stage)
        forward = Loop(layers, tuple(self._gather("forward", self._layer("forward"))))
        again = () if self.remat == "none" else tuple(self._layer("recomputed"))
        gathered = "backward" if self.gathers > 1 else None
        backward = Loop(layers, tuple(self._gather(gathered, (*again, *self._layer("backward")))))
        one_pass = (*self._hand_on(), forward, *self._logits(), *self._hand_on(), backward)
        return (Loop(self.passes + self.stage - 1, one_pass), *self._sum_gradients(), self._update())

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        return {name: getattr(self, name) for name in ("data", "stage", "fsdp", "context", "tensor")}

    @property
    def tokens(self) -> int:
        """Tokens of a pass on one GPU."""
        return self.rows * self.length // self.context

    @property
    def weights(self) -> int:
        """Weights of the products of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.model.projections.values())

    @property
    def trained(self) -> float:
        """Trained weights of one GPU."""
        trained = self.weights * self.model.layers + self.model.vocab_size * self.model.width
        if self.rank:
            sizes = (self.model.projections[part] for part in self.adapted)
            trained = self.model.layers * self.rank * sum(map(sum, sizes))
        return trained / self.weight_shards / self.tensor / self.stage

    @property
    def weight_shards(self) -> int:
        """Shards that a layer's weights are gathered from."""
        return self.fsdp * self.context

    def _layer(self, pass_name: Pass) -> Iterator[Item]:
        for part, (inputs, outputs) in self.model.projections.items():
            yield from self._product(part, inputs, outputs, pass_name)
            if part == "attention/qkv":
                yield from self._attend(pass_name)
            elif part in _SUMMED and self.tensor > 1:
                sent = self.tokens * self.model.width * _BYTES * SENT["all-reduce"](self.tensor)
                yield self._wait_for("all-reduce", "tensor", sent)
        moved = self.model.norms * 2 * self.tokens * self.model.width * _BYTES
        gated = 3 * self.tokens * self.model.mlp_width * _BYTES / self.tensor
        yield Work(part="norm", pass_name=pass_name, memory=moved)
        yield Work(part="mlp", pass_name=pass_name, memory=gated)

    def _product(self, part: str, inputs: int, outputs: int, pass_name: Pass) -> Iterator[Work]:
        """A product with weights: forward, or by its inputs, and by its weights where they are trained."""
        shards = self.tensor * (self.stage if part == "loss" else 1)
        memory = _BYTES * (self.tokens * (inputs + outputs) + inputs * outputs) / shards
        taken, made = (inputs / shards, outputs) if part in _SUMMED else (inputs, outputs / shards)
        by_inputs, by_weights = _list_products(self.tokens, taken, made, pass_name)
        for product in (by_inputs,) if pass_name != "backward" or self.rank else (by_inputs, by_weights):
            yield Work(part=part, pass_name=pass_name, products=(product,), memory=memory)
        if part in self.adapted:
            tokens = self.tokens / self.tensor
            for down, up in ((inputs, self.rank), (self.rank, outputs)):
                products = _list_products(tokens, down, up, pass_name)
                for product in products if pass_name == "backward" else products[:1]:
                    memory = _BYTES * self.tokens * (down + up) / self.tensor
                    yield Work(part=part, pass_name=pass_name, products=(product,), memory=memory)

    def _attend(self, pass_name: Pass) -> Iterator[Item]:
        model = self.model
        product = 2 * self.rows * model.count_pairs(self.length) * model.heads * model.head_width / self.context
        products = (self.attention_products if pass_name == "backward" else 2) / self.tensor
        moved = self.tokens * (2 * model.heads + 2 * model.kv_heads) * model.head_width * _BYTES
        times = 2 if pass_name == "backward" else 1  # gradients of what is exchanged come back
        if self.context > 1:
            exchanged = times * self.tokens * 2 * model.kv_heads * model.head_width * _BYTES * (self.context - 1)
            yield self._wait_for("collective-permute", "context", exchanged / self.tensor)
        memory = moved * times / self.tensor
        yield Work(part="attention/attend", pass_name=pass_name, attention=products * product, memory=memory)

    def _logits(self) -> Iterator[Work]:
        for pass_name in ("forward", "backward"):
            yield from self._product("loss", self.model.width, self.model.vocab_size, pass_name)

    def _gather(self, name: str | None, work: Iterable[Item]) -> Iterator[Item]:
        """The work of a layer, beside which the next layer's weights come, and in the backward pass gradients go."""
        shards, weights = self.weight_shards, self.weights * _BYTES / self.tensor
        kinds: dict[str, float] = {} if shards == 1 or name is None else {"all-gather": weights}
        if name == "backward" and shards > 1 and not self.rank:
            kinds["reduce-scatter"] = weights / shards / _BYTES * self.gradient_bytes
        axes = "+".join(axis for axis in ("fsdp", "context") if getattr(self, axis) > 1)
        for kind, size in kinds.items():
            yield Send(
                name=f"{name} {kind}", kind=kind, axes=axes, sent=size * SENT[kind](shards), is_async=self.overlaps
            )
        yield from work
        if name == "backward" and self.passes > 1 and not self.rank:
            yield Work(part="gradients", pass_name="backward", memory=weights / shards / _BYTES * _ADDED_BYTES)
        for kind in kinds if self.overlaps else ():
            yield Wait(f"{name} {kind}")

    def _hand_on(self) -> Iterator[Item]:
        if self.stage > 1:
            yield self._wait_for("collective-permute", "stage", self.tokens * self.model.width * _BYTES / self.tensor)

    def _sum_gradients(self) -> Iterator[Item]:
        if self.data > 1:
            yield self._wait_for("all-reduce", "data", self.trained * 4 * SENT["all-reduce"](self.data))

    @staticmethod
    def _wait_for(kind: str, axes: str, sent: float) -> Send:
        return Send(name=f"{kind} over {axes}", kind=kind, axes=axes, sent=sent, is_async=False)

    def _update(self) -> Work:
        return Work(part="optimizer", pass_name="update", memory=self.trained * _STATE_BYTES)


def _list_products(tokens: float, inputs: float, outputs: float, pass_name: Pass) -> tuple[Product, Product]:
    """What makes the outputs, or the gradients of the inputs, and what makes the gradients of the weights."""
    forward = Product(rows=tokens, columns=outputs, depth=inputs)
    by_inputs = Product(rows=tokens, columns=inputs, depth=outputs)
    by_weights = Product(rows=inputs, columns=outputs, depth=tokens)
    return by_inputs if pass_name == "backward" else forward, by_weights
