"""A file of prompts and its file of texts: their order, what cannot be answered, and going on after any end."""

import errno
import gzip
import itertools
import json
import os
import signal
import sys
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from gemma2_jax import generate
from gemma2_jax.inference import batch as batches
from gemma2_jax.inference.batch import Answers, Batch, run_jobs
from gemma2_jax.inference.prompts import Encoder, find_prompts
from gemma2_jax.inference.settings import Sampling, TextSettings
from gemma2_jax.inference.source import Source, open_source

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
SETTINGS = {"weights": "a", "temperature": 0.0}


class CountingEngine:
    """In place of an engine: the k-th token of a request is k after its prompt's length and its sample."""

    slots = 2

    def __init__(self):
        self.requests, self.most = [], 0

    def submit(self, request):
        self.requests.append(request)
        self.most = max(self.most, len(self.requests))

    def advance(self):
        active = [request for request in self.requests if not request.has_ended][: self.slots]
        for request in active:
            request.tokens.append(1000 + len(request.prompt) + request.sample % 50 + len(request.tokens))
            if len(request.tokens) == request.max_new_tokens:
                request.reason = "length"
        self.requests = [request for request in self.requests if not request.has_ended]
        return active


@cache
def open_model():
    return open_source(Source(checkpoint=str(ASSETS)))


def new_batch(path, *, samples=1, stop=(), chat=False, **sampling) -> Batch:
    settings = TextSettings(max_new_tokens=5, sampling=Sampling(**sampling), stop=stop, samples=samples)
    return Batch(path=str(path), encoder=Encoder(*open_model(), chat, settings))


def answer(batch: Batch, out: Path, most: int | None = None, settings=SETTINGS, engine=None) -> batches.Survey:
    """Adds at most so many texts."""
    with closing(Answers(out, settings)) as answers:
        survey = batch.survey(answers)
        jobs = run_jobs(engine or CountingEngine(), batch.list_jobs(survey), is_stopped=lambda: False)
        for job in itertools.islice(jobs, most):
            answers.add(job.to_json())
    return survey


def write_lines(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_lines(
        tmp_path / "prompts.jsonl",
        {"id": "a", "prompt": "One", "max_new_tokens": 40},
        "{bad",
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "T"}], "tag": [None, 1.5]},
        {"prompt": "Two", "seed": 3},
        {"prompt": "Three", "max_new_tokens": 1},
    )


def test_texts_come_in_the_order_of_the_prompts(prompts, tmp_path):
    """The first is the longest; what a line has besides is repeated."""
    survey = answer(new_batch(prompts), tmp_path / "out.jsonl")
    found = read_answers(tmp_path / "out.jsonl")
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5]
    assert [line.get("tokens") for line in found] == [40, None, 5, 5, 1]
    assert found[0] | {"id": "a", "prompt": "One", "max_new_tokens": 40, "reason": "length"} == found[0]
    assert found[2]["tag"] == [None, 1.5] and found[3]["seed"] == 3
    assert found[1]["error"].startswith(f"{prompts}:2: not JSON") and found[1].keys() == {"line", "error"}
    assert (survey.texts, survey.done, survey.errors, survey.longest) == (5, 0, 1, 43)


@pytest.mark.parametrize("samples", [1, 2])
def test_work_that_was_stopped_goes_on_as_if_it_had_not_been(prompts, tmp_path, samples):
    """After each line, and within the next."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    batch = new_batch(prompts, samples=samples, temperature=1.0)
    answer(batch, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 * samples + 1
    for count in range(len(lines)):
        for half in (b"", lines[count][:-1]):
            answer(batch, out, 0)
            out.write_bytes(b"".join(lines[:count]) + half)
            survey = answer(batch, out)
            assert (survey.texts, survey.done, survey.errors) == (len(lines), count, 1)
            assert out.read_bytes() == whole.read_bytes()
    assert answer(batch, out).longest == 0


def test_samples_and_lines_draw_apart_from_each_other(tmp_path):
    """But lines with one seed of their own do not."""
    prompts = write_lines(tmp_path / "p.jsonl", *[{"prompt": "One"}] * 2, *[{"prompt": "One", "seed": 3}] * 2)
    batch = new_batch(prompts, samples=2, temperature=1.0)
    with closing(Answers(tmp_path / "out", SETTINGS)) as answers:
        jobs = list(batch.list_jobs(batch.survey(answers)))
    drawn = [(job.completion.request.sampling.seed, job.completion.request.sample) for job in jobs]
    assert len({*drawn[:4]}) == 4 and drawn[4:6] == drawn[6:8] and len({*drawn[4:6]}) == 2
    assert [job.to_json()["sample"] for job in jobs] == [0, 1] * 4


def test_the_end_of_a_turn_ends_an_answer_alone(prompts, tmp_path):
    """A text that is continued may have it; one by --chat, or of messages, may not."""
    with closing(Answers(tmp_path / "out", SETTINGS)) as answers:
        found = []
        for chat in (False, True):
            batch = new_batch(prompts, chat=chat)
            jobs = batch.list_jobs(batch.survey(answers))
            found.append([5 in job.completion.request.stop for job in jobs if job.completion])
    assert found == [[False, True, False, False], [True] * 4]


def test_a_window_of_prompts_is_in_memory(tmp_path, monkeypatch):
    """However many come after a long one."""
    prompts = write_lines(
        tmp_path / "p.jsonl", {"prompt": "long", "max_new_tokens": 200}, *[{"prompt": f"{n}"} for n in range(300)]
    )
    read, engine, seen = batches.read_lines, CountingEngine(), []

    def count_lines(path):
        for line in read(path):
            seen.append(line)
            yield line

    batch = new_batch(prompts)
    with closing(Answers(tmp_path / "out", SETTINGS)) as answers:
        survey = batch.survey(answers)
        monkeypatch.setattr(batches, "read_lines", count_lines)
        for number, _ in enumerate(run_jobs(engine, batch.list_jobs(survey), is_stopped=lambda: False)):
            assert len(seen) <= number + 9
    assert (number, engine.most) == (300, 8)


def test_text_ends_before_a_stop_string(prompts, tmp_path):
    answer(new_batch(prompts), tmp_path / "whole.jsonl")
    whole = read_answers(tmp_path / "whole.jsonl")[0]["text"]
    stop = whole[len(whole) // 2 :][:3]
    answer(new_batch(prompts, stop=(stop,)), tmp_path / "out.jsonl")
    found = read_answers(tmp_path / "out.jsonl")
    assert found[0]["text"] == whole[: whole.index(stop)] and found[0]["reason"] == "stop"
    assert 0 < found[0]["tokens"] < 40 and found[-1]["reason"] == "length"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "holds a list; a line is an object"),
        ({"text": "a"}, "has 'text', which the answer has too"),
        ({"id": 3}, "a line has either a 'prompt' or 'messages', and it has 'id'"),
        ({"prompt": 3}, "'prompt' is a number; it must be a text"),
        ({"prompt": "\ud83d"}, "half of a character"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"prompt": "a", "top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"prompt": "a", "temperature": True}, "temperature is True; it must be a number"),
        ({"prompt": "a", "top_p": 2}, "top_p is 2; it must be above 0"),
        ({"prompt": "a" * 9000}, "shorten the prompt, or ask for fewer"),
        ({"messages": "a"}, "'messages' is a text that is not JSON"),
        ({"messages": []}, "'messages' are none"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "end with an answer"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "the chat template does not take these messages"),
    ],
)
def test_what_cannot_be_answered_is_told_by_line(tmp_path, line, said):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "fine"}, line, {"prompt": "fine"})
    survey = answer(new_batch(prompts), tmp_path / "out.jsonl")
    found = read_answers(tmp_path / "out.jsonl")
    assert [len(found), found[0]["tokens"], found[2]["tokens"], survey.errors] == [3, 5, 5, 1]
    assert found[1]["error"].startswith(f"{prompts}:2: ") and said in found[1]["error"]
    assert found[1]["error"] == survey.first_error


KEYS = {
    "temprature": "did you mean temperature?",
    "maxNewTokens": "did you mean max_new_tokens?",
    "max_tokens": "did you mean max_new_tokens?",
    "topP": "did you mean top_p?",
    "temp": "did you mean temperature?",
    "stop": "--stop sets it for all lines",
    "temperature": "",
    "id": "",
    "category": "",
    "se": "",
    "": "",
}


@pytest.mark.parametrize(("key", "said"), KEYS.items())
def test_a_misspelled_setting_is_told_once_and_kept(tmp_path, key, said):
    path = write_lines(tmp_path / "prompts.jsonl", *[{"prompt": "One", key: 1}] * 2)
    survey = answer(new_batch(path), tmp_path / "out.jsonl")
    told = f"{path}:1 has '{key}', which is no setting of a line, and is repeated beside the answer; {said}"
    assert survey.doubts == ({key: told} if said else {})
    assert survey.errors == 0 and [line[key] for line in read_answers(tmp_path / "out.jsonl")] == [1, 1]


def test_a_key_beside_the_setting_that_it_is_like_is_not_told(tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "One", "speed": 3.5, "seed": 1})
    assert not answer(new_batch(path), tmp_path / "out.jsonl").doubts


def test_prompts_may_be_compressed_or_a_table(prompts, tmp_path):
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(prompts.read_bytes()))
    table = tmp_path / "p.csv"
    table.write_text('id,prompt\n7,"One\n"\n')
    answer(new_batch(prompts), tmp_path / "plain")
    answer(new_batch(packed), tmp_path / "packed")
    answer(new_batch(table), tmp_path / "table")
    plain, unpacked = read_answers(tmp_path / "plain"), read_answers(tmp_path / "packed")
    assert plain[2:] == unpacked[2:] and len(unpacked) == 5
    assert read_answers(tmp_path / "table")[0] | {"id": "7", "prompt": "One\n"} == read_answers(tmp_path / "table")[0]


def test_texts_of_something_else_are_left_alone(prompts, tmp_path):
    out, batch = tmp_path / "out.jsonl", new_batch(prompts)
    answer(batch, out, 3)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"was begun with temperature 0.0, not 0.5; give the same settings"):
        answer(batch, out, settings=SETTINGS | {"temperature": 0.5})
    other = write_lines(tmp_path / "other.jsonl", {"id": "b", "prompt": "One", "max_new_tokens": 40})
    with pytest.raises(ValueError, match=r"the answer to another prompt where that to .*other.jsonl:1 was to come"):
        answer(new_batch(other), out)
    shorter = write_lines(tmp_path / "shorter.jsonl", {"id": "a", "prompt": "One", "max_new_tokens": 40})
    with pytest.raises(ValueError, match=r"has more texts than .*shorter.jsonl has prompts"):
        answer(new_batch(shorter), out)
    with closing(Answers(out, SETTINGS)), pytest.raises(ValueError, match="another process writes to"):
        answer(batch, out)
    assert out.read_bytes() == before
    out.write_bytes(before.replace(b"{", b"", 1))
    with pytest.raises(ValueError, match=r"out.jsonl:1 is no answer; mend the file"):
        answer(batch, out)
    for settings in ("5", "[]", "[1]", "{"):
        (tmp_path / "out.jsonl.settings.json").write_text(settings)
        with pytest.raises(ValueError, match="name another file"):
            answer(batch, out)
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="does not say with which settings it was made"):
        answer(batch, out)
    with pytest.raises(ValueError, match="there is no folder"):
        answer(batch, tmp_path / "none" / "out")
    with pytest.raises(ValueError, match=r"^\. is not a file; name another"):
        answer(batch, Path())


def test_a_full_disk_leaves_whole_lines(prompts, tmp_path, monkeypatch):
    out, whole, write = tmp_path / "out", tmp_path / "whole", os.write
    answer(new_batch(prompts), whole)
    left = [len(whole.read_bytes().splitlines()[0]) + 20]

    def write_some(file, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: left[0]])
        left[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        with pytest.raises(OSError, match="No space left on device") as full:
            answer(new_batch(prompts), out)
    assert full.value.filename == str(out)
    assert out.read_bytes() and whole.read_bytes().startswith(out.read_bytes()) and out.read_bytes()[-1:] == b"\n"
    answer(new_batch(prompts), out)
    assert out.read_bytes() == whole.read_bytes()


@pytest.fixture
def answer_file(prompts, tmp_path, monkeypatch, capsys):
    """Runs the command on the prompts with a CountingEngine; gives its status and what it wrote to standard error."""

    def run(*arguments: str) -> tuple[object, str]:
        files = ["--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")]
        monkeypatch.setattr(sys, "argv", ["generate", "--checkpoint", str(ASSETS), *files, *arguments])
        monkeypatch.setattr(generate, "_make_engine", lambda *_: CountingEngine())
        with pytest.raises(SystemExit) as ended:
            generate.main()
        return ended.value.code, capsys.readouterr().err

    return run


def test_a_full_disk_at_the_start_is_said_with_the_file(prompts, tmp_path, monkeypatch):
    def fail(path, *arguments, **options):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*out\.jsonl\.settings\.json'"):
        Answers(tmp_path / "out.jsonl", SETTINGS)
    assert not [*tmp_path.glob(".*")]


def test_a_pipe_is_no_file_of_prompts(tmp_path):
    os.mkfifo(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match=r"prompts\.jsonl is no file but a pipe or a device; name a file of prompts"):
        find_prompts(str(tmp_path / "prompts.jsonl"))


def test_a_misspelled_file_leaves_nothing_behind(answer_file, prompts, tmp_path):
    prompts.rename(tmp_path / "elsewhere.jsonl")
    code, _ = answer_file()
    assert code.endswith("prompts.jsonl is not there; name a file of prompts")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere.jsonl"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_done(answer_file, tmp_path, monkeypatch, number, status):
    add = Answers.add

    def add_and_signal(self, line):
        add(self, line)
        if line["line"] == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", add_and_signal)
        code, said = answer_file()
    assert code == status
    assert f"out.jsonl has {len(read_answers(tmp_path / 'out.jsonl'))} texts; the same command goes on" in said
    code, said = answer_file()
    assert code.startswith("error: 1 line of the prompts cannot be answered; the first is ")
    assert [line["line"] for line in read_answers(tmp_path / "out.jsonl")] == [1, 2, 3, 4, 5]


def test_strict_generates_nothing_where_a_line_is_bad(answer_file, tmp_path):
    code, _ = answer_file("--strict")
    assert code.endswith("nothing was generated, as --strict asks") and "prompts.jsonl:2: not JSON" in code
    assert not read_answers(tmp_path / "out.jsonl")


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"chat": True}, {"stop": ("x",)}, {"top_k": 2}])
def test_settings_tell_what_changes_a_text(prompts, change):
    source, other = Source(checkpoint="a"), Source(checkpoint="b", adapter="c")
    settings = batches.describe_settings(new_batch(prompts), source)
    assert batches.describe_settings(new_batch(prompts), other) == settings  # of one model under another name
    assert batches.describe_settings(new_batch(prompts, **change), source) != settings
    for changed in (replace(source, dtype="bfloat16"), replace(source, int8=True)):
        assert batches.describe_settings(new_batch(prompts), changed) != settings
