"""Machine code: its readers on typed-out text, and kernels compiled for an H100 that is not there.

Run as a program, which is what the tests here do once, it compiles the kernels and prints what it found as JSON: JAX
must not have been used before `described_cluster.prepare_jax`.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compilers import need

from benchmarks import machine_code
from benchmarks.machine_code import Kernel, Loop, Opcodes
from gemma2_jax.planning import described_cluster

ROOT = Path(__file__).parents[2]
LAYERS = 3


def compile_all() -> dict:
    """jax's own attention; two kernels of one name in a loop, of which the second one needs too many registers."""
    described_cluster.prepare_jax()
    import jax
    import jax.experimental.pallas.mosaic_gpu as plgpu
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # jax asks the CUDA runtime, which is not there, for its version; 12.9.1 is the version of ptxas.
    versions = SimpleNamespace(cuda_runtime_get_version=lambda: 12091)
    attention_mgpu.cuda_versions = versions  # pyright: ignore[reportPrivateImportUsage]

    def attention(q, k, v, causal=False):
        tiles = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal)
        return attention_mgpu.attention(q, k, v, tiles)

    def normalize(x):
        def normalize(x_ref, out_ref):
            layout = plgpu.Layout.WG_STRIDED(x.shape, vec_size=1)
            value = plgpu.load(x_ref.at[...], layout=layout, optimized=False)
            # The sum keeps all of x in registers: each element is needed after it.
            out_ref[...] = jax.lax.fori_loop(0, 8, lambda _, v: v * v.sum() + jnp.tanh(v), value)

        parameters = plgpu.CompilerParams(approx_math=True)
        return plgpu.kernel(normalize, out_type=x, compiler_params=parameters)(x)

    def layers(small, large):
        return jax.lax.scan(
            lambda c, _: ((normalize(c[0]), normalize(c[1])), None), (small, large), None, length=LAYERS
        )[0]

    queries, keys = (jax.ShapeDtypeStruct((1, 2048, heads, 128), jnp.float16) for heads in (4, 2))
    elements = [jax.ShapeDtypeStruct((64, columns), jnp.float32) for columns in (64, 512)]
    found = {
        "attention": machine_code.compile_kernels(attention, queries, keys, keys),
        "again": machine_code.compile_kernels(attention, queries, keys, keys),
        "causal": machine_code.compile_kernels(lambda q, k, v: attention(q, k, v, True), queries, keys, keys),
        "layers": machine_code.compile_kernels(layers, *elements),
    }
    described = {name: [asdict(kernel) for kernel in kernels] for name, kernels in found.items()}
    mesh = jax.sharding.Mesh(described_cluster.describe_cluster(1), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    program = jax.jit(layers, in_shardings=sharding).trace(*elements).lower(lowering_platforms=("cuda",)).compile()
    text = program.as_text()
    assert text is not None
    return {**described, "calls": [asdict(call) for call in machine_code.find_calls(text)]}


@pytest.fixture(scope="module")
def found(optimized) -> dict:
    need()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def parse_kernel(described: dict) -> Kernel:
    """Makes the kernel that was described in JSON."""
    loops = tuple(Loop(address=loop["address"], opcodes=Opcodes(loop["opcodes"])) for loop in described["loops"])
    fields: dict[str, Any] = described | {name: tuple(described[name]) for name in ("set_registers", "warnings")}
    return Kernel(**fields | {"opcodes": Opcodes(described["opcodes"]), "loops": loops})


def test_attention_of_jax(found):
    (forward,) = map(parse_kernel, found["attention"])
    assert forward.isa == "8.8", "not the ptxas of the extra `plan`"
    assert forward.opcodes.total("HGMMA") == 16, "64 x 128 x 128 twice, 16 of an inner dimension at a time"
    assert forward.opcodes.total("HMMA") == 0
    assert forward.opcodes.total("UTMALDG") > 0 and forward.opcodes.total("UTMASTG") > 0
    assert forward.opcodes.total("LDL") == forward.opcodes.total("STL") == 0
    assert forward.opcodes.total("MUFU.EX2") >= 64, "64 x 128 scores are 64 for each of 128 threads"
    assert (forward.spill_stores, forward.spill_loads, forward.stack, forward.warnings) == (0, 0, 0, ())
    assert forward.threads == 3 * 128
    assert forward.set_registers == (232, 40), "what attention_mgpu.py asks for: compute, memory"
    assert forward.registers == 168, "all there are, for 384 threads, in eights"
    # Queries of two warpgroups, two stages of keys and values; scratch and barriers are the rest.
    assert 0 <= forward.shared - 2 * (2 * 64 * 128 + 2 * 2 * 128 * 128) < 4096
    assert forward.fits and forward.blocks_per_sm == 1


def test_loops_of_attention_of_jax(found):
    (forward,) = map(parse_kernel, found["attention"])
    tiles, loads = forward.loops
    assert forward.tiles == (tiles,)
    assert (
        tiles.opcodes.total("HGMMA") == 16
        and tiles.opcodes.total("MUFU.EX2") >= 64
        and not tiles.opcodes.total("UTMALDG")
    )
    assert loads.opcodes.total("UTMALDG") == 4, "keys and values, 64 columns at a time"
    for loop in forward.loops:
        assert loop.instructions < sum(forward.opcodes.values()) / 2
        assert not loop.opcodes.total("NANOSLEEP") and loop.opcodes.total("SYNCS.PHASECHK.TRANS64.TRYWAIT")


def test_masked_tiles_are_longer_than_clean_ones(found):
    (unmasked,) = map(parse_kernel, found["attention"])
    (causal,) = map(parse_kernel, found["causal"])
    clean, masked = causal.tiles
    assert clean.opcodes.total("HGMMA") == masked.opcodes.total("HGMMA") == 16
    assert clean.instructions == pytest.approx(unmasked.tiles[0].instructions, rel=0.05)
    assert masked.instructions > clean.instructions + 64, "a choice for each of 64 scores"


def test_a_second_compilation_is_read_too(found):
    assert found["again"] == found["attention"]


def test_spills_are_seen(found):
    small, large = map(parse_kernel, found["layers"])
    assert (small.name, large.name) == ("normalize 1", "normalize 2")
    assert (small.spill_stores, small.spill_loads, small.stack, small.warnings) == (0, 0, 0, ())
    assert small.opcodes.total("LDL") == small.opcodes.total("STL") == 0
    assert small.blocks_per_sm > large.blocks_per_sm == 2
    assert large.registers == 255 and large.stack > 0
    assert any("spilled" in warning for warning in large.warnings)
    for opcode, spilled in ("STL", large.spill_stores), ("LDL", large.spill_loads):
        assert spilled > 0
        found = {name: count for name, count in large.opcodes.items() if f"{name}.".startswith(f"{opcode}.")}
        sizes = {name: int((re.findall(r"\.(64|128)\b", name) or [32])[0]) // 8 for name in found}
        assert sum(sizes[name] * count for name, count in found.items()) == spilled, "ptxas and the binary differ"
    for kernel, columns in (small, 64), (large, 512):
        (loop,) = kernel.loops
        assert loop.opcodes.total("MUFU.TANH") == 64 * columns / 128
        assert not kernel.tiles


def test_calls_of_a_compiled_program(found):
    calls = found["calls"]
    assert [call["name"] for call in calls] == ["normalize", "normalize"]
    for call in calls:
        assert call["times"] == LAYERS and len(call["loops"]) == 1 and call["where"].endswith("normalize/mpmd_map")


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas warning : Registers are spilled to local memory in function 'f_mosaic_gpu_kernel'
ptxas info    : Function properties for f_mosaic_gpu_kernel
    1024 bytes stack frame, 1536 bytes spill stores, 1408 bytes spill loads
ptxas info    : Function properties for inner
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 1024 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 48.625 ms
"""


def test_reports():
    assert machine_code.read_report(REPORT) == {
        "registers": 255,
        "stack": 1024,
        "spill_stores": 1540,
        "spill_loads": 1410,
        "static_shared": 1,
        "warnings": (
            "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized",
            "Registers are spilled to local memory in function 'f_mosaic_gpu_kernel'",
        ),
    }
    with pytest.raises(ValueError, match="not ptxas's report of one kernel"):
        machine_code.read_report("ptxas fatal   : Unresolved extern function 'f'")


def test_launches():
    lines = """\
    %c256 = arith.constant 256 : index
    %1 = arith.constant 1 : index
    %c100432_i32 = arith.constant 100432 : i32
    %2 = gpu.launch async [%0] blocks(%a, %b, %c) in (%d = %1, %e = %1, %f = %1) threads(%g, %h, %i) in (%j = %c256, %k = %1, %l = %1) dynamic_shared_memory_size %c100432_i32 {
""".splitlines()  # noqa: E501  (lines of MLIR are as long as they are)
    assert machine_code.read_launch(lines) == {"threads": 256, "dynamic_shared": 100432}
    with pytest.raises(ValueError, match=r"no gpu\.launch"):
        machine_code.read_launch(lines[:3])


# A loop over work, in which two loops over tiles follow each other, the first with a branch within. The waits in them
# go on after the end, as ptxas has it. With and without the columns that jaxlib adds.
DISASSEMBLY = """\
   -:-:-:Y:01        /*0000*/                   S2R R5, SR_TID.X
.L_x_0:
   -:-:-:Y:01        /*0010*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
   -:-:-:Y:01        /*0020*/              @!P1 BRA `(.L_x_0)
.L_x_1:
   -:-:-:Y:01        /*0030*/                   UMOV UR4, 0x400
.L_x_2:
   -:-:2:Y:02        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR12], R6
   2:-:-:Y:05        /*0050*/              @!P1 BRA `(.L_x_20)
.L_x_3:
   -:-:-:-:12        /*0060*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT, gsb0
   -:-:-:Y:01        /*0070*/               @P2 BRA `(.L_x_4)
   -:-:-:Y:01        /*0080*/                   MUFU.EX2 R2, R3
.L_x_4:
   -:-:-:Y:01        /*0090*/               @P0 BRA `(.L_x_2)
.L_x_5:
        /*00a0*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*00b0*/                   FSEL R2, R3, R4, P3 ;
        /*00c0*/                   FSEL R3, R3, R4, P4 ;
        /*00d0*/                   MUFU.EX2 R2, R3 ;
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR12], R6 ;
        /*00f0*/              @!P1 BRA `(.L_x_21) ;
.L_x_6:
        /*0100*/               @P0 BRA `(.L_x_5) ;
        /*0110*/               @P5 BRA `(.L_x_1) ;
        /*0120*/                   EXIT ;
.L_x_20:
        /*0130*/                   MOV R7, UR12 ;
        /*0140*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R7+URZ], R6 ;
        /*0150*/              @!P1 NANOSLEEP.SYNCS 0x989680 ;
        /*0160*/              @!P1 BRA `(.L_x_20) ;
        /*0170*/                   BRA `(.L_x_3) ;
.L_x_21:
        /*0180*/                   MOV R7, UR12 ;
        /*0190*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R7+URZ], R6 ;
        /*01a0*/              @!P1 BRA `(.L_x_21) ;
        /*01b0*/                   BRA `(.L_x_6) ;
.L_x_29:
        /*01c0*/                   BRA `(.L_x_29);
        /*01d0*/                   NOP;
"""
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT"


def test_disassemblies():
    read = machine_code.read_disassembly(DISASSEMBLY)
    assert read["set_registers"] == (232,)
    assert sum(read["opcodes"].values()) == 28, "padding is not counted"
    assert read["opcodes"].total("MUFU") == read["opcodes"].total("MUFU.EX2") == 2 and read["opcodes"].total("MUF") == 0
    clean, masked = read["loops"]
    assert (clean.address, clean.instructions, masked.address, masked.instructions) == (0x40, 6, 0xA0, 7)
    assert clean.opcodes == {WAIT: 1, "BRA": 3, "HGMMA.64x128x16.F32": 1, "MUFU.EX2": 1}
    assert masked.opcodes == {WAIT: 1, "BRA": 2, "HGMMA.64x128x16.F32": 1, "MUFU.EX2": 1, "FSEL": 2}


def test_disassemblies_that_cannot_be_read():
    with pytest.raises(ValueError, match="no instructions"):
        machine_code.read_disassembly("nvdisasm fatal   : Memory allocation failure")
    with pytest.raises(ValueError, match="a branch to somewhere unknown: BRX R4 -0xc10"):
        machine_code.read_disassembly("/*0000*/ BRX R4 -0xc10 ;\n/*0010*/ EXIT ;")
    indirect = '/*0000*/ BRX R4 -0xc10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);\n.L_x_1:\n/*0010*/ EXIT ;\n.L_x_2:\n'
    (loop,) = machine_code.read_disassembly(f"{indirect}/*0020*/ NOP ;\n/*0030*/ @P0 BRA `(.L_x_2);")["loops"]
    assert (loop.address, loop.instructions) == (0x20, 2)


HLO = r"""
%layer (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/while/dkv"}, backend_config={module = "ML\EFR\00stable_mosaic_gpu\00llvm\00dkv_mosaic_gpu\00dkv_0\00"}
}
%pass (p: f32[8]) -> f32[8] {
  %layers = f32[8]{0} while(%p), condition=%c, body=%layer, metadata={op_name="layers"}, backend_config={"known_trip_count":{"n":"26"}}
  ROOT %y = f32[8]{0} while(%p), condition=%c, body=%layer, metadata={op_name="search"}
}
ENTRY %main (param: f32[8]) -> f32[8] {
  %x = f32[8]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/forward"}, backend_config={module = "ML\EFR\00forward_mosaic_gpu\00"}
  %z = f32[8]{0} custom-call(%p), custom_call_target="other"
  ROOT %w = f32[8]{0} while(%p), condition=%c, body=%pass, metadata={op_name="passes"}, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501  (so are those of HLO)


def test_calls():
    found = [tuple(vars(call).values()) for call in machine_code.find_calls(HLO)]
    assert found == [
        ("forward", "jit(f)/forward", "main", (), 1),
        ("dkv", "jit(f)/while/dkv", "layer", ("passes", "layers"), 130),
        ("dkv", "jit(f)/while/dkv", "layer", ("passes", "search"), None),
    ]
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        machine_code.find_calls("module @jit_step {}")


BLOCK = Kernel(
    name="f", isa="8.8", registers=32, set_registers=(), spill_stores=0, spill_loads=0, stack=0, dynamic_shared=0,
    static_shared=0, threads=128, warnings=(), opcodes=Opcodes(), loops=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 128, 0, 16),  # 2048 threads
        (16, 32, 0, 32),
        (168, 384, 0, 1),
        (65, 256, 0, 3),  # as if 72
        (255, 128, 0, 2),
        (32, 128, 75_776, 3),  # 74 KiB, and one of each block
        (32, 128, 75_777, 3),
        (32, 128, 76_801, 2),
        (32, 128, 232_448, 1),
    ],
)
def test_blocks_of_a_multiprocessor(registers, threads, shared, blocks):
    block = replace(BLOCK, registers=registers, threads=threads, dynamic_shared=shared)
    assert block.blocks_per_sm == blocks
    assert block.fits and not replace(block, dynamic_shared=232_448, static_shared=1).fits


def test_missing_tools_name_the_extra(monkeypatch):
    monkeypatch.setattr(machine_code, "_installed_files", lambda *_: [])
    monkeypatch.setattr(machine_code.shutil, "which", lambda _: None)
    for find_tool in machine_code.find_nvdisasm, machine_code.find_ptxas:
        name = find_tool.__name__.removeprefix("find_")
        with pytest.raises(ImportError, match=rf"needs {name}: pip install 'gemma2-jax\[plan\]'"):
            find_tool()


if __name__ == "__main__":
    print(json.dumps(compile_all()))
