"""`python -m gemma2_jax`, or `gemma2-jax` once it is installed: lists the commands, and runs the one that is named.

gemma2-jax train --config 9b_lora       is       python -m gemma2_jax.train --config 9b_lora
"""

import difflib
import importlib
import sys

COMMANDS = {
    "train": "pretrain or fine-tune; the same command on the same --workdir resumes",
    "generate": "continue prompts, or answer them, with any checkpoint",
    "convert": "convert a checkpoint into any other format; inspect one; compare two",
    "plan": "say whether a training step fits on so many H100s, without having any",
}
MODULES = {"convert": "gemma2_jax.convert.__main__"}  # the others are gemma2_jax.NAME


def main() -> None:
    """Runs the command that the first argument names, with the others; without one, lists the commands."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:10} {summary}" for command, summary in COMMANDS.items()]
        print("usage: gemma2-jax COMMAND [OPTIONS]\n", *lines, "\nEach command has a --help.", sep="\n")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.exit(f"error: there is no command {name}; {hint}There are {', '.join(COMMANDS)}")
    sys.argv = [f"gemma2-jax {name}", *arguments]
    importlib.import_module(MODULES.get(name, f"gemma2_jax.{name}")).main()


if __name__ == "__main__":
    main()
