"""Adapters beside a decoder's weights: what of a checkpoint can be put into a place of its banks, and how it is read.

Reading takes host memory for one adapter, and no device: it may go on in a thread beside the engine's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma2_jax.convert.checkpoints import Checkpoint, read_array
from gemma2_jax.convert.formats import table
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.model.adapter_bank import BankShape, BankShapes, FrozenAdapter
from gemma2_jax.model_config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class AdapterRoom:
    """Room for adapters that are not known yet."""

    places: int  # for adapters, those that are known among them
    rank: int  # the highest that they may have


def attach_adapters(
    decoder: Decoder, base: Checkpoint, adapters: Mapping[str, Checkpoint], room: AdapterRoom | None = None
) -> None:
    """Puts adapters, by name, beside the weights of a decoder; each request says which it takes.

    Args:
      decoder: that of `base`, which has no adapters yet.
      base: the model that they were opened with as their base.
      adapters: what each is.
      room: for others too, which may be loaded later. None: for these alone.

    Raises ValueError where they cannot stand beside one another, or an adapter changes more than projections.
    """
    for name, adapter in adapters.items():
        _check_base(base, name)
        _check_kind(adapter)
    layers = decoder.config.layers
    shapes = find_shapes({name: adapter.adapter for name, adapter in adapters.items()}, layers)
    if room:
        _check_base(base, "another")
        if len(adapters) > room.places:
            raise ValueError(f"there are {len(adapters)} adapters, and places for {room.places}; ask for more places")
        norms = {name for name, shape in shapes.items() if shape.after_norm}
        rank = max([room.rank, *(shape.rank for shape in shapes.values())])
        shapes = {name: BankShape(rank, has_ratio=True, after_norm=name in norms) for name in table.PROJECTIONS}
    if not shapes:
        return
    decoder.attach_banks(shapes, room.places if room else len(adapters))
    for name, adapter in adapters.items():
        decoder.add_adapter(name, read_adapter(adapter))
    for place in decoder.free_places()[:1]:  # so that the program is compiled
        decoder.put_layer(place, 0, decoder.cut_layer({}, 0))


def check_adapter(checkpoint: Checkpoint, shapes: BankShapes) -> None:
    """Raises ValueError where an adapter does not fit into a place of banks of these shapes."""
    _check_kind(checkpoint)
    config = checkpoint.adapter
    assert checkpoint.model is not None
    for projection, shape in find_shapes({str(checkpoint.path): config}, checkpoint.model.layers).items():
        if shape.rank > shapes[projection].rank:
            raise ValueError(
                f"the adapter {checkpoint.path} has rank {shape.rank}, and the server has room for rank "
                f"{shapes[projection].rank}; start it with --adapter_rank {shape.rank}"
            )
        if shape.after_norm != shapes[projection].after_norm:
            is_so, others = ("after", "before") if shape.after_norm else ("before", "after")
            raise ValueError(
                f"the adapter {checkpoint.path} is added to {projection} {is_so} the post-norm (adapter.after_norm), "
                f"and the server's are added {others} it; start a server with --adapters NAME={checkpoint.path}"
            )


def read_adapter(checkpoint: Checkpoint) -> dict[str, FrozenAdapter]:
    """The arrays of an adapter, by projection. Raises ValueError where its files are damaged."""
    config, adapter = checkpoint.adapter, {}
    assert checkpoint.model is not None
    for projection in table.match_targets(config):
        arrays = {
            part: _read_whole(checkpoint, row.path)
            for part, row in table.adapter_rows(projection).items()
            if row.path in checkpoint.shapes
        }
        scale_L = [config.layer_scale(projection, layer) for layer in range(checkpoint.model.layers)]
        b_L = arrays["b"] * np.asarray(scale_L, np.float32).reshape(-1, *[1] * (arrays["b"].ndim - 1))
        adapter[projection] = FrozenAdapter(arrays["a"], b_L, arrays.get("m"))
    return adapter


def _read_whole(checkpoint: Checkpoint, path: str) -> np.ndarray:
    return read_array(checkpoint, path, (slice(None),) * len(checkpoint.shapes[path].shape)).astype(np.float32)


def _check_base(base: Checkpoint, name: str) -> None:
    """Raises ValueError where the model has an adapter, of which no other knows."""
    if base.adapter.kind != "none":
        raise ValueError(
            f"{base.path} has an adapter already, beside which {name} cannot be served; merge it into the model "
            "(python -m gemma2_jax.convert --merge), or serve the model alone"
        )


def _check_kind(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a checkpoint is no adapter, or one that changes more than projections."""
    config = checkpoint.adapter
    if config.kind == "none":
        raise ValueError(f"{checkpoint.path} is no adapter, but a model; serve it by itself")
    if changed := [*config.modules_to_save, *map(str, config.trainable_tokens)]:
        raise ValueError(
            f"the adapter {checkpoint.path} changes {', '.join(changed[:5])} beside its projections, which rows of one "
            "batch cannot do apart; serve it by itself, merged"
        )


def find_shapes(adapters: Mapping[str, AdapterConfig], layers: int) -> BankShapes:
    """The shapes of banks that have room for these adapters, by name, and for no others.

    Raises ValueError where one of them is added after a norm and another before it.
    """
    shapes = {}
    for projection in table.PROJECTIONS:
        found = [adapter for adapter in adapters.values() if projection in table.match_targets(adapter)]
        if not found:
            continue
        norms = {projection in adapter.unmergeable_targets for adapter in found}
        if len(norms) > 1:
            raise ValueError(
                f"of the adapters {', '.join(adapters)}, some are added to {projection} after the post-norm "
                "(adapter.after_norm) and some before it; serve them apart"
            )
        rank = max(adapter.stack_rank(projection, layers) for adapter in found)
        shapes[projection] = BankShape(rank, any(adapter.kind == "dora" for adapter in found), norms.pop())
    return shapes
