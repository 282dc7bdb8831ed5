"""The engine: requests that join and leave get the tokens that each would get alone, which are transformers'."""

from functools import cache

import jax
import numpy as np
import pytest
import torch
from test_generate import CONFIGS, NEW, decoder, graph_of, peer, prompts_of, transformers_tokens, weights_of

from gemma2_jax import mesh as meshes
from gemma2_jax.config import MeshConfig
from gemma2_jax.inference import engine as engines
from gemma2_jax.inference.clock import Clock
from gemma2_jax.inference.decoder import Decoder, decoding_mesh
from gemma2_jax.inference.engine import Engine, Request, make_engine
from gemma2_jax.inference.settings import GREEDY, Sampling
from gemma2_jax.model import gemma2 as model
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B


def new_engine(name: str = "27b", slots: int = 3) -> Engine:
    return Engine(decoder(name), slots=slots, context=CONFIGS[name].max_length)


@cache
def shared_engine() -> Engine:
    return new_engine()


def requests_of(prompts, **settings) -> list[Request]:
    return [Request(prompt=prompt, **{"max_new_tokens": NEW} | settings) for prompt in prompts]


def continue_prompts(prompts, **settings) -> list[list[int]]:
    return [request.tokens for request in shared_engine().run(requests_of(prompts, **settings))]


@pytest.mark.parametrize("name", ["27b", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("2b", "9b"))])
def test_requests_that_join_and_leave_equal_transformers(name):
    """Seven requests in three slots: prompts shorter than the window of 8 and longer than a part."""
    prompts = prompts_of(name, 1, 7, 40, 8, 20, 33, 64)
    engine = new_engine(name)
    requests = requests_of(prompts[:2])
    for request in requests:
        engine.submit(request)
    for prompt in prompts[2:]:  # the others come while those are under way
        for _ in range(3):
            engine.advance()
        requests += requests_of([prompt])
        engine.submit(requests[-1])
    while not engine.is_idle:
        engine.advance()
    assert [request.tokens for request in requests] == transformers_tokens(name, prompts)
    assert {request.reason for request in requests} == {"length"}


def test_a_draw_does_not_depend_on_the_others():
    prompts = prompts_of("27b", 5, 12, 30)
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=3)
    together = requests_of(prompts, sampling=sampling)
    list(new_engine().run(together))
    alone = requests_of(prompts, sampling=sampling)
    for request in reversed(alone):
        list(new_engine().run([Request(prompt=[5, 6], max_new_tokens=3), request]))
    assert [request.tokens for request in together] == [request.tokens for request in alone]
    assert together[0].tokens != continue_prompts(prompts[:1])[0]


def test_requests_end_by_tokens_of_their_own():
    prompts = prompts_of("27b", 5, 12)
    whole = requests_of(prompts)
    list(new_engine().run(whole))
    stops = [whole[0].tokens[10], whole[1].tokens[0]]
    ended = [Request(prompt=p, max_new_tokens=NEW, stop=frozenset([s])) for p, s in zip(prompts, stops, strict=True)]
    list(new_engine().run(ended))
    for request, before, stop in zip(ended, whole, stops, strict=True):
        assert request.tokens == before.tokens[: before.tokens.index(stop) + 1]
        assert request.reason == "stop"


def test_a_request_that_is_canceled_leaves_its_slot():
    first, second = requests_of(prompts_of("27b", 33, 20))
    expected = requests_of([second.prompt])
    list(new_engine().run(expected))
    engine = new_engine(slots=1)
    engine.submit(first)
    engine.submit(second)
    while len(first.tokens) < 2:
        engine.advance()
    first.is_canceled = True
    taken = len(first.tokens)
    while not engine.is_idle:
        engine.advance()
    assert len(first.tokens) == taken
    assert second.tokens == expected[0].tokens


def test_a_long_prompt_is_read_while_short_ones_come(monkeypatch):
    """And short ones need not wait until all of it is."""
    monkeypatch.setattr(engines, "PARTS", {"cpu": (32,), "gpu": (32,)})
    engine, ended = new_engine(), []
    (long,) = requests_of(prompts_of("27b", 120), max_new_tokens=1)
    engine.submit(long)
    for number in range(30):  # there is always one that has not been begun
        engine.submit(Request(prompt=[3 + number] * 9, max_new_tokens=1))
        ended += engine.advance()
    assert ended[0] is not long and any(request is long for request in ended)


def test_nothing_is_compiled_after_the_start():
    engine = new_engine(slots=5)  # programs of no other test
    before = Clock()
    engine.warm()
    assert before.compiling > 0
    clock = Clock()
    for length in (1, 31, 32, 33, 100):
        list(engine.run(requests_of(prompts_of("27b", length), max_new_tokens=20)))
    assert clock.compiling == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"prompt": [-1]}, "the prompt has tokens from -1 to -1"),
        ({"max_new_tokens": 128}, "with 128 new ones 129, and there is room for 128"),
        ({"stop": frozenset(range(65))}, "there are 65 stop tokens; give 64 at most"),
        ({"alternatives": 21}, "the scores of 21 tokens are asked for in each place; ask for 0 to 20"),
        ({"sampling": Sampling(logit_bias=((384, 1.0),))}, "logit_bias has token 384, and the model's are 0 to 383"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        new_engine().submit(Request(**{"prompt": [5], "max_new_tokens": 4} | changes))
    assert np.all(new_engine()._state.left_B == 0)


@pytest.fixture
def tokens_read(monkeypatch) -> list[int]:
    """How many tokens each part of a prompt had, over all engines."""
    counts, read = [], engines._read_parts

    def count_tokens(graph, weights, state, parts):
        counts.append(int(parts.length_B.sum()))
        return read(graph, weights, state, parts)

    monkeypatch.setattr(engines, "_read_parts", count_tokens)
    return counts


def test_a_prompt_that_begins_as_another_is_read_from_where_they_differ(tokens_read):
    """A header of 40 tokens: in a row that is free, in one that adds tokens, and in one that is still read."""
    header, *tails = prompts_of("wide", 40, 3, 5, 9, 20)
    prompts = [header + tail for tail in tails]
    engine = new_engine("wide")
    first = Request(prompt=prompts[0], max_new_tokens=10)
    second, third, fourth = requests_of(prompts[1:], max_new_tokens=30)
    list(engine.run([first]))
    assert tokens_read == [43]
    tokens_read.clear()
    engine.submit(second)
    while not second.tokens:
        engine.advance()
    assert tokens_read == [5]
    tokens_read.clear()
    list(engine.run([third, fourth]))
    assert sum(tokens_read) == 9 + 20
    expected = transformers_tokens("wide", prompts)
    assert [len(first.tokens), *(len(r.tokens) for r in (second, third, fourth))] == [10, 30, 30, 30]
    for request, row in zip((first, second, third, fourth), expected, strict=True):
        assert request.tokens == row[: len(request.tokens)]


def test_a_conversation_goes_on_in_its_row(tokens_read):
    """The row holds the prompt and the answer, which have gone around the ring of the local layer's window of 8."""
    (prompt, question), engine = prompts_of("27b", 30, 7), new_engine()
    (first,) = engine.run(requests_of([prompt], max_new_tokens=20))
    tokens_read.clear()
    (second,) = engine.run(requests_of([prompt + first.tokens + question], max_new_tokens=40))
    assert tokens_read == [1 + len(question)]  # the newest token is not in the cache yet
    assert [second.tokens] == [row[:40] for row in transformers_tokens("27b", [second.prompt])]


def test_a_row_that_has_gone_on_serves_no_beginning(tokens_read):
    """The window of 8 has passed: what the local layer knew of the header is gone."""
    header, *tails = prompts_of("27b", 40, 3, 5)
    prompts = [header + tail for tail in tails]
    engine = new_engine()
    found = [request.tokens for prompt in prompts for request in engine.run(requests_of([prompt]))]
    assert sum(tokens_read) == sum(map(len, prompts))
    assert found == transformers_tokens("27b", prompts)


def test_samples_of_one_prompt_read_it_once(tokens_read):
    (prompt,) = prompts_of("wide", 50)
    sampling = Sampling(temperature=1.0, seed=5)
    settings = dict(prompt=prompt, max_new_tokens=10, sampling=sampling)
    requests = [Request(**settings, sample=sample) for sample in range(3)]
    together = [request.tokens for request in new_engine("wide").run(requests)]
    assert sum(tokens_read) == 50 + 1 + 1
    assert len(set(map(tuple, together))) == 3
    (alone,) = new_engine("wide").run([Request(**settings, sample=2)])
    assert alone.tokens == together[2]


def test_what_a_canceled_request_read_serves_others(tokens_read):
    """Its row goes no further on the device, and its tokens are not taken for others'."""
    header, tail = prompts_of("wide", 40, 5)
    engine = new_engine("wide")
    canceled = Request(prompt=header, max_new_tokens=50)
    engine.submit(canceled)
    while len(canceled.tokens) < 2:
        engine.advance()
    canceled.is_canceled = True
    tokens_read.clear()
    (found,) = engine.run(requests_of([header + tail]))
    assert sum(tokens_read) == 5
    assert [found.tokens] == transformers_tokens("wide", [header + tail])


def test_scores_are_those_of_transformers():
    """Of new tokens, and of the prompt's own: read in three parts, beside another request."""
    prompts = prompts_of("27b", 70, 12)
    asked = Request(prompt=prompts[0], max_new_tokens=20, alternatives=5, echo=True)
    other = Request(prompt=prompts[1], max_new_tokens=20)
    list(shared_engine().run([asked, other]))
    assert not other.scores and not other.prompt_scores
    whole = asked.sequence
    with torch.no_grad():
        logits = peer("27b")(torch.tensor([whole])).logits[0, :-1]
    expected = logits.double().log_softmax(-1)
    scores = asked.prompt_scores + asked.scores
    assert len(scores) == len(whole) - 1
    np.testing.assert_allclose(
        [score.value for score in scores], expected[range(len(scores)), whole[1:]], atol=5e-5, rtol=0
    )
    values, tokens = expected.topk(5)
    found = np.array([score.alternatives for score in scores])
    np.testing.assert_allclose(found[..., 1], values, atol=5e-5, rtol=0)
    assert (found[..., 0] == tokens.numpy()).mean() > 0.99  # of nearly equal ones, either comes first


def test_a_prompt_alone_is_scored():
    """No new token is asked for; the same prompt has been read before, and is read again for its scores."""
    (prompt,) = prompts_of("27b", 40)
    both = requests_of([prompt, prompt], max_new_tokens=0, echo=True)
    for request in shared_engine().run(both):
        assert (len(request.prompt_scores), request.tokens, request.reason) == (39, [], "length")
    assert both[0].prompt_scores == both[1].prompt_scores


def test_settings_are_of_the_row_alone():
    """A bias, a penalty and a seed in three rows do not change the fourth."""
    prompts = prompts_of("27b", 5, 5, 5, 5)
    plain = continue_prompts(prompts)
    samplings = [
        Sampling(logit_bias=((7, 100.0),)),
        Sampling(frequency_penalty=50.0),
        Sampling(temperature=1.0),
        GREEDY,
    ]
    requests = [
        Request(prompt=prompt, max_new_tokens=NEW, sampling=sampling)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    biased, diverse, drawn, same = (request.tokens for request in new_engine().run(requests))
    assert biased == [7] * NEW
    assert len(set(diverse)) == NEW  # none twice
    assert drawn != plain[2] and same == plain[3]


def test_a_mesh_gives_the_same_tokens(tokens_read):
    """Rows over data, heads and vocabulary over tensor; a mesh for training becomes one for decoding."""
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    letters = model.weight_dims(model.rebuild_model(graph_of("wide"), weights_of("wide")))
    placed = {
        path: jax.device_put(w, meshes.stored_sharding(mesh, letters[path], w.shape))
        for path, w in weights_of("wide").items()
    }
    spread = Decoder(graph_of("wide"), placed, mesh)
    assert dict(spread.mesh.shape) == dict(data=2, stage=1, fsdp=1, context=1, tensor=4)
    assert spread.weights["blocks"][0]["attn"]["q"]["w"].addressable_shards[0].data.shape == (40, 2, 8)
    header, *tails = prompts_of("wide", 40, 3, 5, 9, 20, 1)
    prompts = [header + tail for tail in tails] + prompts_of("wide", 9)
    engine = Engine(spread, slots=4, context=128)
    found = [request.tokens for request in engine.run(requests_of(prompts, max_new_tokens=20, alternatives=1))]
    assert sum(tokens_read) < sum(map(len, prompts)) - 2 * 40
    assert found == [row[:20] for row in transformers_tokens("wide", prompts)]


@pytest.mark.parametrize(
    ("config", "sizes", "expected"),
    [
        (GEMMA2_2B, dict(fsdp=8), (1, 8)),
        (GEMMA2_9B, dict(fsdp=4, tensor=2), (1, 8)),
        (CONFIGS["2b"], dict(fsdp=8), (2, 4)),
        (GEMMA2_27B, dict(data=2, fsdp=2, context=2), (2, 4)),
        (GEMMA2_27B, dict(data=4, tensor=2), (4, 2)),
    ],
)
def test_other_shards_become_tensor_shards(config, sizes, expected):
    found = decoding_mesh(meshes.make_mesh(MeshConfig(**sizes)), config).shape
    assert (found["data"], found["tensor"]) == expected


def test_tensor_shards_that_do_not_divide_the_model():
    mesh = meshes.make_mesh(MeshConfig(data=1, tensor=3), jax.devices()[:3])
    with pytest.raises(ValueError, match=r"tensor 3 does not divide the 16 heads, 8 key .* use 1, 2, 4, 8, 16$"):
        decoding_mesh(mesh, GEMMA2_9B)


@pytest.mark.parametrize("slots", [1, 3])
def test_programs_do_not_copy_the_cache(slots):
    """In the compiled programs the cache is changed where it lies: 128 tokens for each of 4 heads."""
    engine = new_engine(slots=slots)
    made, state = engine._decoder, engine._state
    part = engines._make_part(None, 0, 32, 0)
    parts = jax.tree.map(lambda x: np.asarray(x)[None], part)
    with jax.set_mesh(made.mesh):
        adding = engines.add_tokens_program.lower(made.graph, made.weights, state, np.ones(slots, bool), np.int32(16))
        reading = engines._read_parts.lower(made.graph, made.weights, state, parts)
    cached = f"f32[{slots},4,128,8]"
    for lowered in (adding, reading) if slots > 1 else (adding,):  # a part works on a copy of its row, here of all
        program = lowered.compile().as_text()
        assert cached in program
        assert not [line for line in program.splitlines() if cached in line and " copy(" in line]


def test_slots_are_as_many_as_fit(monkeypatch):
    """A row of two layers, one of 8 tokens and one of 128, with keys and values of 4 heads of 8, and its tokens."""
    monkeypatch.setattr(engines, "_free_memory", lambda _: 1_000_000)
    per_row = (8 + 128) * 2 * 4 * 8 * 4 + 128 * 4
    assert abs(engines.count_slots(decoder("27b"), 128) - 800_000 / per_row) < 2
    monkeypatch.setattr(engines, "_free_memory", lambda _: 30_000)
    with pytest.raises(ValueError, match=r"a slot of 128 tokens takes 0\.00 GiB of each device"):
        engines.count_slots(decoder("27b"), 128)


def test_an_engine_for_requests_has_a_slot_for_each():
    engine = make_engine(decoder("27b"), requests_of(prompts_of("27b", 5, 30), max_new_tokens=30))
    assert (engine.slots, engine.context) == (2, 64)
    with pytest.raises(ValueError, match="there are no prompts; give at least one"):
        make_engine(decoder("27b"), [])
