"""The attention kernels on a Hopper GPU: checked, and then timed beside XLA and cuDNN.

    python -m benchmarks.gpu [--recipe 9b_lora]

It ends with three steps of a recipe beside the plan's bound and estimate, and writes all numbers into one file, with
what is needed to compare it with another machine's: GPUs, clocks, limits of power, driver, versions, commit, tiles.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from gemma2_jax.cluster import platforms
from gemma2_jax.kernels.shapes import SHAPES

if TYPE_CHECKING:
    from gemma2_jax.kernels.tiles import Build

PEAK_BYTES = 3.35e12  # Bytes a second of an H100 SXM's memory, by NVIDIA's data sheet.
# Published TFLOP/s by width and pass: causal, 8192 tokens a row, without a soft cap.
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
    interpret: bool = False  # tiny cases with the interpreter, on CPU: no number of it says anything of a GPU
    recipe: str = "2b_lora"  # whose steps are taken, on all GPUs
    json: Path | None = None  # the file of all numbers, to be sent in; gpu.json, unless nothing is timed


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with these arguments, by default those of the command line."""
    command = tyro.cli(Command, prog="python -m benchmarks.gpu", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    if unknown := [name for name in command.shapes if name not in SHAPES]:
        refuse(f"there is no shape {', '.join(unknown)}: there are {'; '.join(SHAPES)}")
    platforms.prepare_process(cpu=command.interpret, cache=False)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    report: dict[str, Any] = {"device": describe_device(command.interpret)}
    console.print(*report["device"].values(), sep="; ", highlight=False)
    from benchmarks import gpu_report

    report |= gpu_report.describe_machine()
    path = command.json or (None if command.check_only else Path("gpu.json"))
    report["checks"], failures = run_checks(console, command)
    write_report(path, report)
    if not failures and not command.check_only:
        time_all(console, command, path, report)
    if failures:
        console.print("failed:", *failures, sep="\n  ", highlight=False, markup=False)
        sys.exit(1)


def time_all(console: Console, command: Command, path: Path | None, report: dict[str, Any]) -> None:
    """Times kernels, devices and steps. The file is written after each part, as a later one may fail."""
    from benchmarks import gpu_report

    parts: dict[str, Callable[[], Any]] = {
        "tiles": lambda: gpu_report.describe_tiles(command.shapes),
        "attention": lambda: time_attention(console, command),
        "decode": lambda: time_decode(console, command),
        "rates": gpu_report.measure_rates,
        "steps": lambda: gpu_report.measure_steps(command.recipe),
    }
    for name, part in parts.items():
        report[name] = part()
        write_report(path, report)
    for step in report["steps"]:
        console.print(
            f"{step['recipe']}: {step['subject']}", step["found"] or step["reason"], sep=": ", highlight=False
        )
    if report["note"]:
        console.print(report["note"], highlight=False)
    console.print(f"all of it is in {path}, which can be sent in", highlight=False)


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Writes what is known so far; the file appears whole."""
    if path is None:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def refuse(text: str) -> NoReturn:
    """Ends the command with an error, exit status 2."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def describe_device(interpret: bool) -> dict[str, str]:
    """Says what this runs on; exits where that is no Hopper GPU and nothing is interpreted."""
    import jax
    import jax.extend

    from gemma2_jax.model.attention.choice import device_architecture

    if interpret:  # Warpgroups wait for one another: were their programs enqueued, some would never begin.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    plain = os.environ.get("JAX_PLATFORMS") == "cpu"
    try:
        with platforms.silence_stderr() if plain else contextlib.nullcontext():
            device = jax.devices()[0]
        kind = device.device_kind
    except (RuntimeError, AssertionError):  # JAX raises these where JAX_PLATFORMS names what is not there.
        device, kind = None, "no device"
    if not interpret and (device is None or device_architecture(device) != "sm_90"):
        if capability := getattr(device, "compute_capability", None):
            kind += f", of compute capability {capability}"
        refuse(
            f"the kernels need a GPU of compute capability 9.0, such as an H100, and JAX found {kind}; "
            "--check-only --interpret checks tiny cases on CPU"
        )
    return {
        "kind": f"{kind}, interpreted" if interpret else kind,
        "jax": f"jax {jax.__version__}",
        "jaxlib": f"jaxlib {version('jaxlib')}",
        "platform": " ".join(jax.extend.backend.get_backend().platform_version.split()),  # CUDA's version is in it.
    }


def run_checks(console: Console, command: Command) -> tuple[list[dict], list[str]]:
    """Checks every case and prints a table; returns the checks, and a sentence for each failure."""
    from benchmarks import attention
    from gemma2_jax.model.attention import checking

    table = Table(
        title="Errors against float32, of the worst head, and in brackets those of XLA in bfloat16",
        title_justify="left",
    )
    names = "out", "lse", "dq", "dk", "dv"
    for column in ("case", "tanh", *names, "twice"):
        table.add_column(column, justify="right" if column in names else "left")
    checks: list[checking.Check] = []
    for case in [case for name in command.shapes for case in attention.list_checked(name, command.interpret)]:
        print(f"checking {case}", file=sys.stderr)
        for check in checking.check_case(case, attention.list_builds(command.interpret)):
            cells = [_format_error(check.errors.get(name), check.xla.get(name)) for name in names]
            table.add_row(check.case, check.tanh, *cells, "the same" if check.same else "[red]not the same[/red]")
            checks.append(check)
    console.print(table)
    return [asdict(check) for check in checks], [failure for check in checks for failure in check.failures]


def _format_error(error: float | None, xla_error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.1e}" + (f" ({xla_error:.1e})" if xla_error is not None else "")


def time_attention(console: Console, command: Command) -> list[dict]:
    """Times every layer of these shapes and prints a table; returns its numbers."""
    from benchmarks import attention
    from gemma2_jax.model.attention import checking

    table = Table(title="ms and TFLOP/s; cuDNN is without the soft cap, which it lacks", title_justify="left")
    for column in ("layer", "pass", "kernel", "XLA", "XLA / kernel", "cuDNN, no cap", "published, no cap"):
        table.add_column(column, justify="left" if column in ("layer", "pass") else "right")
    numbers, notes = [], []
    build = choose_build(command)
    layers = [layer for name in command.shapes for layer in attention.list_timed_layers(name, command.interpret)]
    for layer in layers:
        print(f"timing {layer}", file=sys.stderr)
        kernel = attention.time_passes(checking.kernel_attention(layer, build(layer)), layer, command.interpret)
        xla = _time_peer("XLA", checking.xla_attention(layer), layer, notes)
        cudnn = {} if layer.packed else _time_peer("cuDNN", attention.cudnn_attention(layer), layer, notes)
        plain = layer.length == 8192 and layer.window is None and not layer.packed
        for name, seconds in kernel.items():
            flops = layer.flops(name)
            sides = {"kernel": seconds, "xla": xla.get(name), "cudnn": cudnn.get(name)}
            speeds = [_format_speed(time, flops) for time in sides.values()]
            speeds.insert(2, f"{xla[name] / seconds:.1f}" if name in xla else "")
            published = PUBLISHED.get((layer.shape.width, name), "") if plain else ""
            table.add_row(str(layer), name, *speeds, published, end_section=name == "both")
            tflops = {side: time and flops / time / 1e12 for side, time in sides.items()}
            numbers.append(
                {"layer": str(layer), "pass": name, "flops": flops, "seconds": sides, "tflops": tflops}
                | {"tiles": str(build(layer).select_tiles(layer.shape.width))}
            )
    console.print(table)
    console.print(*dict.fromkeys(notes), SOURCES, sep="\n", highlight=False, markup=False)
    return numbers


def choose_build(command: Command) -> "Callable[[Any], Build]":
    """A function of a case that says how its kernels are built: with the tiles that a run on this device would take."""
    import jax

    from benchmarks import gpu_report
    from gemma2_jax.kernels.tiles import GPU
    from gemma2_jax.model.attention.checking import INTERPRETED

    if command.interpret:
        return lambda case: INTERPRETED
    choices = {name: gpu_report.choose_tiles(name, jax.devices()[0]).tiles for name in command.shapes}
    return lambda case: replace(GPU, tiles=choices[case.name])


def _time_peer(name: str, attend: Any, layer: Any, notes: list[str]) -> dict[str, float]:
    """Measures the seconds of each pass; where the peer cannot run, it adds a note that says why, and returns none."""
    from benchmarks import attention

    try:
        return attention.time_passes(attend, layer)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # XLA's own are RuntimeErrors.
        notes.append(f"{name} gave no times, width {layer.shape.width}: {str(error).strip().partition('\n')[0]}")
        return {}


def _format_speed(seconds: float | None, flops: float) -> str:
    return "none" if seconds is None else f"{seconds * 1e3:.3f} ms {flops / seconds / 1e12:5.0f}"


def time_decode(console: Console, command: Command) -> list[dict]:
    """Times every cache of these shapes and prints a table; returns its numbers."""
    from benchmarks import attention
    from gemma2_jax.model.attention import checking

    peak = f"the {PEAK_BYTES / 1e12:.2f} TB/s of an H100 SXM"
    title = f"µs of a call, GB/s of the keys and values seen, and their share of {peak}"
    table = Table(title=title, title_justify="left")
    for column in ("cache", "kernel", "XLA", "XLA / kernel"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    numbers = []
    build = choose_build(command)
    for case in [case for name in command.shapes for case in attention.list_timed_caches(name, command.interpret)]:
        print(f"timing {case}", file=sys.stderr)
        steps = {"kernel": checking.kernel_decode(case, build(case)), "xla": checking.xla_decode(case)}
        sides = {name: attention.time_decode(step, case, command.interpret) for name, step in steps.items()}
        speeds = [
            f"{time * 1e6:.1f} µs {case.bytes / time / 1e9:5,.0f} {case.bytes / time / PEAK_BYTES:4.0%}"
            for time in sides.values()
        ]
        table.add_row(str(case), *speeds, f"{sides['xla'] / sides['kernel']:.1f}")
        rates = {side: case.bytes / time for side, time in sides.items()}
        numbers.append({"cache": str(case), "bytes": case.bytes, "seconds": sides, "bytes_per_second": rates})
    console.print(table)
    return numbers


if __name__ == "__main__":
    main()
