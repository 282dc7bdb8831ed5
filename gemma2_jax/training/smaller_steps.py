"""Changes of a run that make its step smaller, and the search for the smallest of them with which it fits.

The run stays the same: its rows, their length, the precision and the steps. A change has a smaller micro batch, keeps
less for the backward pass, or divides the weights over more devices. How much a change saves is guessed from sizes, and
the guess only says what to compile first: what is found was compiled. The planner compiles for described GPUs, and
`training.fit` for the devices at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from gemma2_jax.config import ComputeConfig, Config, MeshConfig

if TYPE_CHECKING:
    from gemma2_jax.training.step import Program

MOST_COMPILED = 4
ENOUGH_FOUND = 3
_HOPELESS = 1.5  # times the memory that there is; what is guessed to need more is not compiled
_GRADIENT_BYTES = 4  # gradients of all micro batches are added up in float32

type Axis = Literal["", "fsdp", "tensor"]


class LargeStepError(ValueError):
    """The step of a run needs more memory than its devices have."""

    def __init__(self, message: str, device_kind: str, count: int):
        super().__init__(message)
        self.device_kind, self.count = device_kind, count


@dataclass(frozen=True, kw_only=True)
class Change:
    """The same run with a smaller step."""

    config: Config
    devices: int
    axis: Axis  # that takes the devices of `data`, and those that are added; empty: the mesh is as it was
    micro: int  # how many divisors down the micro batch is
    recomputed: int  # how many levels less is kept for the backward pass

    def is_part_of(self, other: Change) -> bool:
        """Whether the other change makes all these changes, and more."""
        return (
            self.axis in ("", other.axis)
            and self.devices <= other.devices
            and self.micro <= other.micro
            and self.recomputed <= other.recomputed
        )

    def list_options(self, before: Config) -> tuple[str, ...]:
        """The options that make it of the run as it was."""
        groups = {
            "train": ("micro_batch_size",),
            "compute": ("remat", "kept_outputs"),
            "mesh": tuple(asdict(before.mesh)),
        }
        options = []
        for group, names in groups.items():
            for name in names:
                value = getattr(getattr(self.config, group), name)
                if value != getattr(getattr(before, group), name):
                    text = " ".join(value) if isinstance(value, tuple) else str(value)
                    options.append(f"--{group}.{name} {text}".rstrip())
        return tuple(options)

    @property
    def _order(self) -> tuple:
        """What is tried first: few kinds of changes, on few devices."""
        kinds = bool(self.axis) + bool(self.micro) + bool(self.recomputed)
        return kinds, self.devices, self.axis, self.micro + self.recomputed, self.micro


@dataclass(frozen=True, kw_only=True)
class LargeStep:
    """A compiled step that needs more memory than there is."""

    program: Program
    temporaries: int  # bytes on one device
    limit: int  # bytes that one device has
    devices_per_host: int


def argument_bytes(program: Program) -> dict[str, int]:
    """Bytes of each kind of argument on one device, by the kind's name; kinds without any are left out."""
    state = program.state
    kinds = {
        "trained weights": state.params,
        "optimizer": state.optimizer,
        "frozen weights": state.frozen,
        "batch": program.batch,
    }
    return {name: size for name, tree in kinds.items() if (size := _shard_bytes(tree))}


def find_changes(
    step: LargeStep,
    changes: Iterator[Change],
    make_program: Callable[[Config, int], Program],
    measure: Callable[[Change], int],
) -> dict[Change, int]:
    """The bytes on one device that changes of a step need. Those of at most `limit` fit, and no part of them would do.

    Args:
      step: as it is.
      changes: from `list_changes`.
      make_program: the program of a config on so many devices; ValueError where it does not divide over them.
      measure: compiles the step of a change, and returns the bytes that it needs on one device.
    """
    pending = _guess_sizes(step, changes, make_program)
    measured: dict[Change, int] = {}
    errors = {False: 1.0, True: 1.0}  # measured over guessed, at most so far, by whether more is recomputed
    while len(measured) < MOST_COMPILED:
        found = [change for change, size in measured.items() if size <= step.limit]
        failed = [change for change in measured if change not in found]
        pending = {
            change: guess
            for change, guess in pending.items()
            if not any(part.is_part_of(change) for part in found) and not any(map(change.is_part_of, failed))
        }
        likely = {change: guess * errors[change.recomputed > 0] for change, guess in pending.items()}
        promising = [change for change, size in likely.items() if size <= step.limit]
        if not promising and not found:
            promising = [change for change, size in likely.items() if size <= _HOPELESS * step.limit]
            promising = sorted(promising, key=likely.__getitem__)[:1]
        if not promising or len(found) == ENOUGH_FOUND:
            break
        change = min(promising, key=lambda change: change._order)
        measured[change] = measure(change)
        kind = change.recomputed > 0
        errors[kind] = max(errors[kind], measured[change] / pending[change])
    return measured


def list_changes(step: LargeStep, axes: tuple[Axis, ...], most_devices: int) -> Iterator[Change]:
    """Every change of a step, on its devices and on twice, four times... as many up to `most_devices`.

    `axes` are those of the mesh that may take more devices than they have. Some changes may not divide the run.
    """
    config, mesh = step.program.config, step.program.mesh
    for devices, axis, places in _list_places(config.mesh, mesh.shape, axes, most_devices, step.devices_per_host):
        for micro, rows in enumerate(list_divisors(config.train.micro_batch_size)):
            for recomputed, compute in enumerate(_list_recomputations(config.compute)):
                if micro or recomputed or axis:
                    train = replace(config.train, micro_batch_size=rows)
                    changed = replace(config, train=train, compute=compute, mesh=places)
                    yield Change(config=changed, devices=devices, axis=axis, micro=micro, recomputed=recomputed)


def list_divisors(number: int) -> list[int]:
    """The divisors of a number, largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _list_recomputations(compute: ComputeConfig) -> list[ComputeConfig]:
    """What is kept for the backward pass, and less and less of it."""
    kinds = [compute]
    if compute.remat in ("none", "dots") or compute.kept_outputs:
        remat = "offload" if compute.remat == "offload" else "block"
        kinds.append(replace(compute, remat=remat, kept_outputs=()))
    if compute.remat != "offload":
        kinds.append(replace(compute, remat="offload", kept_outputs=()))
    return kinds


def _list_places(
    config: MeshConfig, sizes: Mapping[str, int], axes: tuple[Axis, ...], most_devices: int, devices_per_host: int
) -> Iterator[tuple[int, Axis, MeshConfig]]:
    """The mesh as it is, with the devices of `data` on another axis, and with more devices there."""
    devices = math.prod(sizes.values())
    yield devices, "", config
    divided = devices // sizes["data"] // sizes["stage"]  # over which a layer is divided
    factors = [factor for factor in range(2, sizes["data"] + 1) if sizes["data"] % factor == 0]
    inside = [factor for factor in factors if divided * factor <= devices_per_host]
    for axis in axes:
        for factor in inside[-1:] or factors[:1]:
            yield devices, axis, _move_data(config, sizes, axis, factor, factor)
    more = 2 ** (devices.bit_length())  # the next power of two
    while more <= most_devices:
        if more % devices == 0:
            yield more, "fsdp", _move_data(config, sizes, "fsdp", sizes["data"], sizes["data"] * (more // devices))
        more *= 2


def _move_data(config: MeshConfig, sizes: Mapping[str, int], axis: Axis, removed: int, added: int) -> MeshConfig:
    """The mesh with `data` divided by `removed`, and another axis times `added`. Sizes that need no option stay."""
    data = config.data if config.data == -1 else sizes["data"] // removed
    fixed = {name: sizes[name] for name, size in asdict(config).items() if size == -1 and name != "data"}
    return replace(config, **fixed | {"data": data, axis: sizes[axis] * added})


def _guess_sizes(
    step: LargeStep, changes: Iterator[Change], make_program: Callable[[Config, int], Program]
) -> dict[Change, float]:
    """The bytes that changes may need on one device, without those that divide nothing or whose state alone is more."""
    from gemma2_jax.mesh import check_mesh

    programs: dict[MeshConfig, Program | None] = {}
    guesses = {}
    for change in changes:
        config = change.config
        if config.mesh not in programs:  # the state is the same for all changes on this mesh
            smallest = replace(config, train=replace(config.train, micro_batch_size=1))
            try:
                programs[config.mesh] = make_program(smallest, change.devices)
            except ValueError:
                programs[config.mesh] = None
        program = programs[config.mesh]
        if program is None:
            continue
        try:
            check_mesh(config, program.mesh)
        except ValueError:
            continue
        fixed = sum(argument_bytes(program).values()) + _gradient_bytes(program)
        if fixed <= step.limit:
            guesses[change] = fixed + _guess_activations(step, config, program.mesh.shape)
    return guesses


def _guess_activations(step: LargeStep, config: Config, mesh: Mapping[str, int]) -> float:
    """Bytes of temporaries beside gradients, if all grow with the tokens of a pass on one device."""
    before, sizes = step.program.config, step.program.mesh.shape
    now = max(0, step.temporaries - _gradient_bytes(step.program))
    inputs = min(now, _input_bytes(before, sizes))
    kept = now - inputs if before.compute.remat in ("none", "dots") or before.compute.kept_outputs else 0
    if config.compute != before.compute:
        # All that a block makes still exists for one block at a time, and the gradients of it.
        now -= kept * max(0.0, 1 - 2 / before.model.layers)
        if config.compute.remat == "offload" != before.compute.remat:
            now -= inputs
    return now * _tokens(config, mesh) / _tokens(before, sizes)


def _tokens(config: Config, mesh: Mapping[str, int]) -> float:
    """Tokens of a pass whose activations one device has."""
    return config.train.micro_batch_size * config.train.sequence_length / mesh["context"] / mesh["tensor"]


def _input_bytes(config: Config, mesh: Mapping[str, int]) -> int:
    """Bytes of the inputs of all blocks of a stage in all passes that are live there."""
    stages = mesh["stage"]
    blocks = -(-config.model.layers // stages) * (2 * stages - 1)
    size = 2 if config.compute.dtype == "bfloat16" else 4
    return round(blocks * _tokens(config, mesh) * config.model.width * size)


def _gradient_bytes(program: Program) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in program.params.values()) * _GRADIENT_BYTES


def _shard_bytes(tree) -> int:
    import jax

    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
