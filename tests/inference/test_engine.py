"""The engine: requests that join and leave get the tokens that each would get alone, which are transformers'."""

import numpy as np
import pytest
from test_generate import CONFIGS, NEW, generator, prompts_of, transformers_tokens

from gemma2_jax.inference.clock import Clock
from gemma2_jax.inference.engine import Engine, Request
from gemma2_jax.inference.sampling import Sampling


def make_engine(name: str = "27b", slots: int = 3) -> Engine:
    return Engine(generator(name), slots=slots, context=CONFIGS[name].max_length)


def requests_of(prompts, **settings) -> list[Request]:
    return [Request(prompt=prompt, **{"max_new_tokens": NEW} | settings) for prompt in prompts]


@pytest.mark.parametrize("name", ["27b", "2b", pytest.param("9b", marks=pytest.mark.exhaustive)])
def test_requests_that_join_and_leave_equal_transformers(name):
    """Seven requests in three slots: prompts shorter than the window of 8 and longer than a part."""
    prompts = prompts_of(name, 1, 7, 40, 8, 20, 33, 64)
    engine = make_engine(name)
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
    list(make_engine().run(together))
    alone = requests_of(prompts, sampling=sampling)
    for request in reversed(alone):
        list(make_engine(slots=2).run([Request(prompt=[5, 6], max_new_tokens=3), request]))
    assert [request.tokens for request in together] == [request.tokens for request in alone]
    assert together[0].tokens != generator("27b").generate(prompts[:1], max_new_tokens=NEW)[0]


def test_requests_end_by_tokens_of_their_own():
    prompts = prompts_of("27b", 5, 12)
    whole = requests_of(prompts)
    list(make_engine().run(whole))
    stops = [whole[0].tokens[10], whole[1].tokens[0]]
    ended = [Request(prompt=p, max_new_tokens=NEW, stop=frozenset([s])) for p, s in zip(prompts, stops, strict=True)]
    list(make_engine().run(ended))
    for request, before, stop in zip(ended, whole, stops, strict=True):
        assert request.tokens == before.tokens[: before.tokens.index(stop) + 1]
        assert request.reason == "stop"


def test_a_request_that_is_canceled_leaves_its_slot():
    first, second = requests_of(prompts_of("27b", 33, 20))
    expected = requests_of([second.prompt])
    list(make_engine().run(expected))
    engine = make_engine(slots=1)
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


def test_nothing_is_compiled_after_the_start():
    engine = make_engine(slots=5)  # programs of no other test
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
        ({"stop": frozenset(range(9))}, "there are 9 stop tokens; give 8 at most"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_engine().submit(Request(**{"prompt": [5], "max_new_tokens": 4} | changes))
    assert np.all(make_engine()._state.left_B == 0)
