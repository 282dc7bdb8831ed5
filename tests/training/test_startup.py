"""What a run says before its first step and after its last, and what it tells somebody whose options do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import ROOT, lines_of, small

from gemma2_jax import config as configs, config_text
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.model_config import AdapterConfig
from gemma2_jax.training import loop, resume, startup

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes of the tiny model name assets/ relative to the repository."""
    monkeypatch.chdir(ROOT)


def spoken(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_fewer_steps_than_were_taken(tmp_path, capsys):
    config = small("tiny_lora", tmp_path, steps=2)
    loop.train(config)
    before = lines_of(tmp_path)
    capsys.readouterr()
    result = loop.train(replace(config, steps=1))
    said = spoken(capsys)
    assert "there is nothing to do: this run has already taken 2 steps, of 1 asked" in said
    assert f"The adapter of step 2: {tmp_path}/checkpoints/2/params" in said
    assert (result.step, int(result.state.step), result.losses) == (2, 2, {})
    assert lines_of(tmp_path) == before
    assert config_text.from_text((tmp_path / "config.txt").read_text()).steps == 2
    with pytest.raises(ValueError, match=r"holds another run: optim.lr was"):
        loop.train(replace(config, steps=1, optim=replace(config.optim, lr=1.0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"eval_fraction": 0.0}}, "none, and no evaluation (data.eval is empty, and data.eval_fraction is 0)"),
        (
            {"train": {"eval_every": 0}},
            "0.05 of tests/fixtures/sums.jsonl, which is not trained on; no evaluation (train.eval_every is 0)",
        ),
    ],
)
def test_no_evaluation(tmp_path, capsys, changes, message):
    config = small("tiny_lora", tmp_path, steps=2)
    config = replace(config, **{group: replace(getattr(config, group), **fields) for group, fields in changes.items()})
    assert loop.train(config).eval_losses == {}
    said = spoken(capsys)
    assert f"held-out data {message}" in said
    documents = 150 if "data" in changes else 144
    assert f"training data tests/fixtures/sums.jsonl: {documents} documents" in said
    assert not any("eval_loss" in line for line in lines_of(tmp_path))


def test_a_small_data_set(tmp_path, capsys):
    """Sixty prompts, none below the held-out share: one is held out, and a new run can start from the result."""
    path = tmp_path / "own data.jsonl"
    rows = [{"prompt": f"It's number {n}:\n", "completion": f" {n + 1}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small("tiny_sft", tmp_path / "run", steps=1)
    config = replace(
        config,
        data=replace(config.data, train=str(path), eval_fraction=0.0001),
        optim=replace(config.optim, warmup_steps=30, decay_steps=None),
    )
    result = loop.train(config)
    said = spoken(capsys)
    assert list(result.eval_losses) == [0, 1]
    assert f"training data {path}: 59 documents" in said and f"held-out data {path}: 1 document (0" in said
    assert "cosine after 0 warmup steps (30 were asked, but the decay ends with step 1)" in said
    assert f"The weights of step 1: {tmp_path}/run/checkpoints/1/params" in said
    assert f"convert {tmp_path}/run {tmp_path}/run-hf --to hf" in said
    assert "PEFT" not in said and "Trace" not in said and "--chat" not in said
    assert """ --prompt 'It'"'"'s number """ in said
    # Another learning rate is another run, which may start from this one.
    faster = replace(config, optim=replace(config.optim, lr=0.5))
    with pytest.raises(ValueError, match=rf"optim.lr was .* start a new run .*: --init {tmp_path}/run --workdir NEW$"):
        loop.train(faster)
    loop.train(replace(config, init=str(tmp_path / "run"), workdir=str(tmp_path / "new")))  # compiled already
    assert f"weights run {tmp_path}/run" in spoken(capsys)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    message = (
        rf"the run in {tmp_path}/run cannot go on with this data: its position is one in \d+ rows? of 64 with \d+ "
        r"tokens, packed by length, 8 to a batch, and the data is now \d+ rows? of 64 with .*"
        r"Give back the data, the sizes and the version of gemma2_jax of that run, or .*--init"
    )
    with pytest.raises(ValueError, match=message):
        loop.train(replace(config, steps=2))


def test_new_starts(tmp_path):
    """An adapter needs its model, and one on random weights cannot be gone on from elsewhere."""
    config = small("tiny_lora", tmp_path / "a run")
    assert resume.describe_new_start(config) == ""
    assert resume.describe_new_start(replace(config, init="base")).endswith(
        f": --init base --adapter '{tmp_path}/a run' --workdir NEW"
    )
    full = replace(config, adapter=AdapterConfig(), workdir="full")
    assert resume.describe_new_start(full).endswith(": --init full --workdir NEW")


def test_a_model_under_another_name_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = replace(small("tiny_lora", tmp_path), init="model")
    path = tmp_path / "config.txt"
    path.write_text(config_text.to_text(config))
    assert not resume.config_differences(replace(config, init=str(tmp_path / "model")), path)
    assert [*resume.config_differences(replace(config, init="elsewhere"), path)] == ["init"]
    path.write_bytes(b"steps = \xff")
    with pytest.raises(ValueError, match=f"{path} is damaged, as it is not UTF-8"):
        resume.config_differences(config, path)


def test_notes_on_the_weights_are_said(tmp_path):
    config = small("tiny_sft", tmp_path, init="model")
    program = SimpleNamespace(config=config, params={"embedding": np.ones(3)}, frozen={})
    source = Checkpoint(format="huggingface", path=Path("model"), model=config.model, notes=("one", "another"))
    lines = [*startup._describe_weights(SimpleNamespace(program=program, source=source, start_step=0, checkpoint=""))]
    assert lines[1:4] == [("weights", "huggingface model"), ("note", "one"), ("note", "another")]


def test_notes_on_documents_are_said_once_with_their_source(tmp_path, capsys):
    """The example is one that is trained on, as it is cut; data that is held out from itself or repeated is told."""
    good = [{"prompt": f"{number}:", "completion": " yes"} for number in range(30)]
    long = [{"prompt": "word " * 99, "completion": " no"}, {"prompt": "Q:", "completion": " word" * 99}]
    for name, records in {"a": [*long, *good], "b": [*good, {"prompt": "Q", "completion": ""}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = small("tiny_lora", tmp_path / "run", steps=1)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    train, bad = ",".join(f"{tmp_path}/{name}.jsonl" for name in ("a", "b", "link")), f"{tmp_path}/b.jsonl"
    loop.train(replace(config, data=replace(config.data, train=train, eval=bad, on_bad="skip")))
    said = capsys.readouterr()
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "documents b: 30 prompt and completion" in "\n".join(lines)
    left_out = f"b: 1 document left out (empty); the first is {bad}:31: 'completion' is empty, which leaves nothing to"
    assert [line.startswith(f"note {left_out}") for line in lines].count(True) == 1
    assert "left out" not in said.err and said.out.count("left out (empty)") == 1
    (example,) = (line for line in lines if line.startswith("example"))
    assert example.startswith("example <bos>Q:[[ word") and "(cut to 64 of its" in example
    said_lines = "\n".join(lines)
    assert f"note data.train and data.eval both have {bad}; a held-out loss of what is trained on tells" in said_lines
    given = f"{tmp_path}/a.jsonl, {tmp_path}/link.jsonl"
    assert f"note several sources ({given}) have {tmp_path}/a.jsonl; it is trained on in each" in said_lines


def test_suggested_prompts(tmp_path):
    """Of the data, of any kind, shortened; and none where the data is gone."""
    path = tmp_path / "data.jsonl"
    data = configs.DataConfig(train=str(path), eval_fraction=0.0)

    def suggest(record: dict, **changes) -> str:
        path.write_text(json.dumps(record) + "\n")
        return startup.suggest_prompt(replace(data, **changes))

    system, answer = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Yes."}
    talk = [system, {"role": "user", "content": "\n  Be brief.\nAlways."}, answer]
    assert suggest({"messages": talk}) == "--chat --prompt 'Be brief.'"
    words = "word " * 11
    assert suggest({"text": f"{words}ending and more"}, kind="text") == f"--prompt '{words.strip()}'"
    assert suggest({"text": "x" * 99}, kind="text") == f"--prompt {'x' * 60}"
    assert "json.dumps" in suggest({}, train="python-docs")
    path.unlink()
    assert startup.suggest_prompt(data) == "--prompt TEXT"
