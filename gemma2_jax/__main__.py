"""`python -m gemma2_jax`, or `gemma2-jax` once it is installed: lists the commands, and runs the one that is named.

gemma2-jax train --config 9b_lora       is       python -m gemma2_jax.train --config 9b_lora
"""

import importlib
import sys
from pathlib import Path

from gemma2_jax import command_line

COMMANDS = {
    "train": "pretrain, fine-tune; the same command on the same --workdir resumes",
    "generate": "continue prompts, or answer them, with any checkpoint",
    "chat": "talk with any checkpoint in a terminal",
    "serve": "answer requests of OpenAI's HTTP API with any checkpoint",
    "evaluate": "score any checkpoint on the tasks of lm-evaluation-harness",
    "convert": "convert a checkpoint into any format; inspect one; compare two",
    "data": "print what a data set is; write one as Megatron's .bin and .idx",
    "report": "write a run, or several, as one HTML page with pictures",
    "profile": "say where the time of traced steps went, by scope and by operation",
    "plan": "say whether a step fits on absent GPUs, and how fast it can be",
    "check": "look at a machine before a run is paid for: GPUs, kernels, links",
}
MODULES = {
    "convert": "gemma2_jax.convert.__main__",
    "data": "gemma2_jax.data.__main__",
}  # the others are gemma2_jax.NAME


def main() -> None:
    """Runs the command that the first argument names, with the others; without one, lists the commands."""
    program = "gemma2-jax" if Path(sys.argv[0]).name == "gemma2-jax" else "python -m gemma2_jax"
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:10} {summary}" for command, summary in COMMANDS.items()]
        return command_line.print_commands(program, lines)
    if name not in COMMANDS:
        near = command_line.suggest(name, COMMANDS) or "."
        command_line.exit_usage(f"there is no command {name}{near} There are {', '.join(COMMANDS)}", program)
    program = f"{program} {name}"
    sys.argv = [program, *arguments]
    importlib.import_module(MODULES.get(name, f"gemma2_jax.{name}")).main(program)


if __name__ == "__main__":
    main()
