"""The adapter of each checkpoint as PEFT reads it, in WORKDIR/adapters/STEP, where `train.export_adapter` asks for it.

Beside Orbax's checkpoints, which training resumes from, these are for others to load while it goes on. A folder appears
whole or not at all, and is what `python -m gemma2_jax.convert WORKDIR/checkpoints/STEP DST --to peft` writes.
"""

import shutil
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.writing import Job, write_checkpoint
from gemma2_jax.model.gemma2 import Abstract, Weights


class AdapterExports:
    """The exported adapters of one run."""

    def __init__(self, config: Config):
        self._config = config
        self.folder = config.output / "adapters"

    def save(self, step: int, params: Weights) -> None:
        """Writes those of a step in place of what was there. Every process calls it, and process 0 writes.

        Raises ValueError or OSError where the disk does not take it.
        """
        config = self._config
        if not config.train.export_adapter:
            return
        # Pipeline stages may have filled up the stacks with zeros, see `step.Program`.
        arrays = {path: _gather_array(w)[: config.model.layers] for path, w in params.items()}
        if jax.process_index() != 0:
            return
        source = Checkpoint(
            format="run",
            path=config.output,
            model=config.model,
            adapter=config.adapter,
            base=config.init,
            companions=(config.output / "tokenizer",),
            sources=(_HostArrays(arrays),),
        )
        # That of a run which ended before its checkpoint was whole.
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        write_checkpoint(Job(source=source, to="peft"), self.folder / str(step))
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Keeps as many as there are checkpoints, none of them later, and nothing that a killed run began."""
        whole = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
        kept = [other for other in whole if other <= step][-self._config.train.keep_checkpoints :]
        for path in self.folder.iterdir():
            if path.name.endswith(".partial") or (path.name.isdigit() and int(path.name) not in kept):
                shutil.rmtree(path)


def _gather_array(w: jax.Array) -> np.ndarray:
    """All of an array, of which this process may hold a part."""
    return np.asarray(w if w.is_fully_addressable else multihost_utils.process_allgather(w, tiled=True))


@dataclass(frozen=True)
class _HostArrays:
    """Arrays in the host's memory as a source of `convert`."""

    arrays: dict[str, np.ndarray]

    @property
    def shapes(self) -> Abstract:
        return {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        return self.arrays[path][index].astype(dtype, copy=False)
