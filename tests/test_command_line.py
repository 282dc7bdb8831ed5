"""What the commands say of arguments that they do not understand: one sentence, alike for all of them."""

import contextlib
import errno
import os
import re
import signal
import sys

import pytest
import tyro

from gemma2_jax import __main__ as commands, command_line

RECIPES = "There are 27b_dora, 27b_lora, "


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What `gemma2-jax` with these arguments says on standard error as it ends with status 2."""

    def run(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/gemma2-jax", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        output, error = capsys.readouterr()
        assert ended.value.code == 2 and not output
        return error

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("tran", "there is no command tran; did you mean train? There are train, generate, chat, serve, evaluate, "
         "convert, data, report, profile, plan, check."),
        ("train --config tiny_lora --nonsense x", "there is no option --nonsense."),
        ("train --config tiny_lora --optim.lrr 3", "there is no option --optim.lrr; did you mean --optim.lr or "
         "--optim.min-lr?"),
        ("train --config tiny_lora optim.warmup_step=3", "there is no option --optim.warmup-step; did you mean "
         "--optim.warmup-steps?"),
        ("train --config tiny_lora --seed 3", "there is no option --seed; did you mean --data.seed or --train.seed?"),
        ("train --config tiny_lora --data.trian x", "there is no option --data.trian; did you mean --data.train or "
         "--data.stream?"),
        ("train --config tiny_lora --data.format csv", "there is no option --data.format."),
        ("train --config tiny_lora --data.packing maybe", "--data.packing is 'maybe'. It may be True or False."),
        ("train --config tiny_lora --data.kind instruction", "--data.kind is 'instruction'; did you mean "
         "instructions? It may be text or instructions."),
        ("train --config tiny_lora --data.eval-fraction 2", "data.eval_fraction is 2.0; it must be at least 0 and "
         "below 1."),
        ("train --config tiny_lora --optim.lr three", "--optim.lr is 'three'; it must be a number."),
        ("generate --checkpoint a --max-new-tokens 1.5", "--max-new-tokens is '1.5'; it must be a whole number."),
        ("generate --checkpoint a --top-k five", "--top-k is 'five'; it must be a whole number."),
        ("generate --checkpoint a --logit-bias 42", "--logit-bias is '42'; it must be [INT FLOAT [INT FLOAT ...]]."),
        ("generate --checkpoint a --temp 1", "there is no option --temp; did you mean --temperature?"),
        ("train --config tiny_lora --steps", "--steps INT lacks its value."),
        ("train --config tiny_lora --steps 0", "steps is 0; it must be at least 1 and below 2**31."),
        ("train --config tiny_lora wrong", "wrong is not an option, nor the value of one."),
        ("train tiny_lra", f"tiny_lra is not an option: a recipe is given as --config NAME; did you mean tiny_lora? "
         f"{RECIPES}"),
        ("train --config tiny_lra", f"there is no recipe 'tiny_lra'; did you mean tiny_lora? {RECIPES}"),
        ("train --config tiny_lora --config=2b_lora", "--config is given 2 times, as tiny_lora and 2b_lora; give one "
         "of them."),
        ("plan --config tiny_lora --gpu 3", "there is no option --gpu; did you mean --gpus?"),
        ("generate", "--checkpoint STR must be given."),
        ("generate --checkpoint a --promt b", "there is no option --promt; did you mean --prompt or --prompts?"),
        ("generate --checkpoint a --prompts b", "prompts is given, and out is not."),
        ("generate --checkpoint a --prompts b --out c --prompt d", "prompts and prompt are both given."),
        ("generate --checkpoint a --prompts b --out ./b", "prompts and out are both ./b; name another file for the "
         "answers."),
        ("generate --checkpoint a --out b", "out is given, and prompts, which it is for, is not."),
        ("generate --checkpoint a --samples 2", "samples is 2, and at temperature 0 all of them are alike; set a "
         "temperature, as 1."),
        ("generate --checkpoint a --stop=", "stop is ('',); give strings that are not empty."),
        ("generate --checkpoint a --top-p 2", "top_p is 2.0; it must be above 0 and at most 1, or unset."),
        ("profile", "RUN must be given."),
        ("convert --nonsense x", "there is no option --nonsense."),
        ("convert nspect x", "there is no command nspect, nor a folder of that name; did you mean inspect?"),
        ("convert a b", "--to {orbax,hf,"),
        ("convert a b --to hff", "--to is 'hff'; did you mean hf? It may be orbax or hf or "),
        ("convert a b c --to hf", "c is not an option, nor the value of one."),
        ("convert inspect", "PATH must be given."),
        ("convert verify a b --atol nan", "atol is nan; it must be a finite number of at least 0."),
        ("convert verify a b --atol=-1", "atol is -1.0; it must be a finite number of at least 0."),
        ("convert verify a b --hf-config=", "hf_config is empty; name a folder ('.' is the current one)."),
        ("generate --checkpoint=", "checkpoint is empty; name a folder ('.' is the current one)."),
        ("train --config tiny_lora --workdir=", "workdir is empty; name the folder to write to ('.' is the current "
         "one)."),
        ("train --config tiny_lora --steps 1 steps=2", "--steps is given 2 times; give it once."),
        ("train --config= --config tiny_lora", "--config is given 2 times, as nothing and tiny_lora; give "
         "one of them."),
        ("generate --checkpoint a --prompt b --prompt c --top-k 1 --top_k=2", "--top-k is given 2 times; give it "
         "once."),
        ("train --config tiny_lora --mesh.data 0", "mesh data 0 x "),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, said, refusal):
    error = refusal(arguments)
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    command, subcommand = [*arguments.split(), ""][:2]
    program = {"tran": "", "convert": " convert"}.get(command, f" {command}")
    program += f" {subcommand}" if subcommand in ("inspect", "verify") else ""
    assert error.endswith(f" gemma2-jax{program} --help lists the options\n")


def test_a_terminal_cuts_lines_between_words(refusal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    piped = refusal("train")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = refusal("train").splitlines()
    assert max(map(len, lines)) <= 60 and " ".join(lines) + "\n" == piped


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a\x1b[31m\nerror: b\udcff"), r"error: a\x1b[31m\nerror: b\udcff"),
        (ValueError("x" * 10**6), "error: " + "x" * 4993 + " ... " + "x" * 5000),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "error: f cannot be used (Permission denied); have "
         "its owner give you the right to (chmod), or copy it to where you have it"),
        (OSError(errno.EIO, "Input/output error", "f"), "error: f cannot be used (Input/output error); mend that, and "
         "give the same command again"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: standard input or output cannot be used (No space "
         "left on device); redirect it to somewhere else"),
        (OSError("f could not be written"), "error: f could not be written"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_commands_no_terminal(error, said):
    with pytest.raises(SystemExit) as ended:
        command_line.exit_error(error)
    assert ended.value.code == said


@pytest.mark.parametrize("called", ["/usr/bin/gemma2-jax", "/a/gemma2_jax/__main__.py"])
def test_help_names_the_program_as_it_was_called(called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called, "convert", "inspect", "--help"])
    with pytest.raises(SystemExit):
        commands.main()
    program = "gemma2-jax" if called.endswith("gemma2-jax") else "python -m gemma2_jax"
    assert capsys.readouterr().out.startswith(f"usage: {program} convert inspect [-h]")


_HELP = ("data inspect", "data build", "convert inspect", "convert verify", "convert import", "convert export")


@pytest.mark.parametrize("name", ["", "data", *commands.COMMANDS, *_HELP])
def test_help_fits_a_terminal(name, monkeypatch, capsys):
    """Of 80 columns, but for the line of usage; and says something of every option."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["gemma2-jax", *name.split(), "--help"])
    with contextlib.suppress(SystemExit):
        commands.main()
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > 80 and not line.startswith("usage:")]
    text = "\n".join(line.strip("│ ") for line in lines)
    assert not re.findall(r"^(--\S+)(?: \S+)*(?: {2,}|\n)\((?:default|required)", text, re.MULTILINE)


def test_a_tyro_without_its_hook_prints_its_own_words(refusal, monkeypatch):
    monkeypatch.delattr(tyro._errors, "on_parse_error")
    assert "nonsense" in refusal("generate --checkpoint a --nonsense x")


@pytest.mark.parametrize(
    "arguments", ["", "data", *(f"{name} --help" for name in (*commands.COMMANDS, "data inspect"))]
)
def test_help_that_nobody_reads_ends_without_a_word(arguments, monkeypatch, capsys):
    """As `--help | head` does, where the reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed, monkeypatch.context() as patch:  # what remains is written at its end
        patch.setattr(sys, "argv", ["gemma2-jax", *arguments.split()])
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as ended:
            commands.main()
    assert ended.value.code == 141 and capsys.readouterr() == ("", "")


def test_signals_are_noted():
    """The second Ctrl-C ends at once; the handlers from before are there again."""
    before = signal.getsignal(signal.SIGTERM)
    with command_line.catch_signals(signal.SIGINT, signal.SIGTERM) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
