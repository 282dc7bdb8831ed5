"""The processes of one run: which of them this one is, how they start, and how they end together.

`find_place` reads flags and environment; `process_group` is a context manager around all that the processes do
together. When one of them fails, is killed or loses its host, each of the others says which and ends: see
`coordinator`. Nothing here divides work or data. JAX is imported only if there are several processes.
"""

import atexit
import contextlib
import faulthandler
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemma2_jax.cluster import jax_internals, platforms
from gemma2_jax.cluster.coordinator import PREPARING, SILENCE_SECONDS, enable_keepalive
from gemma2_jax.command_line import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NOT_FINITE, EXIT_STOPPED, EXIT_STUCK, fold
from gemma2_jax.config import HostsConfig

PATIENCE_SECONDS = 300  # for which each process waits for the others at the start
_RESUMES = "The same command resumes after the newest checkpoint"
_STDERR = 2  # in a notebook, sys.stderr is no file
_VERDICT_SECONDS = 15  # for which a process that is stuck waits for what the coordinator says of it
INTERRUPT = "Ctrl-C"  # what SIGINT is called
_PERIOD_SECONDS = 1.0  # between heartbeats before the steps
_LAST_WORDS_SECONDS = 5  # in which a failing process can print why it fails
_BARRIER_SECONDS = 24 * 3600  # for which process 0 may tokenize; a process that fails ends the run sooner
_OPTIONS = {"coordinator": "--hosts.coordinator HOST:PORT", "count": "--hosts.count N", "index": "--hosts.index I"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those of the run."""

    coordinator: str = ""  # host:port
    count: int = 1
    index: int = 0
    devices: tuple[int, ...] | None = None  # this process's own accelerators of its host; None: all that it sees
    source: str = ""  # where this was read: flags, a launcher

    def __str__(self) -> str:
        if self.count == 1:
            return "1 process" + (f" ({self.source})" if self.source else "")
        return f"{self.count} processes, found from {self.source}"


def find_place(config: HostsConfig, environment: Mapping[str, str]) -> Place:
    """This process's place, by flags, then JAX's variables, then a launcher's; one process if none names others.

    Raises ValueError if they give only a part of it.
    """
    flags = {"coordinator": config.coordinator, "count": config.count or "", "index": config.index}
    sources = {
        "flags": {name: value for name, value in flags.items() if value not in ("", -1)},
        "JAX's variables": _read_variables(environment),
        "Open MPI": _read_open_mpi(environment),
        "SLURM": _read_slurm(environment),
        "Kubernetes": _read_kubernetes(environment),
    }
    found: dict = {}
    for answers in reversed(sources.values()):
        found |= answers
    remark = found.pop("remark", "")
    if found.get("count") == 1 or not (found.keys() & {"coordinator", "count"} or "index" in sources["flags"]):
        return Place(source=remark)
    missing = [name for name in _OPTIONS if name not in found]
    if missing:
        raise ValueError(
            f"{' and '.join(f'hosts.{name}' for name in found if name in _OPTIONS)} given, but not "
            f"{' and '.join(f'hosts.{name}' for name in missing)}: give every process "
            f"{' '.join(_OPTIONS[name] for name in missing)}, or start them with srun, mpirun or a Kubernetes JobSet"
        )
    if found["index"] >= found["count"]:
        raise ValueError(
            f"this is process {found['index']} of {found['count']}, but processes count from 0; "
            "give as many indices as hosts.count says"
        )
    return Place(**found, source=next(name for name, answers in sources.items() if "index" in answers))


def _read_variables(environment: Mapping[str, str]) -> dict:
    """Reads the variables that JAX and its Kubernetes operators use."""
    answers: dict = {}
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        answers["coordinator"] = address
    for name, variable in (("count", "JAX_NUM_PROCESSES"), ("index", "JAX_PROCESS_ID")):
        if variable in environment:
            answers[name] = int(environment[variable])
    return answers


def _read_open_mpi(environment: Mapping[str, str]) -> dict:
    """Reads what mpirun sets. It says where process 0 is only in version 4, or if all are on one host."""
    count = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if count == 1:
        return {}
    local_index, local_count = (int(environment[f"OMPI_COMM_WORLD_LOCAL_{name}"]) for name in ("RANK", "SIZE"))
    answers: dict = {"count": count, "index": int(environment["OMPI_COMM_WORLD_RANK"])}
    answers |= _own_device(local_index, local_count, environment)
    launcher = environment.get("OMPI_MCA_orte_hnp_uri", "")  # such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    job = launcher.partition(";")[0] or environment.get("PMIX_NAMESPACE", "")
    if local_count == count:
        answers["coordinator"] = f"127.0.0.1:{_choose_port(job)}"
    elif address := re.search(r"tcp://([^,:]+)", launcher):
        answers["coordinator"] = f"{address[1]}:{_choose_port(job)}"
    return answers


def _read_slurm(environment: Mapping[str, str]) -> dict:
    """Reads what srun sets for each task. The shell of salloc and the script of sbatch are not tasks of the job."""
    count = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1:
        tasks = int(environment.get("SLURM_NTASKS", 1))
        return {"remark": f"not started by srun, though SLURM has {tasks} tasks"} if tasks > 1 else {}
    # Nodes are written like node[07-08,11],other; tasks on each of them like 8(x2),4.
    host = re.split(r",(?![^\[]*\])", environment["SLURM_STEP_NODELIST"])[0]
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", host)
    tasks = [
        int(tasks)
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
        for _ in range(int(times or 1))
    ]
    local_count = tasks[int(environment["SLURM_NODEID"])]
    job = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    return {
        "coordinator": f"{host}:{_choose_port(job)}",
        "count": count,
        "index": int(environment["SLURM_PROCID"]),
        **_own_device(int(environment["SLURM_LOCALID"]), local_count, environment),
    }


def _read_kubernetes(environment: Mapping[str, str]) -> dict:
    """Reads what Kubernetes sets in each pod of an Indexed Job. The manifest must set the rest, in JAX's variables."""
    index = environment.get("JOB_COMPLETION_INDEX")
    return {} if index is None else {"index": int(index)}


def _own_device(local_index: int, local_count: int, environment: Mapping[str, str]) -> dict:
    """This process's accelerator, if `local_count` processes share those of the host.

    Empty if the launcher has already divided the accelerators, or the process has its host to itself.
    """
    divided = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return {} if local_count == 1 or divided else {"devices": (local_index,)}


def _choose_port(job: str) -> int:
    """A port that is the same for all processes of a job, above the range that Linux takes for outgoing connections."""
    return 61440 + zlib.crc32(job.encode()) % 4096


@contextlib.contextmanager
def process_group(config: HostsConfig) -> Iterator[None]:
    """Joins the processes of a run for the time of the block. JAX must not have looked for devices before.

    Raises ValueError if this process's place is unclear, and OSError if the others cannot be reached. If another
    process fails during the block, this one ends.
    """
    place = find_place(config, os.environ)
    if place.count == 1:
        platforms.check_platform()
        yield
        return
    with _run_coordinator(place), _connect_coordinator(place) as connection, _publish(connection), end_when_told():
        import jax

        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and go on
        watch = threading.Thread(target=connection.watch, daemon=True)
        watch.start()
        threading.Thread(target=connection.send_first_heartbeats, daemon=True).start()
        try:
            # JAX starts a service in process 0, which nobody uses: the coordinator's outlives process 0.
            jax.distributed.initialize(
                connection.service,
                place.count,
                place.index,
                place.devices,
                cluster_detection_method="deactivate",
                coordinator_bind_address="127.0.0.1:0",
            )
            platforms.restrict_cache(place.index)
            yield
            # Process 0 may still print or read for minutes, and JAX's own wait for it at the end is a short one.
            wait_for_processes("shutdown")
            jax.distributed.shutdown()
        except BaseException as error:
            interrupted, status = isinstance(error, KeyboardInterrupt), exit_status(error)
            reason = "was interrupted" if interrupted else f"failed: {(str(error) or repr(error)).splitlines()[0]}"
            if _is_peer_failure(error):
                connection.suspect(reason)
                watch.join(SILENCE_SECONDS + 5)  # by then the coordinator has named the process that failed
            connection.leave(reason, status)
            _schedule_exit(status)
            raise
        connection.leave()


@contextlib.contextmanager
def process_zero_first(block: str) -> Iterator[None]:
    """Lets process 0 finish the block of this name before the others begin it, and find what process 0 wrote."""
    import jax

    if jax.process_index() > 0:
        wait_for_processes(block)
    yield
    if jax.process_index() == 0:
        wait_for_processes(block)


def wait_for_processes(moment: str) -> None:
    """Returns when every process of the run has called this for the same `moment`; at once for one process.

    On CPU the first collective of a group of devices gives up when one of them is 30 seconds late (Gloo's rendezvous).
    A process may be late because it compiles what another read from the cache, or reads weights from a slower disk.
    """
    import jax

    if jax.distributed.is_initialized():
        jax_internals.wait_for_all(moment, _BARRIER_SECONDS)


def gather_answers(question: str, answer: str, seconds: float = _BARRIER_SECONDS) -> list[str]:
    """The answers of all processes to a question, by index, of which this process gives one; its own for one process.

    A run asks a question once, of all its processes. Any thread may ask, as no device takes part. Raises TimeoutError
    where an answer has not come after so many seconds.
    """
    import jax

    if not jax.distributed.is_initialized():
        return [answer]
    try:
        return jax_internals.gather_answers(question, answer, math.ceil(seconds))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"not every process has answered {question} after {seconds:.0f} s") from error


class Terminated(KeyboardInterrupt):
    """This process was told to end, by SIGTERM or SIGUSR1, at a moment at which there is nothing to save."""


@contextlib.contextmanager
def end_when_told() -> Iterator[None]:
    """Has SIGTERM and SIGUSR1 raise Terminated during the block, as Ctrl-C raises KeyboardInterrupt.

    Python ignores what is raised within a callback of its garbage collector, as JAX has one, and in destructors; so the
    signal is noted as well: `ignored_signal`.
    """

    def end(number: int, frame: object) -> None:
        global _signal
        _signal = INTERRUPT if number == signal.SIGINT else signal.Signals(number).name
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(_signal)

    global _signal
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    if former[signal.SIGINT] != signal.default_int_handler:  # it is ignored, as in the background
        del former[signal.SIGINT]
    for number in former:
        signal.signal(number, end)
    try:
        yield
    finally:
        _signal = ""
        for number, handler in former.items():
            signal.signal(number, handler)


def ignored_signal() -> str:
    """The signal by which this process was told to end and did not; empty if there was none."""
    return _signal


def exit_status(error: BaseException) -> int:
    """The status that a command ends with for this error: `docs/running.md` lists them."""
    kinds = {
        Terminated: EXIT_STOPPED,
        KeyboardInterrupt: EXIT_INTERRUPTED,
        TimeoutError: EXIT_STUCK,
        FloatingPointError: EXIT_NOT_FINITE,
    }
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), EXIT_FAILED)


def post_notice(topic: str, text: str) -> None:
    """Tells all processes of the run, in place of what was posted of this topic before."""
    jax_internals.post_notice(topic, text)


def read_notice(topic: str) -> str:
    """What a process of the run has posted of this topic; empty if none has. No device takes part."""
    return jax_internals.read_notice(topic)


def send_heartbeat(doing: str) -> None:
    """Tells the coordinator that this process lives, and what it is doing; nothing where it is the only one.

    An empty text says that its steps are over, from which on it sends none.
    """
    if _connection is not None:
        _connection.send_heartbeat(doing)


def end_stuck(reason: str) -> None:
    """Ends all processes of the run with EXIT_STUCK, with what their threads are doing, as this one is stuck.

    `reason` is what it has been doing, for how long. It is said, and nothing ends, where the process is an interactive
    session, which is not ours to end.
    """
    if _connection is not None:
        _connection.report_stuck(reason)
        time.sleep(_VERDICT_SECONDS)  # in which `watch` ends this process
    _end_process(f"process {os.getpid()} on {socket.gethostname()} {reason}", EXIT_STUCK)


@contextlib.contextmanager
def _publish(connection: "_CoordinatorConnection") -> Iterator[None]:
    """Has `send_heartbeat` and `end_stuck` use this connection during the block."""
    global _connection
    _connection = connection
    try:
        yield
    finally:
        _connection = None


def write_stderr(text: str) -> None:
    """Writes to standard error at any moment, as it takes no lock; not where that cannot be, as its disk is full."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, text.encode(errors="backslashreplace"))


def _end_process(reason: str, status: int) -> None:
    """Ends this process, whatever its threads are doing, which is printed first where one of them is stuck."""
    is_stuck = status == EXIT_STUCK
    if os.isatty(_STDERR):  # a progress bar has hidden the cursor, and not ended its line
        write_stderr("\x1b[?25h\n")
    if is_stuck:
        faulthandler.dump_traceback(_STDERR)
    if is_stuck and hasattr(sys, "ps1"):
        write_stderr(fold(f"warning: {reason}") + "\n")
        return
    write_stderr(fold(f"error: {reason}; every process ends here. {_RESUMES}") + "\n")
    os._exit(status)


@contextlib.contextmanager
def _run_coordinator(place: Place) -> Iterator[None]:
    """Runs the coordinator's process during the block, if this is process 0."""
    if place.index != 0:
        yield
        return
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        )
    except OSError as error:
        raise OSError(
            f"the processes cannot meet at {place.coordinator}: {error}; give all of them another --hosts.coordinator"
        ) from error
    with listener:
        command = [sys.executable, "-m", "gemma2_jax.cluster.coordinator", f"--listener={listener.fileno()}"]
        process = subprocess.Popen(
            [*command, f"--count={place.count}", f"--patience={PATIENCE_SECONDS}"],
            pass_fds=[listener.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
    yield
    process.wait()


class _CoordinatorConnection:
    """This process's connection to the coordinator."""

    def __init__(self, connection: socket.socket, place: Place):
        self._socket, self._lines, self._left = connection, connection.makefile(), False
        self._sending = threading.Lock()  # as several threads send
        self._at_steps = threading.Event()
        enable_keepalive(connection)
        self._send(index=place.index, count=place.count, host=socket.gethostname(), pid=os.getpid())
        hello = self._receive() or {"verdict": "it ended"}
        if "verdict" in hello:
            raise OSError(f"the processes could not meet at {place.coordinator}: {hello['verdict']}")
        self.service = f"{_coordinator_host(place)}:{hello['service']}"
        self._first_process = hello["first_process"]

    def send_first_heartbeats(self) -> None:
        """Sends a heartbeat every second until the first of `send_heartbeat`, which is that of a step."""
        while not self._at_steps.is_set():
            self._send(heartbeat=PREPARING)
            self._at_steps.wait(_PERIOD_SECONDS)

    def send_heartbeat(self, doing: str) -> None:
        self._at_steps.set()
        self._send(heartbeat=doing)

    def report_stuck(self, reason: str) -> None:
        """Says that this process is stuck, for which the coordinator ends the run."""
        self._send(stuck=reason)

    def suspect(self, reason: str) -> None:
        """Says why a collective failed, for which the coordinator ends the run if another process is silent."""
        self._send(suspicion=reason)

    def leave(self, reason: str = "", status: int = 0) -> None:
        """Says that this process is done, or why it fails, and with which status."""
        self._left = True
        self._send(end=reason, status=status)

    def watch(self) -> None:
        """Waits until another process has failed, and then ends this one, whatever it is doing."""
        lost = {"verdict": f"{self._first_process} stopped answering, and the coordinator there", "status": EXIT_FAILED}
        message = self._receive() or lost
        if not self._left:
            _end_process(message["verdict"], message["status"])

    def _send(self, **message: object) -> None:
        with self._sending, contextlib.suppress(OSError):  # `watch` notices a lost connection too
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> dict | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._lines.readline())


_connection: _CoordinatorConnection | None = None  # of this process, while it is one of several
_signal = ""  # by which this process was told to end


def _coordinator_host(place: Place) -> str:
    return "127.0.0.1" if place.index == 0 else place.coordinator.rpartition(":")[0]


@contextlib.contextmanager
def _connect_coordinator(place: Place) -> Iterator[_CoordinatorConnection]:
    """Connects to the coordinator, and waits until all processes have."""
    address, deadline = _coordinator_host(place).strip("[]"), time.monotonic() + PATIENCE_SECONDS
    if place.index == 0:
        print(f"waiting for {place.count - 1} more process(es) at {place.coordinator}", flush=True)
    while True:
        try:
            connection = socket.create_connection((address, int(place.coordinator.rpartition(":")[2])), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(
                    f"nothing answered at {place.coordinator} for {PATIENCE_SECONDS} s ({error}); is process 0 "
                    "running, and is that a port of its host which this one may reach?"
                ) from error
            time.sleep(0.5)
    connection.settimeout(None)
    with connection:
        yield _CoordinatorConnection(connection, place)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)


def _is_peer_failure(error: BaseException | None) -> bool:
    """Whether a collective may have raised this as another process is gone: any XLA error but lack of memory."""
    from jax.errors import JaxRuntimeError

    while error is not None:
        if isinstance(error, JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__
    return False


def _schedule_exit(status: int) -> None:
    """Lets this process print its error, and ends it even if one of its threads waits for other processes."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)
    timer = threading.Timer(_LAST_WORDS_SECONDS, end)
    timer.daemon = True
    timer.start()
