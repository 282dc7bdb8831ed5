"""Where metrics go: the same lines to all, to the same page when a run resumes, and no service stops training."""

import sys
import threading
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
    """What of wandb is used. A page that is known has had lines up to step 2."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], []

    def init(self, **options):
        known = any(options["id"] == other["id"] for other in self.started)
        self.started.append(options)
        return SimpleNamespace(
            step=3 if known else 0,
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
    loop.train(replace(config, steps=3))
    assert [step for step, _ in fake.logged[6:]] == [3, 3, 3]
    (config.output / "checkpoints").rename(tmp_path / "moved")
    loop.train(config)
    ids = [options["id"] for options in fake.started]
    assert ids[0] == ids[1] != ids[2]
    assert fake.finished == [0, 0, 0]


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
    assert said[0].startswith(f"warning: W&B failed (no route to host at {failing}); training goes on")
    lost = {"open": 5, 2: 2, "close": 0}[failing]
    assert said[1:] == ([f"W&B lacks {lost} line(s), which metrics.jsonl has"] if lost else [])
    assert tracker.logged == {"open": [], 2: [1, 4, 5], "close": [1, 2, 3, 4, 5]}[failing]


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
    assert said == ["MLflow did not take all lines in 0.05 s; metrics.jsonl has them"]
    hang.set()
