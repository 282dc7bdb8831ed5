"""Kernels that are broken on purpose are found in a process of their own, named, and not used. The interpreter stands
for the GPU.

Run as a program, with a way to break them and a `Spec`, this file is that process.
"""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import lax

from gemma2_jax import recipes
from gemma2_jax.cluster import hosts, kernel_check, kernel_records, platforms
from gemma2_jax.cluster.kernel_check import Finding, Spec, check_kernels, find_reason, local_shape
from gemma2_jax.config import ComputeConfig, MeshConfig
from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.kernels.shapes import SHAPES
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model.attention import choice
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_27B, GEMMA2_TINY
from gemma2_jax.training.step import Program

TINY = Spec(shape=replace(local_shape(GEMMA2_TINY, 1), heads=2, kv_heads=1), interpret=True, timed=True)
PTXAS = (
    "ptxas error   : Entry function 'gemma2_attention_forward' uses too much shared data (0x39000 bytes, 0x38c00 max)"
)


def break_kernels(how: str) -> None:
    """Has kernels of this process be wrong: a compile error and a wrong constant, or a loop without an end."""
    from gemma2_jax.cluster import kernel_program
    from gemma2_jax.kernels import decode, tiles

    def refuse(*inputs):
        raise RuntimeError(f"Internal error while assembling:\n{PTXAS}\nptxas fatal   : Ptx assembly aborted")

    cached = partial(kernel_program.Cached, name="width 64", shape=TINY.shape, positions=(60,))
    caches, loop_over_tiles = [cached(slots=64)], decode._Block.loop_over_tiles

    def loop_for_ever(block, accumulator):
        block.begin = lax.while_loop(lambda tile: tile >= 0, lambda tile: lax.rem(tile + 1, 2), block.begin)
        return loop_over_tiles(block, accumulator)

    def make_kernel(shape, settings, build, make=decode._make_kernel):
        factor = 1.02 if settings.S == 128 else 1  # of every score
        return make(shape, replace(settings, exp2_factor=factor * settings.exp2_factor), build)

    if how == "endless":
        decode._Block.loop_over_tiles = loop_for_ever
    else:
        tiles.Build.kernel = refuse
        decode._make_kernel = make_kernel
        caches.append(cached(slots=128))
    listed, timed = kernel_program.list_cases, kernel_program.list_timed
    kernel_program.list_timed = lambda shape, part, **options: timed(shape, part, **options)[1:]
    kernel_program.list_cases = lambda shape, part, **options: (
        listed(shape, part, **options) if part == "attention" else caches
    )


@pytest.fixture(scope="module")
def broken() -> dict[str, list[Finding]]:
    """What is found of kernels that are broken in each way."""

    def check(how: str) -> list[Finding]:
        parts = ("decode",) if how == "endless" else kernel_check.PARTS
        seconds = 1 if how == "endless" else kernel_check.PATIENCE_SECONDS
        return check_kernels(TINY, parts, run_seconds=seconds, program=(__file__, how))

    with ThreadPoolExecutor() as pool:
        return dict(zip(("wrong", "endless"), pool.map(check, ("wrong", "endless")), strict=True))


def test_a_compile_error_is_named_with_the_compilers_line(broken):
    """It ends its part, and the other part is checked by another process."""
    first = broken["wrong"][0]
    assert (first.part, first.verdict, first.detail) == ("attention", "does not compile", PTXAS)
    assert first.case == "width 64: 1 x 100, window 33, packed" and first.is_fault
    assert {finding.part for finding in broken["wrong"][1:]} == {"decode"}


def test_a_wrong_constant_is_found_beside_a_sound_kernel(broken):
    sound, wrong, *timed = broken["wrong"][1:]
    assert (sound.case, sound.verdict) == ("width 64: decode, 1 x 64 slots, dense", "agrees")
    assert (wrong.case, wrong.verdict) == ("width 64: decode, 1 x 128 slots, dense", "differs")
    assert re.search(r"out is off by \d\.\de-\d\d, of \d\.\de-\d\d allowed", wrong.detail)
    assert len(timed) == 1 and all(finding.kernel_seconds and finding.xla_seconds for finding in timed)
    assert not any(finding.is_fault for finding in timed)


def test_an_endless_loop_is_killed_and_named(broken):
    (hung,) = broken["endless"]
    assert hung.verdict == "hangs" and hung.is_fault
    assert str(hung) == "width 64: decode, 1 x 64 slots, dense hangs: it did not end within 1 s, and was killed"


def test_what_is_no_fault_of_the_kernels_is_none(monkeypatch, tmp_path):
    """The process does not start, finds no memory, dies of a signal, or is silent before a kernel begins."""
    program = tmp_path / "program.py"

    def find(text: str) -> Finding:
        program.write_text(text)
        (finding,) = check_kernels(TINY, ("attention",), program=(str(program),))
        return finding

    running = """import os, sys; print('{"part": "attention", "case": "c", "phase": "run"}', flush=True); """
    finding = find("raise ImportError('no such plugin')")
    assert (finding.verdict, finding.detail) == ("not checked", "ImportError: no such plugin")
    finding = find(running + "sys.exit('E: RESOURCE_EXHAUSTED: Out of memory while trying to allocate')")
    assert finding.verdict == "not checked" and finding.detail.startswith("no memory was left for it on the GPU (")
    finding = find(running + "os.kill(os.getpid(), 11)")
    assert (finding.verdict, finding.detail) == ("fails", "the process was ended by SIGSEGV")
    monkeypatch.setattr(kernel_check, "PATIENCE_SECONDS", 0.5)
    finding = find("import time; time.sleep(60)")
    assert (finding.verdict, finding.detail) == ("not checked", "its start took longer than 0.5 s")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"x\nRuntimeError: a\n{PTXAS}\nValueError: b\n", PTXAS),
        (
            "Traceback:\n  File\njax.errors.JaxRuntimeError: INTERNAL: c\nmore of it\n",
            "jax.errors.JaxRuntimeError: INTERNAL: c",
        ),
        ("F0000 check failed\n\n", "F0000 check failed"),
        ("", ""),
    ],
)
def test_the_reason_is_one_line(text, reason):
    assert find_reason(text) == reason


def test_shapes_are_those_of_one_device():
    assert asdict(local_shape(GEMMA2_27B, 1)) == asdict(SHAPES["27b"]) | {"heads": 4, "kv_heads": 2}
    assert local_shape(GEMMA2_27B, 8).kv_heads == 2 and local_shape(GEMMA2_2B, 4).heads == 2
    assert (local_shape(GEMMA2_2B, 8).heads, local_shape(GEMMA2_2B, 8).kv_heads) == (1, 1)


HOPPER = SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", process_index=0, local_hardware_id=1
)
AGREES = [Finding(part=part, case=part, verdict="agrees") for part in kernel_check.PARTS]
KNOWN = choice.Experience(was_run=True, tiles_source=kernel_records.TileChoice().source)
HANGS = Finding(part="decode", case="c", verdict="hangs", detail="d")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that JAX is made to see, with records of its own; a function that says what a check of it finds."""
    found, specs = [*AGREES], []

    def check(spec: Spec, **options) -> list[Finding]:
        specs.append(spec)
        return [*found]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(kernel_records, "_known", {})
    monkeypatch.setattr(kernel_records, "check_kernels", check)
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    monkeypatch.setattr(platforms, "find_driver", lambda: "580.65.06")
    mesh = SimpleNamespace(devices=np.array([HOPPER]), local_devices=[HOPPER], shape={"tensor": 1})

    def examine(findings: list[Finding], parts=kernel_records.TRAINING, *, again: bool = False) -> choice.Experience:
        found[:] = findings
        if not again:
            kernel_records._known.clear()
        return kernel_records.examine(GEMMA2_2B, mesh, parts)

    return SimpleNamespace(examine=examine, specs=specs, folder=tmp_path / "gemma2_jax" / "kernels", mesh=mesh)


def test_kernels_are_run_once_for_all_that_they_depend_on(gpu, monkeypatch):
    assert gpu.examine(AGREES) == KNOWN
    assert [spec.device for spec in gpu.specs] == ["5"], "the process's own GPU"
    (path,) = gpu.folder.iterdir()
    assert (
        path.name.startswith("NVIDIA-H100-80GB-HBM3-")
        and json.loads(path.read_text())["environment"]["versions"]["jax"]
    )
    gpu.examine([HANGS])
    assert len(gpu.specs) == 1, "the record is read"
    for change in (
        partial(monkeypatch.setattr, platforms, "find_driver", lambda: "590.1"),
        partial(monkeypatch.setattr, HOPPER, "device_kind", "NVIDIA H200"),
        partial(monkeypatch.setattr, kernel_records, "_digest_sources", lambda: "other"),
        partial(monkeypatch.setattr, kernel_records, "_find_version", lambda package: "1.0"),
        partial(gpu.mesh.shape.update, tensor=8),
    ):
        before = len(gpu.specs)
        change()
        gpu.examine(AGREES)
        gpu.examine(AGREES)
        assert len(gpu.specs) == before + 1


def test_a_damaged_record_is_made_again(gpu):
    gpu.examine(AGREES)
    (path,) = gpu.folder.iterdir()
    for text in ("", "[]", '{"findings": [{"part": "x"}], "time": "", "environment": {}}'):
        path.write_text(text)
        assert gpu.examine(AGREES) == KNOWN
    assert len(gpu.specs) == 4 and len([*gpu.folder.iterdir()]) == 1


def test_training_does_not_ask_for_decoding(gpu):
    assert not gpu.examine([AGREES[0], HANGS]).fault
    assert "c hangs: d" in gpu.examine([], kernel_records.INFERENCE).fault


def test_what_could_not_be_checked_is_not_used_and_not_kept(gpu):
    unchecked = Finding(part="attention", case="c", verdict="not checked", detail="no memory was left")
    experience = gpu.examine([unchecked])
    assert experience.fault.startswith("could not be checked on this device (no memory was left; run python -m")
    assert not gpu.folder.exists() and gpu.examine(AGREES) == KNOWN


def test_times_are_kept_and_decide(gpu):
    timed = [
        Finding(part="attention", case=case, verdict="was timed", kernel_seconds=1.0, xla_seconds=xla)
        for case, xla in (("a", 3.0), ("b", 5.0))
    ]
    assert gpu.examine([*AGREES, *timed]).time_ratio == 0.25
    assert gpu.examine([], kernel_records.INFERENCE).time_ratio == 0.25
    spec = gpu.specs[-1]
    record = kernel_records.run_check(spec, HOPPER)
    assert record.time_ratio(kernel_records.TRAINING) == 0.25, "a check that times nothing leaves the times"


def choose(name: str, experience: choice.Experience) -> str:
    return choice.choose_attention(GEMMA2_2B, ComputeConfig(attention=name), HOPPER, lambda: experience)[1]


def test_auto_says_what_is_known():
    assert choose("auto", choice.Experience()) == "mosaic (the fastest here)"
    run = choice.Experience(was_run=True)
    assert choose("auto", run) == (
        "mosaic (the fastest here, by design: not yet timed on this device, which python -m gemma2_jax.check does)"
    )
    assert choose("auto", replace(run, time_ratio=0.3)) == "mosaic (the fastest here, in 0.30 of xla's time)"
    slow = replace(run, time_ratio=1.5)
    assert choose("auto", slow) == (
        "xla (the fastest here; mosaic was timed on this device and takes 1.50 of xla's time)"
    )
    assert choose("mosaic", slow) == "mosaic (as asked)"


def test_broken_kernels_are_not_trained_with(gpu, broken, monkeypatch):
    """`auto` falls back and says why; the kernels by name stop the run before it reads anything."""
    everywhere = replace(choice.IMPLEMENTATIONS["mosaic"], limits=replace(MOSAIC, architectures=None))
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "mosaic", everywhere)
    recipe = recipes.load_recipe("tiny_lora")
    compute = replace(recipe.compute, dtype="bfloat16")
    (device,) = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: [device])
    mesh = make_mesh(MeshConfig(data=1), [device])
    for how, said in (("wrong", f"does not compile: {PTXAS}"), ("endless", "it did not end within 1 s")):
        monkeypatch.setattr(kernel_records, "_known", {})
        monkeypatch.setattr(kernel_records, "read_record", lambda environment: None)
        monkeypatch.setattr(kernel_records, "check_kernels", lambda spec, how=how, **options: broken[how])
        sample = replace(recipe.sample, prompts=("a",), tokens=1)
        config = replace(recipe, compute=compute, sample=sample)
        program = Program(config, mesh)
        assert program.attention_reason.startswith("xla (the fastest here; mosaic failed on this device on ")
        assert said in program.attention_reason
        named = replace(config, compute=replace(compute, attention="mosaic"))
        with pytest.raises(
            ValueError, match=r"^compute.attention mosaic failed on this device on .*; use auto or xla$"
        ):
            Program(named, mesh)


def test_processes_of_one_mesh_agree(gpu, monkeypatch):
    """Each gives what it knows, and all go by the process with a fault."""
    questions = []

    def gather(question: str, answer: str) -> list[str]:
        questions.append(question)
        if question.startswith("attention_tiles"):
            return [answer, answer]
        return [answer, json.dumps(asdict(choice.Experience(was_run=True, fault="fails there")))]

    monkeypatch.setattr(hosts, "gather_answers", gather)
    assert not gpu.examine(AGREES).fault and not questions, "nobody is asked of a mesh of one process"
    other = SimpleNamespace(**vars(HOPPER) | {"process_index": 1})
    gpu.mesh.devices = np.array([HOPPER, other])
    assert gpu.examine(AGREES).fault == "fails there"
    assert gpu.examine(AGREES, again=True).fault == "fails there"
    assert len(questions) == 2, "each question is asked once"


def test_the_worst_of_all_processes_counts():
    fault, slow, fast = choice.Experience(fault="f"), choice.Experience(time_ratio=2), choice.Experience(time_ratio=0.5)
    assert kernel_records._find_worst([fast, fault, slow]) is fault and kernel_records._find_worst([fast, slow]) is slow
    assert kernel_records._find_worst([fast, choice.Experience(was_run=True)]).time_ratio is None


if __name__ == "__main__":
    from gemma2_jax.cluster import kernel_program

    break_kernels(sys.argv[1])
    kernel_program.main(sys.argv[2])
