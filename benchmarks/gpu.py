"""The attention kernels on a Hopper GPU: checked, and then timed beside XLA and cuDNN.

    python -m benchmarks.gpu

Checks come first. Results and gradients are compared with the meaning in float32 (`gemma2_jax.kernels.reference`), as
are those of XLA's bfloat16 path: a kernel may be off by three times as much, and a little more. It must also give the
same bits twice. Where a check fails, the command says which, times nothing, and exits with status 1.

Times are the device's: calls are enqueued one after another and waited for once, and of five such rounds after a
warm-up the fastest counts. Decoding goes from one cache to the next, of which there are more than fit in L2. FLOPs are
by the usual convention: 4 * pairs * heads * width forward, where pairs are those of a query and a key that it sees,
counted exactly; 2.5 times that backward. So they compare with published ones, and needless work lowers them.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from gemma2_jax.cluster import platforms
from gemma2_jax.kernels.shapes import SHAPES

PEAK_BYTES = 3.35e12  # a second, of an H100 SXM: NVIDIA's data sheet
# TFLOP/s by width and pass, causal, 8192 tokens a row, and none with a soft cap.
PUBLISHED = {
    (128, "forward"): "FA3 602, cuDNN 529",
    (128, "backward"): "FA3 539, cuDNN 541",
    (256, "forward"): "FA3 628, cuDNN 497",
}
SOURCES = """\
Published: causal, rows of 8192, no soft cap; on H100, but for the backward pass of cuDNN, which is on H200 with 8 \
query heads a key head. Forward: github.com/Dao-AILab/flash-attention, assets/flash3_fp16_fwd.png. Backward: FA3, \
github.com/facebookexperimental/triton, #3582; cuDNN, github.com/NVIDIA/cudnn-frontend, \
benchmark/sdpa_benchmark_training."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Checks the attention kernels on a Hopper GPU, and then times them beside XLA and cuDNN."""

    shapes: tuple[str, ...] = ("2b", "9b", "27b")  # of gemma2_jax.kernels.shapes
    check_only: bool = False  # time nothing
    interpret: bool = False  # check tiny cases with the interpreter, on CPU; nothing can be timed there
    json: Path | None = None  # also write the numbers here


def main(arguments: list[str] | None = None) -> None:
    command = tyro.cli(Command, prog="python -m benchmarks.gpu", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    if unknown := [name for name in command.shapes if name not in SHAPES]:
        refuse(f"there is no shape {', '.join(unknown)}: there are {'; '.join(SHAPES)}")
    if command.interpret and not command.check_only:
        refuse("the interpreter says nothing of time: use --interpret with --check-only")
    platforms.prepare_process(cpu=command.interpret, cache=False)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    found: dict[str, Any] = {"device": device(command.interpret)}
    console.print(*found["device"].values(), sep="; ", highlight=False)
    found["checks"], failures = check(console, command)
    if not failures and not command.check_only:
        found["attention"] = time_attention(console, command.shapes)
        found["decode"] = time_decode(console, command.shapes)
    if command.json:
        beside = command.json.with_name(f"{command.json.name}.tmp")
        beside.write_text(json.dumps(found, indent=1))
        beside.replace(command.json)
    if failures:
        console.print("failed:", *failures, sep="\n  ", highlight=False, markup=False)
        sys.exit(1)


def refuse(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def device(interpret: bool) -> dict[str, str]:
    """What this runs on; it exits where that is no Hopper GPU and nothing is interpreted."""
    import jax
    import jax.extend

    from gemma2_jax.model.attention.choice import device_architecture

    if interpret:  # warpgroups wait for one another: were their programs enqueued, some would never begin
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    plain = os.environ.get("JAX_PLATFORMS") == "cpu"
    try:
        with platforms.silence_stderr() if plain else contextlib.nullcontext():
            first = jax.devices()[0]
        described = first.device_kind
    except (RuntimeError, AssertionError):  # JAX's, where JAX_PLATFORMS names what is not there
        first, described = None, "no device"
    if not interpret and (first is None or device_architecture(first) != "sm_90"):
        if capability := getattr(first, "compute_capability", None):
            described += f", of compute capability {capability}"
        refuse(
            f"the kernels need a GPU of compute capability 9.0, such as an H100, and JAX found {described}; "
            "--check-only --interpret checks tiny cases on CPU"
        )
    return {
        "kind": f"{described}, interpreted" if interpret else described,
        "jax": f"jax {jax.__version__}",
        "jaxlib": f"jaxlib {version('jaxlib')}",
        "platform": " ".join(jax.extend.backend.get_backend().platform_version.split()),  # CUDA's version is in it
    }


def check(console: Console, command: Command) -> tuple[list[dict], list[str]]:
    """Checks, and what failed of them."""
    from benchmarks import attention

    table = Table(
        title="Errors against float32, of the worst head, and in brackets those of XLA in bfloat16",
        title_justify="left",
    )
    names = "out", "lse", "dq", "dk", "dv"
    for column in ("case", "tanh", *names, "twice"):
        table.add_column(column, justify="right" if column in names else "left")
    found: list[attention.Check] = []
    for case in [case for name in command.shapes for case in attention.checked(name, command.interpret)]:
        print(f"checking {case}", file=sys.stderr)
        for each in attention.check(case, command.interpret):
            cells = [_error(each.errors.get(name), each.xla.get(name)) for name in names]
            table.add_row(each.case, each.tanh, *cells, "the same" if each.same else "[red]not the same[/red]")
            found.append(each)
    console.print(table)
    return [asdict(each) for each in found], [failure for each in found for failure in each.failures]


def _error(error: float | None, by_xla: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.1e}" + (f" ({by_xla:.1e})" if by_xla is not None else "")


def time_attention(console: Console, shapes: tuple[str, ...]) -> list[dict]:
    from benchmarks import attention

    table = Table(title="ms and TFLOP/s; cuDNN is without the soft cap, which it lacks", title_justify="left")
    for column in ("layer", "pass", "kernel", "XLA", "XLA / kernel", "cuDNN, no cap", "published, no cap"):
        table.add_column(column, justify="left" if column in ("layer", "pass") else "right")
    found, notes = [], []
    for layer in [layer for name in shapes for layer in attention.timed(name)]:
        print(f"timing {layer}", file=sys.stderr)
        ours = attention.time_passes(attention.by_kernel(layer), layer)
        xla = _peer("XLA", attention.by_xla(layer), layer, notes)
        cudnn = {} if layer.packed else _peer("cuDNN", attention.by_cudnn(layer), layer, notes)
        plain = layer.length == 8192 and layer.window is None and not layer.packed
        for which, seconds in ours.items():
            sides = {"kernel": seconds, "xla": xla.get(which), "cudnn": cudnn.get(which)}
            speeds = [_speed(time, layer.flops(which)) for time in sides.values()]
            speeds.insert(2, f"{xla[which] / seconds:.1f}" if which in xla else "")
            published = PUBLISHED.get((layer.shape.width, which), "") if plain else ""
            table.add_row(str(layer), which, *speeds, published, end_section=which == "both")
            found.append({"layer": str(layer), "pass": which, "flops": layer.flops(which), "seconds": sides})
    console.print(table)
    console.print(*dict.fromkeys(notes), SOURCES, sep="\n", highlight=False, markup=False)
    return found


def _peer(name: str, attend: Any, layer: Any, notes: list[str]) -> dict[str, float]:
    """Seconds of each pass, and none where it cannot run, of which a note says why."""
    from benchmarks import attention

    try:
        return attention.time_passes(attend, layer)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # XLA's own are RuntimeErrors
        notes.append(f"{name} gave no times, width {layer.shape.width}: {str(error).strip().partition('\n')[0]}")
        return {}


def _speed(seconds: float | None, flops: float) -> str:
    return "none" if seconds is None else f"{seconds * 1e3:.3f} ms {flops / seconds / 1e12:5.0f}"


def time_decode(console: Console, shapes: tuple[str, ...]) -> list[dict]:
    from benchmarks import attention

    peak = f"the {PEAK_BYTES / 1e12:.2f} TB/s of an H100 SXM"
    title = f"µs of a call, GB/s of the keys and values seen, and their share of {peak}"
    table = Table(title=title, title_justify="left")
    for column in ("cache", "kernel", "XLA", "XLA / kernel"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    found = []
    for case in [case for name in shapes for case in attention.timed_caches(name)]:
        print(f"timing {case}", file=sys.stderr)
        ways = {"kernel": attention.decode_by_kernel(case), "xla": attention.decode_by_xla(case)}
        sides = {name: attention.time_decode(step, case) for name, step in ways.items()}
        speeds = [
            f"{time * 1e6:.1f} µs {case.bytes / time / 1e9:5,.0f} {case.bytes / time / PEAK_BYTES:4.0%}"
            for time in sides.values()
        ]
        table.add_row(str(case), *speeds, f"{sides['xla'] / sides['kernel']:.1f}")
        found.append({"cache": str(case), "bytes": case.bytes, "seconds": sides})
    console.print(table)
    return found


if __name__ == "__main__":
    main()
