"""Orbax checkpoints of a run: trained weights, optimizer, step and data position, as one atomic step.

A step is a folder WORKDIR/checkpoints/STEP that appears whole or not at all. Only trained weights are kept: with
adapters that is the adapters alone, and the frozen weights come from where the run started. Writing overlaps with
training: the arrays are copied off the devices before `save` returns.

A checkpoint can be restored on any mesh and by any number of processes. Pipeline stages may need a stack of layers to
be longer than the model is deep; reading adds zeros after the last layer, or leaves them out.
"""

import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_args import get_registered_args_cls
from orbax.checkpoint.checkpoint_managers import LatestN
from rich.filesize import decimal

from gemma2_jax.convert.files.orbax import CHUNK_BYTES
from gemma2_jax.dims import Abstract
from gemma2_jax.model.gemma2 import Weights


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, workdir: Path, keep: int):
        self.folder = workdir.absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(keep), cleanup_tmp_directories=True, create=True
        )
        handlers = ocp.DefaultCheckpointHandlerRegistry()
        for item, handler in (
            ("params", ocp.PyTreeCheckpointHandler()),
            ("optimizer", ocp.PyTreeCheckpointHandler()),
            ("loop", ocp.JsonCheckpointHandler()),
        ):
            save, restore = get_registered_args_cls(handler)
            handlers.add(item, save, handler)
            handlers.add(item, restore, handler)
        self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)

    def __enter__(self) -> "Checkpoints":
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        return self

    def __exit__(self, failed, *_) -> None:
        try:
            if failed is not None and jax.process_count() > 1:
                return  # a write ends only when all processes end it, and the others are about to end themselves
            if failed is KeyboardInterrupt and self._manager.is_saving_in_progress():
                print("a checkpoint is still being written; interrupt again to give it up", file=sys.stderr, flush=True)
            with self._explain_failures():
                self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_is_not_of_orbax)

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Weights, optimizer: Any, loop: dict) -> None:
        """Starts writing a step; returns when the arrays may be donated. `loop` must be JSON.

        Raises OSError where the disk has no room for it, or the step before it could not be written. An interrupt is
        raised when the write has started, so that the step is kept.
        """
        if shortage := self.describe_shortage(params, optimizer):
            raise OSError(
                f"the checkpoint of step {step} {shortage}; make room, and the same command {self._describe_next()}"
            )
        with self._explain_failures(), _delay_interrupts():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(
                        _nest_dicts(params), save_args=_nest_dicts({path: _chunking(path) for path in params})
                    ),
                    optimizer=ocp.args.PyTreeSave(_nest_dicts(optimizer)),
                    loop=ocp.args.JsonSave(loop),
                ),
            )

    def describe_shortage(self, params: Weights | Abstract, optimizer: Any) -> str:
        """What a checkpoint of these needs and what the disk has, where that is less; else empty."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, optimizer)))
        free = shutil.disk_usage(self.folder).free
        return f"needs {decimal(size)}, and {self.folder} has {decimal(free)} free" if size > free else ""

    @contextmanager
    def _explain_failures(self) -> Iterator[None]:
        """Turns what Orbax raises for a failed write, here or in a thread of its own, into one sentence."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise OSError(
                f"a checkpoint could not be written to {self.folder}: {reason}; "
                f"once that is mended, the same command {self._describe_next()}"
            ) from error

    def restore(self, step: int, params: Abstract, optimizer: Any) -> tuple[Weights, Any, dict]:
        """A step's contents, shaped and placed like the abstract arrays given. ValueError where they are damaged."""
        args = ocp.args.Composite(
            params=_restore_args(_nest_dicts(params)),
            optimizer=_restore_args(_nest_dicts(optimizer)),
            loop=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=args)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):  # of this machine, not of the files
            raise
        except Exception as error:  # Orbax raises KeyError, ValueError, OSError and others for damaged files
            raise ValueError(self._describe_damage(step, error)) from error
        return _flatten_dicts(restored["params"]), _flatten_dicts(restored["optimizer"]), restored["loop"]

    def _describe_damage(self, step: int, error: Exception) -> str:
        folder = self.folder / str(step)
        missing = [name for name in ("params", "optimizer", "loop") if not (folder / name).is_dir()]
        said = (str(error) or repr(error)).splitlines()[0].partition(" [")[0]  # TensorStore adds its JSON
        reason = f"it has no {' and no '.join(missing)}" if missing else said
        earlier = [saved for saved in self._manager.all_steps() if saved < step]
        next_start = f"go on from step {max(earlier)}" if earlier else "start from the beginning"
        return (
            f"the checkpoint {folder} is damaged or not whole: {reason.rstrip('.')}; copy that folder again, or move "
            f"it away to {next_start}"
        )

    def _describe_next(self) -> str:
        """What the same command does as things are."""
        return "starts from the beginning" if self.latest is None else f"resumes after step {self.latest}"


@contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt at the end of the block, not within it.

    Does nothing in other threads than the main one, as they get no signals, or where the signal has another handler.
    """
    delayed = []
    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if _raises_interrupt(number)]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    for number in signals:
        signal.signal(number, lambda *_: delayed.append(True))
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.default_int_handler)
    if delayed:
        raise KeyboardInterrupt


def _raises_interrupt(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.default_int_handler


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """A filter that drops Orbax's log records, as Orbax logs each error with its stack trace and then raises it too."""
    return record.levelno >= logging.CRITICAL or "orbax" not in Path(record.pathname).parts


def _chunking(path: str) -> ocp.SaveArgs:
    """How an array is cut into chunks in storage: one layer in each, as converters read them."""
    return ocp.SaveArgs(shard_axes=(0,)) if path.startswith("blocks/") else ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


def _restore_args(wanted: Any) -> ocp.args.PyTreeRestore:
    """How to read a tree of abstract arrays; the first dim of each may be cut short, or filled up with zeros."""
    how = jax.tree.map(
        lambda w: ocp.ArrayRestoreArgs(dtype=w.dtype, sharding=w.sharding, global_shape=w.shape, strict=False), wanted
    )
    return ocp.args.PyTreeRestore(wanted, how)


def _nest_dicts(tree: Any) -> Any:
    """The tree with nested dicts in place of dicts of paths, as Orbax names arrays by nested keys."""
    return jax.tree.map(
        lambda node: unflatten_dict(node, sep="/") if isinstance(node, dict) else node,
        tree,
        is_leaf=lambda node: isinstance(node, dict),
    )


def _flatten_dicts(tree: Any) -> Any:
    return jax.tree.map(
        lambda node: flatten_dict(node, sep="/") if isinstance(node, dict) else node,
        tree,
        is_leaf=lambda node: isinstance(node, dict),
    )
