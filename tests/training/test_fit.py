"""Steps that are too large for their devices: what is said of them, and that nothing is loaded before."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from small_runs import ROOT, small

from gemma2_jax import train
from gemma2_jax.cluster import devices, hosts
from gemma2_jax.cluster.devices import MemoryLimit
from gemma2_jax.config import ProfileConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training import fit, loop, resume
from gemma2_jax.training.smaller_steps import LargeStepError
from gemma2_jax.training.step import Program, compile_step

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def one_layer(workdir, **changes):
    """Two rows in a pass on each device."""
    config = small("tiny_sft", workdir, steps=1, **changes)
    train = replace(config.train, global_batch_size=16, micro_batch_size=2, eval_every=0)
    return replace(config, model=replace(config.model, layers=1), train=train)


def test_a_step_that_is_too_large_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    """And its program is kept, where that is asked for."""

    def load(*_):
        raise AssertionError("something is loaded")

    needs = []
    measure = fit.measure_need
    monkeypatch.setattr(fit, "measure_need", lambda *given: needs.append(measure(*given)) or needs[-1])
    monkeypatch.setattr(fit, "find_memory_limit", lambda: MemoryLimit(size=100, source="it has"))
    for name in ("start_state", "load_base"):
        monkeypatch.setattr(resume, name, load)
    before = sum(x.nbytes for x in jax.live_arrays())
    with pytest.raises(LargeStepError) as refused:
        loop.train(one_layer(tmp_path, profile=ProfileConfig(keep_program=True)))
    assert sum(x.nbytes for x in jax.live_arrays()) < before + 10_000, "the state has 2 MB"
    assert not [*(tmp_path / "checkpoints").glob("*")] and (tmp_path / "program" / "train_step.executable").exists()
    (need,) = needs
    assert {"trained weights", "optimizer", "temporaries"} < need.keys()
    message = str(refused.value)
    total, weights = sum(need.values()) / 2**30, need["trained weights"] / 2**30
    assert message.startswith(f"a step needs {total:.2f} GiB of each device (trained weights {weights:.2f} + "), message
    assert message.endswith(
        "and it has 0.00 GiB; nothing was loaded. No smaller step was found that fits on these devices"
    )


def test_smaller_steps_are_compiled_for_these_devices(tmp_path, monkeypatch, capsys):
    config = one_layer(tmp_path)
    program = Program(config, make_mesh(config.mesh, jax.devices()[:2]))
    with jax.set_mesh(program.mesh):
        compiled = compile_step(program, program.train_step, program.batch, donate_argnums=0)
        need = fit.measure_need(program, compiled)
        assert need is not None
        limit = MemoryLimit(size=sum(need.values()), source="it has")
        monkeypatch.setattr(fit, "find_memory_limit", lambda: limit)
        assert fit.check_fit(program, compiled) == limit
        changes = fit.list_changes
        monkeypatch.setattr(
            fit, "list_changes", lambda *given: (c for c in changes(*given) if not c.micro and not c.recomputed)
        )
        monkeypatch.setattr(fit, "find_memory_limit", lambda: replace(limit, size=limit.size - 1))
        with pytest.raises(
            LargeStepError, match=r"nothing was loaded\. It fits with --mesh\.fsdp 2 \(0\.0\d GiB\), as"
        ):
            fit.check_fit(program, compiled)
    assert capsys.readouterr().err == "the step does not fit; compiling it with --mesh.fsdp 2\n"


def test_the_process_with_the_least_decides(monkeypatch):
    answers = [None, {"size": 7, "source": "a"}, {"size": 5, "source": "b"}]
    monkeypatch.setattr(hosts, "gather_answers", lambda *_: [json.dumps(answer) for answer in answers])
    assert fit._agree_on_limit(None) == MemoryLimit(size=5, source="b")
    monkeypatch.setattr(hosts, "gather_answers", lambda question, answer: [answer])
    assert fit._agree_on_limit(None) is None


def test_limits(monkeypatch, tmp_path):
    """Of GPUs what XLA may still take on the fullest, of a CPU its memory and swap space, or the container's limit."""
    found = devices.find_memory_limit()
    assert found is not None
    assert found.source == "this machine has for each of its 8 CPU devices" and 2**26 < found.size < 2**45
    text = {"/proc/meminfo": "SwapTotal:       1000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(devices, "_read_text", lambda file: text.get(file, ""))
    monkeypatch.setattr(devices.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name])
    assert devices.machine_memory() == 40_960 + 1_024_000
    text["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert devices.machine_memory() == 5000
    stats = [{"bytes_limit": 100, "bytes_in_use": used} for used in (10, 30)]
    gpus = [
        SimpleNamespace(platform="gpu", device_kind="H", memory_stats=lambda counts=counts: counts) for counts in stats
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: gpus)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    limit = devices.find_memory_limit()
    assert limit == MemoryLimit(size=70, source="H, with XLA_CLIENT_MEM_FRACTION=0.5, can give")
    gpus[1].memory_stats = lambda: None
    assert devices.find_memory_limit() is None


def test_the_command_that_asks_for_more_gpus(monkeypatch, tmp_path):
    error = LargeStepError("a step needs 9.00 GiB", "NVIDIA A100-SXM4-40GB", 2)
    monkeypatch.setattr(train.sys, "argv", ["train", "--config", "9b_sft", "--data.train", "my data.jsonl"])
    assert train._describe_error(error, tmp_path) == (
        "a step needs 9.00 GiB. On how many of these GPUs it fits, this says: python -m gemma2_jax.plan --config "
        "9b_sft --data.train 'my data.jsonl' --gpus 2 --device a100-40"
    )
    assert train._describe_error(LargeStepError("no", "cpu", 1), tmp_path) == "no"
    assert hosts.exit_status(error) == 1
