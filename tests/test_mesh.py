"""Meshes over virtual devices: what divides, where arrays lie, and that a sharded step equals an unsharded one."""

import math
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from peers import BITING

from gemma2_jax import config as configs, dims, mesh as meshes, recipes
from gemma2_jax.config import ComputeConfig, MeshConfig, TrainConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model_config import AdapterConfig, ModelConfig
from gemma2_jax.training.loop import place_batch
from gemma2_jax.training.step import Program

pytestmark = pytest.mark.usefixtures("compiled_once")

GOLDEN = Path(__file__).parent / "golden" / "shardings"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, tensor=3), "takes a multiple of 3 devices, and there are 8"),
        (MeshConfig(data=2, tensor=2), "is 4 devices, but there are 8; set one axis to -1"),
    ],
)
def test_impossible_meshes(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(config)


def program(kind: str, mesh: MeshConfig, devices: int = 8, **changes) -> Program:
    config = recipes.finetune(
        "test",
        BITING["9b"],
        "",
        kind,
        train=TrainConfig(sequence_length=32, global_batch_size=8),
        compute=ComputeConfig(dtype="float32", frozen_dtype="float32", loss_chunk=8),
        # A large epsilon: else Adam blows the rounding of the smallest gradients up to whole steps.
        optim=configs.OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-2),
        mesh=mesh,
    )
    return Program(replace(config, **changes), make_mesh(mesh, jax.devices()[:devices]))


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"mesh.tensor 8 does not divide the query heads of 4; use a divisor of 4"):
        program("sft", MeshConfig(tensor=8))
    odd = replace(BITING["9b"], heads=8, kv_heads=2, mlp_width=80)
    with pytest.raises(ValueError, match=r"into 8 pieces, which does not divide .*length 30; use 24 or 32"):
        program("sft", MeshConfig(tensor=8), model=odd, train=TrainConfig(sequence_length=30, global_batch_size=8))
    with pytest.raises(ValueError, match=r"context 4 .* 8 pieces, which does not divide .*length 36; use 32 or 40"):
        program("sft", MeshConfig(context=4), train=TrainConfig(sequence_length=36, global_batch_size=8))
    six = replace(BITING["9b"], heads=24, kv_heads=12, mlp_width=80)
    with pytest.raises(ValueError, match=r"the key/value heads of 12; use a divisor or a multiple of 12"):
        program("sft", MeshConfig(tensor=8), model=six)
    with pytest.raises(ValueError, match=r"mesh.stage 8 is more than the 4 layers; use fewer stages"):
        program("sft", MeshConfig(stage=8))
    prime = replace(BITING["9b"], width=57, mlp_width=81)
    with pytest.raises(ValueError, match=r"mesh.fsdp 4 x mesh.context 2: fsdp divides neither .* width of 57 nor"):
        program("sft", MeshConfig(fsdp=4, context=2), model=prime)
    with pytest.raises(ValueError, match=r"global_batch_size 12 does not divide over .* = 8 rows a pass; use 16"):
        program("sft", MeshConfig(), train=TrainConfig(sequence_length=32, global_batch_size=12))


@pytest.mark.parametrize("name", [name for name in recipes.recipe_names() if not name.startswith("tiny")])
def test_shardings_are_golden(name):
    """Shardings of every recipe's state, read off arrays of its model, shrunk; UPDATE_GOLDEN=1 renews them."""
    recipe = recipes.load_recipe(name)
    config = replace(
        recipe,
        model=replace(BITING[name.split("_")[0]], layers=3),
        train=replace(recipe.train, sequence_length=32),
        mesh=MeshConfig(data=1, stage=2, fsdp=2, tensor=2),
    )
    run = Program(config, make_mesh(config.mesh))
    state = run.initial_state(
        {path: jax.device_put(np.zeros(w.shape, w.dtype), w.sharding) for path, w in run.base.items()}
    )
    lines = []
    for group, arrays in (("trained", state.params), ("frozen", state.frozen)):
        for path, w in sorted(arrays.items()):
            lines.append(f"{group} {path} {run.letters[path]} {w.dtype} {w.sharding.spec}\n")
    for name_, moments in (
        ("mu", optax.tree.get(state.optimizer, "mu")),
        ("nu", optax.tree.get(state.optimizer, "nu")),
    ):
        for path, w in moments.items():
            assert w.sharding == state.params[path].sharding, f"{name_} of {path} lies elsewhere than its weight"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text("".join(lines))
    assert "".join(lines) == golden.read_text()


# What runs always, model, mesh: layers that stages do not divide, and heads that tensor shards exceed, among them.
MESHES = [
    (None, "9b", MeshConfig(data=4, tensor=2)),
    (None, "27b", MeshConfig(data=2, tensor=4)),
    (None, "9b", MeshConfig(fsdp=8)),
    (None, "9b", MeshConfig(data=2, fsdp=2, tensor=2)),
    (None, "2b", MeshConfig(stage=2, fsdp=2, tensor=2)),  # 2 + 1 layers
    (None, "2b", MeshConfig(stage=2, data=4)),
    (None, 5, MeshConfig(stage=3, tensor=2)),  # 2 + 2 + 1 layers, on six devices
    (None, 7, MeshConfig(stage=4, fsdp=2)),  # 2 + 2 + 2 + 1 layers
    (None, "9b", MeshConfig(context=2, data=4)),
    (None, "9b", MeshConfig(context=4, fsdp=2)),
    (None, "9b", MeshConfig(context=2, tensor=2, data=2)),
    (None, "9b", MeshConfig(context=4, tensor=2)),
    ("sft", "2b", MeshConfig(stage=2, context=2, tensor=2)),
]


def biting(model: str | int) -> ModelConfig:
    """A model whose scores and logits reach their caps; a number is that of its layers."""
    config = BITING[model] if isinstance(model, str) else replace(BITING["9b"], layers=model)
    return replace(config, attn_softcap=5.0, final_softcap=5.0)


def weights(run: Program) -> dict[str, jax.Array]:
    """Weights that bite, placed as the run wants them: layers in front, zeros in what is over.

    Scores have a spread of about 4 and logits of 3. More, and steps amplify the rounding of sums to 1e-4.
    """
    rng = np.random.default_rng(1)
    found = {}
    for path, want in run.base.items():
        letters = run.letters[path]
        shape = dims.weight_shape(letters, run.config.model)
        fan_in = math.prod(shape[1:-1]) if path.endswith("o/w") else shape[letters.index("D")]
        fan_in = run.config.model.mlp_width if path.endswith("down/w") else fan_in
        gain = 2 if path.endswith(("q/w", "k/w")) else 3 if path == "embedding" else 1
        std = 0.3 if path.endswith("norm/w") else gain * fan_in**-0.5
        w = np.pad(rng.normal(0, std, shape), [(0, now - old) for now, old in zip(want.shape, shape, strict=True)])
        found[path] = jax.device_put(w.astype(want.dtype), want.sharding)
    return found


def batches(packed: bool) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (8, 32), np.int32), axis=1) if packed else np.ones((8, 32), np.int32)
    return [
        {
            "tokens": rng.integers(0, 384, (8, 32), np.int32),
            "targets": rng.integers(0, 384, (8, 32), np.int32),
            "segments": segments,
            "positions": np.tile(np.arange(32, dtype=np.int32), (8, 1)),
            "weights": rng.integers(0, 2, (8, 32)).astype(np.float32),
        }
        for _ in range(3)
    ]


def compile_step(run: Program) -> jax.stages.Compiled:
    with jax.set_mesh(run.mesh):
        return jax.jit(run.train_step, donate_argnums=0).lower(run.state, run.batch).compile()


def three_steps(run: Program, step: jax.stages.Compiled) -> list[dict[str, np.ndarray]]:
    """Loss, mean gradient (Adam's) and weights after three steps, packed and not, by name."""
    results = []
    with jax.set_mesh(run.mesh):
        for packed in (True, False):
            state = run.initial_state(weights(run))
            for batch in batches(packed):
                state, metrics = step(state, place_batch(run, batch))
            moment = optax.tree.get(state.optimizer, "mu")
            found = {"loss": metrics["loss"], "norm": metrics["grad_norm"]}
            for name, tree in (("gradient", moment), ("weight", state.params)):
                for path, w in tree.items():
                    if run.letters[path].startswith("L"):
                        w, padding = w[: run.config.model.layers], w[run.config.model.layers :]
                        assert not np.any(padding), f"{path}: layers that are none were trained"
                    found[f"{name} of {path}"] = w
            results.append({name: np.asarray(value, np.float64) for name, value in found.items()})
    return results


@cache
def unsharded(kind: str, model: str | int) -> list[dict[str, np.ndarray]]:
    run = program(kind, MeshConfig(), devices=1, model=biting(model))
    return three_steps(run, compile_step(run))


def check_steps(found: list[dict[str, np.ndarray]], wanted: list[dict[str, np.ndarray]]) -> None:
    """Float32 sums in another order, through three steps: relative L2 errors of 1e-5."""
    for got, expected in zip(found, wanted, strict=True):
        for name, value in expected.items():
            error = np.linalg.norm(got[name] - value) / max(np.linalg.norm(value), 1e-30)
            assert error < 1e-5, f"{name}: relative L2 error {error:.2e}"


def cases() -> list:
    """Every mesh with every kind of training, of which one may run always."""
    found = []
    for always, model, mesh in MESHES:
        for kind in ("sft", "lora", "dora"):
            name = "x".join(f"{axis}{size}" for axis, size in vars(mesh).items() if size > 1)
            marks = () if kind == always else pytest.mark.exhaustive
            found.append(
                pytest.param(kind, model, replace(mesh, data=abs(mesh.data)), id=f"{kind}-{name}", marks=marks)
            )
    return found


@pytest.mark.parametrize(("kind", "model", "mesh"), cases())
def test_sharded_steps_equal_unsharded_ones(kind, model, mesh):
    run = program(kind, mesh, devices=math.prod(vars(mesh).values()), model=biting(model))
    check_steps(three_steps(run, compile_step(run)), unsharded(kind, model))


@pytest.mark.parametrize(
    ("fields", "mesh"),
    [
        pytest.param({"after_norm": True}, MeshConfig(data=1, stage=2, fsdp=2, tensor=2), marks=pytest.mark.exhaustive),
        (
            {
                "targets": ("attn/q", "mlp/up", "mlp/down"),
                "layers": (0, 2),
                "rank_pattern": (("2/attn/q", 2), ("mlp/*", 3)),
                "alpha_pattern": (("2/mlp/up", 9.0),),
                "modules_to_save": ("*_norm",),
                "trainable_tokens": (300, 7, 383, 12),
            },
            MeshConfig(data=1, stage=2, fsdp=2),
        ),
    ],
)
def test_adapters_of_other_kinds_on_a_mesh(fields, mesh):
    """Added after the post-norm (what `test_after_norm` samples); on some layers, beside weights that are trained."""
    adapter = AdapterConfig(kind="dora", rank=4, **fields)
    runs = [
        program("dora", mesh, devices=math.prod(vars(mesh).values()), model=biting("2b"), adapter=adapter)
        for mesh in (MeshConfig(data=1), mesh)
    ]
    expected, found = (three_steps(run, compile_step(run)) for run in runs)
    check_steps(found, expected)
    for name in [name for name in found[0] if "/adapter/" in name and adapter.layers]:
        assert all(not np.any(got[name][1]) and np.any(got[name][2]) for got in found)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("sft", "lora")), "dora"]
)
def test_a_tensor_parallel_step(kind, capfd):
    """Over twice the key/value heads it equals an unsharded one.

    Positions are gathered for the blocks; logits and MLP are not, and XLA finds no resharding it cannot do.
    """
    run = program(kind, MeshConfig(tensor=8), model=biting("27b"))
    step = compile_step(run)
    assert "rematerialization" not in capfd.readouterr().err
    check_steps(three_steps(run, step), unsharded(kind, "27b"))
    found = re.findall(r"= f32\[([\d,]+)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\(", step.as_text())
    collectives = {(name, tuple(map(int, shape.split(",")))) for shape, name in found}
    assert ("all-gather", (1, 32, 40)) in collectives, "positions are not spread between blocks"
    config = BITING["27b"]
    large = {config.vocab_size, config.vocab_size // 8, config.mlp_width}
    assert not [(name, shape) for name, shape in collectives if large & set(shape)]


@pytest.mark.parametrize("kind", ["sft", pytest.param("dora", marks=pytest.mark.exhaustive)])
def test_only_stages_hand_on(kind):
    """Activations go from stage to stage; nothing else is moved about, nor is there a resharding XLA warns of."""
    text = compile_step(program(kind, MeshConfig(data=1, stage=2, fsdp=2, tensor=2), model=BITING["9b"])).as_text()
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:collective-permute|all-to-all)\(.*op_name=\"([^\"]*)\"", text)
    assert {(shape, name.split("/")[-1]) for shape, name in moved} == {("1,16,56", "ppermute")}


def test_the_table_of_dims():
    """Positions are spread further between blocks; what an axis does not divide may stay whole or goes elsewhere."""
    mesh = {"data": 2, "stage": 2, "fsdp": 2, "context": 1, "tensor": 4}
    batch, both = ("data", "fsdp"), ("fsdp", "context")
    assert dims.used_spec("BTD", (2, 32, 56), mesh, "between_blocks") == P(batch, ("context", "tensor"), None)
    assert dims.used_spec("BTD", (2, 32, 56), mesh) == P(batch, "context", None)
    assert dims.used_spec("BTD", (2, 1, 56), mesh, "between_blocks") == P(batch, "context", None)
    assert dims.used_spec("BTF", (2, 32, 80), mesh) == P(batch, "context", "tensor")
    assert dims.used_spec("BTKH", (2, 32, 4, 16), mesh) == P(batch, "context", "tensor", None)
    assert dims.used_spec("BTKH", (2, 32, 2, 16), mesh) == P(batch, "context", None, None)
    assert dims.used_spec("BTV", (2, 32, 384), mesh, "for_logits") == P("data", None, ("tensor", "stage", *both))
    assert dims.used_spec("BTV", (2, 32, 8), mesh, "for_logits") == P("data", None, ("tensor", "stage", "context"))
    assert dims.stored_spec("LDKH", (4, 56, 2, 16), mesh) == P("stage", both, None, None)
    assert dims.stored_spec("LDKH", (4, 56, 4, 16), mesh) == P("stage", both, "tensor", None)
    assert dims.stored_spec("LDF", (4, 57, 80), mesh) == P("stage", "context", ("tensor", "fsdp"))
    assert dims.stored_spec("LFD", (4, 80, 56), mesh) == P("stage", ("tensor", *both), None)
    assert dims.stored_spec("VD", (384, 56), mesh) == P(("tensor", "stage", *both), None)
    assert dims.stored_spec("VD", (384, 57), mesh | {"stage": 5, "fsdp": 19}) == P(
        ("tensor", "context"), "fsdp"
    )  # as 5 divides none
    assert dims.stored_spec("VD", (384, 57), mesh | {"stage": 19}) == P(("tensor", *both), "stage")
    assert dims.stored_spec("LD", (4, 56), mesh) == P("stage", None)
    # Axes that `shard_map` has split over already are not in the mesh.
    assert dims.used_spec("BTF", (2, 32, 80), {"fsdp": 2, "tensor": 4}) == P("fsdp", None, "tensor")


def test_context_shards_have_equal_work():
    """Two shards of eight positions: the outer pairs, and the inner ones."""
    row = np.arange(8)
    np.testing.assert_array_equal(meshes.balance_context(row, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(meshes.balance_context(row, 1), row)
    assert [sum(part) for part in np.split(meshes.balance_context(np.arange(32), 4), 4)] == [124] * 4


def test_constrain_without_a_mesh_is_nothing():
    x = np.ones((2, 3, 4))
    assert meshes.constrain(x, "BTD") is x


@pytest.mark.parametrize(
    ("name", "mesh", "layers", "passes", "bubble"),
    [
        ("27b_pretrain", MeshConfig(data=1, stage=2, tensor=4), [23, 23], 16, "5.9%"),
        ("2b_pretrain", MeshConfig(data=1, stage=3), [9, 9, 8], 16, "11.1%"),
        ("9b_sft", MeshConfig(data=1, stage=2), [21, 21], 128, "0.8%"),
        ("27b_sft", MeshConfig(data=2, stage=4), [12, 12, 12, 10], 64, "4.5%"),
    ],
)
def test_stages_and_their_bubble(name, mesh, layers, passes, bubble):
    config = replace(recipes.load_recipe(name), mesh=mesh)
    run = Program(config, make_mesh(mesh, jax.devices()[: math.prod(vars(mesh).values())]))
    stages = run.pipeline
    assert [int(stages.stage_layers(stage)) for stage in range(stages.stages)] == layers
    assert stages.passes == passes and f"{stages.bubble:.1%}" == bubble
    assert run.base["blocks/mlp/gate/w"].shape[0] == stages.layers * stages.stages


def compiled(**changes):
    """A step of three layers over two stages, compiled; what it keeps is far larger than a batch."""
    config = ComputeConfig(dtype="float32", loss_chunk=8, remat=changes.pop("remat", "block"))
    run = program("sft", MeshConfig(data=1, stage=2, fsdp=2, tensor=2), model=biting("2b"), compute=config, **changes)
    with jax.set_mesh(run.mesh):
        return run, jax.jit(run.train_step).lower(run.state, run.batch).compile()


@pytest.mark.exhaustive
def test_what_a_stage_keeps_does_not_grow_with_the_passes():
    """Eight times the passes need room for their tokens and nothing else: [B, T] times five arrays of four bytes."""
    few, many = (compiled(train=TrainConfig(sequence_length=32, global_batch_size=rows)) for rows in (8, 64))
    assert (few[0].pipeline.passes, many[0].pipeline.passes) == (4, 32)
    grown = [run[1].memory_analysis().temp_size_in_bytes for run in (few, many)]
    one_pass = 32 * 36 * 4  # its activations between two layers
    assert grown[1] - grown[0] <= 5 * (64 - 8) * 32 * 4 + 2 * one_pass


@pytest.mark.exhaustive
def test_a_pass_that_stages_wait_for_alone():
    """Fewer passes than stages."""
    losses = []
    for mesh, devices in (MeshConfig(data=1), 1), (MeshConfig(data=1, stage=4, fsdp=2), 8):
        train = TrainConfig(sequence_length=32, global_batch_size=8, micro_batch_size=4)
        run = program("sft", mesh, devices=devices, model=biting(7), train=train)
        assert run.pipeline.passes == {1: 2, 8: 1}[devices]
        with jax.set_mesh(run.mesh):
            _, metrics = jax.jit(run.train_step)(run.initial_state(weights(run)), place_batch(run, batches(True)[0]))
        losses.append((metrics["loss"], metrics["grad_norm"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_held_out_losses_agree():
    losses = []
    for mesh, devices in (MeshConfig(data=1), 1), (MeshConfig(data=1, stage=2, context=2, tensor=2), 8):
        run = program("sft", mesh, devices=devices, model=biting("2b"))
        with jax.set_mesh(run.mesh):
            losses.append(jax.jit(run.eval_step)(run.initial_state(weights(run)), place_batch(run, batches(True)[0])))
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    ("policies", "stages"),
    [(("block", "dots"), 1), pytest.param(("block", "dots", "none", "offload"), 2, marks=pytest.mark.exhaustive)],
)
def test_remat_policies_agree(policies, stages):
    """Whatever is kept of a block, the gradients are the same; what keeps more takes more memory."""
    norms, memory = {}, {}
    for policy in policies:
        compute = ComputeConfig(dtype="float32", frozen_dtype="float32", loss_chunk=8, remat=policy)
        run = program("sft", MeshConfig(data=1, stage=stages), devices=stages, model=biting("2b"), compute=compute)
        step = compile_step(run)
        with jax.set_mesh(run.mesh):
            _, metrics = step(run.initial_state(weights(run)), place_batch(run, batches(True)[0]))
        norms[policy], memory[policy] = float(metrics["grad_norm"]), step.memory_analysis().temp_size_in_bytes
    np.testing.assert_allclose(list(norms.values()), norms["block"], rtol=1e-5)
    least_first = [memory[policy] for policy in policies if policy != "offload"]
    assert least_first == sorted(set(least_first))


@pytest.mark.parametrize("kind", ["sft", pytest.param("lora", marks=pytest.mark.exhaustive)])
def test_kept_outputs_change_no_gradient(kind):
    """What is kept of a block is what would be computed again, bit by bit; it takes memory."""
    gradients, memory = [], []
    for kept in ((), ("attention", "o", "down")):
        compute = ComputeConfig(dtype="float32", frozen_dtype="float32", loss_chunk=8, kept_outputs=kept)
        run = program(kind, MeshConfig(data=1), devices=1, model=biting("2b"), compute=compute)
        step = compile_step(run)
        with jax.set_mesh(run.mesh):
            state, _ = step(run.initial_state(weights(run)), place_batch(run, batches(True)[0]))
        gradients.append(jax.device_get(optax.tree.get(state.optimizer, "mu")))
        memory.append(step.memory_analysis().temp_size_in_bytes)
    jax.tree.map(np.testing.assert_array_equal, *gradients)
    assert memory[0] < memory[1]


def test_outputs_of_all_products_are_kept_already():
    with pytest.raises(
        ValueError, match=r"compute.kept_outputs names o, and compute.remat is none.* use compute.remat"
    ):
        ComputeConfig(remat="none", kept_outputs=("o",))
