"""Weights that a decoder reads layer by layer: the bits of a model that is loaded whole, and how much is in memory."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_adapter_bank import adapted_model
from test_generate import CONFIGS

from gemma2_jax import mesh as meshes
from gemma2_jax.config import MeshConfig
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.inference import decoder as decoders
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.loaded import _ModelArrays, load_decoder
from gemma2_jax.model import lora
from gemma2_jax.model.gemma2 import flatten_state
from gemma2_jax.model_config import AdapterConfig

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
ADAPTERS = {
    "none": AdapterConfig(),
    "lora": AdapterConfig(kind="lora", rank=2, alpha_pattern=(("1/mlp/up", 9.0),), trainable_tokens=(7, 5)),
    "dora": AdapterConfig(kind="dora", rank=4, targets=("attn/*", "mlp/down"), layers=(1,)),
    "after the norm": AdapterConfig(kind="lora", rank=2, after_norm=True),
}


@pytest.mark.parametrize(
    ("kind", "int8"),
    [("none", False), ("none", True), ("lora", False), ("dora", True), ("after the norm", False)],
)
def test_weights_are_those_of_a_model_that_is_loaded_whole(kind, int8):
    config = ADAPTERS[kind]
    whole = adapted_model(config, 3)
    if whole.token_rows is not None:
        whole.token_rows.w[...] += 1
    stored = _ModelArrays(flatten_state(nnx.state(whole)))
    checkpoint = Checkpoint(
        format="huggingface", path=Path("model"), model=CONFIGS["27b"], adapter=config, sources=(stored,)
    )
    if config.unmergeable_targets:
        with pytest.raises(ValueError, match="an adapter beside the weights works on them as they are"):
            load_decoder(checkpoint, int8=True)
    else:
        lora.merge_adapters(whole)
    graph, state = nnx.split(whole)
    mesh = meshes.make_mesh(MeshConfig(data=2, tensor=4)) if kind == "none" else None
    expected = Decoder(graph, flatten_state(state), mesh, int8=int8)
    found = load_decoder(checkpoint, mesh=mesh, int8=int8)
    assert jax.tree.structure(found.weights) == jax.tree.structure(expected.weights)
    for (path, w), other in zip(
        jax.tree.leaves_with_path(found.weights), jax.tree.leaves(expected.weights), strict=True
    ):
        assert w.sharding.is_equivalent_to(other.sharding, w.ndim) and w.dtype == other.dtype, path
        np.testing.assert_array_equal(w, other, err_msg=str(path))


def test_one_layer_at_a_time_is_in_memory_before_it_is_rounded(monkeypatch):
    before, together, quantize = jax.live_arrays(), [], decoders.quantize

    def count_bytes(w, dims):
        known = {id(x) for x in before}
        matrices = [x for x in jax.live_arrays() if id(x) not in known and x.dtype == np.float32 and x.nbytes > 50_000]
        together.append(sum(x.nbytes for x in matrices))
        return quantize(w, dims)

    monkeypatch.setattr(decoders, "quantize", count_bytes)
    load_decoder(open_checkpoint(str(ASSETS)), int8=True)
    largest, embedding = 192 * 576 * 4, 4096 * 192 * 4
    assert len(together) == 7 * 6 + 1
    assert sorted(together)[-2] == largest and max(together) == embedding
