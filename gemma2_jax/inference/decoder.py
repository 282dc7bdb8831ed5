"""A model laid out for generation: layers with weights of their own, in the dtype they are computed in, on a mesh.

A step reads every weight for one token of each row. So every layer has its own arrays here: cutting a weight out of a
stack would read and write it once more. For the same reason no weight is gathered in a step: what fsdp, stage and
context shards of a training mesh keep apart is split over tensor shards, as far as the model's heads divide.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import describe_mesh, make_mesh, stored_sharding
from gemma2_jax.model.adapter_bank import (
    BankShapes,
    FrozenAdapter,
    LayerParts,
    attach_banks,
    cut_layer,
    put_layer,
)
from gemma2_jax.model.gemma2 import (
    Gemma2,
    Weights,
    rebuild_model,
    transpose_embedding,
    unstack_layers,
    weight_dims,
)
from gemma2_jax.model.int8 import quantize, quantize_model, summed_dims
from gemma2_jax.model.lora import projections
from gemma2_jax.model_config import ModelConfig, is_adapter_path


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is read when a decoder takes it, and a stack layer by layer."""

    want: jax.ShapeDtypeStruct  # of the whole stack
    read: Callable[[int | None, NamedSharding], jax.Array]  # of a layer, or of what is no stack: None


class Decoder:
    """The model and its weights; the mesh has data and tensor shards alone.

    The constructor empties `weights`. Of those in memory, at most one stacked array at a time is there twice; of those
    that are stored, at most one layer of one is there before it is cast or rounded. Adapters are not merged; a step is
    faster if the caller merges them (`lora.merge_adapters`).
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        weights: Weights | dict[str, StoredWeight],
        mesh: Mesh | None = None,
        *,
        int8: bool = False,
    ):
        """`mesh` is that of the weights, by default one device's; they are moved to `decoding_mesh`.

        With `int8`, projections and the embedding are rounded to it (`model.int8`). Raises ValueError if a projection
        still has an adapter, which works on the weight as it was.
        """
        shapes = {path: w.want if isinstance(w, StoredWeight) else w for path, w in weights.items()}
        model = nnx.eval_shape(lambda weights: rebuild_model(graph, weights), shapes)
        self.config: ModelConfig = model.config
        self.mesh = decoding_mesh(mesh or one_device_mesh(), self.config)
        letters = weight_dims(model)
        if int8 and any(map(is_adapter_path, weights)):
            raise ValueError("an adapter beside the weights works on them as they are, and not in int8; leave out int8")
        summed = {f"blocks/{name}/w": summed_dims(part.equation) for name, part in projections(model).items()}
        rounded = summed | {"embedding": (1,)} if int8 else {}
        unstacked = nnx.eval_shape(unstack_layers, model)
        self.graph = nnx.graphdef(nnx.eval_shape(quantize_model, unstacked) if int8 else unstacked)
        with jax.set_mesh(self.mesh):
            self.weights = _unstack_weights(weights, _Layout(letters, rounded, self.mesh, model.dtype))
            if self.mesh.devices.flat[0].platform == "cpu":
                self._change_model(transpose_embedding)
        self.adapters: dict[str, int] = {}  # names, and their places in the banks
        self.adapter_places = 0  # that the banks have
        self.bank_shapes: BankShapes = {}
        self._equations: tuple[tuple[str, str], ...] = ()  # of projections with banks, by name

    def attach_banks(self, shapes: BankShapes, places: int) -> None:
        """Gives the model places for so many adapters, of which each row takes its own (`adapter_bank`)."""
        self._change_model(lambda model: attach_banks(model, shapes, places, self.mesh))
        self.adapter_places, self.bank_shapes = places, shapes
        parts = projections(nnx.merge(self.graph, self.weights))
        self._equations = tuple((name, parts[f"0/{name}"].equation) for name in shapes)

    @property
    def bank_bytes(self) -> int:
        """The memory of the banks, on all devices."""
        banks = [w["adapter"] for layer in range(self.config.layers) for w in self._adapted_weights(layer).values()]
        return sum(x.nbytes for x in jax.tree.leaves(banks))

    def add_adapter(self, name: str, adapter: Mapping[str, FrozenAdapter]) -> None:
        """Puts an adapter, which fits, into the first place that is free."""
        place = self.free_places()[0]
        for layer in range(self.config.layers):
            self.put_layer(place, layer, self.cut_layer(adapter, layer))
        self.adapters[name] = place

    def remove_adapter(self, name: str) -> None:
        """Frees the place of an adapter, of which no row may be under way."""
        del self.adapters[name]

    def free_places(self) -> list[int]:
        """The numbers of the places that no adapter has."""
        return [place for place in range(1, 1 + self.adapter_places) if place not in self.adapters.values()]

    def cut_layer(self, adapter: Mapping[str, FrozenAdapter], layer: int) -> LayerParts:
        """A layer of an adapter, in host memory, for `put_layer`."""
        return cut_layer(adapter, layer, {name: w["adapter"] for name, w in self._adapted_weights(layer).items()})

    def put_layer(self, place: int, layer: int, parts: LayerParts) -> None:
        """Fills a layer of a place, of whose adapter no row may be under way. Its program is the same for all."""
        adapted = self._adapted_weights(layer)
        banks = {name: w["adapter"] for name, w in adapted.items()}
        weights = {name: {key: w[key] for key in ("w", "scale") if key in w} for name, w in adapted.items()}
        with jax.set_mesh(self.mesh):
            changed = put_layer(self._equations, banks, weights, parts, np.int32(place))
        for name, w in adapted.items():
            w["adapter"] = changed[name]

    def _adapted_weights(self, layer: int) -> dict[str, dict]:
        """The arrays of a layer's projections that have banks, by name."""
        block = self.weights["blocks"][layer]
        return {name: block[name.split("/")[0]][name.split("/")[1]] for name, _ in self._equations}

    def _change_model(self, change: Callable[[Gemma2], object]) -> None:
        model = nnx.merge(self.graph, self.weights)
        self.weights = {}  # so that each weight is freed once it is replaced
        try:
            change(model)
        finally:
            self.graph, state = nnx.split(model)
            self.weights = nnx.to_pure_dict(state)

    def adapter_number(self, name: str | None) -> int:
        """The place of an adapter in the banks; 0 is none."""
        return 0 if name is None else self.adapters[name]

    @property
    def place(self) -> str:
        """The devices and the mesh in words."""
        return f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}; mesh {describe_mesh(self.mesh)}"

    @property
    def batch_shards(self) -> int:
        """How many shards a batch is spread over."""
        return self.mesh.shape["data"]


def one_device_mesh() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def decoding_mesh(mesh: Mesh, config: ModelConfig) -> Mesh:
    """The same devices with data and tensor shards alone: as many of tensor as the model's heads divide over.

    Raises ValueError if the model does not divide over the tensor shards that there are.
    """
    tensor = mesh.shape["tensor"]
    if not _divides(tensor, config):
        fitting = [str(size) for size in range(1, config.heads + 1) if _divides(size, config)]
        raise ValueError(
            f"tensor {tensor} does not divide the {config.heads} heads, {config.kv_heads} key and value heads and the "
            f"MLP width of {config.mlp_width}; use {', '.join(fitting)}"
        )
    others = mesh.size // (tensor * mesh.shape["data"])
    sizes = [tensor * more for more in range(1, others + 1) if others % more == 0]
    tensor = max(size for size in sizes if _divides(size, config))
    shape = dict.fromkeys(mesh.axis_names, 1) | {"data": mesh.size // tensor, "tensor": tensor}
    return Mesh(mesh.devices.reshape(*shape.values()), mesh.axis_names, axis_types=mesh.axis_types)


def _divides(tensor: int, config: ModelConfig) -> bool:
    shares_heads = config.kv_heads % tensor == 0 or tensor % config.kv_heads == 0
    return shares_heads and math.gcd(config.heads, config.mlp_width) % tensor == 0


def keeps_dtype(path: str) -> bool:
    """Whether the model computes with a weight in the dtype that it is stored in, as with norms and adapters."""
    return "norm/" in path or is_adapter_path(path)


@dataclass(frozen=True)
class _Layout:
    """How a decoder has its weights."""

    letters: Mapping[str, str]  # the dims of each, a stack's with L
    rounded: Mapping[str, tuple[int, ...]]  # those in int8, and the dims that a layer of each is summed over
    mesh: Mesh
    dtype: jnp.dtype


def _unstack_weights(weights: Weights | dict[str, StoredWeight], layout: _Layout) -> dict:
    """The arrays of a model after `unstack_layers`, nested; `weights` is emptied."""
    unstacked: dict[tuple[str | int, ...], jax.Array] = {}
    for path in list(weights):
        names = path.split("/")
        is_stack = names[0] == "blocks"
        for number, w in enumerate(_take_layers(weights, path, layout)):
            place = ("blocks", number, *names[1:]) if is_stack else tuple(names)
            if path in layout.rounded:
                unstacked[place], scale = quantize(w, layout.rounded[path])
                unstacked[(*place[:-1], "scale" if is_stack else "row_scale")] = scale
            else:
                unstacked[place] = w if keeps_dtype(path) else w.astype(layout.dtype)
            del w  # before the next one is read
    return unflatten_dict(unstacked)


def _take_layers(weights: Weights | dict[str, StoredWeight], path: str, layout: _Layout) -> Iterator[jax.Array]:
    """The layers of a stack, or the one array that is none, on the mesh. Takes it out of `weights`."""
    w, letters, dtype = weights.pop(path), layout.letters[path], layout.dtype
    is_stack = letters.startswith("L")
    if isinstance(w, StoredWeight):
        shape = w.want.shape[is_stack:]
        place = stored_sharding(layout.mesh, letters[is_stack:], shape)
        for layer in range(w.want.shape[0]) if is_stack else [None]:
            yield w.read(layer, place)
        return
    w = jax.device_put(w, stored_sharding(layout.mesh, letters, w.shape))
    w = w if keeps_dtype(path) else w.astype(dtype)
    layers = _cut_layers(w) if is_stack else [w]
    del w
    while layers:
        yield layers.pop(0)


@jax.jit
def _cut_layers(w_L: jax.Array) -> list[jax.Array]:
    return list(w_L)
