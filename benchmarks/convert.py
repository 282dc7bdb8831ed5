"""Conversions of checkpoints of real size, beside `cp` of the same files: time and peak memory of each.

    python -m benchmarks.convert [FOLDER]

Makes random bfloat16 weights in FOLDER (by default a temporary one; it needs 16 GB), of 2B and of a few layers of 27B,
converts them from one format to the next, each as a process of its own with the command a user would give, and deletes
all of it. Whether the bytes that come back are the same is checked too.
"""

import filecmp
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from gemma2_jax.config import GEMMA2_2B, GEMMA2_27B, ModelConfig
from gemma2_jax.convert.files import safetensors as tensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.hf_config import hf_config

ROUNDS = 3  # of each, by turns with cp
# Memory depends on the largest matrix of a layer and not on their number, so that two layers show that of 27B.
MODELS = {"2B": GEMMA2_2B, "27B with 2 of its 46 layers": replace(GEMMA2_27B, layers=2)}

# Runs the command that follows and prints the most memory that it held: its own, as Linux counts it, in bytes.
_MEASURED = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=sys.stderr); "
_MEASURED += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"


def random_checkpoint(folder: Path, model: ModelConfig) -> None:
    """Hugging Face files of random bfloat16 weights."""
    shapes = table.their_shapes(table.MODEL, model)
    wanted = {name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)

    def parts():
        for shape in shapes.values():
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            yield (bits & 0xBFFF).view(ml_dtypes.bfloat16)  # below 2, so that none is NaN

    folder.mkdir()
    tensors.write_safetensors(folder, tensors.MODEL, wanted, parts(), lambda size: None)
    tensors.write_json(folder / "config.json", hf_config(model, "bfloat16"))


def measured(*command: object) -> tuple[float, float]:
    """Seconds and bytes of memory at most."""
    subprocess.run(["sync"], check=True)  # what was written before is not to be waited for
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - start, float(run.stdout)


def conversions(folder: Path, model: ModelConfig) -> tuple[int, list[tuple[str, float, float, float]]]:
    """Bytes of the weights, and of each conversion its title, the seconds of cp and its own, and bytes of memory."""
    rows, at = [], {name: folder / name for name in ("hf", "copy", "orbax", "megatron", "back")}
    random_checkpoint(at["hf"], model)
    files = sorted(file.name for file in at["hf"].glob("model*"))
    size = sum((at["hf"] / file).stat().st_size for file in files)
    for title, source, target, to in (
        ("Hugging Face to Orbax", "hf", "orbax", "orbax"),
        ("Orbax to Hugging Face", "orbax", "back", "hf"),
        ("Hugging Face to Megatron", "hf", "megatron", "megatron"),
        ("Megatron to Hugging Face", "megatron", "back", "hf"),
    ):
        copying, seconds, memory = [], [], []
        for _ in range(ROUNDS):
            shutil.rmtree(at["copy"], ignore_errors=True)
            memory.append(measured("cp", "-r", at[source], at["copy"])[0])
            shutil.rmtree(at["copy"])
            shutil.rmtree(at[target], ignore_errors=True)
            command = (sys.executable, "-m", "gemma2_jax.convert", at[source], at[target], "--to", to)
            for kept, found in zip((seconds, memory), measured(*command), strict=True):
                kept.append(found)
        rows.append((title, min(copying), min(seconds), max(memory)))
        if target == "back":
            same = filecmp.cmpfiles(at["hf"], at["back"], files, shallow=False)[0] == files
            print(f"{title}: the bytes that come back {'are the same' if same else 'DIFFER'}")
            shutil.rmtree(at["back"])
            shutil.rmtree(at[source])
    return size, rows


def main() -> None:
    """Prints a table for each model."""
    from rich.console import Console
    from rich.table import Table

    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
            size, rows = conversions(Path(temporary), model)
        shown = Table(title=f"{name} in bfloat16, {size / 1e9:.1f} GB: the best of {ROUNDS}")
        for column in ("conversion", "cp, s", "conversion, s", "times cp", "peak memory, GB"):
            shown.add_column(column, justify="left" if column == "conversion" else "right")
        for title, copying, seconds, memory in rows:
            shown.add_row(title, f"{copying:.1f}", f"{seconds:.1f}", f"{seconds / copying:.2f}", f"{memory / 1e9:.2f}")
        Console(width=100).print(shown)


if __name__ == "__main__":
    main()
