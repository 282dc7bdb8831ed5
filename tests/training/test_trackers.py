"""Where metrics go: the same lines to all, to the same page when a run resumes, and no service stops training."""

import shutil
import struct
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small_runs import ROOT, lines_of, small

from gemma2_jax.training import loop, trackers

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes of the tiny model name assets/ relative to the repository."""
    monkeypatch.chdir(ROOT)


def tracked(tmp_path, steps=1, **fields):
    config = small("tiny_lora", tmp_path, steps=steps)
    return replace(config, train=replace(config.train, **fields))


@pytest.mark.parametrize(
    ("field", "value", "package"),
    [("tensorboard", True, "tensorboardX"), ("wandb", "a-project", "wandb"), ("mlflow", "an-experiment", "mlflow")],
)
def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch, field, value, package):
    monkeypatch.setitem(sys.modules, package, None)  # not installed
    with pytest.raises(ValueError, match=rf"train.{field} is {value!r}, .* pip install 'gemma2-jax\[{field}\]'"):
        loop.train(tracked(tmp_path / "run", **{field: value}))
    assert not (tmp_path / "run").exists()


class FakeWandb:
    """What of wandb is used. A page that is known has had lines up to step 3."""

    errors = SimpleNamespace(UsageError=KeyError)

    def __init__(self):
        self.started, self.logged, self.finished = [], [], []

    def login(self, *, verify):
        assert not verify, "the service need not answer"

    def init(self, **options):
        known = any(options["id"] == other["id"] for other in self.started)
        self.started.append(options)
        return SimpleNamespace(
            step=4 if known else 0,
            log=lambda line, step: self.logged.append((step, line)),
            finish=lambda exit_code: self.finished.append(exit_code),
        )

    Html = staticmethod(str)


def test_wandb_gets_the_same_lines(tmp_path, monkeypatch):
    """It goes on with its page when the run resumes, and a new run in the same folder has a new one."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tracked(tmp_path / "run", steps=2, wandb="a-project", checkpoint_every=1)
    loop.train(config)
    assert {"project": "a-project", "name": "run", "resume": "allow"}.items() <= fake.started[0].items()
    assert fake.started[0]["config"]["optim.lr"] == "0.005"
    lines = lines_of(config.output)
    assert len(fake.logged) == len(lines) == 6
    for (step, sent), line in zip(fake.logged, lines, strict=True):
        assert sent | {"step": step, "time": line["time"]} == line
    loop.train(replace(config, steps=4))
    assert [step for step, _ in fake.logged[6:]] == [4, 4, 4], "the page has step 3 from before"
    (config.output / "checkpoints").rename(tmp_path / "moved")
    loop.train(config)
    ids = [options["id"] for options in fake.started]
    assert ids[0] == ids[1] != ids[2]
    assert fake.finished == [0, 0, 0]


def test_wandb_without_a_key_is_refused(tmp_path, monkeypatch):
    def refuse(**_):
        raise KeyError("no key")

    fake = FakeWandb()
    fake.login = refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match=r"W&B has no key of yours; run wandb login.*WANDB_MODE=offline"):
        loop.train(tracked(tmp_path / "run", wandb="a-project"))
    assert not (tmp_path / "run").exists()


def read_events(folder):
    """What TensorBoard's files hold, as (tag, step, value), oldest file first, and where each file begins to count."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    events, starts = [], []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            starts += [event.step] if event.HasField("session_log") else []
            events += [(value.tag, event.step, value) for value in event.summary.value]
    return events, starts


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """Read back by TensorBoard's own messages; a run that resumes says from which step on older events do not count."""
    pytest.importorskip("tensorboardX")
    config = tracked(tmp_path, steps=3, tensorboard=True, checkpoint_every=2)
    loop.train(config)
    events, starts = read_events(tmp_path / "tensorboard")
    assert starts == [1]
    read = {(tag, step): value.simple_value for tag, step, value in events if value.HasField("simple_value")}
    expected = {
        (name, line["step"]): number
        for line in lines_of(tmp_path)
        for name, number in line.items()
        if name not in ("step", "time")
    }
    assert read.keys() == expected.keys() and ("eval_loss", 0) in read and ("checkpoint_seconds", 2) in read
    assert [*read.values()] == pytest.approx([expected[key] for key in read], rel=1e-6)
    texts = {tag: value.tensor.string_val[0].decode() for tag, _, value in events if value.HasField("tensor")}
    assert "    optim.lr = 0.005\n" in texts["config/text_summary"]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    time.sleep(1)  # its files are named by the second
    loop.train(config)
    assert read_events(tmp_path / "tensorboard")[1] == [1, 3]


@pytest.mark.parametrize("cut", ["", '{"step": 3, "lo', '{"step": 2, "loss": 1.5}'])
def test_lines_that_a_kill_has_cut_are_dropped(cut, tmp_path):
    """A line without its end may be whole; the next would be written behind it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n' + cut)
    trackers.truncate_metrics(path, 2)
    kept = [1, 2] + [2] * cut.endswith("}")
    assert path.read_text().endswith("\n")
    assert [line["step"] for line in lines_of(tmp_path)] == kept
    path.write_text('{"step": 1}')
    trackers.truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_damaged_lines_are_dropped(tmp_path):
    """As a power failure or a disk leaves them: the run goes on from its checkpoint all the same."""
    path = tmp_path / "metrics.jsonl"
    damaged = [b"\0" * 40, b"[" * 100_000, b'{"step": "1"}', b'{"step": null}', b"\xff", b'{"step": 1e999}', b"7"]
    path.write_bytes(b"\n".join([b'{"step": 1}', *damaged, b'{"step": 2}', b""]))
    trackers.truncate_metrics(path, 2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_texts_of_lines():
    line = {"step": 3, "event": "skip", "text": "step 3 was skipped", "time": 1.0}
    assert (trackers.list_numbers(line), trackers.list_texts(line)) == ({}, {"skip": "step 3 was skipped"})
    line = {"step": 3, "samples": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]}
    assert trackers.list_texts(line) == {"samples": "prompt: a\ncompletion: b\n\nprompt: c\ncompletion: d"}


def test_mlflow_gets_the_same_numbers(tmp_path, monkeypatch):
    """With its config once, and into its run again when it resumes."""
    called = []

    class FakeMLflow:
        def __getattr__(self, name):
            return lambda *arguments, **options: called.append((name, arguments, options)) or run

    run = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    monkeypatch.setitem(sys.modules, "mlflow", FakeMLflow())
    config = tracked(tmp_path, mlflow="an experiment", steps=1)
    loop.train(config)
    names = [name for name, _, _ in called]
    assert names == ["set_experiment", "start_run", "log_params", *["log_metrics"] * 4, "end_run"]
    assert called[1][2] == {"run_id": None, "run_name": tmp_path.name}
    assert called[2][1][0]["optim.lr"] == "0.005"
    for (_, (numbers,), options), line in zip(called[3:7], lines_of(tmp_path), strict=True):
        assert numbers | {"step": options["step"], "time": line["time"]} == line
    called.clear()
    loop.train(replace(config, steps=2))
    assert [name for name, _, _ in called][:3] == ["set_experiment", "start_run", "log_metrics"]
    assert called[1][2] == {"run_id": "abc", "run_name": None}
    assert called[-1] == ("end_run", ("FINISHED",), {})


def test_secrets_are_not_sent(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tracked(tmp_path, wandb="a-project")
    url = "https://me:secret@host/a.jsonl?X-Amz-Signature=1234"
    config = replace(config, data=replace(config.data, train=url, eval="s3://bucket/b.jsonl"))
    trackers.Wandb(config, 0).open()
    sent = fake.started[0]["config"]
    assert sent["data.train"] == "'https://***@host/a.jsonl?***'"
    assert sent["data.eval"] == "'s3://bucket/b.jsonl'"


class Failing:
    """A tracker that raises at what it is told to."""

    def __init__(self, *failing):
        self.failing, self.logged, self.closed = failing, [], []

    def open(self):
        self.call("open")

    def log(self, line):
        self.call(line["step"])
        self.logged.append(line["step"])

    def close(self, failed):
        self.closed.append(failed)
        self.call("close")

    def call(self, name):
        if name in self.failing:
            raise ConnectionError(f"no route to host at {name}")


@pytest.mark.parametrize("failing", ["open", 2, "close"])
def test_a_service_that_fails_is_said_once_and_tried_again(failing, monkeypatch):
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.0)
    said, tracker = [], Failing(failing, 3 if failing == 2 else failing)
    background = trackers.Background("W&B", tracker, said.append)
    background.open()
    for step in range(1, 6):
        background.log({"step": step})
    background.close(failed=False)
    assert said[0] == f"warning: W&B failed (no route to host at {failing}); training goes on, and it is tried again"
    missing = {"open": 5, 2: 2, "close": 0}[failing]
    assert said[1:] == ([f"W&B lacks {missing} line(s), which metrics.jsonl has"] if missing else [])
    assert tracker.logged == {"open": [], 2: [1, 4, 5], "close": [1, 2, 3, 4, 5]}[failing]


def test_a_service_that_comes_back_gets_what_it_missed(monkeypatch):
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.01)
    said, tracker, tried = [], Failing("open"), threading.Event()
    background = trackers.Background("MLflow", tracker, lambda text: said.append(text) or tried.set())
    background.open()
    background.log({"step": 1})
    assert tried.wait(10)
    tracker.failing = ()
    background.log({"step": 2})
    while len(tracker.logged) < 2:
        time.sleep(0.01)
    background.close(failed=True)
    assert len(said) == 1 and tracker.logged == [1, 2] and tracker.closed == [True]


def test_a_service_that_hangs_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(trackers, "QUEUED_LINES", 3)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.05)
    hang, said = threading.Event(), []
    tracker = Failing()
    tracker.log = lambda line: hang.wait()
    background = trackers.Background("MLflow", tracker, said.append)
    background.open()
    for step in range(100):
        background.log({"step": step})
    background.close(failed=False)
    assert said == ["MLflow lacks 100 line(s), which metrics.jsonl has"]
    hang.set()
