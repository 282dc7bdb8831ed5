"""Several adapters in one batch: the tokens and scores of each alone, merged where it can be."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generate import CONFIGS, graph_of, prompts_of, weights_of

from gemma2_jax import mesh as meshes
from gemma2_jax.config import MeshConfig
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.model import lora
from gemma2_jax.model.gemma2 import Gemma2, flatten_state, rebuild_model
from gemma2_jax.model_config import AdapterConfig

ADAPTERS = {
    "all": AdapterConfig(kind="lora", rank=2, alpha=3.0, alpha_pattern=(("1/mlp/up", 9.0),)),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=6.0, targets=("attn/*", "mlp/down")),
    "second": AdapterConfig(kind="lora", rank=3, alpha=8.0, targets=("mlp/gate", "attn/o"), layers=(1,)),
}
NEW = 24


def adapted_model(config: AdapterConfig, seed: int) -> Gemma2:
    """The 27B shape with an adapter whose arrays are random where they are not zero for good."""
    whole = rebuild_model(graph_of("27b"), weights_of("27b"))
    lora.attach_adapters(whole, config, rngs=nnx.Rngs(seed))
    random = np.random.default_rng(seed)
    for part in lora.projections(whole).values():
        if isinstance(part.adapter, lora.Adapter):
            is_adapted = jnp.any(part.adapter.a[...] != 0, axis=tuple(range(1, part.adapter.a.ndim)))
            noise = 0.3 * random.normal(size=part.adapter.b.shape).astype(np.float32)
            part.adapter.b[...] = noise * is_adapted.reshape(-1, *[1] * (noise.ndim - 1))
            if part.adapter.m is not None:
                part.adapter.m[...] *= 1.3
    return whole


def frozen_adapters(configs: dict[str, AdapterConfig]) -> dict[str, dict[str, lora.FrozenAdapter]]:
    return {
        name: {
            projection: part.adapter.freeze(part.w[...])
            for projection, part in lora.projections(adapted_model(config, seed)).items()
            if isinstance(part.adapter, lora.Adapter)
        }
        for seed, (name, config) in enumerate(configs.items())
    }


def continue_prompts(decoder: Decoder, prompts, adapters) -> list[Request]:
    engine = Engine(decoder, slots=4, context=CONFIGS["27b"].max_length)
    return list(
        engine.run(
            Request(prompt=prompt, max_new_tokens=NEW, alternatives=0, adapter=adapter)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        )
    )


def assert_same(found: list[Request], expected: list[Request]) -> None:
    for request, alone in zip(found, expected, strict=True):
        assert request.tokens == alone.tokens
        scores = [[score.value for score in x.scores] for x in (request, alone)]
        np.testing.assert_allclose(*scores, atol=1e-4, rtol=0)


def test_rows_take_their_own_adapters():
    """The same prompts with each adapter and with none, in one batch, against each merged into the weights."""
    decoder = Decoder(graph_of("27b"), weights_of("27b"))
    decoder.attach_adapters(frozen_adapters(ADAPTERS))
    prompts = prompts_of("27b", 20, 20, 20, 20, 45, 3)
    names = [None, "all", "dora", "second", "dora", "all"]
    found = continue_prompts(decoder, prompts, names)
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        whole = rebuild_model(graph_of("27b"), weights_of("27b"))
        if name is not None:
            whole = adapted_model(ADAPTERS[name], [*ADAPTERS].index(name))
            lora.merge_adapters(whole)
        expected += continue_prompts(Decoder(graph_of("27b"), flatten_state(nnx.state(whole))), [prompt], [None])
    assert_same(found, expected)
    assert len({tuple(request.tokens) for request in found[:4]}) == 4


def test_a_mesh_gives_the_same_adapters():
    mesh = meshes.make_mesh(MeshConfig(data=2, tensor=4))
    frozen, prompts, names = frozen_adapters(ADAPTERS), prompts_of("27b", 20, 33), ["dora", "all"]
    found = []
    for place in (None, mesh):
        decoder = Decoder(graph_of("27b"), weights_of("27b"), place)
        decoder.attach_adapters(frozen)
        found.append(continue_prompts(decoder, prompts, names))
    assert_same(*found)


def test_a_prefix_of_another_adapter_is_not_taken():
    decoder = Decoder(graph_of("wide"), weights_of("wide"))
    decoder.attach_adapters(frozen_adapters({"all": ADAPTERS["all"]}))
    (prompt,) = prompts_of("wide", 40)
    names = [None, "all", None, "all"]
    found = continue_prompts(decoder, [prompt] * 4, names)
    alone = [continue_prompts(decoder, [prompt], [name])[0] for name in names]
    assert_same(found, alone)
    assert found[0].tokens != found[1].tokens


def test_adapters_before_and_after_a_norm_are_refused():
    configs = {"before": ADAPTERS["all"], "after": AdapterConfig(kind="lora", rank=2, after_norm=True)}
    decoder = Decoder(graph_of("27b"), weights_of("27b"))
    with pytest.raises(ValueError, match="of the adapters before, after, some are added to attn/o after the post-norm"):
        decoder.attach_adapters(frozen_adapters(configs))


def test_unknown_adapters_are_named():
    decoder = Decoder(graph_of("27b"), weights_of("27b"))
    decoder.attach_adapters(frozen_adapters({"all": ADAPTERS["all"]}))
    with pytest.raises(ValueError, match="there is no adapter 'none'; there are all"):
        continue_prompts(decoder, [[5]], ["none"])
