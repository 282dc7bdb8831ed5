"""Several processes as one run: found, equal to one process, and ended together when one of them fails."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from small_runs import ROOT, command, lines_of, small

import gemma2_jax as g2
from gemma2_jax import config_text, train
from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config, GuardConfig, HostsConfig, MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.model_config import GEMMA2_TINY, AdapterConfig
from gemma2_jax.training import loop, resume
from gemma2_jax.training.export import AdapterExports
from gemma2_jax.training.lock import lock_workdir
from gemma2_jax.training.resume import open_source
from gemma2_jax.training.step import Program

TINY = ROOT / "assets" / "tiny-gemma2"
# As srun sets them for the second of two tasks, one a node, in a job of two nodes.
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
# As mpirun of Open MPI 4 does for the last of four processes on two hosts, and version 5 for the second of two on one.
MPI4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPI5 = {
    "PMIX_NAMESPACE": "prterun-node-7-4242@1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
POD = {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "set-train-0-0.set:5555", "JAX_NUM_PROCESSES": "2"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def place(environment: dict[str, str], **flags) -> hosts.Place:
    return hosts.find_place(HostsConfig(**flags), environment)


def host(environment: dict[str, str]) -> str:
    return place(environment).coordinator.partition(":")[0]


def test_slurm():
    found = place(SRUN)
    assert (found.count, found.index, found.devices, found.source) == (2, 1, None, "SLURM")
    assert host(SRUN) == "node07"
    assert found.coordinator == place(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).coordinator
    assert found.coordinator != place(SRUN | {"SLURM_STEP_ID": "1"}).coordinator, "two steps at once would meet"
    for nodes, first in (("a1,b2", "a1"), ("n[001,007-9],m2", "n001"), ("gpu-a", "gpu-a"), ("r[2-3]n[4-5]", "r2n4")):
        assert host(SRUN | {"SLURM_STEP_NODELIST": nodes}) == first
    # Several tasks of a node each take one GPU, unless SLURM has dealt them out.
    shared = SRUN | {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "1,4", "SLURM_LOCALID": "3"}
    assert place(shared).devices == (3,)
    assert place(shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices == (3,)
    assert place(shared | {"CUDA_VISIBLE_DEVICES": "0"}).devices is None


def test_slurm_without_srun():
    """In the shell of salloc and the script of sbatch there is one process, which says so."""
    batch = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0"}
    interactive = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    for environment in (batch, interactive):
        assert str(place(environment)) == "1 process (not started by srun, though SLURM has 2 tasks)"
    assert str(place(batch | {"SLURM_NTASKS": "1"})) == "1 process"


def test_open_mpi():
    found = place(MPI4)
    assert (found.count, found.index, found.devices, found.source) == (4, 3, (1,), "Open MPI")
    assert host(MPI4) == "10.96.0.1"
    assert host(MPI5) == "127.0.0.1"
    # Started inside a SLURM job, where each node runs one daemon of mpirun as a task.
    assert place(SRUN | MPI4) == found
    spread = MPI5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(
        ValueError, match=r"but not hosts.coordinator: give every process --hosts.coordinator HOST:PORT"
    ):
        place(spread)
    assert place(spread, coordinator="node-7:5555").index == 1


def test_kubernetes():
    found = place(POD)
    assert (found.coordinator, found.count, found.index) == ("set-train-0-0.set:5555", 2, 1)
    assert str(found) == "2 processes, found from Kubernetes"
    assert place({"JOB_COMPLETION_INDEX": "1"}).count == 1, "pods that were told of no others are runs of their own"


def test_flags():
    assert place({}) == hosts.Place()
    flags = dict(coordinator="node-1:5555", count=3, index=2)
    found = place(SRUN, **flags)
    assert (found.coordinator, found.count, found.index, found.source) == ("node-1:5555", 3, 2, "flags")
    assert place({}, count=1) == hosts.Place()


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, {"coordinator": "a:1"}, "hosts.coordinator given, but not hosts.count and hosts.index: give every process "
         "--hosts.count N --hosts.index I"),
        ({}, {"index": 1}, "not hosts.coordinator and hosts.count"),
        ({"JAX_NUM_PROCESSES": "2"}, {}, "hosts.count given, but not hosts.coordinator and hosts.index"),
        (POD | {"JOB_COMPLETION_INDEX": "2"}, {}, "this is process 2 of 2, but processes count from 0"),
    ],
)  # fmt: skip
def test_a_place_that_is_half_told(environment, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        place(environment, **flags)


def test_flags_that_cannot_be():
    with pytest.raises(ValueError, match=r"'node-1'; it must be host:port"):
        HostsConfig(coordinator="node-1")
    with pytest.raises(ValueError, match=r"hosts.index 2 of hosts.count 2: processes count from 0; use 0 to 1"):
        HostsConfig(count=2, index=2)


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def options(count: int = 2) -> list[list[str]]:
    """Options of each process."""
    shared = [f"hosts.coordinator=127.0.0.1:{free_port()}", f"hosts.count={count}"]
    return [[*shared, f"hosts.index={index}"] for index in range(count)]


def two(config: Config, given: list[list[str]], environments: list[dict[str, str]] | None = None) -> list:
    """Two processes of four devices each, started; what is given to one takes the place of what the config says."""

    def arguments(option: list[str]) -> list[str]:
        names = {argument.partition("=")[0] for argument in option}
        return [argument for argument in command("tiny_sft", config) if argument.partition("=")[0] not in names]

    return [
        subprocess.Popen(
            [*arguments(option), *option],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for option, environment in zip(given, environments or [{}, {}], strict=True)
    ]


def cache_variables(folder: Path) -> dict[str, str]:
    """Has a process of four devices keep every program that it compiles."""
    return {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def ends(processes: list) -> list[tuple[int, str, str]]:
    """Of each, its status and what it said."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def fsdp(workdir: Path) -> Config:
    """Six steps over eight shards, so that each of two processes holds half of every weight."""
    config = small("tiny_sft", workdir, steps=6, mesh=MeshConfig(data=1, fsdp=8))
    return replace(config, train=replace(config.train, checkpoint_every=2, eval_every=100, keep_checkpoints=9))


def logged(workdir: Path) -> np.ndarray:
    """Loss and gradient norm of each step, none missing and none twice, and the held-out losses at both ends."""
    steps = [line for line in lines_of(workdir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    held_out = [line["eval_loss"] for line in lines_of(workdir) if "eval_loss" in line]
    assert len(held_out) == 2
    return np.array([line["loss"] for line in steps] + [line["grad_norm"] for line in steps] + held_out)


def test_a_signal_to_one_process_stops_both_after_one_step(tmp_path):
    config = replace(fsdp(tmp_path / "run"), steps=20_000)
    config = replace(config, train=replace(config.train, checkpoint_every=20_000))
    processes = two(config, options())
    while not (tmp_path / "run/metrics.jsonl").exists() or len(lines_of(tmp_path / "run")) < 9:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    ended = ends(processes)
    assert [status for status, _, _ in ended] == [75, 75], ended
    last = max(line["step"] for line in lines_of(tmp_path / "run") if "loss" in line)
    kept = f"interrupted by SIGTERM after step {last}; the checkpoint of step {last} is kept in"
    assert all(kept in error for _, _, error in ended), ended


def test_a_process_that_stands_still_ends_both(tmp_path):
    """One is stopped by SIGSTOP, so that it can say nothing; the other waits for it, and the coordinator names it."""
    config = replace(fsdp(tmp_path / "run"), steps=20_000, mesh=MeshConfig(data=2), guard=GuardConfig(stuck_seconds=2))
    config = replace(config, train=replace(config.train, checkpoint_every=20_000))
    processes = two(config, options(), [{"JAX_NUM_CPU_DEVICES": "1"}] * 2)
    while not (tmp_path / "run/metrics.jsonl").exists() or len(lines_of(tmp_path / "run")) < 20:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGSTOP)
    processes[0].wait(timeout=60)
    processes[1].send_signal(signal.SIGCONT)
    ended = ends(processes)
    assert [status for status, _, _ in ended] == [76, 76], ended
    host = re.escape(socket.gethostname())
    verdict = (
        rf"error: process 0 on {host} \(pid {processes[0].pid}\) (has been .* step \d+ for \d+ s, .*|failed: .*); "
        rf"process 1 on {host} \(pid {processes[1].pid}\) has not answered for \d+ s, and was .* step \d+ then; "
        "every process ends here. The same command resumes after the newest checkpoint"
    )
    for _, _, error in ended:
        assert re.fullmatch(verdict, error.splitlines()[-1]), error
        assert 'loop.py", line' in error, error


def test_no_process_leaves_before_the_others_are_done(monkeypatch):
    """JAX's shutdown waits a minute, and then aborts all; process 0 may print the tables of a profile for longer."""
    called: list[object] = []
    connection = SimpleNamespace(
        service="", watch=lambda: None, send_first_heartbeats=lambda: None, leave=lambda: called.append("leave")
    )
    monkeypatch.setattr(hosts, "find_place", lambda *_: hosts.Place(coordinator="node-1:1", count=2, index=1))
    monkeypatch.setattr(hosts, "_connect_coordinator", lambda place: contextlib.nullcontext(connection))
    monkeypatch.setattr(hosts, "end_when_told", contextlib.nullcontext)
    monkeypatch.setattr(hosts.platforms, "restrict_cache", lambda index: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts.jax_internals, "wait_for_all", lambda name, seconds: called.append(seconds))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: called.append("shutdown"))
    with hosts.process_group(HostsConfig()):
        called.append("work")
    assert called == ["work", hosts._BARRIER_SECONDS, "shutdown", "leave"]


def cut(source: Path, workdir: Path, step: int) -> Config:
    """A run as it was when it had saved that step."""
    shutil.copytree(source, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return fsdp(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run by one process of eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        workdir = tmp_path_factory.mktemp("alone")
        loop.train(fsdp(workdir))
    return workdir


@pytest.mark.exhaustive
def test_two_processes_equal_one(alone, tmp_path):
    """Started as srun would; then gone on with by one process. Sums over shards are in another order between them."""
    tasks = [SRUN | {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())} for _ in range(2)]
    for index, task in enumerate(tasks):
        task |= {"SLURM_PROCID": str(index), "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    samples = ["sample.tokens=8", "sample.prompts=Hello"]
    first, second = ends(two(fsdp(tmp_path / "two"), [samples, samples], tasks))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "8 x cpu, 2 processes, found from SLURM" in first[1]
    # Gloo's threads say how many ranks they are connected to, several in a line at times.
    spoken = [line for line in second[1].splitlines() if line and not re.search(r"\[Gloo\]|peer ranks", line)]
    assert not spoken, f"only process 0 reports, not {spoken}"
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(alone), rtol=1e-6)
    last = [line for line in lines_of(tmp_path / "two") if "samples" in line][-1]
    [text] = g2.generate(g2.load(tmp_path / "two"), ["Hello"], max_new_tokens=8, chat=True)
    assert (last["step"], last["samples"]) == (6, [{"prompt": "Hello", "completion": text}])
    loop.train(cut(tmp_path / "two", tmp_path / "resumed", 2))
    np.testing.assert_allclose(logged(tmp_path / "resumed"), logged(alone), rtol=1e-6)


def named(error: str, victim: subprocess.Popen, index: int) -> bool:
    """Whether this is what a process says when that other one was killed, and nothing else."""
    told = (
        rf"error: process {index} on {re.escape(socket.gethostname())} \(pid {victim.pid}\) stopped answering; every "
    )
    return (
        re.fullmatch(told + r"process ends here\. The same command resumes after the newest checkpoint\n", error)
        is not None
    )


def test_saved_by_one_killed_and_resumed_by_two(alone, tmp_path):
    """With a stage for each, who read the same rows, as their devices differ in the layers that they have.

    The second start has process 0 read what it compiled in the first. On CPU the other has to compile it again.
    """
    config = replace(cut(alone, tmp_path / "run", 2), mesh=MeshConfig(data=1, stage=2, fsdp=4))
    given, environment = options(), cache_variables(tmp_path / "cache")
    processes = two(config, given, [environment] * 2)
    while not (tmp_path / "run" / "checkpoints" / "4").exists() and processes[0].poll() is None:
        time.sleep(0.005)
    processes[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    processes[1].wait(timeout=60)
    seconds = time.monotonic() - killed
    ended = ends(processes)
    assert [status for status, _, _ in ended] == [-signal.SIGKILL, 1], ended
    assert named(ended[1][2], processes[0], 0), ended[1][2]
    assert seconds < 15
    assert not (tmp_path / "run" / "checkpoints" / "6").exists(), "it was over before it was killed"
    again = ends(two(config, given, [environment | {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}] * 2))
    assert [status for status, _, _ in again] == [0, 0], again
    assert "cache hit for 'jit_train_step'" in again[0][2]
    assert f"compiled programs  kept in {tmp_path}/cache" in again[0][1]
    assert "resumes after step 4" in again[0][1]
    np.testing.assert_allclose(logged(tmp_path / "run"), logged(alone), rtol=1e-5)


# A run's start and its first export, with no step between them. Process 1 comes late.
FROM_ADAPTER_TO_ADAPTER = """
import pathlib, sys, time, types
from gemma2_jax import config, config_text
from gemma2_jax.cluster import hosts
given = config_text.from_text(open(sys.argv[1]).read())
with hosts.process_group(config.HostsConfig(coordinator=sys.argv[2], count=2, index=int(sys.argv[3]))):
    import jax
    from gemma2_jax.training import export, resume, step
    from gemma2_jax import mesh
    program = step.Program(given, mesh.make_mesh(given.mesh))
    late = pathlib.Path(given.workdir + "-late")
    if jax.process_index() == 1:
        time.sleep(3)
        late.touch()
    with jax.set_mesh(program.mesh):
        source = resume.open_source(given)
        state, _ = resume.start_state(program, source, types.SimpleNamespace(latest=None))
        assert late.exists(), "process 0 would begin a collective alone, and Gloo give it up after 30 seconds"
        assert not any(w.is_fully_addressable for w in state.params.values())
        export.AdapterExports(given, source).save(1, state.params)
"""


def test_an_adapter_through_two_processes(tmp_path):
    """Each reads its shards of it, and one writes what both have."""
    given = replace(fsdp(tmp_path / "given"), model=GEMMA2_TINY, adapter=AdapterConfig(kind="lora"), init=str(TINY))
    given = replace(given, train=replace(given.train, export_adapter=True))
    program, rng = Program(given, make_mesh(given.mesh)), np.random.default_rng(0)
    adapter = {path: rng.normal(size=w.shape).astype(w.dtype) for path, w in program.params.items()}
    AdapterExports(given, open_source(given)).save(
        0, {path: jax.device_put(w, program.params[path].sharding) for path, w in adapter.items()}
    )
    folder = given.output / "adapters" / "0"
    config = replace(given, workdir=str(tmp_path / "run"), init_adapter=str(folder))
    (tmp_path / "config.txt").write_text(config_text.to_text(config))
    words = [sys.executable, "-c", FROM_ADAPTER_TO_ADAPTER, tmp_path / "config.txt", f"127.0.0.1:{free_port()}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    for status, _, error in ends(
        [
            subprocess.Popen(
                [*words, str(at)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for at in range(2)
        ]
    ):
        assert status == 0, error
    written, expected = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "run/adapters/1", folder))
    assert written.keys() == expected.keys() and len(written) == 2 * 7 * 6
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor)


# One collective by two processes.
SUM_OVER_PROCESSES = """
import sys
from gemma2_jax.cluster import hosts, platforms
from gemma2_jax.config import HostsConfig
platforms.prepare_process()
with hosts.process_group(HostsConfig(coordinator=sys.argv[1], count=2, index=int(sys.argv[2]))):
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((8,), rows, lambda index: np.arange(8.0)[index])
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
    text = f"sum {total}; compiled programs {platforms.describe_cache()}"
    print(text, flush=True)  # Gloo prints too, while the sum is computed
"""


@pytest.mark.parametrize(
    ("folders", "described"),
    [
        (("a", "b"), "not kept: the processes do not all see one folder for them; JAX_COMPILATION_CACHE_DIR names one"),
        (("a", "a"), "kept in {}/a (JAX_ENABLE_COMPILATION_CACHE=0 turns it off)"),
    ],
)
def test_the_folder_of_compiled_programs(folders, described, tmp_path):
    """One that all see, or none: XLA on GPUs has the processes that compile a program wait for one that has read it."""
    words = [sys.executable, "-c", SUM_OVER_PROCESSES, f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*words, str(index)],
            env=os.environ | cache_variables(tmp_path / folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, folder in enumerate(folders)
    ]
    for status, output, error in ends(processes):
        assert status == 0, error
        assert f"sum 28.0; compiled programs {described.format(tmp_path)}\n" in output
    kept = {path.parent.name for path in tmp_path.glob("*/*-cache")}
    assert kept == ({"a"} if folders == ("a", "a") else set())
    assert not list(tmp_path.glob("*/seen-by-all-*"))


@pytest.mark.exhaustive
def test_process_1_killed(tmp_path):
    processes = two(fsdp(tmp_path), options())
    while not (tmp_path / "config.txt").exists() and processes[0].poll() is None:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGKILL)
    ended = ends(processes)
    assert ended[0][0] == 1
    assert named(ended[0][2].removeprefix("tokenizing training data from python-docs\n"), processes[1], 1), ended[0][2]


@pytest.mark.exhaustive
def test_both_end_with_the_status_of_the_one_that_is_told(tmp_path):
    """Whether its signal ends it at once, or Python ignores it and the run ends before its first step."""
    processes = two(fsdp(tmp_path), options())
    while not (tmp_path / "config.txt").exists() and processes[0].poll() is None:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGUSR1)
    ended = ends(processes)
    assert [status for status, _, _ in ended] == [75, 75], ended
    assert "before the first step" in ended[1][2], ended


def test_a_folder_that_process_0_does_not_write_to_is_refused(tmp_path):
    """How one process fails; the test below says what becomes of the others then."""
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=f"^{elsewhere} is not the folder that process 0 writes to; give a --workdir"):
        resume._check_same_options(fsdp(elsewhere), elsewhere / "config.txt")


def test_a_process_that_fails_is_named(tmp_path):
    """Nothing waits for what will not come."""
    first, second = options()
    ended = ends(two(fsdp(tmp_path / "run"), [first, [*second, "optim.lr=0.5"]]))
    reason = "process 1 was not started like process 0: optim.lr was 0.0005 and is 0.5; give all of them"
    assert [status for status, _, _ in ended] == [1, 1], ended
    assert re.search(
        rf"^error: process 1 on \S+ \(pid \d+\) failed: \S*{reason}.*; every process ends here",
        ended[0][2],
        re.MULTILINE,
    )
    assert re.search(rf"^error: \S*{reason}", ended[1][2], re.MULTILINE)
    for _, _, error in ended:
        assert "Traceback" not in error
        assert "stack trace" not in error


def test_a_workdir_in_use_ends_every_process(tmp_path):
    with lock_workdir(tmp_path):
        ended = ends(two(fsdp(tmp_path), options()))
    for status, _, error in ended:
        assert status == 1
        assert f"another run writes to {tmp_path} (pid {os.getpid()} on {socket.gethostname()}); give another" in error
        assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def trained(text: str) -> Config:
    """The config of the training command in a script."""
    words = shlex.split(text.replace("\\\n", " ").partition("-m gemma2_jax.train ")[2].partition("\n")[0])
    return train.parse(words[: words.index("&")] if "&" in words else words).run


def test_example_for_slurm():
    path = ROOT / "examples" / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    config = trained(path.read_text())
    assert config.model.layers == 46
    assert config.mesh.tensor * config.mesh.stage == 16


def test_example_for_kubernetes():
    """It tells each pod all that `find` needs, under names that JobSet gives."""
    manifest = yaml.safe_load((ROOT / "examples" / "jobset.yaml").read_text())
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
    assert trained(container["args"][0]).model.layers == 46
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    found = place(environment | {"JOB_COMPLETION_INDEX": "1"})
    name = manifest["metadata"]["name"]
    assert found.coordinator.partition(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert found.count == spec["parallelism"] == spec["completions"] == 2
    assert spec["completionMode"] == "Indexed"
