"""Orbax checkpoints of a run: trained weights, optimizer, step and data position, as one atomic step.

A step is a folder WORKDIR/checkpoints/STEP that appears whole or not at all. Only trained weights are kept: with
adapters that is the adapters alone, and the frozen weights come from where the run started. Writing overlaps with
training: the arrays are copied off the devices before `save` returns, and a thread of ours follows the write to its
end, whatever that is, and then adds the checksums of all files.

A checkpoint can be restored on any mesh and by any number of processes. Pipeline stages may need a stack of layers to
be longer than the model is deep; reading adds zeros after the last layer, or leaves them out.
"""

import contextlib
import itertools
import json
import logging
import math
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_args import get_registered_args_cls
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)
from rich.filesize import decimal

from gemma2_jax.cluster import hosts, jax_internals
from gemma2_jax.command_line import notify
from gemma2_jax.config import TrainConfig
from gemma2_jax.convert import steps
from gemma2_jax.convert.files import checksums, orbax
from gemma2_jax.dims import Abstract
from gemma2_jax.model.gemma2 import Weights

DEADLINE_SECONDS = 3600
_RETRY_STEPS = 10  # between looks at a disk that had no room
_LOGGERS = ("absl", "asyncio", "concurrent.futures")  # through which Orbax reports errors
_PARTIAL = "*.orbax-checkpoint-tmp*"  # folders that Orbax writes a step to, before it has its name
_WRITE_BARRIERS: tuple[str, ...] = ("async_write_complete", "async_commit_complete")  # of Orbax
_questions = itertools.count()  # the processes of a run ask one another in the same order


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last write.

    Opening them reads the newest step from end to end, and sets it aside, as STEP.damaged, where it is not as it was
    written and there is an earlier one. `opened` says what was found.

    A step that cannot be written, as the disk is full, does not end the run: it is said, and tried again when the next
    is due, or when there is room. Where that is still so at the end of the run, leaving the block raises OSError.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        deadline: float = DEADLINE_SECONDS,
        policies: Sequence[PreservationPolicy] = (),
    ):
        """The newest `keep` steps are kept, and those that one of the policies keeps, each a function of all steps.

        `deadline` is how many seconds a write may take.

        Raises ValueError where the newest step is damaged, and no earlier one is whole.
        """
        self.folder = workdir.absolute() / "checkpoints"
        self._log: Callable[[int, str, str], None] | None = None
        self._events: SimpleQueue[tuple[int, str, str]] = SimpleQueue()  # not logged yet; threads add to them
        self._remove_partial()
        whole, damaged = _find_whole_step(self.folder)
        self.opened = "" if whole is None else _describe_step(self.folder, whole)
        for step, reason in damaged.items():
            kept = _set_aside(self.folder / str(step))
            text = (
                f"the checkpoint {self.folder}/{step} is damaged: {reason}; it is kept as {kept}, and the run goes on"
            )
            self._say(whole or 0, "damaged", f"{text} from step {whole}")
        _gather("")  # until which no process may look at what is there
        self._deadline = deadline
        self._write: _Write | None = None  # under way, or ended since `_finish_write` was last called
        self._failure: _Failure | None = None  # of the newest write, if it failed
        self._agreement = _Agreement() if jax.process_count() > 1 else None
        self._policy = AnyPreservationPolicy([LatestN(keep), *policies])
        self._manager = self._open_manager()

    def __enter__(self) -> "Checkpoints":
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_is_not_of_orbax)
        return self

    def __exit__(self, failed, *_) -> None:
        try:
            if failed is not None and jax.process_count() > 1:
                return  # a write ends only when all processes end it, and the others are about to end themselves
            if failed is KeyboardInterrupt and self._write is not None and not self._write.ended.is_set():
                notify("a checkpoint is still being written; interrupt again to give it up")
            self._finish_write()
            self._manager.close()
            self._remove_partial()
            if failed is None and self._failure is not None:
                raise OSError(
                    f"the checkpoint of step {self._failure.step} was not saved: {self._failure.reason}. "
                    f"{self._describe_rest()}"
                )
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(_is_not_of_orbax)

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        unfinished = self._write.step if self._write is not None and not self._write.ended.is_set() else None
        return max((step for step in self._manager.all_steps() if step != unfinished), default=None)

    def report(self, log: Callable[[int, str, str], None]) -> None:
        """Has what happens to steps logged, as a step, an event and a text, by the thread that calls `is_overdue`."""
        self._log = log

    def _open_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            best_fn=_read_loss,
            best_mode="min",
            create=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=math.ceil(self._deadline),
                barrier_sync_fn=self._agreement.wait if self._agreement else None,
            ),
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
        return ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss of those that are kept, the earliest of equals; None without one."""
        self._finish_write()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        losses = [(_read_loss(kept), step) for step, kept in metrics.items() if kept]
        return min(losses)[1] if losses else None

    def read_loop(self, step: int) -> dict:
        """What was saved as `loop` with this step."""
        return json.loads((self.folder / str(step) / "loop" / "metadata").read_text())

    def save(self, step: int, params: Weights, optimizer: Any, loop: dict, loss: float | None = None) -> bool:
        """Starts writing a step, and returns when the arrays may be donated; False if it is not begun for lack of room.

        `loop` must be JSON. `loss` is the held-out loss of this step, where it is known. Where it cannot be written,
        that is said, and tried again with a later step. An interrupt is raised when the write has started, so that the
        step is kept. Raises TimeoutError as `is_overdue` does.
        """
        self._finish_write()
        if shortage := _gather(self.describe_shortage(params, optimizer))[0]:
            self._fail(step, f"it {shortage}", size=_count_bytes(params, optimizer))
            return False
        write = _Write(step=step, name=f"checkpoint {next(_questions)}", deadline=self._deadline)
        if self._agreement:
            self._agreement.begin(write.name)
        with _delay_interrupts():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(
                        _nest_dicts(params), save_args=_nest_dicts({path: _chunking(path) for path in params})
                    ),
                    optimizer=ocp.args.PyTreeSave(_nest_dicts(optimizer)),
                    loop=ocp.args.JsonSave(loop),
                ),
                metrics=None if loss is None else {"eval_loss": loss},
            )
            self._write = write
            threading.Thread(target=self._follow, args=(write,), name="follow_write", daemon=True).start()
        return True

    def is_overdue(self, step: int) -> bool:
        """Whether to save after this step, which is not due, as an earlier one found no room and now there is some.

        Every process calls it after every step, and all get the same answer. Raises TimeoutError where the write that
        is under way takes longer than its deadline.
        """
        while self._log is not None and not self._events.empty():
            self._log(*self._events.get())
        if self._write is not None and not self._write.ended.is_set():
            self._wait_for_write(self._write, 0)
        elif self._failure is not None and step % _RETRY_STEPS == 0:
            self._remove_partial()
            return self._write is None and not _gather(self._describe_room(self._failure.size))[0]
        return False

    def describe_shortage(self, params: Weights | Abstract, optimizer: Any) -> str:
        """What a checkpoint of these needs and what the disk has, where that is less; else empty."""
        return self._describe_room(_count_bytes(params, optimizer))

    def _describe_room(self, size: int) -> str:
        free = shutil.disk_usage(self.folder).free
        return f"needs {decimal(size)}, and {self.folder} has {decimal(free)} free" if size > free else ""

    def _finish_write(self) -> None:
        """Waits until the write under way has ended, well or not. Raises TimeoutError at its deadline."""
        if self._write is not None:
            self._wait_for_write(self._write, self._write.seconds_left)
            if self._write.failed:  # the manager has kept errors, and would raise them in the next write
                self._remove_partial()
                self._manager = self._open_manager()
            self._write = None

    def _wait_for_write(self, write: "_Write", seconds: float) -> None:
        """Waits so long for the end of a write. Raises TimeoutError where its deadline has passed."""
        if write.ended.wait(max(seconds, 0)) or write.seconds_left > 0:
            return
        raise TimeoutError(
            f"the checkpoint of step {write.step} had not been written after {self._deadline:g} s, which is "
            f"train.save_deadline: does the disk of {self.folder} still answer? {self._describe_rest()}"
        )

    def _follow(self, write: "_Write") -> None:
        """Waits for the end of a write in a thread of its own; then says that it has failed, or adds the checksums."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises what its threads have raised
            write.failed = True
            with contextlib.suppress(Exception):
                self._manager.close()  # which waits for the thread that renames the step when all is written
            if not (self.folder / str(write.step)).is_dir():
                if write.seconds_left > 0:  # else the main thread ends the run
                    self._fail(write.step, f"{self.folder} could not be written to: {_summarize(error)}")
                    write.ended.set()
                return
        if self._failure is not None:
            self._say(write.step, "saved", f"the checkpoint of step {write.step} is saved")
            self._failure = None
        self._add_checksums(write)
        write.ended.set()

    def _add_checksums(self, write: "_Write") -> None:
        """Writes the checksums of a step: each process hashes the files that it wrote, and process 0 the others too."""
        folder, index, sums = self.folder / str(write.step), jax.process_index(), None
        with self._warn_of_checksums(write.step):
            sums = checksums.hash_files(
                folder, [name for name in checksums.list_files(folder) if _writer(name) == index]
            )
        with self._warn_of_checksums(write.step):
            every = [json.loads(answer) for answer in hosts.gather_answers(f"{write.name}/sums", json.dumps(sums))]
            if index == 0 and None not in every:
                checksums.write_checksums(folder, {name: pair for part in every for name, pair in part.items()})

    @contextmanager
    def _warn_of_checksums(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            notify(f"warning: the checkpoint of step {step} is saved, but its checksums are not ({error})")

    def _fail(self, step: int, reason: str, size: int = 0) -> None:
        """Notes that a step could not be written, and says so, unless the one before it could not either."""
        if self._failure is None:
            room = f"when there is room, which is looked for every {_RETRY_STEPS} steps, or " if size else ""
            self._say(
                step,
                "not saved",
                f"the checkpoint of step {step} was not saved: {reason}. Training goes on, and the next is tried "
                f"{room}when due; {self._describe_kept()}",
            )
        self._failure = _Failure(step=step, reason=reason, size=size)

    def _say(self, step: int, event: str, text: str) -> None:
        self._events.put((step, event, text))
        if jax.process_index() == 0:
            notify(text)

    def _remove_partial(self) -> None:
        """Deletes what is left of writes that failed or were killed, when none is under way.

        A write that has failed may still go on for a moment in Orbax's threads, which would report that as well.
        """
        if jax.process_index() == 0:
            for path in self.folder.glob(_PARTIAL):
                shutil.rmtree(path, ignore_errors=True)
            for path in self.folder.glob(f"*/{checksums.PARTIAL}"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def restore(self, step: int, params: Abstract, optimizer: Any) -> tuple[Weights, Any, dict]:
        """A step's contents, shaped and placed like the abstract arrays given.

        Raises ValueError where they are damaged, or those of another model or optimizer.
        """
        folder = self.folder / str(step)
        _check_arrays(folder / "params", _nest_dicts(params))
        _check_arrays(folder / "optimizer", _nest_dicts(optimizer))
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
            raise ValueError(
                f"the checkpoint {folder} cannot be restored: {_summarize(error)}; copy that folder again, or move it "
                "away to go on from the step before it"
            ) from error
        return _flatten_dicts(restored["params"]), _flatten_dicts(restored["optimizer"]), restored["loop"]

    def _describe_kept(self) -> str:
        kept = self.latest
        return (
            "no weights are saved yet" if kept is None else f"the newest weights saved are {self.folder}/{kept}/params"
        )

    def _describe_rest(self) -> str:
        """What is left of the run that ends with a step that is not saved, and what the same command does."""
        kept = self._describe_kept()
        return f"{kept[0].upper()}{kept[1:]}; once that is mended, the same command " + (
            "starts from the beginning" if self.latest is None else f"resumes after step {self.latest}"
        )


@dataclass(kw_only=True)
class _Write:
    """A write under way."""

    step: int
    name: str  # under which the processes speak of it
    deadline: float  # seconds that it may take
    started: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)  # well or not
    failed: bool = False  # whether Orbax has raised an error

    @property
    def seconds_left(self) -> float:
        return self.started + self.deadline - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """The newest step that could not be written."""

    step: int
    reason: str
    size: int  # bytes that it needs, where it was not begun as there was no room; else 0


class _Agreement:
    """How the processes learn that one of them could not write its part, in place of Orbax's barriers.

    By those alone, the others would wait for it until the deadline: it does not come to the barrier. It does come to
    the next one, while it handles its error, and there it answers for the barriers that it has left out.
    """

    def __init__(self):
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._name, self._open = "", set[str]()  # barriers of the write under way that this process has not come to

    def begin(self, name: str) -> None:
        """Called before a write is started, which all processes know by this name."""
        self._name, self._open = name, set(_WRITE_BARRIERS)

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all processes have called it with this key. Raises OSError where one of them has failed."""
        barrier = next((barrier for barrier in _WRITE_BARRIERS if barrier in key), "")
        if not barrier:
            if (error := sys.exception()) is not None:
                while self._open:
                    jax_internals.give_answer(f"{self._name}/{self._open.pop()}", _summarize(error))
            self._barrier(key=key, timeout_ms=timeout_ms)
            return
        if barrier not in self._open:
            raise OSError("another part of the write has failed")
        self._open.remove(barrier)
        reasons = hosts.gather_answers(f"{self._name}/{barrier}", "", timeout_ms / 1000)
        if any(reasons):
            raise OSError(next(filter(None, reasons)))


def _read_loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


def make_policies(config: TrainConfig) -> list[PreservationPolicy]:
    """Which steps are kept beside the newest, as the config says."""
    policies: list[PreservationPolicy] = []
    if config.keep_every:
        policies.append(EveryNSteps(config.keep_every))
    if config.keep_best:
        # Orbax keeps the last ones of those that it sorts.
        policies.append(
            BestN(
                get_metric_fn=_read_loss,
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies


def _find_whole_step(folder: Path) -> tuple[int | None, dict[int, str]]:
    """The newest step that is whole, None where there are no steps, and what is wrong with those after it.

    The processes share the work. Raises ValueError where there are steps and none is whole.
    """
    candidates = json.loads(_gather(json.dumps(steps.list_steps(folder)))[0])
    damaged: dict[int, str] = {}
    for step in reversed(candidates):
        path = folder / str(step)
        if not path.is_dir():
            raise ValueError(
                f"{folder} has no step {step}, though process 0 sees it; give a --workdir that all hosts share"
            )
        reasons = _gather(steps.find_damage(path, jax.process_index(), jax.process_count()))
        if not any(reasons):
            return step, damaged
        damaged[step] = next(filter(None, reasons))
    if damaged:
        step, reason = next(iter(damaged.items()))
        others = "none of the earlier ones is whole" if len(damaged) > 1 else "there is none before it"
        raise ValueError(
            f"the checkpoint {folder / str(step)} is damaged: {reason}, and {others}; copy a step again, or move "
            f"{folder} away to start from the beginning"
        )
    return None, {}


def _describe_step(folder: Path, step: int) -> str:
    if steps.has_checksums(folder / str(step)):
        return f"step {step} is as it was written, by its checksums"
    return f"step {step} has no checksums, as its run was killed before they were written; it could be read to its end"


def _set_aside(step: Path) -> str:
    """Renames a damaged step, in process 0, and returns its new name."""
    names = (f"{step.name}.damaged{suffix}" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))
    name = next(name for name in names if not step.with_name(name).exists())
    if jax.process_index() == 0:
        step.rename(step.with_name(name))
    return name


def _gather(answer: str) -> list[str]:
    """The answers of all processes to a question that each of them asks next."""
    return hosts.gather_answers(f"checkpoint {next(_questions)}", answer)


def _summarize(error: BaseException) -> str:
    """What Orbax and TensorStore say in the first line, without the JSON that TensorStore adds."""
    return (str(error) or repr(error)).splitlines()[0].partition(" [")[0].rstrip(".")


def _count_bytes(*trees: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def _writer(name: str) -> int:
    """The process that wrote this file of a step, as Orbax has a folder for each; of the others it is process 0."""
    found = re.search(r"/ocdbt\.process_(\d+)/", name)
    return int(found[1]) if found else 0


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
    """A filter that drops the records of Orbax, which logs each error with its stack trace and then raises it too.

    Where several parts of a write fail, Python reports those that Orbax does not raise.
    """
    ours = "exception was never retrieved" in record.msg or "exception calling callback" in record.msg
    return record.levelno >= logging.CRITICAL or not (ours or "orbax" in Path(record.pathname).parts)


def _chunking(path: str) -> ocp.SaveArgs:
    """How an array is cut into chunks in storage: one layer in each, as converters read them."""
    return (
        ocp.SaveArgs(shard_axes=(0,)) if path.startswith("blocks/") else ocp.SaveArgs(chunk_byte_size=orbax.CHUNK_BYTES)
    )


def _check_arrays(folder: Path, wanted: Any) -> None:
    """Raises ValueError unless these arrays are stored there; a stack of layers may have more of them, or fewer."""
    stored = orbax.Reader(folder).shapes
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(wanted)
    }
    for path in sorted(stored.keys() | leaves.keys()):
        texts = [_describe_array(path, arrays.get(path)) for arrays in (stored, leaves)]
        if texts[0] != texts[1]:
            raise ValueError(
                f"the checkpoint {folder} is not of this run: its {path} is {texts[0]}, and this run's is {texts[1]}; "
                "give that folder the checkpoints of its own run back, or give another --workdir"
            )


def _describe_array(path: str, array: Any) -> str:
    if array is None:
        return "missing"
    shape = ["layers", *array.shape[1:]] if "blocks/" in path else array.shape
    return f"{array.dtype}[{', '.join(map(str, shape))}]"


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
