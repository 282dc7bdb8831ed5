"""Several adapters in one batch: the tokens and scores of each alone, merged where it can be."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generate import CONFIGS, graph_of, prompts_of, weights_of

from gemma2_jax import mesh as meshes
from gemma2_jax.config import MeshConfig
from gemma2_jax.convert.formats import table
from gemma2_jax.inference.adapters import find_shapes
from gemma2_jax.inference.clock import Clock
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.model import lora
from gemma2_jax.model.adapter_bank import BankShape, BankShapes, FrozenAdapter
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


def frozen_adapter(config: AdapterConfig, seed: int) -> dict[str, FrozenAdapter]:
    """The arrays of that model's adapter."""
    adapter = {}
    for projection, part in lora.projections(adapted_model(config, seed)).items():
        if isinstance(part.adapter, lora.Adapter):
            a, b, m = (
                variable and np.asarray(variable[...]) for variable in (part.adapter.a, part.adapter.b, part.adapter.m)
            )
            scale_L = np.array(part.adapter.scales, np.float32)
            adapter[projection] = FrozenAdapter(a, b * scale_L.reshape(-1, *[1] * (b.ndim - 1)), m)
    return adapter


ROOM = dict.fromkeys(table.PROJECTIONS, BankShape(rank=5, has_ratio=True, after_norm=False))
PLACES = 3


def attach(decoder: Decoder, configs: dict[str, AdapterConfig], shapes: BankShapes = ROOM) -> Decoder:
    """The decoder with these adapters, and with room for others."""
    decoder.attach_banks(shapes, PLACES)
    for seed, (name, config) in enumerate(configs.items()):
        decoder.add_adapter(name, frozen_adapter(config, seed))
    return decoder


def requests_of(prompts, adapters) -> list[Request]:
    return [
        Request(prompt=prompt, max_new_tokens=NEW, alternatives=0, adapter=adapter)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]


def continue_prompts(decoder: Decoder, prompts, adapters) -> list[Request]:
    engine = Engine(decoder, slots=4, context=CONFIGS["27b"].max_length)
    return list(engine.run(requests_of(prompts, adapters)))


def continue_merged(config: AdapterConfig | None, seed: int, prompt: list[int]) -> Request:
    """What the model gives with the adapter in its weights."""
    whole = rebuild_model(graph_of("27b"), weights_of("27b"))
    if config is not None:
        whole = adapted_model(config, seed)
        lora.merge_adapters(whole)
    (found,) = continue_prompts(Decoder(graph_of("27b"), flatten_state(nnx.state(whole))), [prompt], [None])
    return found


def assert_same(found: list[Request], expected: list[Request]) -> None:
    for request, alone in zip(found, expected, strict=True):
        assert request.tokens == alone.tokens
        scores = [[score.value for score in x.scores] for x in (request, alone)]
        np.testing.assert_allclose(*scores, atol=1e-4, rtol=0)


def test_rows_take_their_own_adapters():
    """The same prompts with each adapter and with none, in one batch, against each merged into the weights."""
    decoder = attach(Decoder(graph_of("27b"), weights_of("27b")), ADAPTERS)
    prompts = prompts_of("27b", 20, 20, 20, 20, 45, 3)
    names = [None, "all", "dora", "second", "dora", "all"]
    found = continue_prompts(decoder, prompts, names)
    seeds = [*ADAPTERS]
    expected = [
        continue_merged(ADAPTERS[name] if name else None, seeds.index(name) if name else 0, prompt)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    assert_same(found, expected)
    assert len({tuple(request.tokens) for request in found[:4]}) == 4


@pytest.mark.parametrize("mesh", [None, pytest.param(dict(data=2, tensor=4), marks=pytest.mark.exhaustive)])
def test_an_adapter_takes_the_place_of_another_while_texts_go_on(mesh):
    """A row with another adapter and one with none are between two steps when it does; no program is compiled."""
    decoder = Decoder(graph_of("27b"), weights_of("27b"), mesh and meshes.make_mesh(MeshConfig(**mesh)))
    attach(decoder, {"all": ADAPTERS["all"], "old": ADAPTERS["second"]})
    prompts = prompts_of("27b", 20, 20, 20)
    engine = Engine(decoder, slots=4, context=CONFIGS["27b"].max_length)
    old, *_ = engine.run(requests_of(prompts[:3], ["old", None, "all"]))
    going = requests_of(prompts[:2], [None, "all"])
    for request in going:
        engine.submit(request)
    while not all(0 < len(request.tokens) < NEW for request in going):
        engine.advance()
    new, place, clock = frozen_adapter(ADAPTERS["dora"], 7), decoder.adapter_number("old"), Clock()
    decoder.remove_adapter("old")
    for layer in range(2):
        decoder.put_layer(place, layer, decoder.cut_layer(new, layer))
        engine.advance()
    decoder.adapters["new"] = place
    replaced = requests_of(prompts[:1], ["new"])
    list(engine.run(replaced))
    assert clock.compiling == 0
    assert replaced[0].reused == 0, "the row of the adapter before it is not for this one"
    configs = [(None, 0), (ADAPTERS["all"], 0), (ADAPTERS["second"], 1), (ADAPTERS["dora"], 7)]
    rows = [prompts[0], prompts[1], prompts[0], prompts[0]]
    expected = [continue_merged(*config, prompt) for config, prompt in zip(configs, rows, strict=True)]
    assert_same([*going, old, *replaced], expected)


def test_adapters_after_the_norm_are_what_each_is_alone():
    """Two of them and none in one batch, against each beside the weights, as no weight takes it in."""
    configs = dict.fromkeys(("first", "second"), AdapterConfig(kind="dora", rank=3, alpha=6.0, after_norm=True))
    prompts, names = prompts_of("27b", 20, 20, 20), ["first", None, "second"]
    decoder = attach(Decoder(graph_of("27b"), weights_of("27b")), configs, find_shapes(configs, 2))
    found = continue_prompts(decoder, prompts, names)
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        whole = rebuild_model(graph_of("27b"), weights_of("27b"))
        if name is not None:
            whole = adapted_model(configs[name], [*configs].index(name))
        graph, state = nnx.split(whole)
        expected += continue_prompts(Decoder(graph, flatten_state(state)), [prompt], [None])
    assert_same(found, expected)
    assert len({tuple(request.tokens) for request in found}) == 3


def test_a_prefix_of_another_adapter_is_not_taken():
    decoder = attach(Decoder(graph_of("wide"), weights_of("wide")), {"all": ADAPTERS["all"]})
    (prompt,) = prompts_of("wide", 40)
    names = [None, "all", None, "all"]
    found = continue_prompts(decoder, [prompt] * 4, names)
    alone = [continue_prompts(decoder, [prompt], [name])[0] for name in names]
    assert_same(found, alone)
    assert found[0].tokens != found[1].tokens


def test_the_ratio_of_dora_is_that_of_the_rounded_weights():
    """In int8, where the weight that is multiplied is not the one that was read."""
    decoder = attach(Decoder(graph_of("27b"), weights_of("27b"), int8=True), {"dora": ADAPTERS["dora"]})
    adapter = frozen_adapter(ADAPTERS["dora"], 0)["mlp/down"]
    arrays = decoder.weights["blocks"][1]["mlp"]["down"]
    w = np.asarray(arrays["w"], np.float32) * np.asarray(arrays["scale"])
    norm = np.linalg.norm(w + adapter.a_L[1] @ adapter.b_L[1], axis=0)
    np.testing.assert_allclose(arrays["adapter"]["ratio"][1], adapter.m_L[1] / norm, rtol=1e-5)
    np.testing.assert_array_equal(arrays["adapter"]["ratio"][2], 1)


def test_adapters_before_and_after_a_norm_are_refused():
    configs = {"before": ADAPTERS["all"], "after": AdapterConfig(kind="lora", rank=2, after_norm=True)}
    with pytest.raises(ValueError, match="of the adapters before, after, some are added to attn/o after the post-norm"):
        find_shapes(configs, 2)


def test_unknown_adapters_are_named():
    decoder = attach(Decoder(graph_of("27b"), weights_of("27b")), {"all": ADAPTERS["all"]})
    with pytest.raises(ValueError, match="there is no adapter 'none'; there are all"):
        continue_prompts(decoder, [[5]], ["none"])
