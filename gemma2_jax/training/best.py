"""The best held-out loss of a run: whether the run still gets better, and the export of the step that had it."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config


class BestLoss:
    """The lowest held-out loss so far, and how many evaluations have passed since.

    Its state goes into every checkpoint, so that a run that resumes counts on from the step it resumes after.
    """

    def __init__(self, patience: int, state: dict[str, Any] | None = None):
        """`patience` is how many evaluations may pass without a better loss; 0: any number."""
        self._patience = patience
        known = state or {"step": 0, "loss": None, "passed": 0}
        self._step, self._loss, self._passed = known["step"], known["loss"], known["passed"]
        self._newest = -1, math.nan  # the step that was evaluated last, and its loss

    def add(self, step: int, loss: float) -> None:
        """Takes the held-out loss of a step. One that is not finite, or just as low as the best, is no better."""
        self._newest = step, loss
        if math.isfinite(loss) and (self._loss is None or loss < self._loss):
            self._step, self._loss, self._passed = step, loss, 0
        else:
            self._passed += 1

    def find_loss(self, step: int) -> float | None:
        """The loss of this step, if it was the last to be evaluated, and is finite."""
        evaluated, loss = self._newest
        return loss if evaluated == step and math.isfinite(loss) else None

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the run ends here."""
        return 0 < self._patience <= self._passed

    def get_state(self) -> dict[str, Any]:
        """What to keep in a checkpoint, as JSON."""
        return {"step": self._step, "loss": self._loss, "passed": self._passed}

    def describe_end(self, step: int) -> str:
        """Why the run ends with this step."""
        best = "none was finite" if self._loss is None else f"the best is {self._loss:.4f}, of step {self._step}"
        return (
            f"the held-out loss has not got better in {self._passed} evaluations ({best}), so the run ends with step "
            f"{step}; more train.patience would go on"
        )


def export_step(config: Config, step: int) -> Path:
    """Writes a step as `train.export_best` says to WORKDIR/best/STEP, and deletes what was exported there of others.

    A process of its own does it, as it computes on the CPU, and process 0 of the run starts it. Raises OSError with
    what that says where the step cannot be exported.
    """
    target = config.output / "best" / str(step)
    with hosts.process_zero_first("export_step"):
        if jax.process_index() == 0 and not target.exists():
            source = config.output / "checkpoints" / str(step)
            command = [
                sys.executable,
                "-m",
                "gemma2_jax.convert",
                str(source),
                str(target),
                "--to",
                config.train.export_best,
            ]
            if config.adapter.kind != "none" and config.train.export_best == "hf":
                command.append("--merge")
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
                raise OSError(f"{source} is saved and could not be exported to {target}: {said}")
            for path in target.parent.iterdir():
                if path != target:
                    shutil.rmtree(path)
    return target
