"""Plans: bytes counted by hand in typed-out HLO, and steps compiled for H100s that are not there."""

import math
import re
import time
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import pytest
from compilers import needs_plugin
from jax.experimental import topologies
from rich.console import Console

from benchmarks.machine_code import find_calls
from gemma2_jax import plan, recipes
from gemma2_jax.config import ComputeConfig, Config, MeshConfig, TrainConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model_config import GEMMA2_2B
from gemma2_jax.planning.compiled_step import CompiledStep, compile_step
from gemma2_jax.planning.dense_step import DenseStep, describe_gemma
from gemma2_jax.planning.described_cluster import describe_cluster
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.memory import Peak
from gemma2_jax.planning.report import describe_fit, plan_in_subprocess, summarize_step
from gemma2_jax.planning.schedule import sum_flops
from gemma2_jax.planning.traffic import read_traffic, sum_traffic
from gemma2_jax.training.smaller_steps import argument_bytes
from gemma2_jax.training.step import Program

LAYERS, PASSES = 3, 5
SMALL = replace(
    GEMMA2_2B, layers=LAYERS, width=192, mlp_width=512, heads=16, kv_heads=8, head_width=16, vocab_size=2048, window=64
)


def program(*instructions: str) -> str:
    body = "\n".join(f"  {line}" for line in instructions)
    return f"ENTRY %main (param: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("instruction", "sent"),
    [
        ("f32[8,4]{1,0} all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", 128 / 2),
        ("f32[8,4]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}", 128),
        ("bf16[8,4]{1,0} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add", 64),
        ("(f32[4]{0}, f32[4]{0}) all-to-all(%p, %q), replica_groups={{0,1},{2,3},{4,5},{6,7}}", 16),
        ("s8[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,4}}", 8),
    ],
)
def test_bytes_sent(instruction, sent):
    (found,) = read_traffic(program(f'ROOT %x = {instruction}, metadata={{op_name="here"}}'), {"data": 4, "tensor": 2})
    assert (found.axes, found.sent, found.times, found.where) == ("tensor", sent, 1, "here")


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,2,4,6,8,10},{1,3,5,7,9,11}}", "stage+fsdp"),
        ("{{0,2,4},{1,3,5},{6,8,10},{7,9,11}}", "fsdp"),
        ("{}", "stage+fsdp+tensor"),
        ("[6,2]<=[2,6]T(1,0)", "stage"),
        ("[2,6]<=[12]", "fsdp+tensor"),
        ("[2,6]<=[6,2]T(1,0)", "stage+fsdp"),
        ("[12,1]<=[12]", None),
        ("mesh['stage'=2,'fsdp'=3,'tensor'=2] {'stage'}", "stage"),
        ("mesh['x'=2,'y'=6] {'y':(3)2}", "tensor"),
        ("mesh['x'=2,'y'=6] {'y':(1)3}", "fsdp"),
        ("mesh['x'=6,'y'=2], device_ids=([2,6]T(1,0)) {'y'}", "stage"),
        ("mesh['x'=6,'y'=2], device_ids=(0,6,1,7,2,8,3,9,4,10,5,11) {'x'}", "fsdp+tensor"),
    ],
)
def test_groups_lie_along_axes(groups, axes):
    text = program(f"ROOT %x = f32[12]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert [found.axes for found in read_traffic(text, {"stage": 2, "fsdp": 3, "tensor": 2})] == (
        [axes] if axes else []
    )


LOOPS = """\
%wrapped (p: f32[8]) -> f32[8] {
  ROOT %inside = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}
%layer (p: f32[8]) -> f32[8] {
  %start = ((f32[4], f32[2]), (f32[8], /*index=1*/f32[4])) all-gather-start(%p, %q), replica_groups=[1,2]<=[2]
  ROOT %done = (f32[8]{0}, f32[4]{0}) all-gather-done(%start), metadata={op_name="done"}
}
%tile (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
%pass (p: f32[8]) -> f32[8] {
  %layers = f32[8]{0} while(%p), condition=%c, body=%layer, metadata={op_name="layers"}KNOWN
  %tiles = f32[8]{0} while(%p), condition=%c, body=%tile, metadata={op_name="tiles"}, backend_config={}
  ROOT %y = f32[8]{0} fusion(%p), kind=kLoop, calls=%wrapped
}
ENTRY %main (param: f32[8]) -> f32[8] {
  ROOT %w = f32[8]{0} while(%p), condition=%c, body=%pass, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_loops_multiply_and_unknown_ones_are_named():
    mesh = {"fsdp": 2}
    found = {
        c.kind: c for c in read_traffic(LOOPS.replace("KNOWN", ', backend_config={"known_trip_count":{"n":"3"}}'), mesh)
    }
    assert (found["all-gather"].times, found["all-gather"].sent) == (15, 12 * 4 / 2)
    assert (found["all-reduce"].times, found["all-reduce"].loop) == (5, "")
    assert (found["collective-permute"].times, found["collective-permute"].loop) == (None, "tiles")
    assert sum_traffic(found.values()) == {"fsdp": {"all-gather": 15 * 24, "all-reduce": 5 * 32}}
    assumed = {c.kind: c for c in read_traffic(LOOPS.replace("KNOWN", ""), mesh, layers_per_stage=4)}
    assert (assumed["all-gather"].times, assumed["all-gather"].loop) == (20, "layers")
    nested = LOOPS.replace('backend_config={"known_trip_count":{"n":"5"}}', "").replace("KNOWN", "")
    twice = {c.kind: c for c in read_traffic(nested, mesh, layers_per_stage=4)}
    assert (twice["all-reduce"].times, twice["all-gather"].times) == (4, None)


def test_what_is_not_compiled_hlo_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        read_traffic("module @jit_step {}", {"data": 1})
    with pytest.raises(ValueError, match="in a way that is not known here"):
        read_traffic(program("ROOT %x = f32[8]{0} all-reduce(%p), replica_groups=@mesh"), {"data": 1})


@pytest.mark.parametrize("gpus", [0, 12, 513, 520])
def test_impossible_clusters(gpus):
    with pytest.raises(
        ValueError, match=f"^{gpus} GPUs cannot be planned for: use 1 to 8, or a multiple of 8 up to 512"
    ):
        describe_cluster(gpus)


def test_missing_plugin_names_the_extra(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ImportError, match=r"pip install 'gemma2-jax\[plan\]'"):
        describe_cluster(8)


@cache
def small(kind: str = "sft", **mesh: int) -> CompiledStep:
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
    config = recipes.finetune(
        "test",
        SMALL,
        "",
        kind,
        train=TrainConfig(sequence_length=128, global_batch_size=PASSES * 2 * shards, micro_batch_size=2),
        compute=ComputeConfig(loss_chunk=64, gpu_flags="none"),  # one layer a trip
        mesh=MeshConfig(**{"data": 1, **mesh}),
    )
    return compile_step(config, math.prod(mesh.values()))


def per_layer(found: CompiledStep, kind: str) -> list:
    return [c for c in found.traffic if c.kind == kind and c.times == LAYERS * PASSES]


@needs_plugin
def test_fsdp_gathers_one_layer_at_a_time():
    """Weights twice a pass (forward, and for the backward pass), gradients reduced to shards once."""
    found = small(fsdp=8)
    matrices = SMALL.parameter_count() - SMALL.vocab_size * SMALL.width - (4 * LAYERS + 1) * SMALL.width
    matrices, norms = matrices // LAYERS, 4 * SMALL.width
    gathered = sum(c.sent for c in per_layer(found, "all-gather"))
    assert gathered == 2 * 2 * matrices * 7 / 8, "bfloat16, twice"
    reduced = sum(c.sent for c in per_layer(found, "reduce-scatter"))
    assert reduced == 4 * matrices * 7 / 8, "float32, once"
    assert sum(c.sent for c in per_layer(found, "all-reduce")) == 2 * 4 * norms * 7 / 8
    assert {c.axes for c in found.traffic} == {"fsdp"}
    elsewhere = [c for c in found.traffic if c.times != LAYERS * PASSES]
    tokens = 4 * 8 * 2 * 128 * SMALL.width  # float32, of all shards: they go to the embedding, not it to them
    assert max(c.sent for c in elsewhere) <= tokens * 7 / 8
    vectors = (4 * LAYERS + 1) * SMALL.width
    assert argument_bytes(found.program)["trained weights"] == 4 * ((SMALL.parameter_count() - vectors) / 8 + vectors)
    assert found.arguments >= sum(argument_bytes(found.program).values())


LENGTH, ROWS, CHUNK = 128, 2, 64  # tokens of a row, rows of a pass on a GPU, and tokens of it in a chunk of the loss
BF16, F32, INT32 = 2, 4, 4  # bytes
# Of one layer: the matrices, the keys and values, and the four norms.
MATRICES = 2 * 192 * 16 * 16 + 2 * 192 * 8 * 16 + 3 * 192 * 512
KEYS_AND_VALUES = 2 * ROWS * LENGTH * 8 * 16
NORMS = 4 * 192


def sent_by_fsdp(n: int) -> dict[str, float]:
    """Weights come and gradients go layer by layer; the loss and the embedding take all shards' tokens."""
    share, rows = (n - 1) / n, n * ROWS
    gathered = 2 * LAYERS * MATRICES * BF16  # of a pass: forward, and for the backward pass
    gathered += 2048 * 192 * BF16  # the embedding
    loss_inputs = LENGTH * (192 * BF16 + INT32 + 2 * F32)  # activations, targets, maxima and sums of the softmax
    gathered += rows * (loss_inputs + LENGTH * (192 * BF16 + INT32))  # and gradients with tokens, for the embedding's
    scattered = LAYERS * MATRICES * F32 + rows * LENGTH * (192 * BF16 + 2 * F32)
    reduced = PASSES * (LAYERS * NORMS + 1) * F32 + 192 * F32  # norms and the loss; the last norm once a step
    return {
        "all-gather": PASSES * gathered * share,
        "reduce-scatter": PASSES * scattered * share,
        "all-reduce": 2 * reduced * share,
    }


def sent_by_tensor(n: int) -> dict[str, float]:
    """Positions are gathered before each half of a layer and scattered after it: forward, recomputed, and backward."""
    share, positions = (n - 1) / n, ROWS * LENGTH * 192 * BF16
    layers = 6 * LAYERS * positions
    reduced = PASSES * (LAYERS * NORMS * F32 + 2 * ROWS * LENGTH * F32) + 192 * F32
    return {
        "all-gather": PASSES * (layers + 2 * positions + ROWS * LENGTH * INT32) * share,
        "reduce-scatter": PASSES * (layers + 2 * positions) * share,
        "all-reduce": 2 * reduced * share,
    }


def sent_by_stage(n: int) -> dict[str, float]:
    """Activations go on to the next stage and gradients back; all stages share the embedding and the logits."""
    positions, ticks = ROWS * LENGTH * 192 * BF16, PASSES + n - 1
    reduced = (2 * ticks + 2 * PASSES) * positions  # looked up, given back to the embedding; into the loss, out of it
    reduced += PASSES * 2 * ROWS * LENGTH * F32  # maxima and sums of the softmax
    sent = (2 * ticks - 1) * positions  # nobody takes what the last tick returns
    return {"all-reduce": 2 * (n - 1) / n * reduced, "collective-permute": sent}


def sent_by_context(n: int) -> dict[str, float]:
    """Weights are sharded as by fsdp; beside them go keys and values, the gradients of these, and segments."""
    share = (n - 1) / n
    tokens, positions = ROWS * LENGTH * INT32, ROWS * LENGTH * 192 * BF16
    gathered = 2 * LAYERS * (MATRICES * BF16 + KEYS_AND_VALUES * BF16 + tokens)
    gathered += 2 * tokens + positions + tokens + 2 * ROWS * LENGTH * F32 + positions
    scattered = LAYERS * (MATRICES * F32 + KEYS_AND_VALUES * BF16) + 2 * positions + 2 * ROWS * LENGTH * F32
    reduced = PASSES * (LAYERS * NORMS + 1) * F32 + 192 * F32
    return {
        "all-gather": PASSES * gathered * share,
        "reduce-scatter": PASSES * scattered * share,
        "all-reduce": 2 * reduced * share,
    }


@needs_plugin
@pytest.mark.parametrize(
    ("axis", "size", "expected"),
    [
        ("fsdp", 8, sent_by_fsdp),
        pytest.param("tensor", 8, sent_by_tensor, marks=pytest.mark.exhaustive),
        pytest.param("stage", 2, sent_by_stage, marks=pytest.mark.exhaustive),
        pytest.param("context", 2, sent_by_context, marks=pytest.mark.exhaustive),
    ],
)
def test_bytes_along_one_axis(axis, size, expected):
    """All that a step sends, but for single numbers: norms, and those that are logged."""
    (found,) = sum_traffic(small(**{axis: size}).traffic).values()
    by_hand = expected(size)
    numbers = {kind: found[kind] - by_hand.get(kind, 0) for kind in found}
    assert all(0 <= count < 256 for count in numbers.values()), numbers


def count_flops(step: CompiledStep) -> Counter:
    """FLOPs of all GPUs, by part and pass."""
    mesh = step.program.mesh
    return Counter({key: flops * mesh.size for key, flops in sum_flops(step.schedule).items()})


def expect_flops(config: Config) -> Counter:
    """What a step should do, from the model's sizes."""
    train, rank = config.train, config.adapter.rank if config.adapter.kind == "lora" else 0
    step = DenseStep(
        model=describe_gemma(config.model),
        rows=train.global_batch_size,
        length=train.sequence_length,
        rank=rank,
        adapted=("attention/qkv", "attention/o", "mlp/gate_up", "mlp/down") if rank else (),
    )
    return sum_flops(step.describe())


@needs_plugin
def test_flops_of_products():
    """Products with weights, forward, backward and recomputed; scores here are those of XLA's attention."""
    step = small(fsdp=8)
    found, expected = count_flops(step), expect_flops(step.program.config)
    parts = [key for key in expected if key[0] != "attention/attend"]
    assert len(parts) == 4 * 3 + 2
    assert {key: found[key] for key in parts} == {key: expected[key] for key in parts}


@needs_plugin
def test_subprocess_gives_the_same_plan():
    """JAX is in use in this process; the numbers are those of a step that is compiled here all the same."""
    step = small(fsdp=8)
    found, expected = plan_in_subprocess(step.program.config, 8), summarize_step(step)
    seconds = dict(lower_seconds=0.0, compile_seconds=0.0)
    assert replace(found, **seconds) == replace(expected, **seconds)
    assert found.memory.keys() == {"trained weights", "optimizer", "batch", "temporaries", "results"}
    assert isinstance(found.peak, Peak), found.peak
    assert sum(found.owners.values()) == found.total == step.total
    assert 0 <= found.owners["other state"] < 4096, "the step's number and the history of norms"
    assert sum(found.peak.owners.values()) == step.temporaries
    assert found.peak.owners["gradients"] > 0.9 * found.memory["trained weights"], "alive in the backward pass"
    assert found.fits and found.total >= sum(found.memory.values()) - found.memory["batch"]
    assert str(found).startswith("8 x H100 80GB, mesh fsdp 8: trained weights ")


@needs_plugin
@pytest.mark.exhaustive
@pytest.mark.parametrize("trained", ["sft", "lora"])
def test_tensor_parallel_layers_gather_and_scatter_positions(trained):
    """Sequence parallelism: [B, T, D] is gathered before products and scattered after; logits stay where they are."""
    found = small(trained, data=2, tensor=8)
    assert {c.times for c in found.traffic if "data" in c.axes} == {1}, "gradients meet once a step"
    positions = 2 * (2 * 128 * SMALL.width) * 7 / 8  # bfloat16 [2, 128, D]
    for kind in "all-gather", "reduce-scatter":
        assert {c.axes for c in per_layer(found, kind)} == {"tensor"}
        times = sum(c.sent for c in per_layer(found, kind)) / positions
        narrow = 12 * 32 / SMALL.width if trained == "lora" else 0  # [B, T, R] of seven adapters
        assert 6 <= times < 6.2 + narrow, f"{kind}: twice forward, recomputed and backward, not {times}"
    # Of adapters, the gradients of each one's side of width D, to which all positions add: A of q, k, v, gate and up, B
    # of o and down; float32.
    narrow = 7 * 4 * SMALL.width * 32 * 2 * 7 / 8 if trained == "lora" else 0
    reduced = sum(c.sent for c in per_layer(found, "all-reduce"))
    assert narrow <= reduced < narrow + positions / 8, f"{reduced} bytes, of which {narrow} are adapters' gradients"
    assert {c.kind for c in found.traffic} == {"all-gather", "reduce-scatter", "all-reduce"}, "something is moved about"
    moved = re.findall(r"= (.*) (?:all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", found.text)
    sizes = {int(size) for types in moved for shape in re.findall(r"\[([\d,]+)\]", types) for size in shape.split(",")}
    assert 128 in sizes and not sizes & {SMALL.vocab_size, SMALL.vocab_size // 8, SMALL.mlp_width}


@needs_plugin
@pytest.mark.exhaustive
def test_64_hosts():
    found = small("lora", data=64, tensor=8)
    assert found.program.mesh.size == 512
    assert {"data", "tensor"} <= set(sum_traffic(found.traffic))
    console = Console(width=120, record=True)
    plan.print_plan(console, summarize_step(found))
    text = console.export_text()
    assert "512 x H100 80GB" in text and "mesh data 64 x tensor 8" in text and "frozen weights" in text
    assert "fits, 75.1 GiB to spare" in text and "│ data " in text and "not counted" not in text


ONE_DEVICE = MeshConfig(data=1)


def kernels(found: CompiledStep) -> tuple[Counter, dict[str, int]]:
    """How often a step runs each attention kernel, and how often its layers and passes need it to."""
    program = found.program
    stages, context = program.mesh.shape["stage"], program.mesh.shape["context"]
    runs = program.pipeline.layers * (program.pipeline.passes + stages - 1) * context
    times = Counter()
    for call in find_calls(found.text):
        assert call.times is not None, call
        times[call.name] += call.times
    again = program.config.compute.remat in ("block", "offload")
    forward = runs * (2 if again else 1)
    needed = {"gemma2_attention_forward": forward, "gemma2_attention_dq": runs, "gemma2_attention_dkv": runs}
    return times, needed


@needs_plugin
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("2b_pretrain", replace(ONE_DEVICE, tensor=8), marks=pytest.mark.exhaustive),
        pytest.param("27b_lora", replace(ONE_DEVICE, context=2, tensor=2), marks=pytest.mark.exhaustive),
        ("27b_lora", replace(ONE_DEVICE, tensor=2)),
    ],
)
def test_kernels_in_every_layer(name, mesh):
    """They run as often as they must, and a step does the FLOPs that it should."""
    config = replace(recipes.load_recipe(name), mesh=mesh)
    model = replace(config.model, layers=3, vocab_size=2048)
    train = replace(config.train, sequence_length=6144, global_batch_size=2, micro_batch_size=1)
    compute = replace(config.compute, gpu_flags="none")  # which has loops once in the program, not twice
    config = replace(config, model=model, train=train, compute=compute)
    found = compile_step(config, math.prod(vars(mesh).values()))
    run, needed = kernels(found)
    assert run == needed
    flops, expected = count_flops(found).total(), expect_flops(config).total()
    assert abs(flops / expected - 1) < 0.01, f"{flops:.4g} FLOPs, and not {expected:.4g}"
    # No scores of all pairs; no other dim has this size.
    assert not re.search(r"\[(?:\d+,)*6144,(?:\d+,)*6144(?:,\d+)*\]", found.text)


@needs_plugin
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "mesh", "length"),
    [
        # Megatron-Bridge's tensor- and pipeline-parallel sizes.
        ("2b_pretrain", replace(ONE_DEVICE, tensor=2), 4096),
        ("9b_pretrain", replace(ONE_DEVICE, tensor=8), 4096),
        ("27b_pretrain", replace(ONE_DEVICE, stage=2, tensor=8), 4096),
        ("2b_sft", ONE_DEVICE, 2048),
        ("9b_sft", replace(ONE_DEVICE, tensor=4), 2048),
        ("27b_sft", replace(ONE_DEVICE, stage=2, tensor=8), 2048),
        ("2b_lora", ONE_DEVICE, 2048),
        ("9b_lora", ONE_DEVICE, 2048),
        ("27b_lora", replace(ONE_DEVICE, tensor=4), 2048),
        ("2b_dora", ONE_DEVICE, 2048),
        ("9b_dora", ONE_DEVICE, 2048),
        ("27b_dora", replace(ONE_DEVICE, tensor=4), 2048),
        # Fewer GPUs than it asks for.
        ("9b_sft", replace(ONE_DEVICE, tensor=2), 2048),
        ("27b_sft", replace(ONE_DEVICE, fsdp=8), 2048),
        ("27b_lora", ONE_DEVICE, 4096),
        ("27b_lora", ONE_DEVICE, 8192),
    ],
)
def test_real_steps_fit(name, mesh, length):
    """Compiled at real size, in less than a minute, they fit in what XLA may take of 80 GB."""
    config = replace(recipes.load_recipe(name), mesh=mesh)
    config = replace(config, train=replace(config.train, sequence_length=length))
    found = compile_step(config, math.prod(vars(mesh).values()))
    run, needed = kernels(found)
    # XLA repeats a kernel rather than keep its result, where it takes memory to be short: 27B on eight GPUs.
    assert run.keys() == needed.keys() and all(run[name] >= needed[name] for name in needed)
    assert found.total <= H100.usable_bytes, describe_fit(found.total)
    if config.adapter.kind != "dora" and mesh.stage == 1 and run == needed:
        flops, expected = count_flops(found).total(), expect_flops(config).total()
        assert abs(flops / expected - 1) < 0.01, f"{flops:.4g} FLOPs, and not {expected:.4g}"
    assert found.lower_seconds + found.compile_seconds < 60


def test_depth_does_not_lengthen_programs():
    """The step of 27B as XLA gets it: eight layers against all of them."""
    config = replace(recipes.load_recipe("27b_pretrain"), mesh=MeshConfig(data=1, fsdp=2, tensor=4))
    lengths = []
    for layers in (8, config.model.layers):
        run = Program(replace(config, model=replace(config.model, layers=layers)), make_mesh(config.mesh))
        state, batch = run.state, run.batch
        with jax.set_mesh(run.mesh):
            lengths.append(len(jax.jit(run.train_step).lower(state, batch).as_text().splitlines()))
    assert lengths[0] == lengths[1]


@needs_plugin
@pytest.mark.exhaustive
def test_depth_does_not_lengthen_compilation():
    """The real step of 27B, eight layers against all of them, in CPU seconds: other processes do not count."""
    config = replace(recipes.load_recipe("27b_pretrain"), mesh=MeshConfig(data=1, fsdp=2, tensor=8))
    seconds = []
    for layers in (8, config.model.layers):
        started = time.process_time()
        compile_step(replace(config, model=replace(config.model, layers=layers)), 16)
        seconds.append(time.process_time() - started)
    assert seconds[1] < min(60, 1.5 * seconds[0] + 5), f"8 layers took {seconds[0]:.0f} s, 46 took {seconds[1]:.0f} s"


def test_subprocess_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"^12 GPUs cannot be planned for"):
        plan_in_subprocess(recipes.load_recipe("9b_lora"), 12)
