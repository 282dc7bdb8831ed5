"""The fastest layout of a run on so many GPUs: many are predicted, the best of them compiled, and the rest named.

Each compiled step says how good the prediction for its mesh was, and the next to be compiled is the one that is best
once that is taken into account; what has not been tried is given the benefit of the best that was found. A layout whose
predicted bound lies above the best estimate is left out. Layouts are ranked by the estimate, since the bound knows
nothing of communication that work does not hide, by which layouts differ most.

Compiled plans are kept in the cache folder, so that a search that was cut off goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import gemma2_jax
from gemma2_jax import command_line, config_text
from gemma2_jax.cluster import platforms
from gemma2_jax.config import Config
from gemma2_jax.planning.gpus import Gpu
from gemma2_jax.planning.kept_outputs import choose_kept_outputs, list_candidates
from gemma2_jax.planning.layouts import Layout, Prediction, list_predictions, predict
from gemma2_jax.planning.report import Plan, PlanProcess, read_plan

_PROCESS_BYTES = 4 * 2**30  # memory that compiling one step takes, at most
_MESHES_TRIED = 3  # after which a prediction for another mesh is corrected by what they have shown
_LEAST_SAVED = 0.005  # share of a step's time for which another set of kept outputs is tried


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A layout that was compiled."""

    prediction: Prediction
    plan: Plan


@dataclass(kw_only=True)
class Search:
    """Layouts of one run on so many GPUs: those that are left, those that were compiled, and which is next."""

    config: Config
    gpus: int
    device: Gpu
    left: list[Prediction]
    tried: list[Tried] = field(default_factory=list)
    failed: dict[Layout, str] = field(default_factory=dict)
    taken: set[Layout] = field(default_factory=set)  # those that are, or were, compiled
    pruned: int = 0  # layouts whose predicted bound lies above the best estimate

    @property
    def ranked(self) -> list[Tried]:
        """What fits, the fastest by its estimate first."""
        fitting = [one for one in self.tried if one.plan.fits]
        return sorted(fitting, key=lambda one: (one.plan.estimate.total, one.plan.total))

    def take_next(self) -> Prediction | None:
        """The layout to compile next; None where no other can be the fastest."""
        if best := self.ranked:
            limit = best[0].plan.estimate.total
            kept = [one for one in self.left if one.bound < limit]
            self.pruned += len(self.left) - len(kept)
            self.left = kept
        fitting = [one for one in self.left if one.memory * self._memory_ratio(one) <= self.device.usable_bytes]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda one: one.estimate * self._time_ratio(one))
        self.left.remove(chosen)
        self.taken.add(chosen.layout)
        return chosen

    def add(self, prediction: Prediction, plan: Plan) -> None:
        """Takes a compiled layout, and another set of kept outputs for it where memory is left or lacks."""
        self.tried.append(Tried(prediction=prediction, plan=plan))
        layout = prediction.layout
        if layout.remat not in ("block", "offload"):
            return
        mesh = dataclasses.asdict(layout.mesh)
        taken = self._count_kept(layout)
        kept = choose_kept_outputs(self.config, mesh, max(0, taken + self.device.usable_bytes - plan.total))
        again = predict(self.config, replace(layout, kept_outputs=kept), self.device)
        saved = prediction.estimate - again.estimate
        is_known = again.layout in self.taken | {one.layout for one in self.left}
        if not is_known and (not plan.fits or saved > _LEAST_SAVED * plan.estimate.total):
            self.left.append(again)

    def _count_kept(self, layout: Layout) -> int:
        mesh = dataclasses.asdict(layout.mesh)
        return sum(one.size for one in list_candidates(self.config, mesh) if one.name in layout.kept_outputs)

    def _time_ratio(self, prediction: Prediction) -> float:
        """Compiled over predicted times: of layouts with this mesh, else the least of all.

        Before `_MESHES_TRIED` meshes have been compiled, others are taken at their word.
        """
        ratios = [(one.prediction.layout, one.plan.estimate.total / one.prediction.estimate) for one in self.tried]
        same = [ratio for layout, ratio in ratios if layout.mesh == prediction.layout.mesh]
        if same:
            return sum(same) / len(same)
        enough = len({tuple(dataclasses.astuple(layout.mesh)) for layout, _ in ratios}) >= _MESHES_TRIED
        return min(ratio for _, ratio in ratios) if enough else 1.0

    def _memory_ratio(self, prediction: Prediction) -> float:
        """Compiled over predicted memory of layouts with this mesh and the same remat; 1 without any."""
        layout = prediction.layout
        ratios = [
            one.plan.total / one.prediction.memory
            for one in self.tried
            if (one.prediction.layout.mesh, one.prediction.layout.remat) == (layout.mesh, layout.remat)
        ]
        return sum(ratios) / len(ratios) if ratios else 1.0


def search_layouts(
    config: Config,
    gpus: int,
    device: Gpu,
    limit: int,
    first: Layout | None = None,
    show: Callable[[Search], None] = lambda _: None,
) -> Search:
    """Compiles at most `limit` layouts, several at a time, and calls `show` after each.

    Args:
      first: a layout to compile first, such as the run's own; it does not count.

    Raises:
      ValueError: the run does not divide over so many GPUs, or none of its layouts may fit.
    """
    search = Search(config=config, gpus=gpus, device=device, left=list_predictions(config, gpus, device))
    if not search.left:
        raise ValueError(
            f"no layout of this run over {gpus} x {device.title} can fit: its state alone is too large, or its rows do "
            "not divide over them; use more GPUs, or another train.global_batch_size"
        )
    waiting = [predict(config, first, device)] if first else []
    limit += len(waiting)
    search.left = [one for one in search.left if one.layout != first]
    search.taken |= {one.layout for one in waiting}
    running: dict[Future[Plan], Prediction] = {}
    processes: list[PlanProcess] = []
    with ThreadPoolExecutor(count_workers()) as pool:
        try:
            while True:
                while len(running) < count_workers() and len(search.tried) + len(search.failed) + len(running) < limit:
                    chosen = waiting.pop() if waiting else search.take_next()
                    if chosen is None:
                        break
                    run = chosen.layout.apply(config)
                    running[pool.submit(_plan_kept, run, gpus, device, processes)] = chosen
                if not running:
                    return search
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    _take(search, running.pop(future), future)
                    show(search)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.end()
            raise


def _take(search: Search, prediction: Prediction, future: Future[Plan]) -> None:
    try:
        search.add(prediction, future.result())
    except (ValueError, RuntimeError) as error:
        search.failed[prediction.layout] = str(error)


def count_workers() -> int:
    """Steps that are compiled at a time: one a core, as long as there is memory for them."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), available // _PROCESS_BYTES))


def _plan_kept(config: Config, gpus: int, device: Gpu, processes: list[PlanProcess]) -> Plan:
    """The plan of a run, from the cache folder where it is kept there."""
    path = plan_path(config, gpus, device)
    try:
        return read_plan(json.loads(path.read_text()), config, device)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # it was never made, or by a version that wrote it in another way
    process = PlanProcess(config, gpus, device)
    processes.append(process)
    answer = process.finish()
    plan = read_plan(answer, config, device)
    try:
        command_line.write_whole(path, json.dumps(answer))
    except OSError as error:  # the next search compiles it again
        command_line.notify(f"a plan is not kept: {command_line.describe_error(error)}")
    return plan


def plan_path(config: Config, gpus: int, device: Gpu) -> Path:
    """Where the plan of a run is kept: by all that it depends on."""
    package = Path(gemma2_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    versions = [metadata.version(name) for name in ("jax", "jaxlib")]
    text = config_text.to_text(replace(config, workdir="."))
    digest.update(json.dumps([text, gpus, dataclasses.asdict(device), versions]).encode())
    return platforms.cache_root() / "plans" / f"{digest.hexdigest()[:24]}.json"
