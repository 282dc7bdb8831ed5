"""The process in which `kernel_check` has the attention kernels run: its one argument is a `Spec` as JSON.

It prints a JSON line as each phase begins and as each case ends, and does not catch what is raised: how it ended is for
the caller to read.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from gemma2_jax.cluster import platforms
from gemma2_jax.cluster.kernel_check import PATIENCE_SECONDS, Candidate, Part
from gemma2_jax.cluster.timing import measure_seconds
from gemma2_jax.kernels.shapes import Shape
from gemma2_jax.kernels.tile_sizes import Tile, read_tiles
from gemma2_jax.kernels.tiles import GPU, Build
from gemma2_jax.model.attention import checking, trials as trials_of_kernels
from gemma2_jax.model.attention.cases import Cached, Layer
from gemma2_jax.model.attention.trials import CacheTrials, LayerTrials

_BEYOND_WINDOW = 300  # tokens of a row beyond a window; with them its length is no multiple of a tile
_ALARM_SECONDS = (
    2 * PATIENCE_SECONDS
)  # in a phase, after which this process ends where its caller, who would end it, is gone


def main(argument: str) -> None:
    spec = json.loads(argument)
    platforms.prepare_process(cpu=spec["interpret"], cache=False)
    if spec["interpret"]:  # Warpgroups wait for one another: were their programs enqueued, some would never begin.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    shape = Shape(**spec["shape"])
    build = checking.INTERPRETED if spec["interpret"] else GPU
    if spec["candidates"]:
        candidates = [Candidate(direction=each["direction"], tile=Tile(**each["tile"])) for each in spec["candidates"]]
        try_candidates(shape, candidates, build)
        return
    if spec["tiles"]:
        build = replace(build, tiles=read_tiles(spec["tiles"], shape.width))
    for part in spec["parts"]:
        for case in list_cases(shape, part, interpret=spec["interpret"]):

            def enter(phase: str, part=part, case=case) -> None:
                signal.alarm(_ALARM_SECONDS)
                report(part=part, case=str(case), phase=phase)

            for check in checking.check_case(case, [build], enter):
                failures = [failure.removeprefix(f"{case}, ") for failure in check.failures]
                report(part=part, case=str(case), failures=failures)
    for part in spec["parts"] if spec["timed"] else ():
        for case in list_timed(shape, part, interpret=spec["interpret"]):
            signal.alarm(_ALARM_SECONDS)
            report(part=part, case=str(case), phase="timing")
            report(part=part, case=str(case), **time_case(case, build))


def try_candidates(shape: Shape, candidates: Sequence[Candidate], build: Build) -> None:
    """Checks each candidate and, where it agrees with float32, times it."""
    parts: list[Part] = list(dict.fromkeys(candidate.part for candidate in candidates))
    for part in parts:
        signal.alarm(_ALARM_SECONDS)
        report(part=part, case=part, phase="preparation")
        trials = make_trials(shape, part, build)
        for candidate in [each for each in candidates if each.part == part]:
            named = {"part": part, "case": str(candidate)}

            def enter(phase: str, named=named) -> None:
                signal.alarm(_ALARM_SECONDS)
                report(**named, phase=phase)

            failures, run = trials_of_kernels.try_tile(trials, candidate.direction, candidate.tile, enter)
            report(**named, failures=[failure.removeprefix(f"{candidate}, ") for failure in failures])
            if not failures:
                enter("timing")
                report(**named, kernel=time_kernel(candidate, run, interpret=bool(build.interpret)))


def make_trials(shape: Shape, part: Part, build: Build) -> LayerTrials | CacheTrials:
    """Cases of one shape each: with packed documents and a window, and of a global layer, which is timed; of caches of
    several lengths, and of a full one, which is timed. Interpreted, it is the first alone.
    """
    length = 128 if build.interpret else 2 * shape.window
    name = f"width {shape.width}"
    if part == "attention":
        layer = partial(Layer, name=name, shape=shape, rows=1 if build.interpret else 2, length=length)
        layers = [layer(window=length // 8 + 1, packed=True), layer()]
        return LayerTrials(layers[:1] if build.interpret else layers, build)
    rows = 1 if build.interpret else 16
    cached = partial(Cached, name=name, shape=shape, slots=length)
    positions = tuple((100 + row * 977) % (2 * length) for row in range(rows))
    caches = [cached(positions=positions), cached(positions=rows * (length - 1,))]
    return CacheTrials(caches[:1] if build.interpret else caches, build)


def time_kernel(candidate: Candidate, run: Callable[[], Any], *, interpret: bool) -> float:
    """The seconds of a call of a candidate."""
    least, rounds = (0.0, 1) if interpret else (0.1, 5)
    return measure_seconds(run, least=least, rounds=rounds)


def report(**message: Any) -> None:
    """Prints a line for `kernel_check`."""
    print(json.dumps(message), flush=True)


def list_cases(shape: Shape, part: Part, *, interpret: bool) -> Iterator[Layer | Cached]:
    """The cases that are checked: of local and global layers, of packed rows and of single ones; of a ring and not."""
    layer, cached = (partial(kind, name=f"width {shape.width}", shape=shape) for kind in (Layer, Cached))
    window = shape.window
    if interpret and part == "attention":
        yield layer(rows=1, length=100, window=33, packed=True)
    elif interpret:
        yield cached(slots=128, positions=(60, 300))
    elif part == "attention":
        yield layer(rows=2, length=1000, window=129, packed=True)
        yield layer(rows=1, length=window + _BEYOND_WINDOW, window=window)
        yield layer(rows=1, length=window + _BEYOND_WINDOW, window=window, packed=True)
        yield layer(rows=1, length=window + _BEYOND_WINDOW)
        yield layer(rows=1, length=window + _BEYOND_WINDOW, packed=True)
    else:
        yield cached(slots=1000, positions=(0, 63, 500, 999))
        yield cached(slots=window, positions=(2 * window - 1, 100, window))


def list_timed(shape: Shape, part: Part, *, interpret: bool) -> list[Layer | Cached]:
    """The cases that are timed: a local and a global layer, of rows of two windows or of caches for as many."""
    layer, cached = (partial(kind, name=f"width {shape.width}", shape=shape) for kind in (Layer, Cached))
    length = 64 if interpret else 2 * shape.window
    if part == "attention":
        return [layer(rows=1, length=length), layer(rows=1, length=length, window=length // 2)]
    rows = 1 if interpret else 16
    return [cached(slots=slots, positions=rows * (length - 1,)) for slots in (length, length // 2)]


def time_case(case: Layer | Cached, build: Any) -> dict[str, float]:
    """The seconds of a call of the kernels and of XLA's attention: forward and backward, or a step of decoding."""
    if isinstance(case, Layer):
        inputs = *case.inputs(), case.mask()
        attends = {"kernel": checking.kernel_attention(case, build), "xla": checking.xla_attention(case)}
        programs = {name: partial(checking.run_both_passes, attend) for name, attend in attends.items()}
    else:
        inputs = case.inputs()
        programs = {"kernel": checking.kernel_decode(case, build), "xla": checking.xla_decode(case)}
    least, rounds = (0.01, 1) if build.interpret else (0.1, 5)
    return {
        name: measure_seconds(jax.jit(program), *inputs, least=least, rounds=rounds)
        for name, program in programs.items()
    }


if __name__ == "__main__":
    main(sys.argv[1])
