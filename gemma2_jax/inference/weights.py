"""The weights of a checkpoint as a decoder takes them: read one layer at a time, and with its adapter merged into each.

So loading needs no memory for the whole model in the dtype that is rounded to int8, or that an adapter is added in.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gemma2_jax.convert.checkpoints import Checkpoint, check_wanted, read_array
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.merging import create_merge
from gemma2_jax.convert.sources import load_array
from gemma2_jax.dims import Abstract
from gemma2_jax.inference.decoder import StoredWeight
from gemma2_jax.model_config import TOKEN_ROWS

type _Read = Callable[[int | None, NamedSharding], jax.Array]


def find_weights(checkpoint: Checkpoint, wanted: Abstract) -> dict[str, StoredWeight]:
    """The arrays of `wanted`, in its shapes and dtypes, with the adapter merged unless its own are among them.

    Raises ValueError naming an array that the checkpoint lacks, or has in another shape.
    """
    check_wanted(checkpoint, wanted)
    reads = {path: _read_weight(checkpoint, path, want) for path, want in wanted.items()}
    if not any("/adapter/" in path for path in wanted):
        reads |= _merge_weights(checkpoint, reads, wanted)
    return {path: StoredWeight(want, reads[path]) for path, want in wanted.items()}


def _read_weight(checkpoint: Checkpoint, path: str, want: jax.ShapeDtypeStruct) -> _Read:
    source = checkpoint.find_source(path)

    def read(layer: int | None, place: NamedSharding) -> jax.Array:
        if layer is None:
            return load_array(source, path, jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=place))

        @cache  # devices that hold copies of a slice ask for it once each
        def read_slice(index: Index) -> np.ndarray:
            return source.read(path, (slice(layer, layer + 1), *index), want.dtype)[0]

        return jax.make_array_from_callback(want.shape[1:], place, read_slice)

    return read


def _merge_weights(checkpoint: Checkpoint, reads: dict[str, _Read], wanted: Abstract) -> dict[str, _Read]:
    """The weights that the checkpoint's adapter changes, with its update."""
    config = checkpoint.adapter
    merged: dict[str, _Read] = {}
    if targets := table.match_targets(config):
        assert checkpoint.model is not None
        merge = create_merge(checkpoint.model, config)
        for name in targets:
            path = f"blocks/{name}/w"
            merged[path] = _merge_layers(checkpoint, name, reads[path], merge, wanted[path].dtype)
    if config.trainable_tokens:
        merged["embedding"] = _merge_rows(checkpoint, reads["embedding"])
    return merged


def _merge_layers(
    checkpoint: Checkpoint, name: str, read: _Read, merge: Callable[..., jax.Array], dtype: np.dtype
) -> _Read:
    paths = {part: row.path for part, row in table.adapter_rows(name).items() if row.path in checkpoint.shapes}

    def read_merged(layer: int | None, place: NamedSharding) -> jax.Array:
        assert layer is not None
        index = slice(layer, layer + 1)
        arrays = {
            part: read_array(checkpoint, path, (index, *[slice(None)] * (len(checkpoint.shapes[path].shape) - 1)))
            for part, path in paths.items()
        }
        arrays = {part: x.astype(np.float32) for part, x in arrays.items()}
        return jax.device_put(merge(name, dtype, layer, w=read(layer, place)[None], **arrays)[0], place)

    return read_merged


def _merge_rows(checkpoint: Checkpoint, read: _Read) -> _Read:
    tokens = np.asarray(checkpoint.adapter.token_ids)

    def read_merged(layer: int | None, place: NamedSharding) -> jax.Array:
        embedding_VD = read(layer, place)
        rows_ED = read_array(checkpoint, TOKEN_ROWS, (slice(None), slice(None))).astype(np.float32)
        return jax.device_put(embedding_VD.at[tokens].set(jnp.asarray(rows_ED).astype(embedding_VD.dtype)), place)

    return read_merged
