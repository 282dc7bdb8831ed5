"""Conversions of checkpoints of real size, beside `cp` of the same files: time and peak memory of each.

    python -m benchmarks.convert [FOLDER]

Makes random bfloat16 weights in FOLDER (by default a temporary one; it needs 16 GB), of 2B and of a few layers of 27B,
converts them from one format to the next, each as a process of its own with the command a user would give, and deletes
all of it. Whether the bytes that come back are the same is checked too.

Both have the same start: what was written before is on the disk, and free memory is at hand (`take_memory`). cp has to
copy, with --reflink=never, where a file system could share blocks or copy within itself.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.options import make_parser
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_27B, ModelConfig

ROUNDS = 3  # Runs of each conversion, by turns with cp.
# Memory depends on the largest matrix of a layer and not on their number, so that two layers show that of 27B.
MODELS = {"2B": GEMMA2_2B, "27B with 2 of its 46 layers": replace(GEMMA2_27B, layers=2)}

# Runs the command that follows and prints the most memory that it held: its own, as Linux counts it, in bytes.
_MEASURED = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=sys.stderr); "
_MEASURED += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"


def write_random_checkpoint(folder: Path, model: ModelConfig) -> None:
    """Writes Hugging Face files of random bfloat16 weights."""
    import jax
    import ml_dtypes
    import numpy as np

    from gemma2_jax.convert.files import safetensors
    from gemma2_jax.convert.formats import table
    from gemma2_jax.convert.formats.hf_config import hf_config

    shapes = table.tensor_shapes(table.MODEL, model)
    described = {name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)

    def draw_weights():
        for shape in shapes.values():
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            yield (bits & 0xBFFF).view(ml_dtypes.bfloat16)  # Below 2, so that none is NaN.

    folder.mkdir()
    safetensors.write_safetensors(
        safetensors.ShardedFiles(folder, safetensors.MODEL), described, draw_weights(), lambda size: None
    )
    safetensors.write_json(folder / "config.json", hf_config(model, "bfloat16"))


def take_memory(size: int) -> None:
    """Takes `size` bytes of memory, or as many as are free, and lets them go again.

    Memory that is free for some seconds goes back from a virtual machine to its host, and each page that is written
    then has to be fetched first: on the machine of the figures in docs/checkpoints.md, 0.7 to 1.7 s for a GB. Which
    command would pay for that depends on what ran before it.
    """
    import numpy as np

    np.ones(min(size, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10), np.uint8)


def measure(size: int, *command: object) -> tuple[float, float]:
    """Runs a command that writes `size` bytes; returns its seconds and the bytes of memory that it held at most."""
    subprocess.run(["sync"], check=True)  # The command shall not wait for what was written before.
    take_memory(size * 3 // 2)
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - start, float(run.stdout)


def measure_conversions(folder: Path, model: ModelConfig) -> tuple[int, list[tuple[str, float, float, float]]]:
    """Measures each conversion in turn.

    Returns:
      The bytes of the weights; and for each conversion its title, the seconds of cp, its own, and its bytes of memory.
    """
    rows, folders = [], {name: folder / name for name in ("hf", "copy", "orbax", "megatron", "back")}
    write_random_checkpoint(folders["hf"], model)
    files = sorted(file.name for file in folders["hf"].glob("model*"))
    size = sum((folders["hf"] / file).stat().st_size for file in files)
    for title, source, target, to in (
        ("Hugging Face to Orbax", "hf", "orbax", "orbax"),
        ("Orbax to Hugging Face", "orbax", "back", "hf"),
        ("Hugging Face to Megatron", "hf", "megatron", "megatron"),
        ("Megatron to Hugging Face", "megatron", "back", "hf"),
    ):
        copying, seconds, memory = [], [], []
        for _ in range(ROUNDS):
            shutil.rmtree(folders["copy"], ignore_errors=True)
            copying.append(measure(size, "cp", "-r", "--reflink=never", folders[source], folders["copy"])[0])
            shutil.rmtree(folders["copy"])
            shutil.rmtree(folders[target], ignore_errors=True)
            command = (sys.executable, "-m", "gemma2_jax.convert", folders[source], folders[target], "--to", to)
            for values, value in zip((seconds, memory), measure(size, *command), strict=True):
                values.append(value)
        rows.append((title, min(copying), min(seconds), max(memory)))
        if target == "back":
            same = filecmp.cmpfiles(folders["hf"], folders["back"], files, shallow=False)[0] == files
            print(f"{title}: the bytes that come back {'are the same' if same else 'DIFFER'}")
            shutil.rmtree(folders["back"])
            shutil.rmtree(folders[source])
    return size, rows


def main() -> None:
    """Prints a table for each model."""
    parser = make_parser("convert", __doc__)
    parser.add_argument("folder", nargs="?", help="where to write; by default a temporary folder")
    folder = parser.parse_args().folder
    from rich.console import Console
    from rich.table import Table

    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            size, rows = measure_conversions(Path(temporary), model)
        shown = Table(title=f"{name} in bfloat16, {size / 1e9:.1f} GB: the best of {ROUNDS}")
        for column in ("conversion", "cp, s", "conversion, s", "times cp", "peak memory, GB"):
            shown.add_column(column, justify="left" if column == "conversion" else "right")
        for title, copying, seconds, memory in rows:
            shown.add_row(title, f"{copying:.1f}", f"{seconds:.1f}", f"{seconds / copying:.2f}", f"{memory / 1e9:.2f}")
        Console(width=100).print(shown)


if __name__ == "__main__":
    main()
