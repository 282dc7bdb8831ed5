"""LoRA and DoRA against PEFT: logits, gradients, merging; and that a frozen base costs no gradient."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from flax.traverse_util import unflatten_dict
from peers import BITING, F32, hf_model, rows_of, state_dict, training_gradients

from gemma2_jax import config as configs, recipes
from gemma2_jax.config import TrainConfig
from gemma2_jax.convert.formats.table import from_hf
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model import gemma2 as model, lora
from gemma2_jax.model.attention.choice import IMPLEMENTATIONS
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import TOKEN_ROWS, AdapterConfig
from gemma2_jax.training.step import Program

LAYOUTS = {  # of one layer: PEFT's [r, in] or [out, r] or [out], flattened from our letters
    "a": lambda x: x.reshape(-1, x.shape[-1]).T,
    "b": lambda x: x.reshape(x.shape[0], -1).T,
    "m": lambda x: x.reshape(-1),
}
TORCH_NAMES = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
MODULES = {"attn": "self_attn", "mlp": "mlp"}
PEFT_PATTERNS = {"attn/q": "q_proj", "1/attn/q": "layers.1.self_attn.q_proj"} | dict.fromkeys(
    ["mlp/*", "mlp/down"], "down_proj"
)


def pair(adapter: AdapterConfig, name: str = "2b"):
    """Our adapted model and PEFT's, with the same random base and adapters (B is not zero)."""
    config = BITING[name]
    base = hf_model(config)
    weights = {path: jnp.asarray(w) for path, w in from_hf(state_dict(base), config).items()}
    create = partial(Gemma2, config, attention=IMPLEMENTATIONS["xla"], dtype="float32")
    ours = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0)))
    nnx.update(ours, nnx.state(model.rebuild_model(nnx.graphdef(ours), weights)))
    lora.attach_adapters(ours, adapter, rngs=nnx.Rngs(1))
    targets = sorted({f"{name.split('/')[1]}_proj" for name, p in lora.projections(ours).items() if p.adapter})
    peer = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            use_rslora=adapter.rslora,
            use_dora=adapter.kind == "dora",
            target_modules=targets,
            lora_dropout=0.0,
            layers_to_transform=list(adapter.layers) or None,
            rank_pattern={PEFT_PATTERNS[pattern]: rank for pattern, rank in adapter.rank_pattern},
            alpha_pattern={PEFT_PATTERNS[pattern]: alpha for pattern, alpha in adapter.alpha_pattern},
            trainable_token_indices=list(adapter.token_ids) or None,
            modules_to_save=["embed_tokens", "input_layernorm", "model.norm"] if adapter.modules_to_save else None,
            ensure_weight_tying=bool(adapter.modules_to_save),
        ),
    )
    rng = np.random.default_rng(3)
    peer_params = dict(peer.named_parameters())
    for path, w in model.flatten_state(nnx.state(ours)).items():
        if adapter.replaces(path) or path == TOKEN_ROWS:
            other = np.asarray(w) + 0.2 * rng.standard_normal(w.shape).astype(np.float32)
            nnx.update(ours, nnx.State(unflatten_dict({path: jnp.asarray(other)}, sep="/")))
            for layer, value in enumerate(other if path.startswith("blocks/") else other[None]):
                peer_params[saved_name(path, layer)].data = torch.tensor(value.copy())
    for name, projection in lora.projections(ours).items():
        if projection.adapter is None:
            continue
        for part in "abm" if adapter.kind == "dora" else "ab":
            variable = getattr(projection.adapter, part)
            spread = {"a": 0.3, "b": 0.1, "m": 0.3}[part]
            values = np.array(variable[...]) + spread * rng.standard_normal(variable.shape).astype(np.float32)
            for layer, value in enumerate(values):
                if adapter.layers and layer not in adapter.layers:
                    value[...] = 0
                    continue
                rank = adapter.layer_rank(name, layer)
                beyond_rank(value, part, rank)[...] = 0
                tensor = cut_rank(LAYOUTS[part](value), part, rank)
                peer_params[torch_name(name, layer, part)].data = torch.tensor(tensor.copy())
            variable[...] = jnp.asarray(values)
    return config, ours, peer


def beyond_rank(value: np.ndarray, part: str, rank: int) -> np.ndarray:
    """What a layer has of a larger rank than its own, as a view."""
    return {"a": value[..., rank:], "b": value[rank:], "m": value[:0]}[part]


def cut_rank(tensor: np.ndarray, part: str, rank: int) -> np.ndarray:
    """PEFT's tensor of a layer of a stack, in the layer's own rank."""
    return tensor[:rank] if part == "a" else tensor[:, :rank] if part == "b" else tensor


def saved_name(path: str, layer: int) -> str:
    if path == TOKEN_ROWS:
        return "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    names = {
        "embedding": "embed_tokens",
        "final_norm/w": "norm",
        "blocks/pre_attn_norm/w": f"layers.{layer}.input_layernorm",
    }
    return f"base_model.model.model.{names[path]}.modules_to_save.default.weight"


def torch_name(projection: str, layer: int, part: str) -> str:
    group, name = projection.split("/")
    return f"base_model.model.model.layers.{layer}.{MODULES[group]}.{name}_proj.{TORCH_NAMES[part]}"


@jax.jit
def logits_of(ours: Gemma2, rows):
    return ours(*rows)


ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=4, alpha=8.0),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=8.0),
    "rslora": AdapterConfig(
        kind="lora",
        rank=4,
        alpha=8.0,
        rslora=True,
        rank_pattern=(("1/attn/q", 2), ("mlp/down", 5)),
        alpha_pattern=(("1/attn/q", 3.0),),
        trainable_tokens=(300, 7, 9, 383),
    ),
    "parts": AdapterConfig(
        kind="dora",
        rank=3,
        alpha=5.0,
        targets=("attn/[qv]", "mlp/down"),
        layers=(0, 2),
        rank_pattern=(("mlp/*", 2),),
        alpha_pattern=(("attn/q", 7.0),),
        modules_to_save=("embedding", "pre_attn_norm", "final_norm"),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "lora")) for name in ADAPTERS]
)
def test_logits_and_gradients_equal_peft(name):
    config, ours, peer = pair(ADAPTERS[name])
    rows = rows_of(config)
    tokens = torch.tensor(rows[0])
    expected = peer(tokens, labels=tokens)
    expected.loss.backward()
    np.testing.assert_allclose(logits_of(ours, rows), expected.logits.detach().numpy(), atol=1e-4, rtol=0)
    targets, counted = np.roll(rows[0], -1, axis=1), np.ones(rows[0].shape, np.float32)
    counted[:, -1] = 0
    loss, gradients = training_gradients(
        config, ADAPTERS[name], model.flatten_state(nnx.state(ours)), *rows, targets, counted
    )
    np.testing.assert_allclose(loss, expected.loss.item(), rtol=1e-5)
    peer_params = dict(peer.named_parameters())
    assert gradients.keys() >= {path for path in model.weight_dims(ours) if ADAPTERS[name].replaces(path)}
    assert (TOKEN_ROWS in gradients) == bool(ADAPTERS[name].trainable_tokens)
    for path, gradient in gradients.items():
        for layer, got in enumerate(np.asarray(gradient) if path.startswith("blocks/") else [np.asarray(gradient)]):
            if "/adapter/" in path and layer not in (ADAPTERS[name].layers or range(config.layers)):
                assert not np.any(got), f"{path} layer {layer}, which has no adapter, would be trained"
                continue
            if "/adapter/" in path:
                _, group, projection, _, part = path.split("/")
                rank = ADAPTERS[name].layer_rank(f"{group}/{projection}", layer)
                assert not np.any(beyond_rank(got, part, rank)), f"{path} layer {layer}: more than its rank is trained"
                wanted = peer_params[torch_name(f"{group}/{projection}", layer, part)]
                got = cut_rank(LAYOUTS[part](got), part, rank)
            else:
                wanted = peer_params[saved_name(path, layer)]
            wanted = wanted.grad.numpy()
            error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
            assert error < 1e-4, f"{path} layer {layer}: relative L2 error {error:.2e}"


@pytest.mark.parametrize(
    "name", ["rslora", "dora", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("lora", "parts"))]
)
def test_merged_equals_unmerged(name):
    config, ours, _ = pair(ADAPTERS[name])
    rows = rows_of(config)
    unmerged = logits_of(ours, rows)
    lora.merge_adapters(ours)
    assert not any(isinstance(node, lora.Adapter) for _, node in nnx.iter_graph(ours))
    merged = logits_of(ours, rows)
    # Both are sums of float32 in another order, whose largest single difference is another on each kind of CPU.
    assert np.linalg.norm(merged - unmerged) / np.linalg.norm(unmerged) < 1e-5


def test_new_adapters_change_nothing():
    """B is zero and DoRA's magnitude is the norm, so that training starts from the given model."""
    config = BITING["2b"]
    ours = Gemma2(config, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=nnx.Rngs(0))
    rows = rows_of(config)
    plain = logits_of(ours, rows)
    lora.attach_adapters(ours, AdapterConfig(kind="dora", rank=4), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(logits_of(ours, rows), plain, atol=1e-5)


def test_dropout_drops_inputs_of_the_adapter_only():
    config, adapter = BITING["2b"], AdapterConfig(kind="lora", rank=4, dropout=0.5)
    ours = Gemma2(config, attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=nnx.Rngs(0))
    lora.attach_adapters(ours, adapter, rngs=nnx.Rngs(1))
    rows = rows_of(config)

    counted = np.ones(rows[0].shape, np.float32)

    @jax.jit
    def loss_of(weights, key):
        return training_gradients(config, adapter, weights, *rows, rows[0], counted, key)[0]

    def loss(seed: int | None = None):
        return loss_of(model.flatten_state(nnx.state(ours)), None if seed is None else jax.random.key(seed))

    assert loss(0) == loss()  # B is zero: whatever is dropped, nothing changes
    ours.blocks.attn.q.adapter.b[...] = jnp.ones(ours.blocks.attn.q.adapter.b.shape)
    assert loss(0) == loss(0)
    assert abs(loss(0) - loss(1)) > 1e-4
    assert abs(loss(0) - loss()) > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ("attn/q", "attn/qkv")},
            r"adapter.targets: 'attn/qkv' matches nothing; there are attn/k, .*mlp/up",
        ),
        ({"rank_pattern": (("k_proj", 8),)}, "adapter.rank_pattern: 'k_proj' matches nothing; there are attn/k"),
        (
            {"modules_to_save": ("lm_head",)},
            "adapter.modules_to_save: 'lm_head' matches nothing; there are .*embedding",
        ),
        ({"modules_to_save": ("attn/q",)}, "adapter.modules_to_save and adapter.targets both have attn/q"),
        ({"layers": (0, 3)}, "adapter.layers has 3; the last of the model is 2"),
        ({"rank_pattern": (("3/attn/q", 8),)}, "adapter.rank_pattern: '3/attn/q' matches nothing; there are attn/k"),
        (
            {"trainable_tokens": (7, 384)},
            "adapter.trainable_tokens has 384, and the embedding has 384 rows, 0 to 383",
        ),
        ({"trainable_tokens": (7, "<tool>")}, "has '<tool>', and only training has a tokenizer to say its id; give"),
        (
            {"trainable_tokens": (7,), "modules_to_save": ("embedding",)},
            "modules_to_save has the embedding, and adapter.trainable_tokens some of its rows; choose one",
        ),
    ],
)
def test_what_the_model_lacks_is_named(fields, message):
    ours = Gemma2(BITING["2b"], attention=IMPLEMENTATIONS["xla"], dtype="float32", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        lora.attach_adapters(ours, AdapterConfig(kind="lora", **fields), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "none", "trainable_tokens": (7,)}, "adapter.kind is none, which trains every row of the embedding"),
        ({"kind": "lora", "trainable_tokens": (7, 9, 7)}, "is .7, 9, 7.; give every token once"),
        ({"kind": "lora", "trainable_tokens": (-1,)}, "is .-1,.; give every token once, an id counted from 0"),
    ],
)
def test_tokens_that_cannot_be_meant_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**fields)


def run(kind: str, **train) -> tuple[configs.Config, Program]:
    config = recipes.finetune(
        "test",
        BITING["2b"],
        "",
        kind,
        train=TrainConfig(sequence_length=32, global_batch_size=4, **train),
        compute=replace(F32, frozen_dtype="bfloat16"),
    )
    return config, Program(config, make_mesh(configs.MeshConfig(data=1), jax.devices()[:1]))


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of the arrays of floats computed anywhere in a jaxpr; whether weights are finite is asked in booleans."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.shape for v in equation.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_frozen_base_has_no_gradient_and_no_optimizer_state(kind):
    _, program = run(kind)
    assert {leaf.dtype.name for leaf in program.frozen.values()} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in program.params.values()} == {"float32"}
    assert all("/adapter/" in path for path in program.params)
    state_size = sum(leaf.size for leaf in jax.tree.leaves(program.state.optimizer))
    assert state_size <= 2 * sum(leaf.size for leaf in program.params.values()) + 8
    # A gradient of the embedding or of a stacked weight would be a float array of its shape that the step computes.
    computed = shapes_in(jax.make_jaxpr(program.train_step)(program.state, program.batch).jaxpr)
    frozen = {path: leaf.shape for path, leaf in program.frozen.items() if leaf.ndim > 2}
    assert not {path for path, shape in frozen.items() if shape in computed}
    _, full = run("sft")
    computed = shapes_in(jax.make_jaxpr(full.train_step)(full.state, full.batch).jaxpr)
    assert {leaf.shape for leaf in full.params.values()} <= computed, "the test could not see a gradient"


def test_rows_of_tokens_cost_no_gradient_of_the_embedding():
    """Nothing of the embedding's shape is computed, and the optimizer has the moments of these rows alone."""
    adapter = AdapterConfig(kind="lora", rank=2, targets=("attn/q",), trainable_tokens=(5, 9, 300))
    train = TrainConfig(sequence_length=32, global_batch_size=4)
    config = recipes.finetune("test", BITING["2b"], "", "lora", adapter=adapter, compute=F32, train=train)
    program = Program(config, make_mesh(configs.MeshConfig(data=1), jax.devices()[:1]))
    assert program.params[TOKEN_ROWS].shape == (3, config.model.width)
    shapes = [leaf.shape for leaf in jax.tree.leaves(program.state.optimizer)]
    assert shapes.count((3, config.model.width)) == 2 and (config.model.vocab_size, config.model.width) not in shapes
    computed = shapes_in(jax.make_jaxpr(program.train_step)(program.state, program.batch).jaxpr)
    assert (config.model.vocab_size, config.model.width) not in computed
