"""The model of lm-evaluation-harness, against transformers' own log-probabilities and against the harness's backend."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import lm_eval.tasks
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from peers import hf_model
from test_generate import CONFIGS, decoder, graph_of, peer, prompts_of, weights_of

from gemma2_jax import evaluate
from gemma2_jax.config import MeshConfig
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.inference import scoring
from gemma2_jax.inference.decoder import Decoder
from gemma2_jax.inference.defaults import stop_tokens
from gemma2_jax.inference.harness import HarnessModel
from gemma2_jax.inference.loaded import load_decoder
from gemma2_jax.inference.scoring import Continuation, score_continuations
from gemma2_jax.mesh import make_mesh

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets" / "tiny-gemma2"
TASKS = ROOT / "examples" / "evaluation"
CONTEXT = 80


def log_probability(whole: transformers.Gemma2ForCausalLM, tokens: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` tokens, and whether each is the most likely one."""
    with torch.no_grad():
        logits = whole(torch.tensor([tokens[:-1]])).logits[0, -count:]
    last = torch.tensor(tokens[-count:])
    chosen = logits.log_softmax(-1).gather(1, last[:, None])
    return chosen.double().sum().item(), bool((logits.argmax(-1) == last).all())


def continuations_of(name: str) -> list[Continuation]:
    """Rows of 2 to 129 tokens, of which one to all but the first are scored; some differ in their last token alone."""
    rows = prompts_of(name, 2, 5, 40, 90, 64, 129)
    found = [Continuation(row, count) for row, count in zip(rows, (1, 4, 9, 33, 1, 128), strict=True)]
    with torch.no_grad():
        best = int(peer(name)(torch.tensor([rows[2][:-1]])).logits[0, -1].argmax())
    return [*found, *(Continuation([*rows[2][:-1], token], count) for token, count in ((best, 1), (best, 2), (7, 3)))]


@pytest.mark.parametrize("name", ["27b", "2b", pytest.param("9b", marks=pytest.mark.exhaustive)])
def test_scores_equal_those_of_transformers(name):
    """In batches of at most 300 tokens, the last of which has rows of padding."""
    asked = continuations_of(name)
    found = dict(score_continuations(decoder(name), asked, batch_tokens=300))
    expected = [log_probability(peer(name), [*one.tokens], one.count) for one in asked]
    assert [found[number].log_probability for number in range(len(asked))] == pytest.approx(
        [value for value, _ in expected], abs=1e-3
    )
    assert [found[number].is_greedy for number in range(len(asked))] == [is_greedy for _, is_greedy in expected]
    assert [is_greedy for _, is_greedy in expected[-3:]] == [True, False, False]


def test_rows_that_differ_in_their_last_token_are_read_once(monkeypatch):
    asked = continuations_of("27b")
    assert [len(row.members) for row in scoring._group_rows(decoder("27b"), asked)] == [1, 1, 1, 4, 1, 1]
    monkeypatch.setattr(scoring, "_MOST_ENDINGS", 2)
    assert [len(row.members) for row in scoring._group_rows(decoder("27b"), asked)] == [1, 1, 1, 2, 2, 1, 1]


def test_scores_on_several_devices():
    asked = continuations_of("27b")
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    spread = dict(score_continuations(Decoder(graph_of("27b"), weights_of("27b"), mesh), asked, batch_tokens=300))
    alone = dict(score_continuations(decoder("27b"), asked, batch_tokens=300))
    for number, score in alone.items():
        assert spread[number].log_probability == pytest.approx(score.log_probability, abs=1e-3)
        assert spread[number].is_greedy == score.is_greedy


@pytest.mark.parametrize(("length", "count"), [(5, 0), (5, 5), (1, 1), (130, 3)])
def test_continuations_that_cannot_be_scored(length, count):
    with pytest.raises(ValueError, match=f"{count} of {length} tokens are to be scored; .* at most 129 in all"):
        [*score_continuations(decoder("27b"), [Continuation(prompts_of("27b", length)[0], count)])]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A Hugging Face folder with a model that bites, of a short context, and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("evaluated")
    whole = hf_model(replace(CONFIGS["27b"], vocab_size=4096, max_length=CONTEXT))
    with torch.no_grad():
        whole.model.embed_tokens.weight.mul_(0.1)
    whole.save_pretrained(folder)
    load_tokenizer(ASSETS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness_model(evaluated) -> HarnessModel:
    checkpoint, tokenizer = open_checkpoint(str(evaluated)), load_tokenizer(evaluated)
    return HarnessModel(load_decoder(checkpoint), tokenizer, stop=stop_tokens(checkpoint, tokenizer, chat=False))


@pytest.fixture(scope="module")
def evaluated_peer(evaluated) -> transformers.Gemma2ForCausalLM:
    return transformers.Gemma2ForCausalLM.from_pretrained(evaluated, attn_implementation="eager")


def requests_of(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)]


LONG = " ".join(str(number) for number in range(100))
PAIRS = [("Question: why?\nAnswer: ", "because"), ("What", " is it?"), ("", "Nothing before"), (LONG, " and on")]


def test_contexts_and_continuations_as_tokens(harness_model, evaluated_peer, capsys):
    """White space at the end of a context belongs to what follows; <bos> is first, where there is room for it."""
    found = harness_model.loglikelihood(requests_of("loglikelihood", *PAIRS), disable_tqdm=True)

    def encode(text):
        return harness_model.tokenizer(text, add_special_tokens=False)["input_ids"]

    for (context, continuation), (value, is_greedy) in zip(PAIRS, found, strict=True):
        tokens = [2, *encode(context + continuation)]
        count = len(tokens) - len([2, *encode(context.rstrip())])
        expected = log_probability(evaluated_peer, tokens[-CONTEXT - 1 :], count)
        assert value == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]
    assert capsys.readouterr().err == (
        f"warning: 1 of 4 contexts have more than {CONTEXT} tokens; what is before is left out\n"
    )


def test_texts_beyond_the_context_are_scored_in_windows(harness_model, evaluated_peer):
    """Each but the first ends a window that is full; its other tokens have been scored in the one before."""
    texts = [LONG, "short"]
    tokens = [2, *harness_model.tokenizer(LONG, add_special_tokens=False)["input_ids"]]
    assert 2 * CONTEXT < len(tokens) < 3 * CONTEXT
    rest = len(tokens) - 2 * CONTEXT
    windows = [
        ([2, *tokens[:CONTEXT]], CONTEXT),
        (tokens[CONTEXT - 1 : 2 * CONTEXT], CONTEXT),
        (tokens[-CONTEXT - 1 :], rest),
    ]
    expected = sum(log_probability(evaluated_peer, *window)[0] for window in windows)
    found = harness_model.loglikelihood_rolling(requests_of("loglikelihood_rolling", *((t,) for t in texts)))
    assert found[0] == pytest.approx(expected, abs=1e-3)
    short = [2, 2, *harness_model.tokenizer("short", add_special_tokens=False)["input_ids"]]
    assert found[1] == pytest.approx(log_probability(evaluated_peer, short, len(short) - 1)[0], abs=1e-3)


def test_texts_end_before_a_string_of_until(harness_model, evaluated_peer, capsys):
    """Of two, before the one that comes first; a context that is too long loses its beginning."""
    new = 56

    def transformers_text(context):
        tokens = [2, *harness_model.tokenizer(context, add_special_tokens=False)["input_ids"]][-(CONTEXT - new) :]
        found = evaluated_peer.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=new)
        return harness_model.tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True)

    whole, after_long = transformers_text("What"), transformers_text(LONG)
    stops = [whole[20:23], whole[8:11]]
    end = min(whole.index(stop) for stop in stops)
    options = {"do_sample": False, "max_gen_toks": new}
    asked = [("What", options | {"until": stops}), ("What", options | {"until": []}), (LONG, options | {"until": "\0"})]
    found = harness_model.generate_until(requests_of("generate_until", *asked), disable_tqdm=True)
    assert 0 < end <= 8 and found == [whole[:end], whole, after_long]
    assert f"1 of 1 contexts have more than {CONTEXT - new} tokens" in capsys.readouterr().err


def test_texts_are_drawn_as_the_task_says(harness_model):
    """Each request draws apart from the others, though they are alike."""
    options = {"do_sample": True, "temperature": 1.0, "until": ["\0"], "max_gen_toks": 70}
    texts = harness_model.generate_until(requests_of("generate_until", *[("What", options)] * 3))
    assert len({*texts}) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"num_beams": 4, "max_gen_toks": 8},
            "generation_kwargs has num_beams; it may have max_new_tokens, temperature, top_k",
        ),
        ({"max_gen_toks": CONTEXT}, f"max_gen_toks is {CONTEXT}, and the model's context {CONTEXT}; set fewer"),
        ({}, "max_gen_toks is 256"),
    ],
)
def test_generation_that_cannot_be_done(harness_model, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        harness_model.generate_until(requests_of("generate_until", ("What", options)))


def test_chats_are_written_by_the_template(harness_model):
    """Gemma's has no place for a system prompt; an answer that is begun goes on."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    asked = "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert harness_model.apply_chat_template(talk) == asked
    begun = [*talk, {"role": "assistant", "content": "Well"}]
    assert harness_model.apply_chat_template(begun, add_generation_prompt=False) == asked + "Well"
    assert harness_model.tok_encode(asked)[:2] == [2, 4]  # one <bos>, and <start_of_turn>
    assert "start_of_turn" in harness_model.chat_template(True)


@pytest.fixture
def evaluate_command(monkeypatch, capsys):
    """Runs the command in this process, where the harness has no tasks of its own, which take seconds to list.

    It gives what it printed.
    """
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out

    return run


def test_command_prints_the_table(evaluated, evaluate_command, tmp_path):
    out = tmp_path / "results.json"
    table = evaluate_command(
        "--checkpoint", evaluated, "--tasks", TASKS / "python_docs_choices.yaml", "--limit", 4, "--out", out
    )
    results = json.loads(out.read_text())
    found = results["results"]["python_docs_choices"]["acc,none"]
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[1:7] == ["python_docs_choices", "1", "none", "0", "acc", "↑"] and float(cells[7]) == found
    assert results["n-samples"]["python_docs_choices"]["effective"] == 4
    assert results["config"]["model_args"] == {"checkpoint": str(evaluated)}


def test_folders_of_tasks_stand_for_their_files(evaluated, evaluate_command, tmp_path):
    """Of several, in names that are no patterns; a name that is no folder stays."""
    for folder, name in {"[1]": "own_1", "2": "own_2"}.items():
        (tmp_path / folder).mkdir()
        lines = [
            f"task: {name}",
            "custom_dataset: !function own.list_rows",
            "test_split: test",
            "output_type: loglikelihood",
            "doc_to_text: ''",
            "doc_to_target: '{{word}}'",
            "metric_list: [{metric: perplexity}]",
        ]
        (tmp_path / folder / "own.yaml").write_text("\n".join(lines))
        (tmp_path / folder / "own.py").write_text(
            "import datasets\n\n\ndef list_rows(**_):\n"
            "    return {'test': datasets.Dataset.from_list([{'word': 'import'}])}\n"
        )
    table = evaluate_command("--checkpoint", evaluated, "--tasks", tmp_path / "[1]", tmp_path / "2")
    assert "own_1" in table and "own_2" in table


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: [a", "a file of the tasks cannot be read: while parsing a flow sequence"),
        ("task: a\ncustom_dataset: !function missing.rows", "Cannot import module 'missing' for function 'rows'"),
        (None, "there is no task (.yaml) in "),
    ],
)
def test_a_folder_of_tasks_that_cannot_be_used_is_said(evaluated, evaluate_command, tmp_path, text, said):
    if text:
        (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        evaluate_command("--checkpoint", evaluated, "--tasks", tmp_path)
    assert said in str(ended.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "no_such_task"], "Tasks not found: no_such_task; `lm-eval ls tasks` lists"),
        (["--tasks", "a", "--out", "no/such/folder/out.json"], "there is no folder no/such/folder; make it"),
        (["--tasks", "a", "--limit", "0"], "limit is 0; it must be above 0"),
    ],
)
def test_command_ends_with_a_sentence(evaluated, evaluate_command, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        evaluate_command("--checkpoint", evaluated, *arguments)
    assert said in f"{ended.value} {capsys.readouterr().err}"


def test_help_waits_for_neither_jax_nor_the_harness():
    code = "import sys; from gemma2_jax import evaluate; sys.exit(bool({'jax', 'lm_eval'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.exhaustive
def test_numbers_are_those_of_the_backend_for_transformers(evaluated, harness_model):
    """All that the example's tasks ask for, with a context of 80 tokens, and texts that begin with <bos>."""
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=str(evaluated), device="cpu", dtype="float32", batch_size=4, attn_implementation="eager")
    records = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()[:8]]
    texts = [json.loads(line)["text"] for line in (TASKS / "documents.jsonl").read_text().splitlines()[:3]]
    asked = [(f"Question: {r['question']}\nAnswer:", f" {choice}") for r in records for choice in r["choices"]]
    asked += [*PAIRS, *(("Answer: ", letter) for letter in "ABCD"), ("<bos>Answer", ": yes")]
    pairs, whole = requests_of("loglikelihood", *asked), requests_of("loglikelihood_rolling", *((t,) for t in texts))
    found = harness_model.loglikelihood(pairs), backend.loglikelihood(pairs)
    assert [value for value, _ in found[0]] == pytest.approx([value for value, _ in found[1]], abs=1e-3)
    assert [is_greedy for _, is_greedy in found[0]] == [is_greedy for _, is_greedy in found[1]]
    assert harness_model.loglikelihood_rolling(whole) == pytest.approx(backend.loglikelihood_rolling(whole), abs=1e-3)
    options = {"until": ["a", "the"], "max_gen_toks": 24, "do_sample": False}
    said = requests_of("generate_until", *((r["question"], options) for r in records), (LONG, options))
    assert harness_model.generate_until(said) == backend.generate_until(said)
