"""Training that is killed with SIGKILL at random moments and started again, on this CPU: what is lost, what differs.

    python -m benchmarks.kills_training [--kills 100] [--recipes tiny_sft,tiny_lora] [--seed 0]

Small runs of full fine-tuning and of LoRA save every few steps, evaluate, make samples, and keep the best steps beside
the newest, so that steps are deleted as well. Each run is killed again and again, as a whole process group, and started
again by the same command. Before each start a kind of moment is drawn: while data is tokenized, programs are compiled
or weights read, at a batch or a step, in an evaluation or samples, at the start of a save or while it is written in the
background. The kill comes a random time after such a moment.

When a run has taken its last step, its weights and its optimizer are compared, bit by bit, with those of a run that
nothing disturbed, and so are the losses of all its steps. Lost by a kill are the steps that had ended and are taken
again.
"""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.options import make_parser

STEPS, SAVE_EVERY, EVAL_EVERY = 120, 10, 10


@dataclass(frozen=True)
class Moment:
    """When a kill comes: after one of the first `times` of a kind has begun, within so many seconds."""

    seconds: float
    times: int = 1


MOMENTS = {
    "start": Moment(3.0), "tokenization": Moment(1.0), "compilation": Moment(1.5), "restoring": Moment(0.4),
    "batch": Moment(0.02, 25), "dispatch": Moment(0.05, 25), "step": Moment(0.05, 25), "evaluation": Moment(0.05, 2),
    "samples": Moment(0.01, 2), "checkpoint": Moment(0.02, 2), "background write": Moment(0.3, 2),
}  # fmt: skip
RECIPES = {"tiny_sft": "full", "tiny_lora": "LoRA"}


def train(log: Path, arguments: list[str]) -> None:
    """Trains as `python -m gemma2_jax.train` does, and writes down what it is doing."""
    from gemma2_jax.cluster import platforms

    platforms.prepare_process()
    from gemma2_jax.training import checkpoint, loop, resume, watchdog

    def say(moment: str, step: int = -1) -> None:
        with log.open("a") as file:
            file.write(f"{moment},{step}\n")

    def announce(owner: object, name: str, moment: str, after: str = "") -> None:
        function = getattr(owner, name)

        def announced(*given, **named):
            say(moment)
            result = function(*given, **named)
            if after:
                say(after)
            return result

        setattr(owner, name, announced)

    begin = watchdog.Watchdog.begin

    def begin_and_say(self: watchdog.Watchdog, kind: watchdog.Kind, step: int, count: int = 1) -> None:
        say(kind, step)
        begin(self, kind, step, count)

    say("start")
    announce(loop, "open_data", "tokenization")
    announce(loop, "compile_step", "compilation")
    announce(resume, "start_state", "restoring")
    announce(checkpoint.Checkpoints, "_follow", "background write", "written")
    watchdog.Watchdog.begin = begin_and_say
    sys.argv = ["gemma2_jax.train", *arguments]
    runpy.run_module("gemma2_jax.train", run_name="__main__")


def write_texts(path: Path, megabytes: float, seed: int) -> None:
    numbers = random.Random(seed)
    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            words = " ".join(str(numbers.randrange(100)) for _ in range(numbers.randrange(5, 60)))
            file.write(json.dumps({"text": words}) + "\n")


def start(recipe: str, folder: Path, data: Path, log: Path) -> subprocess.Popen:
    """The command that is killed, and that resumes."""
    options = [
        "--config", recipe, f"workdir={folder / 'run'}", "init=", f"data.train={data / 'train.jsonl'}",
        f"data.eval={data / 'eval.jsonl'}", "data.kind=text", f"data.cache={folder / 'cache'}",
        "data.tokenizer=assets/tiny-gemma2", f"steps={STEPS}",
        "model.layers=2", "model.width=48", "model.mlp_width=128", "train.sequence_length=64",
        "train.global_batch_size=8", "train.micro_batch_size=4", f"train.checkpoint_every={SAVE_EVERY}",
        f"train.eval_every={EVAL_EVERY}", "train.eval_batches=16", "train.log_every=1", "train.keep_checkpoints=1",
        "train.keep_best=1", "sample.tokens=8", "sample.prompts=1 2 3", "train.export_adapter=False",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kills_training", "--train", str(log), *options],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_log(log: Path) -> list[tuple[str, int]]:
    """What the process said that it was doing, with the step where there is one."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(kind, int(step)) for kind, _, step in (line.partition(",") for line in lines if line[-1:].isdigit())]


def read_arrays(step: Path) -> Iterator[tuple[str, bytes]]:
    """The arrays of a checkpoint, those of the optimizer too."""
    from gemma2_jax.convert.files import orbax

    for item in ("params", "optimizer"):
        reader = orbax.Reader(step / item)
        for name, array in reader.shapes.items():
            yield f"{item}/{name}", reader.read(name, tuple(slice(None) for _ in array.shape)).tobytes()


def read_losses(run: Path) -> list[tuple[int, str, float]]:
    """Step, kind and value of each loss in metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], name, line[name]) for line in lines for name in ("loss", "eval_loss") if name in line]


@dataclass(frozen=True)
class Kill:
    """One start that was killed."""

    hit: str  # what the process was doing
    ended: int  # the last step that had ended; 0 if none had in this start
    writing: bool  # whether a checkpoint was being written in the background
    lost: int = 0  # steps that had ended in this start and were taken again


@dataclass
class Runs:
    """Runs of one recipe, killed so many times in all."""

    recipe: str
    folder: Path
    data: Path
    random: random.Random
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    def undisturbed(self) -> Path:
        folder = self.folder / "undisturbed"
        folder.mkdir(parents=True)
        process = start(self.recipe, folder, self.data, folder / "log")
        output = process.communicate()[0]
        assert process.returncode == 0, output
        return folder / "run"

    def kill(self, count: int, expected: Path) -> None:
        """Trains until there have been so many kills, and each run that was begun is finished."""
        arrays, losses = dict(read_arrays(expected / "checkpoints" / str(STEPS))), read_losses(expected)
        while len(self.kills) < count:
            folder = self.folder / f"run-{self.runs}"
            folder.mkdir()
            pending: list[Kill] = []  # since which no step was taken
            while True:
                log = folder / f"log-{len(self.kills) + len(pending)}"
                kill = self._disturb(folder, log, last=len(self.kills) + len(pending) >= count)
                first = next((step for kind, step in read_log(log) if kind == "batch"), None)
                if first is not None:
                    self.kills += [replace(kill, lost=max(0, kill.ended - first + 1)) for kill in pending]
                    pending = []
                if kill is None:
                    break
                pending.append(kill)
            self.kills += pending  # of a run that had taken its last step
            self.runs += 1
            found = dict(read_arrays(folder / "run/checkpoints" / str(STEPS)))
            self.differences += [name for name in arrays.keys() | found.keys() if arrays.get(name) != found.get(name)]
            self.differences += ["metrics.jsonl"] * (read_losses(folder / "run") != losses)
            shutil.rmtree(folder)

    def _disturb(self, folder: Path, log: Path, *, last: bool) -> Kill | None:
        """One start, which is killed unless it is the last or has ended before; then None, as the run is finished."""
        moment = self.random.choice([*MOMENTS])
        if moment == "tokenization":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        times = self.random.randint(1, MOMENTS[moment].times)
        delay = self.random.uniform(0, MOMENTS[moment].seconds)
        process, due = start(self.recipe, folder, self.data, log), None
        while process.poll() is None and (last or due is None or time.monotonic() < due):
            if due is None and sum(kind == moment for kind, _ in read_log(log)) >= times:
                due = time.monotonic() + delay
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        if process.returncode == 0:
            return None
        assert process.returncode == -signal.SIGKILL, output
        doing = read_log(log)
        hit = next((kind for kind, _ in reversed(doing) if kind not in ("background write", "written")), "start")
        writes = Counter(kind for kind, _ in doing if kind in ("background write", "written"))
        return Kill(
            hit=hit,
            ended=max([0, *(step - 1 for kind, step in doing if kind == "batch")]),
            writing=writes["background write"] > writes["written"],
        )


def main() -> None:
    parser = make_parser("kills_training", __doc__)
    parser.add_argument("--kills", type=int, default=100, help="of all runs, shared by the recipes")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="tiny_sft, tiny_lora, or both with a comma")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    if sys.argv[1:2] == ["--train"]:  # LOG and the options of training, which this benchmark starts
        train(Path(sys.argv[2]), sys.argv[3:])
        return
    options = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    from gemma2_jax.cluster import platforms

    platforms.prepare_process(cpu=True)
    console, recipes = Console(width=120), options.recipes.split(",")
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as name:
            data = Path(name)
            write_texts(data / "train.jsonl", 4, options.seed)
            write_texts(data / "eval.jsonl", 0.05, options.seed + 1)
            runs = Runs(recipe=recipe, folder=data / recipe, data=data, random=random.Random(options.seed))
            began = time.monotonic()
            runs.kill(options.kills // len(recipes), runs.undisturbed())
        table = Table(title=f"{recipe} ({RECIPES[recipe]}), {STEPS} steps, saved every {SAVE_EVERY}")
        for column in ("killed at", "kills", "while a checkpoint was written", "steps lost, median", "most"):
            table.add_column(column, justify="left" if column == "killed at" else "right")
        by_hit: dict[str, list[Kill]] = defaultdict(list)
        for kill in runs.kills:
            by_hit[kill.hit].append(kill)
        for hit in [moment for moment in MOMENTS if moment in by_hit]:
            lost = sorted(kill.lost for kill in by_hit[hit])
            writing = sum(kill.writing for kill in by_hit[hit])
            table.add_row(hit, str(len(lost)), str(writing), str(lost[len(lost) // 2]), str(lost[-1]))
        console.print(table)
        verdict = f"differ: {sorted(set(runs.differences))}" if runs.differences else "are the same, bit for bit"
        most = {writing: max([0, *(k.lost for k in runs.kills if k.writing is writing)]) for writing in (False, True)}
        console.print(
            f"{len(runs.kills)} kills in {runs.runs} runs, {time.monotonic() - began:.0f} s; weights, optimizer and "
            f"losses of their last steps and of the undisturbed run {verdict}; at most {most[False]} steps lost by "
            f"a kill, {most[True]} while a checkpoint was being written, which counts when it is whole"
        )


if __name__ == "__main__":
    main()
