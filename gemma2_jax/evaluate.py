"""`python -m gemma2_jax.evaluate --checkpoint PATH --tasks NAME`: lm-evaluation-harness. The command line only.

It opens the checkpoint (`convert`), and hands its model (`inference.harness`) to the harness, whose tasks, metrics and
table these are. Nothing here imports JAX or the harness before the arguments are understood, so that `--help` and
mistakes answer at once.
"""

import glob
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gemma2_jax import command_line
from gemma2_jax.cluster import platforms
from gemma2_jax.inference.source import Source, load_source, open_source


@dataclass(frozen=True, kw_only=True)
class Command:
    """Evaluates a checkpoint with lm-evaluation-harness, and prints its table."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    tasks: tuple[str, ...]  # names that lm_eval has, such as arc_easy, and files (.yaml) or folders of them
    limit: float | None = None  # so many examples of each task, or below 1 that share of them; None: all
    num_fewshot: int | None = None  # examples that each prompt begins with; None: as many as the task says
    chat: bool = False  # write prompts as the tokenizer's chat template does
    batch_tokens: int = 8192  # tokens that are scored in one pass, with padding
    out: Path | None = None  # the file that lm_eval's results are written to, as JSON

    def __post_init__(self) -> None:
        if not all(self.tasks) or not self.tasks:
            raise ValueError("tasks has an empty name; name a task, such as arc_easy, or a file")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit is {self.limit:g}; it must be above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot is {self.num_fewshot}; it must be at least 0")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")
        if self.out is not None and self.out.is_dir():
            raise ValueError(f"out is {self.out}, a folder; name a file")
        if self.out is not None and not self.out.parent.is_dir():
            raise ValueError(f"there is no folder {self.out.parent}; make it, or name another file (--out)")


def main(program: str = "python -m gemma2_jax.evaluate") -> None:
    """Parses, loads, evaluates; exits with a sentence where that cannot be done."""
    command = command_line.parse(Command, sys.argv[1:], program)
    platforms.prepare_process()
    with command_line.exit_with_sentence():
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("an evaluation needs lm-evaluation-harness: pip install 'gemma2-jax[eval]'")
        platforms.check_platform()
        results = _evaluate(command)
        _print_tables(results)
        if command.out:
            _write_results(results, command.out)


def _evaluate(command: Command) -> dict[str, Any]:
    checkpoint, tokenizer = open_source(command.source)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm_eval forks for some standard errors, which JAX's threads do not survive
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.evaluator import simple_evaluate
    from yaml import YAMLError

    from gemma2_jax.inference.defaults import stop_tokens
    from gemma2_jax.inference.harness import HarnessModel

    config = EvaluatorConfig(tasks=[*_list_tasks(command.tasks)])
    try:
        manager = config.process_tasks()  # before the work that takes long
    except ValueError as error:
        raise ValueError(f"{error}; `lm-eval ls tasks` lists the names, and files end with .yaml") from error
    except (YAMLError, ImportError, AttributeError) as error:  # of a file, or of a function that it names
        raise ValueError(f"a file of the tasks cannot be read: {' '.join(str(error).split())}; mend it") from error
    if not config.tasks:
        raise ValueError(f"there is no task (.yaml) in {' '.join(command.tasks)}; name another folder, or a file")
    model = HarnessModel(
        load_source(command.source, checkpoint),
        tokenizer,
        stop=stop_tokens(checkpoint, tokenizer, chat=command.chat),
        batch_tokens=command.batch_tokens,
    )
    no_torch: dict[str, Any] = {"torch_random_seed": None}  # nothing here draws with torch, which would be imported
    results: Any = simple_evaluate(
        model,
        tasks=[*config.tasks],
        task_manager=manager,
        num_fewshot=command.num_fewshot,
        limit=command.limit,
        apply_chat_template=command.chat,
        log_samples=False,
        **no_torch,
    )
    assert results  # those of the one process
    results["config"] |= {"model": "gemma2_jax", "model_args": {"checkpoint": str(checkpoint.path)}}
    return results


def _list_tasks(names: Sequence[str]) -> Iterator[str]:
    """Names of tasks and files, those of a folder in its place: the harness takes a folder that is alone."""
    for name in names:
        files = sorted(Path(name).glob("*.yaml")) if Path(name).is_dir() else []
        yield from [glob.escape(str(file)) for file in files] or [name]


def _print_tables(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def _write_results(results: dict[str, Any], path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
    command_line.write_whole(path, text + "\n")


if __name__ == "__main__":
    main()
