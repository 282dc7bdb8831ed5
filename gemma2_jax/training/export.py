"""The adapter of each checkpoint as PEFT reads it, in WORKDIR/adapters/STEP, where `train.export_adapter` asks for it.

Training resumes from Orbax's checkpoints; these folders are for other programs to load while it goes on. A folder
appears whole or not at all, and is what `python -m gemma2_jax.convert WORKDIR/checkpoints/STEP DST --to peft` writes.
"""

import shutil
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma2_jax.command_line import notify
from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint, grow_embedding
from gemma2_jax.convert.files.folder import generation_file
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.dims import Abstract
from gemma2_jax.model.gemma2 import Weights


class AdapterExports:
    """The exported adapters of one run."""

    def __init__(self, config: Config, source: Checkpoint | None):
        self._config, self._source = config, source
        self.folder = config.output / "adapters"
        self._failure = ""  # why the adapter of the last step is not there

    def save(self, step: int, params: Weights) -> None:
        """Writes the adapter of a step, in place of what was there. Every process calls it, and process 0 writes.

        Where it cannot be written, that is said, and training goes on, as the checkpoint of the step has it. Raises
        ValueError where it cannot be PEFT's.
        """
        config = self._config
        if not config.train.export_adapter:
            return
        # Stacks may end in layers of zeros, which fill up the last pipeline stage: see `Program._stored_layers`.
        arrays = {
            path: _gather_array(w)[: config.model.layers if path.startswith("blocks/") else None]
            for path, w in params.items()
        }
        if jax.process_index() != 0:
            return
        assert self._source is not None and self._source.model is not None, "init names a model"
        source = Checkpoint(
            format="run",
            path=config.output,
            model=config.model,
            adapter=config.adapter,
            base=config.init,
            tokenizer=config.output / "tokenizer",
            generation=generation_file(config.output / "tokenizer"),
            sources=(*grow_embedding(self._source.sources, config.model), _HostArrays(arrays)),
            grown=config.model.vocab_size > self._source.model.vocab_size,
        )
        # A run that ended before its checkpoint was whole may have left this folder.
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        try:
            write_checkpoint(Job(source=source, to="peft"), self.folder / str(step))
            self._prune(step)
        except OSError as error:
            if not self._failure:
                notify(f"warning: {_describe_failure(step, error)}; training goes on")
            self._failure = _describe_failure(step, error)
        else:
            self._failure = ""

    def finish(self) -> None:
        """Raises OSError where the adapter of the last step could not be written, when the run has ended."""
        if self._failure:
            folder = self._config.output / "checkpoints"
            raise OSError(f"{self._failure}; {folder} has it, and once that is mended the same command writes it again")

    def _prune(self, step: int) -> None:
        """Keeps as many folders as there are checkpoints, none of a later step, and none that a killed run began."""
        train, folder = self._config.train, self._config.output / "checkpoints"
        steps = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
        steps = [exported for exported in steps if exported <= step]
        kept_steps = steps[-train.keep_checkpoints :]
        if train.keep_every or train.keep_best:  # a checkpoint that goes now takes its adapter along the next time
            kept_steps += [exported for exported in steps if (folder / str(exported)).exists()]
        for path in self.folder.iterdir():
            if path.name.endswith(".partial") or (path.name.isdigit() and int(path.name) not in kept_steps):
                shutil.rmtree(path)


def _describe_failure(step: int, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"the adapter of step {step} could not be written for PEFT ({reason})"


def _gather_array(w: jax.Array) -> np.ndarray:
    """The whole array, of which this process may hold only a part."""
    return np.asarray(w if w.is_fully_addressable else multihost_utils.process_allgather(w, tiled=True))


@dataclass(frozen=True)
class _HostArrays:
    """Arrays in the host's memory, for `convert` to read as it reads a file."""

    arrays: dict[str, np.ndarray]

    @property
    def shapes(self) -> Abstract:
        return {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        return self.arrays[path][index].astype(dtype, copy=False)

    def stored_rows(self, path: str) -> tuple[int, int]:
        dim = int(path.startswith("blocks/"))
        return dim, self.arrays[path].shape[dim]
