"""Tokenizing and training that are killed with SIGKILL at random moments, on this CPU: what is lost, and what differs.

    python -m benchmarks.kills_data [--part tokenizing|hosts|training] [--seed 0]

Tokenizing: a corpus is tokenized by a process for each CPU. At a moment drawn at random the whole process group is
killed, or the parent alone, or one worker, and the same command is started again at once. Lost are the tokens of pieces
that were not whole. Each store that gets its name is compared, byte by byte, with one that nothing disturbed.

Hosts: two processes with hostnames of their own share a cache, as two jobs do. One builds and the other waits until the
first is killed. Giving a process a hostname needs `unshare` and the permission to use it.

Training: `tiny_lora` on a mixture of three sources with weights, which starts with an empty cache. It is killed at
random moments and resumed by one process, two, and one again, with another number of devices each time. Of every step,
the digests of the rows that the processes took are compared with those of a run that nothing disturbed.
"""

import contextlib
import filecmp
import hashlib
import json
import math
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.options import make_parser
from benchmarks.tokenizing import TOKENIZER, write_corpus

KINDS = ("group", "parent", "worker")
PARTS = ("tokenizing", "hosts", "training")
WEIGHTS = ("0.5", "0.3", "0.2")
STEPS, SAVE_EVERY = 120, 10
STARTS = ((1, 2), (2, 1), (1, 4), (2, 2))  # processes, and devices of each, which take turns


def build(corpus: Path, cache: Path) -> None:
    """Tokenizes the corpus, as a run does."""
    from gemma2_jax.config import DataConfig
    from gemma2_jax.data.encoding import load_tokenizer
    from gemma2_jax.data.store import build_store

    data = DataConfig(kind="text", train=str(corpus), eval="python-docs")
    build_store(data, "train", load_tokenizer(TOKENIZER), cache, show=True)


def train(log: Path, arguments: list[str]) -> None:
    """Trains as `python -m gemma2_jax.train` does, and writes down which rows each batch has."""
    from gemma2_jax.data.batches import Batches

    take = Batches.__next__

    def take_and_log(batches: Batches) -> dict:
        number = batches.get_state()["batches"]
        batch = take(batches)
        layout = batches.layout
        digests = [
            hashlib.blake2b(b"".join(batch[name][row].tobytes() for name in sorted(batch)), digest_size=8).hexdigest()
            for row in range(layout.share_rows)
        ]
        line = {"position": number, "first": layout.share_index * layout.share_rows, "rows": digests}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return batch

    Batches.__next__ = take_and_log
    sys.argv = ["gemma2_jax.train", *arguments]
    runpy.run_module("gemma2_jax.train", run_name="__main__")


def start_build(corpus: Path, cache: Path, *, hostname: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.kills_data", "--build", str(corpus), "--folder", str(cache)]
    if hostname:
        command = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', hostname, *command]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def list_children(parent: int) -> list[int]:
    """Processes whose parent is that one, and who have not ended."""
    children = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                state, ancestor = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(ancestor) == parent and state != "Z":
                    children.append(int(folder.name))
    return children


def is_alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(processes: list[int]) -> float:
    """Seconds until none of the processes is alive; an AssertionError after a minute."""
    began = time.monotonic()
    while any(map(is_alive, processes)):
        assert time.monotonic() < began + 60, f"of {processes}, some go on without their parent"
        time.sleep(0.002)
    return time.monotonic() - began


@dataclass
class Kept:
    """What a build that was killed has left."""

    tokens: int = 0  # of pieces that are whole
    lost: int = 0  # tokens of others
    files: int = 0


def count_kept(cache: Path) -> Kept:
    kept = Kept()
    for folder in cache.glob("*.partial"):
        with contextlib.suppress(OSError, IndexError):
            kept.tokens = json.loads((folder / "journal").read_text().rpartition("\n")[0].splitlines()[-1])["tokens"]
        done = kept.tokens
        for path in folder.rglob("piece-*.tokens"):
            whole = path.with_suffix(".report").exists()
            kept.tokens += path.stat().st_size // 4 * whole
            kept.lost += path.stat().st_size // 4 * (not whole)
        kept.lost += max(0, (folder / "tokens").stat().st_size // 4 - done) if (folder / "tokens").exists() else 0
    kept.files = sum(path.is_file() for path in cache.rglob("*"))
    return kept


def find_differences(left: Path, right: Path) -> list[str]:
    """Files that are not the same in two folders; those that one of them lacks are among them."""
    names = sorted({path.name for folder in (left, right) for path in folder.iterdir()})
    _, unlike, missing = filecmp.cmpfiles(left, right, names, shallow=False)
    return unlike + missing


def find_store(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


@dataclass
class Kills:
    """Builds that are killed: a row of the table for each kill."""

    corpus: Path
    folder: Path
    random: random.Random
    seconds: float  # of a build that is not disturbed
    rows: list[tuple] = field(default_factory=list)
    stores: int = 0  # that got their names
    different: list[str] = field(default_factory=list)

    def run(self, kills: int, expected: Path) -> None:
        """Builds until there have been so many kills, and once more to the end."""
        while len(self.rows) < kills:
            cache = self.folder / f"cache-{self.stores}"
            while not self._disturb(cache, last=len(self.rows) >= kills):
                pass
            self.stores += 1
            store = find_store(cache)
            self.different += find_differences(store, expected)
            assert {path.name for path in cache.iterdir()} == {store.name, f"{store.name}.lock"}, "files are left over"
            shutil.rmtree(cache)

    def _disturb(self, cache: Path, *, last: bool) -> bool:
        """One start, which is killed unless it is the last or ends before its time. True if the store is whole."""
        kind = self.random.choice(KINDS)
        moment = self.random.uniform(0.2, 0.8) * self.seconds
        parent, began = start_build(self.corpus, cache), time.monotonic()
        workers = []
        while parent.poll() is None and (last or time.monotonic() < began + moment):
            time.sleep(0.01)
        if parent.poll() is None:
            workers = list_children(parent.pid)
            kind = kind if workers else "group"
            if kind == "worker":
                os.kill(self.random.choice(workers), signal.SIGKILL)
            else:
                (os.killpg if kind == "group" else os.kill)(parent.pid, signal.SIGKILL)
        error = parent.communicate()[1]
        if parent.returncode == 0:
            return True
        if kind == "worker":
            assert "ended by itself" in error, error
        else:
            assert parent.returncode == -signal.SIGKILL, error
        kept = count_kept(cache)
        # Half of the time the next start comes while workers without a parent may still be there.
        ended = wait_for_end(workers) if self.random.random() < 0.5 else None
        self.rows.append((kind, moment, kept, ended, self.stores))
        return False


def run_tokenizing(console, megabytes: int, kills: int, seed: int) -> None:
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        write_corpus(corpus, megabytes)
        began = time.monotonic()
        start_build(corpus, folder / "undisturbed").communicate()
        seconds = time.monotonic() - began
        expected = find_store(folder / "undisturbed")
        total = (expected / "tokens").stat().st_size // 4
        test = Kills(corpus=corpus, folder=folder, random=random.Random(seed), seconds=seconds)
        test.run(kills, expected)
    table = Table(
        title=f"{megabytes} MB, {total:,} tokens, {seconds:.1f} s undisturbed, on {len(os.sched_getaffinity(0))} CPUs"
    )
    for column in (
        "store",
        "killed",
        "after, s",
        "tokens kept",
        "tokens lost",
        "of all",
        "files left",
        "workers ended, s",
    ):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for kind, moment, kept, ended, store in test.rows:
        table.add_row(
            str(store), kind, f"{moment:.1f}", f"{kept.tokens:,}", f"{kept.lost:,}", f"{kept.lost / total:.1%}",
            str(kept.files), "not waited" if ended is None else f"{ended:.3f}",
        )  # fmt: skip
    console.print(table)
    lost = sum(kept.lost for _, _, kept, _, _ in test.rows) / len(test.rows) / total
    verdict = f"differ in {test.different}" if test.different else "are equal, byte for byte"
    console.print(
        f"{len(test.rows)} kills lost {lost:.1%} of the work each, on average; the {test.stores} stores that got their "
        f"names and the undisturbed one {verdict}"
    )


def run_hosts(console, megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, cache = folder / "corpus", folder / "cache"
        corpus.mkdir()
        write_corpus(corpus, megabytes)
        start_build(corpus, folder / "undisturbed").communicate()
        for kind in ("group", "parent"):
            first = start_build(corpus, cache, hostname="host-a")
            while not list(cache.glob("*.partial/journal")):
                assert first.poll() is None, first.communicate()[1]
                time.sleep(0.01)
            second = start_build(corpus, cache, hostname="host-b")
            time.sleep(4)  # it has started by then, and waits
            assert first.poll() is None and second.poll() is None, "the corpus is too small for this"
            waited = not list_children(second.pid)
            (os.killpg if kind == "group" else os.kill)(first.pid, signal.SIGKILL)
            killed = time.monotonic()
            while not list_children(second.pid) and second.poll() is None:
                time.sleep(0.002)
            seconds = time.monotonic() - killed
            first.communicate()
            said = second.communicate()[1].strip().splitlines()
            assert second.returncode == 0, said
            different = find_differences(find_store(cache), find_store(folder / "undisturbed"))
            console.print(
                f"host-a was killed ({kind}): host-b {'waited for it' if waited else 'did not wait'}, and went on "
                f"{seconds:.2f} s after; files that differ: {different or 'none'}; it said:"
            )
            console.print(*[f"    {line}" for line in said], sep="\n", markup=False, highlight=False)
            shutil.rmtree(cache)


def write_sources(folder: Path) -> str:
    """Three sources of documents, and what --data.train says of them."""
    from gemma2_jax.data import python_docs

    texts, numbers = [*python_docs.python_documents().values()], random.Random(0)
    for name, megabytes in (("a", 8), ("b", 5), ("c", 1)):
        with (folder / f"{name}.jsonl").open("w") as file:
            while file.tell() < megabytes * 1e6:
                file.write(json.dumps({"text": f"{numbers.choice(texts)} {numbers.random()}"}) + "\n")
    return ",".join(f"{weight}*{folder}/{name}.jsonl" for weight, name in zip(WEIGHTS, "abc", strict=True))


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def start_training(folder: Path, sources: str, processes: int, devices: int, log: Path) -> list[subprocess.Popen]:
    """Processes of one run, which write down their batches in files of their own that begin with `log`."""
    options = [
        "--config", "tiny_lora", f"workdir={folder / 'run'}", f"data.train={sources}", "data.kind=text",
        f"data.cache={folder / 'cache'}", f"steps={STEPS}", "train.sequence_length=64", "train.global_batch_size=8",
        "train.micro_batch_size=1", f"train.checkpoint_every={SAVE_EVERY}", "train.eval_every=60",
        "train.eval_batches=2", "train.log_every=1", "mesh.data=1", f"mesh.fsdp={processes * devices}",
    ]  # fmt: skip
    if processes > 1:
        options += [f"hosts.coordinator=127.0.0.1:{free_port()}", f"hosts.count={processes}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills_data", "--train", f"{log}-{index}", *options]
            + [f"hosts.index={index}"] * (processes > 1),
            env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip


def read_batches(logs: list[Path]) -> Iterator[tuple[int, int, str]]:
    """The number of a batch, that of a row in it, and the row's digest, of each row that was taken."""
    for log in logs:
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # of the last line, which a kill has cut
                entry = json.loads(line)
                position = entry["position"]
                for row, digest in enumerate(entry["rows"]):
                    yield json.dumps(position), entry["first"] + row, digest


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def read_losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@dataclass
class Trainings:
    """One run that is killed and resumed: a row of the table for each start."""

    folder: Path
    sources: str
    random: random.Random
    seconds: float  # of a run that is not disturbed
    expected: dict[tuple[str, int], str]  # its rows: digests by batch and place
    rows: list[tuple] = field(default_factory=list)
    found: dict[tuple[str, int], str] = field(default_factory=dict)  # the rows of all starts
    wrong: int = 0  # rows that were not those expected

    def start(self, *, last: bool) -> bool:
        """One start, which is killed unless it is the last or ends before. True if the run is finished."""
        number = len(self.rows)
        processes, devices = STARTS[number % len(STARTS)]
        log, began = self.folder / f"log-{number}", time.monotonic()
        running = start_training(self.folder, self.sources, processes, devices, log)
        self._wait_for_moment(running, Path(f"{log}-0"), last=last)
        moment = time.monotonic() - began
        victim, *others = self.random.sample(running, len(running))
        kind = self.random.choice(KINDS[:2])
        workers = [child for process in running for child in list_children(process.pid)]
        if victim.poll() is None:
            (os.killpg if kind == "group" else os.kill)(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        outputs = [process.communicate(timeout=120)[0] for process in (victim, *others)]
        ended = time.monotonic() - killed
        wait_for_end(workers)
        finished = all(process.returncode == 0 for process in running)
        assert finished or victim.returncode == -signal.SIGKILL, "\n".join(outputs)
        taken = {(batch, row): digest for batch, row, digest in read_batches([*self.folder.glob(f"{log.name}-*")])}
        wrong = sum(self.expected.get(place) != digest for place, digest in taken.items())
        self.wrong += wrong
        self.found |= taken
        saved = [int(path.name) for path in (self.folder / "run/checkpoints").glob("*") if path.name.isdigit()]
        what = ("", "", "") if finished else (kind, f"{moment:.1f}", f"{ended:.1f}")
        self.rows.append((f"{processes} x {devices}", *what, f"{len(taken):,}", str(wrong), str(max(saved, default=0))))
        return finished

    def _wait_for_moment(self, running: list[subprocess.Popen], log: Path, *, last: bool) -> None:
        """Returns when it is time to kill, or when the processes have ended.

        A quarter of the kills come before the first batch: while data is read, or the program is compiled.
        """
        batches = self.random.randint(1, 3 * SAVE_EVERY) if len(self.rows) % 4 else 0
        delay = self.random.uniform(0, 0.3 if batches else 0.4 * self.seconds)
        due = math.inf
        while any(process.poll() is None for process in running) and time.monotonic() < due:
            if due == math.inf and not last and count_lines(log) >= batches:
                due = time.monotonic() + delay
            time.sleep(0.01)


def list_names(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*")}


def run_training(console, kills: int, seed: int) -> None:
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        straight, broken = folder / "straight", folder / "broken"
        straight.mkdir()
        broken.mkdir()
        sources = write_sources(folder)
        began = time.monotonic()
        (process,) = start_training(straight, sources, 1, 2, straight / "log")
        output = process.communicate()[0]
        assert process.returncode == 0, output
        test = Trainings(
            folder=broken,
            sources=sources,
            random=random.Random(seed),
            seconds=time.monotonic() - began,
            expected={(batch, row): digest for batch, row, digest in read_batches([straight / "log-0"])},
        )
        while not test.start(last=len(test.rows) >= kills):
            pass
        losses = [read_losses(path / "run") for path in (straight, broken)]
        others = list_names(straight / "cache") ^ list_names(broken / "cache")
    table = Table(title=f"tiny_lora on a mixture of three sources, {STEPS} steps, {test.seconds:.0f} s undisturbed")
    for column in ("processes x devices", "killed", "after, s", "ended, s", "rows taken", "wrong rows", "saved step"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for row in test.rows:
        table.add_row(*row)
    console.print(table)
    assert losses[0].keys() == losses[1].keys(), "a step is missing"
    error = max(abs(losses[1][step] / loss - 1) for step, loss in losses[0].items())
    same = "are" if test.found == test.expected and not test.wrong else "are not"
    console.print(
        f"all {len(test.expected):,} rows of {STEPS} batches {same} those of the undisturbed run, bit for bit; losses "
        f"of steps differ by at most {error:.1e} of their size, and the last are {losses[1][STEPS]:.6f} and "
        f"{losses[0][STEPS]:.6f}; files of one cache that the other lacks: {sorted(others) or 'none'}"
    )


def main() -> None:
    parser = make_parser("kills_data", __doc__)
    parser.add_argument("--part", choices=PARTS, help="one part alone")
    parser.add_argument("--megabytes", type=int, default=100, help="of JSONL that is tokenized")
    parser.add_argument("--kills", type=int, default=20, help="of the builds; training is killed 8 times")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is killed")
    parser.add_argument("--build", type=Path, help="tokenize that corpus, which is what this benchmark starts")
    parser.add_argument("--folder", type=Path)
    if sys.argv[1:2] == ["--train"]:  # LOG and the options of training, which this benchmark starts too
        train(Path(sys.argv[2]), sys.argv[3:])
        return
    options = parser.parse_args()
    if options.build:
        build(options.build, options.folder)
        return
    from rich.console import Console

    console = Console(width=120)
    if options.part in (None, "tokenizing"):
        run_tokenizing(console, options.megabytes, options.kills, options.seed)
    if options.part in (None, "hosts"):
        run_hosts(console, options.megabytes)
    if options.part in (None, "training"):
        run_training(console, 8, options.seed)


if __name__ == "__main__":
    main()
