"""The converter's commands: inspect, verify, import and export, what they print, and what a signal leaves."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from megatron_files import DORA, FIXTURES, HF, LORA, ONE, PEFT, TINY, Hostile, bits, convert, load_tensors
from peers import hf_config
from safetensors.numpy import save_file
from small_runs import saved_run

from gemma2_jax.config import Config, OptimConfig, TrainConfig
from gemma2_jax.convert.__main__ import main
from gemma2_jax.convert.checkpoints import load_weights
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.model_config import ModelConfig

LEGACY, LM = FIXTURES / "legacy" / "A_bf16_tp2pp2", FIXTURES / "megatron_lm" / "A_f32_tp1pp1"
OPTIMIZER = FIXTURES / "optimizer" / "A_bf16_tp1pp1"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; gives its exit status or its last message, its output and its error output."""
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal, which is not what these commands write to
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*words) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


MODEL = (
    "layers 4, width 64, mlp_width 128, heads 4, kv_heads 2, head_width 16, query_pre_attn_scalar 16, vocab_size 512"
)
QKV = "attn/q, attn/k, attn/v"
INSPECTED = {
    "hf": (HF["bf16"], (), ["a Hugging Face model", "362.6 kB of bfloat16", MODEL]),
    "torch_dist": (
        FIXTURES / "torch_dist" / "A_bf16_tp2pp2",
        (),
        ["a Megatron checkpoint, torch_dist at TP 2 and PP 2", "bfloat16", MODEL, "4 x 64 x 4 x 16", "L D N H"],
    ),
    "megatron_lm": (
        LM,
        ("--hf-config", HF["f32"]),
        ["torch_dist", "rng_state", "float32", MODEL, "tokenizer.*hf/A_f32"],
    ),
    "legacy": (
        LEGACY,
        ("--hf-config", HF["bf16"]),
        ["legacy torch at TP 2 and PP 2", "not read, as", "bfloat16", MODEL],
    ),
    "optimizer": (OPTIMIZER, (), [r"not read, as it is no weight: optimizer \(30\), rng_state \(1\)"]),
    "lora": (
        LORA,
        (),
        ["LoRA of rank 8, alpha 16 on attn/q, .*after the post-norm", "base +hf/A_f32", "attn/o/adapter/b"],
    ),
    "dora": (DORA, (), ["DoRA of rank 8", "blocks/mlp/gate/adapter/m.*L F"]),
    "peft": (PEFT, (), ["a PEFT adapter", "LoRA of rank 8", "hf/A_f32", "not read: no base model"]),
    "peft with a config": (PEFT, ("--hf-config", HF["f32"]), ["a PEFT adapter", "blocks/mlp/down/adapter/a"]),
}


@pytest.mark.parametrize("case", INSPECTED)
def test_inspect(case, run):
    path, words, expected = INSPECTED[case]
    code, output, _ = run("inspect", path, *words)
    assert code == 0 and str(path) in output
    for text in expected:
        assert re.search(text, output), text


def test_inspect_of_names_that_look_like_something_else(run, tmp_path):
    """Not like markup, nor like a command to the terminal. What is no file is said to be none."""
    folder = Path(shutil.copytree(HF["f32"], tmp_path / "a[/b]\x1b[31m"))
    code, output, _ = run("inspect", folder)
    assert code == 0 and r"a[/b]\x1b[31m" in output and "\x1b" not in output
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    code, _, _ = run("inspect", folder)
    assert "it holds config.json, generation_config.json, loop (a link to nothing), model.safetensors (a link" in code


@pytest.mark.parametrize("to", ["orbax", "megatron", "megatron-legacy"])
def test_inspect_says_what_was_written(to, run, tmp_path):
    convert(HF["f32"], tmp_path / "out", to)
    code, output, _ = run("inspect", tmp_path / "out", *(["--hf-config", HF["f32"]] if to == "megatron-legacy" else []))
    names = {"orbax": "an Orbax folder", "megatron": "torch_dist at TP 1 and PP 1", "megatron-legacy": "TP 1 and PP 1"}
    assert code == 0 and names[to] in output and MODEL in output and "725.2 kB of float32" in output
    (tmp_path / "empty").mkdir()
    code, output, _ = run("inspect", tmp_path / "empty")
    assert "is no checkpoint that this program knows" in str(code) and not output


def test_verify_across_formats(run, tmp_path):
    for first, second, words in (
        (HF["bf16"], FIXTURES / "torch_dist" / "A_bf16_tp2pp2", ()),
        (HF["bf16"], LEGACY, ("--hf-config", HF["bf16"])),
        (LM, ONE, ("--hf-config", HF["f32"])),
        (LORA, LORA, ("--hf-config", HF["f32"])),
        (convert(HF["bf16"], tmp_path / "orbax", "orbax"), LEGACY, ("--hf-config", HF["bf16"])),
    ):
        for pair in ((first, second), (second, first)):
            code, output, _ = run("verify", *pair, *words)
            assert code == 0 and re.search(r"(\d+) of \1 arrays \([\d,]+ elements\) are the same, bit by bit", output)


def test_verify_tells_adapters_of_the_same_arrays_apart(run, tmp_path):
    scaled = Path(shutil.copytree(PEFT, tmp_path / "scaled")) / "adapter_config.json"
    scaled.write_text(scaled.read_text().replace('"lora_alpha": 16', '"lora_alpha": 4'))
    for second, said in (
        (LORA, "one is added after the post-norm (adapter.after_norm)."),
        (scaled.parent, "the scale (alpha, rank and rslora) is 2 and 0.5."),
    ):
        code, output, _ = run("verify", PEFT, second, "--hf-config", HF["f32"])
        assert code == 1 and "They hold the same weights, bit by bit.\n" in output
        assert output.endswith(f"Their adapters compute different things all the same: {said}\n")
    assert run("verify", PEFT, PEFT, "--hf-config", HF["f32"])[0] == 0


def test_verify_finds_what_differs(run, tmp_path):
    changed = Path(shutil.copytree(HF["f32"], tmp_path / "other"))
    content = load_tensors(changed)
    content["model.norm.weight"][3] = 0.0
    save_file(content, changed / "model.safetensors")
    converted = convert(changed, tmp_path / "one", "megatron")
    content["model.layers.2.mlp.up_proj.weight"][5, 7] += 0.25
    content["model.norm.weight"][3] = -0.0
    content["model.norm.weight"][4] = np.nan
    save_file(content, changed / "model.safetensors")
    code, output, _ = run("verify", converted, changed)
    assert code == 1 and "11 of 13 arrays" in output and "bit by bit" in output
    assert output.endswith(
        "They differ in mlp/up and final_norm, by no change that is known (relative L2 0.022 to nan); all else is the "
        "same.\n"
    )
    assert re.search(r"mlp/up +1 +0\.25", output) and max(map(len, output.splitlines()[2:6])) <= 80
    assert re.search(r"final_norm +3% +nan", output) and "attn/q" not in output
    content["model.norm.weight"] = load_tensors(HF["f32"])["model.norm.weight"]
    save_file(content, changed / "model.safetensors")
    assert run("verify", ONE, changed, "--atol", "0.2")[0] == 1
    code, output, _ = run("verify", ONE, changed, "--atol", "0.26")
    assert code == 0 and "same, within 0.26; the largest difference is 0.25\n" in output and "mlp/up" not in output
    # A difference of dtypes alone counts, unless there is a tolerance.
    code, output, _ = run("verify", HF["f32"], HF["bf16"])
    assert code == 1 and "0 of 13 arrays" in output
    assert "of all arrays the first has float32 and the second bfloat16" in output
    assert run("verify", HF["f32"], HF["bf16"], "--atol", "0.1")[0] == 0
    cut = convert(HF["f32"], tmp_path / "cut", "hf", dtype="bfloat16")
    assert run("verify", cut, HF["bf16"])[0] == 0


def test_verify_refuses_other_shapes(run, tmp_path):
    other = save_random_model(tmp_path / "other", TINY)
    code, _, _ = run("verify", HF["f32"], other)
    assert re.search(
        r"error: .* has embedding with shape \(512, 64\), and .* has embedding with shape \(6, 4\); they are models of "
        r"different sizes: layers 4 and not 1, width 64 and not 4, ",
        str(code),
    )
    code, _, _ = run("verify", HF["f32"], LORA)
    assert re.search("has embedding with shape .* and .* has no embedding.*; one is an adapter alone: give", str(code))


@pytest.mark.parametrize("same", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_verify_a_prompt(same, run):
    code, output, _ = run("verify", ONE, HF["f32" if same else "bf16"], "--prompt", "hello world")
    assert code == (0 if same else 1)
    assert re.search(r"logits of (\d+) tokens in float32: they differ by at most .*same at \d+ of \1 positions", output)
    assert bool(re.search(r"they differ by at most 0, .* same at (\d+) of \1", output)) == same


def test_a_prompt_needs_a_tokenizer(run):
    code, _, _ = run("verify", ONE, ONE, "--prompt", "x")
    assert "neither checkpoint has a tokenizer for the prompt" in str(code)


def test_import_and_export(run, tmp_path):
    megatron, back = tmp_path / "there", tmp_path / "back"
    options = "--torch-dtype", "bfloat16", "--device-map", "auto", "--trust-remote-code"
    code, output, _ = run("import", "--hf-model", HF["f32"], "--megatron-path", megatron, *options)
    assert code == 0 and f"checkpoint.pretrained_checkpoint={megatron}" in output
    assert yaml.safe_load((megatron / "iter_0000000" / "run_config.yaml").read_text())["model"]["bf16"] is True
    paths = "--hf-model", HF["bf16"], "--megatron-path", megatron, "--hf-path", back
    code, output, _ = run("export", *paths, "--no-progress", "--trust-remote-code")
    assert code == 0 and "transformers.AutoModelForCausalLM.from_pretrained" in output
    assert bits(load_tensors(back)) == bits(load_tensors(HF["bf16"]))
    assert json.loads((back / "config.json").read_text()) == json.loads((HF["bf16"] / "config.json").read_text()) | {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "rope_theta": 10000.0,
    }
    for file in ("tokenizer.json", "generation_config.json"):
        assert (back / file).read_bytes() == (HF["bf16"] / file).read_bytes()
    code, _, _ = run("export", "--hf-model", HF["f32"], "--megatron-path", LM, "--hf-path", tmp_path / "lm")
    assert code == 0 and bits(load_tensors(tmp_path / "lm")) == bits(load_tensors(HF["f32"]))
    code, _, _ = run("export", "--hf-model", HF["f32"], "--megatron-path", LM, "--hf-path", tmp_path / "lm")
    assert "exists already" in str(code)


def test_convert_warns_notes_and_refuses(run, tmp_path):
    code, output, warned = run(LORA, tmp_path / "peft", "--to", "peft")
    assert code == 0 and "note: its attn/o and mlp/down act after the post-norm" in output
    assert warned.startswith("warning: the adapter of attn/o and mlp/down was trained to be added after the post-norm")
    code, output, warned = run(
        tmp_path / "peft", tmp_path / "again", "--to", "megatron-adapter", "--hf-config", HF["f32"]
    )
    assert code == 0 and "was trained to be added before the post-norm" in warned
    base = tmp_path / "again-base"
    hint, fields = output.splitlines()[-2:]
    assert fields.endswith(f"there: checkpoint.load={tmp_path / 'again'} checkpoint.pretrained_checkpoint={base}")
    model = json.loads((PEFT / "adapter_config.json").read_text())["base_model_name_or_path"]
    command = f"python -m gemma2_jax.convert {model} {base} --to megatron"
    assert hint == f"convert its model for Megatron-Bridge: {command}"
    code, output, _ = run(HF["f32"], tmp_path / "ranks", "--to", "megatron-legacy", "--tp", 2, "--pp", 4)
    assert code == 0 and len(list((tmp_path / "ranks" / "iter_0000000").glob("mp_rank_0[01]_00[0-3]"))) == 8
    assert f"load it with Megatron-LM: --load {tmp_path / 'ranks'} --ckpt-format torch --finetune" in output
    code, _, _ = run(HF["f32"], tmp_path / "x", "--to", "megatron", "--tp", 2)
    assert "leave out --tp and --pp" in str(code)
    code, _, _ = run(LM, tmp_path / "x", "--to", "hf")
    assert "give --hf-config" in str(code) and not (tmp_path / "x").exists()


def test_what_goes_into_a_pipe_is_whole(run, tmp_path):
    """No name is cut to fit a terminal of 40 columns, no line ends in blanks, and there is no progress bar."""
    source = open_checkpoint(DORA)
    code, output, _ = run("inspect", DORA)
    assert code == 0 and "…" not in output and str(DORA) in output
    for path, shape in source.shapes.items():
        assert re.search(rf"\b{path} .*\b{' x '.join(map(str, shape.shape))} .*float32", output)
    code, verified, _ = run("verify", HF["f32"], HF["bf16"])
    assert code == 1 and all(f"\n{name} " in verified for name in ("embedding", "mlp/down"))
    code, converted, warned = run(HF["f32"], tmp_path / "out", "--to", "orbax")
    assert code == 0 and len(converted.splitlines()) == 3 and not warned
    for line in (output + verified + converted).splitlines():
        assert line == line.rstrip() and "━━" not in line


def test_no_name_is_cut_on_a_terminal(run, monkeypatch):
    """Two blanks alone stand between columns, so that those of 27B fit into 80; with lines these would take 79."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "74")
    code, output, _ = run("inspect", DORA)
    assert code == 0 and all(path in output for path in open_checkpoint(DORA).shapes)


def test_a_terminal_gets_a_progress_bar(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    assert "━" in run("import", "--hf-model", HF["f32"], "--megatron-path", tmp_path / "there")[1]
    export = "export", "--hf-model", HF["f32"], "--megatron-path", tmp_path / "there"
    assert "━" in run(*export, "--hf-path", tmp_path / "shown")[1]
    assert "━" not in run(*export, "--hf-path", tmp_path / "quiet", "--no-progress")[1]


@pytest.mark.parametrize("to", ["peft", "megatron-adapter"])
def test_a_run_that_trained_the_whole_weights_has_no_adapter_to_write(to, run, tmp_path):
    source = open_checkpoint(HF["f32"])
    assert source.model is not None
    config = Config(
        workdir="x", model=source.model, optim=OptimConfig(lr=1.0), init=str(HF["f32"]),
        train=TrainConfig(sequence_length=8),
    )  # fmt: skip
    weights = {path: np.asarray(x) for path, x in load_weights(source, source.shapes).items()}
    trained = saved_run(tmp_path / "run", config, {1: weights})
    code, _, _ = run(trained, tmp_path / "out", "--to", to)
    weights_format = {"peft": "hf", "megatron-adapter": "megatron"}[to]
    assert str(code) == (
        f"error: {trained} trained the whole weights, so there is no adapter to write; "
        f"write its weights with --to {weights_format}"
    )
    code, _, _ = run(HF["f32"], tmp_path / "out", "--to", to)
    assert f"has no adapter, and --to {to} writes nothing else; write its weights with --to" in str(code)


ADAPTERS_ALONE = {"peft": (PEFT, ()), "peft with a config": (PEFT, ("--hf-config", HF["f32"])), "megatron": (LORA, ())}


@pytest.mark.parametrize("case", ADAPTERS_ALONE)
@pytest.mark.parametrize("choices", [("--to", "hf"), ("--to", "hf", "--merge"), ("--to", "orbax")], ids=" ".join)
def test_an_adapter_alone_asks_for_its_model_first(choices, case, run, tmp_path):
    """Before it is said that the adapter needs merging, that it cannot be merged, or that a tokenizer is missing."""
    adapter, words = ADAPTERS_ALONE[case]
    code, _, _ = run(adapter, tmp_path / "out", *choices, *words)
    assert re.fullmatch(
        rf"error: {adapter} is an adapter to \S+A_f32\S*, whose weights are not at hand, and --to \w+ writes them too; "
        rf"give that model as SRC and this adapter as --adapter {adapter}",
        str(code),
    )
    assert not (tmp_path / "out").exists()


def test_adapters_alone_are_compared_by_their_arrays_and_have_no_logits(run):
    code, output, _ = run("verify", PEFT, PEFT, "--prompt", "x")
    assert "give the folder of the model's config.json as --hf-config" in str(code) and "are the same" not in output
    code, output, _ = run("verify", PEFT, LORA, "--hf-config", HF["f32"], "--prompt", "x")
    assert "14 of 14 arrays" in output
    assert re.search("whose weights are not at hand, so it has no logits; put it on that model first", str(code))


def start_command(*words) -> subprocess.Popen:
    # A shell has what it starts in the background ignore SIGINT, and nohup SIGHUP; this process may have been.
    words = ["env", "--default-signal=INT,HUP", sys.executable, "-m", "gemma2_jax.convert", *map(str, words)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_hostile_checkpoint_in_a_process_of_its_own(tmp_path):
    bad = Path(shutil.copytree(ONE, tmp_path / "bad"))
    torch.save({"iteration": Hostile(tmp_path / "was-run")}, bad / "iter_0000000" / "common.pt")
    process = start_command(bad, tmp_path / "out", "--to", "hf")
    output, error = process.communicate(timeout=100)
    assert process.returncode == 1 and error.startswith("error: ") and error.count("\n") == 1 and not output
    assert re.search(r"names '\w+\.system', which no Megatron checkpoint has; it was not run", error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def save_random_model(folder: Path, model: ModelConfig) -> Path:
    """A model of random bits, which are quick to make."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    content = {
        name: np.frombuffer(rng.bytes(4 * int(np.prod(shape))), np.float32).reshape(shape)
        for name, shape in table.tensor_shapes(table.MODEL, model).items()
    }
    save_file(content, folder / "model.safetensors")
    hf_config(model, dtype="float32", architectures=["Gemma2ForCausalLM"]).save_pretrained(folder)
    return folder


SMALL = replace(
    TINY, layers=75, width=256, mlp_width=1024, heads=8, kv_heads=4, head_width=32, vocab_size=2048, max_length=64
)  # 298 MB


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("large") / "hf", SMALL)


@pytest.mark.parametrize(
    ("to", "number", "status"),
    [("megatron", signal.SIGTERM, 143), ("megatron-legacy", signal.SIGHUP, 129), ("hf", signal.SIGINT, 130)],
)
def test_a_signal_in_the_middle_leaves_nothing(to, number, status, large_model, tmp_path):
    target = tmp_path / "out" / to
    process = start_command(large_model, target, "--to", to)
    partial = target.parent / f".{to}.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and sum(file.stat().st_size for file in partial.rglob("*")) > 1_000_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "Traceback" not in error and list(target.parent.iterdir()) == []


PEAK = r"""
import re, sys
from pathlib import Path
from gemma2_jax.cluster import platforms
platforms.prepare_process(cpu=True, cache=False)
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.writing import write_checkpoint
for source, target, to in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    opened = open_checkpoint(source, hf_config=HF if "legacy" in source else None)
    write_checkpoint(Job(source=opened, to=to), Path(target))
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss has the parent's in it
"""


def peak_memory(hf: Path, *steps) -> float:
    """MB that a process of its own takes."""
    words = [str(word) for step in steps for word in step]
    code = f"HF = {str(hf)!r}\n{PEAK}"
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1000


CHAINS = {
    "megatron": ("megatron", "hf"),
    "orbax": ("orbax", "hf"),
    "legacy": ("megatron-legacy", "hf"),
    "megatron and orbax": ("megatron", "orbax", "megatron", "hf"),
}


@pytest.mark.parametrize(
    "chain", ["megatron", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in list(CHAINS)[1:])]
)
def test_memory_stays_bounded(chain, large_model, tmp_path):
    size = (large_model / "model.safetensors").stat().st_size / 1e6
    small = save_random_model(tmp_path / "small", replace(SMALL, layers=1, vocab_size=128))
    peaks = []
    for source in (small, large_model):
        steps, at = [], source
        for number, to in enumerate(CHAINS[chain]):
            target = tmp_path / source.name / f"{number}-{to.removeprefix('megatron-')}"
            steps.append((at, target, to))
            at = target
        peaks.append(peak_memory(source, *steps))
    assert size > 290 and peaks[1] < peaks[0] + 120, peaks
    assert bits(load_tensors(at)) == bits(load_tensors(large_model))
