"""What to change where a planned step does not fit: the smallest changes with which it does, each of them compiled.

`training.smaller_steps` says which changes there are; here their steps are compiled for the GPUs of the plan, and their
estimates say what they cost. `described_cluster.prepare_jax` must be called before JAX is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2_jax.planning.compiled_step import compile_step, make_program
from gemma2_jax.planning.report import Plan, summarize_step
from gemma2_jax.training.smaller_steps import LargeStep, find_changes, list_changes

if TYPE_CHECKING:
    from gemma2_jax.training.smaller_steps import Change

MOST_GPUS = 16


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Options that make a smaller step of the same run, and the plan of it."""

    options: tuple[str, ...]  # in place of those of the same names
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """The options, and what one would choose by."""
        time = self.plan.estimate
        return {
            "options": self.options,
            "gpus": self.plan.gpus,
            "mesh": self.plan.mesh,
            "total": self.plan.total,
            "fits": self.plan.fits,
            "estimated_seconds": time.total,
            "estimated_gpu_hours": self.plan.gpu_hours(time),
        }


def advise(plan: Plan, report: Callable[[str], None]) -> tuple[Advice, ...]:
    """Smaller steps of the same run on as many GPUs, or on up to `MOST_GPUS`: those that fit first, cheapest first.

    At most four are compiled, of which those that do not fit are of use where none does. Nothing is done for a plan
    that fits.

    Args:
      plan: of a step that does not fit.
      report: is called with a sentence before each is compiled.
    """
    if plan.fits:
        return ()

    def make(config, gpus):
        return make_program(config, gpus, plan.device)

    compiled: dict[Change, Advice] = {}

    def measure(change: Change) -> int:
        options = change.list_options(plan.config)
        if change.devices != plan.gpus:
            options = (f"--gpus {change.devices}", *options)
        report(f"it does not fit; compiling it with {' '.join(options)}")
        smaller = summarize_step(compile_step(change.config, change.devices, plan.device))
        compiled[change] = Advice(options=options, plan=smaller)
        return smaller.total

    step = LargeStep(
        program=make(plan.config, plan.gpus),
        temporaries=plan.memory["temporaries"],
        limit=plan.device.usable_bytes,
        devices_per_host=plan.device.gpus_per_host,
    )
    find_changes(step, list_changes(step, ("fsdp", "tensor"), MOST_GPUS), make, measure)
    return tuple(sorted(compiled.values(), key=_rank))


def _rank(advice: Advice) -> tuple[bool, float]:
    return not advice.plan.fits, advice.plan.gpu_hours(advice.plan.estimate)
