"""Steps that go wrong: what is skipped, what is said of it, when the run ends, and that a resumed run is the same."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import lines_of, small

from gemma2_jax import recipes
from gemma2_jax.config import GuardConfig, MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training import guard, loop
from gemma2_jax.training.checkpoint import Checkpoints
from gemma2_jax.training.step import Program

pytestmark = pytest.mark.usefixtures("compiled_once")

OF_MODEL = dict(layers=2, width=32, mlp_width=48, vocab_size=512)


def random_batch(program: Program, seed: int) -> dict[str, np.ndarray]:
    """Rows of random tokens, all of which are learned."""
    random, shape = np.random.default_rng(seed), program.batch["tokens"].shape
    tokens = random.integers(0, program.config.model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    targets = np.roll(tokens, -1, axis=1)
    return {"tokens": tokens, "targets": targets, "segments": ones, "positions": positions, "weights": ones * 1.0}


def spoil(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with a loss that is not a number."""
    weights = batch["weights"].copy()
    weights[0, 3] = math.nan
    return {**batch, "weights": weights}


@pytest.fixture(scope="module", params=["tiny_sft", "tiny_lora"])
def stepper(request):
    """A program of a small model, its compiled step, and a state to start from."""
    recipe = recipes.load_recipe(request.param)
    config = replace(
        recipe,
        init="",
        model=replace(recipe.model, **OF_MODEL),
        train=replace(recipe.train, sequence_length=16, global_batch_size=4, micro_batch_size=2),
        optim=replace(recipe.optim, warmup_steps=3),
        guard=GuardConfig(skip_deviations=3.0),
        steps=40,
    )
    program = Program(config, make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))
    with jax.set_mesh(program.mesh):
        yield program, loop.compile_step(program, program.train_step, program.batch)


def take(program, step, state, batch):
    return step(
        state, loop.place_batch(program, {name: x.astype(program.batch[name].dtype) for name, x in batch.items()})
    )


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(stepper):
    """Steps a, bad, b leave what a, b leave, to the last bit: weights, moments, learning rate, history."""
    program, step = stepper
    with jax.set_mesh(program.mesh):
        one, two = random_batch(program, 1), random_batch(program, 2)
        ends, rates = {}, {}
        for name, batches in {"plain": [one, two], "spoiled": [one, spoil(two), two]}.items():
            state, rates[name] = program.initial_state(program.random_base()), []
            for batch in batches:
                state, values = take(program, step, state, batch)
                if values["taken"]:
                    rates[name].append(float(values["lr"]))
                else:
                    assert math.isnan(values["loss"])
                    assert "all weights are finite" in program.describe_skip(values)
            ends[name] = state
    assert rates["plain"] == rates["spoiled"]
    assert (int(ends["plain"].step), int(ends["spoiled"].step)) == (2, 3)
    same = replace(ends["spoiled"], step=ends["plain"].step)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ends["plain"]), jax.device_get(same))


@pytest.mark.parametrize("path", ["blocks/attn/o/w", "final_norm/w", "embedding"])
def test_a_weight_that_is_not_finite_is_named(stepper, path):
    program, step = stepper
    with jax.set_mesh(program.mesh):
        base = dict(program.random_base())
        layer = (1,) if path.startswith("blocks") else ()
        base[path] = jax.device_put(base[path].at[(*layer, 0)].set(jnp.nan), base[path].sharding)
        _, values = take(program, step, program.initial_state(base), random_batch(program, 1))
    name = "attn/o/w of layer 1" if layer else path
    assert program.describe_skip(values) == f"the weight {name} is not finite"
    assert not values["taken"]


def test_the_first_gradient_of_the_backward_pass_is_named():
    """Literal gradients of two layers: the backward pass meets layer 1 before layer 0, and its MLP before attention."""
    gradients = {
        "blocks/attn/q/w": jnp.ones((2, 3)), "blocks/mlp/down/w": jnp.ones((2, 4)),
        "embedding": jnp.ones((5, 3)), "final_norm/w": jnp.ones(3),
    }  # fmt: skip
    forward = [
        "embedding", "attn/q/w of layer 0", "mlp/down/w of layer 0", "attn/q/w of layer 1", "mlp/down/w of layer 1",
        "final_norm/w",
    ]  # fmt: skip
    assert guard.list_places(gradients) == forward
    bad = {**gradients, "embedding": gradients["embedding"].at[4, 1].set(jnp.inf)}
    for path, layer, found in [
        ("embedding", 4, "embedding"),
        ("blocks/mlp/down/w", 0, "mlp/down/w of layer 0"),
        ("blocks/attn/q/w", 1, "attn/q/w of layer 1"),
        ("blocks/mlp/down/w", 1, "mlp/down/w of layer 1"),
    ]:
        bad[path] = bad[path].at[layer].set(-jnp.inf)
        place = int(guard.find_nonfinite(jnp.float32(2), bad, gradients))
        assert guard.describe_place(place, 2.0, bad, gradients).endswith(f"is that of {found}")


def test_gradients_far_beyond_the_others_are_skipped():
    """The running mean and variance of ZClip's section 3, by hand: plain means of the first steps, then by 0.97."""
    norms = np.random.default_rng(0).uniform(0.8, 1.2, 60).astype(np.float32)
    norms[[10, 40]] = 30.0  # the first is too early to be judged
    config, history, mean, variance, taken = GuardConfig(skip_deviations=5), guard.no_history(), 0.0, 0.0, []
    count = 0
    for norm in norms.tolist():
        is_taken, history = guard.judge_step(config, history, jnp.float32(1), jnp.float32(norm))
        taken.append(bool(is_taken))
        if not (count >= 25 and norm > mean + 5 * variance**0.5):
            count += 1
            rate = max(1 / count, 0.03)
            mean, variance = mean + rate * (norm - mean), (1 - rate) * (variance + rate * (norm - mean) ** 2)
        np.testing.assert_allclose([history["mean"], history["variance"]], [mean, variance], rtol=1e-4, atol=1e-6)
    assert [step for step, is_taken in enumerate(taken) if not is_taken] == [40]
    off = [bool(guard.judge_step(GuardConfig(), history, jnp.float32(1), jnp.float32(x))[0]) for x in (30, math.inf)]
    assert off == [True, False]


def make_guard(tmp_path, **fields) -> guard.Guard:
    config = replace(small("tiny_sft", tmp_path), guard=GuardConfig(**fields))
    return guard.Guard(config, lambda values: "a reason", lambda step: [{"row": 0, "tokens": 2, "text": f"of {step}"}])


def test_a_leap_of_the_loss_is_said_and_taken(tmp_path):
    watch = make_guard(tmp_path, spike_deviations=6)
    losses = [2 + 0.01 * (-1) ** step for step in range(40)]
    said = [watch.see(step, {"loss": loss, "grad_norm": 1, "taken": True}) for step, loss in enumerate(losses)]
    assert not any(said)
    leap = watch.see(40, {"loss": 2.5, "grad_norm": 1, "taken": True})
    assert leap.startswith("the loss leapt to 2.5000, from 2.00")
    assert (watch.skipped, watch.row, watch.is_exhausted) == (0, 0, False)


def test_the_limit_is_of_steps_in_a_row(tmp_path):
    watch = make_guard(tmp_path, skip_limit=2)
    bad, good = {"loss": math.nan, "grad_norm": 1, "taken": False}, {"loss": 2, "grad_norm": 1, "taken": True}
    for step, values in enumerate([bad, bad, good, bad, bad]):
        watch.see(step, values)
        assert not watch.is_exhausted
    resumed = make_guard(tmp_path, skip_limit=2)
    resumed.set_state(json.loads(json.dumps(watch.get_state())))
    resumed.see(5, bad)
    assert resumed.is_exhausted
    assert resumed.skipped == 5
    assert resumed.describe_end().startswith(
        "3 step(s) in a row were skipped, and guard.skip_limit is 2; the last is step 5"
    )
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 3, 4, 5]
    assert lines[-1]["documents"] == [{"row": 0, "tokens": 2, "text": "of 5"}]


def test_weights_that_blew_up_end_the_run_and_are_not_saved(tmp_path):
    """Step 1 makes the weights enormous. No later step is taken, and none of their checkpoints is written."""
    config = small("tiny_sft", tmp_path, steps=9)
    config = replace(config, optim=replace(config.optim, lr=1e30, warmup_steps=0), guard=GuardConfig(skip_limit=3))
    config = replace(config, train=replace(config.train, log_every=100, eval_every=100, checkpoint_every=1))
    with pytest.raises(FloatingPointError, match=r"4 step\(s\) in a row were skipped.*the last is step 5: loss .*"):
        loop.train(config)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        assert checkpoints.latest == 1
    assert [line["step"] for line in lines_of(tmp_path) if line.get("event") == "skip"] == [2, 3, 4, 5]


def test_a_run_with_a_bad_batch_goes_on_and_resumes_alike(tmp_path, monkeypatch):
    """Batches 4 and 5 are spoiled: their documents are named, and the checkpoint that is due at 5 follows step 6."""
    place, seen = loop.place_batch, {}

    def place_spoiled(program, batch):
        if batch["tokens"].shape[0] and not any(np.array_equal(batch["tokens"], x["tokens"]) for x in seen.values()):
            seen[len(seen) + 1] = batch
        number = next((n for n, x in seen.items() if np.array_equal(batch["tokens"], x["tokens"])), 0)
        return place(program, spoil(batch) if number in (4, 5) else batch)

    monkeypatch.setattr(loop, "place_batch", place_spoiled)
    config = small("tiny_sft", tmp_path / "whole", steps=9)
    config = replace(config, train=replace(config.train, eval_every=0), guard=GuardConfig(skip_deviations=4.0))
    whole = loop.train(config)
    assert sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir()) == ["6", "9"]
    lines = [json.loads(line) for line in (tmp_path / "whole/skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5]
    decoded = [document["text"] for document in lines[0]["documents"]]
    assert len(decoded) == 8
    assert all(text.startswith("<bos><start_of_turn>user\nThere are") for text in decoded)
    assert {line["step"]: line["skipped"] for line in lines_of(tmp_path / "whole") if "skipped" in line}[9] == 2
    first = replace(config, steps=6, workdir=str(tmp_path / "parts"))
    loop.train(first)
    parts = loop.train(replace(first, steps=9))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.state), jax.device_get(parts.state))
    kept = [
        [{**line, "seconds": 0} for line in lines_of(tmp_path / name) if "event" in line] for name in ("whole", "parts")
    ]
    assert [line["step"] for line in kept[0]] == [line["step"] for line in kept[1]] == [4, 5]


def test_documents_of_a_stream_cannot_be_listed(tmp_path):
    config = small("tiny_sft", tmp_path, steps=2)
    config = replace(config, data=replace(config.data, stream=True, eval_fraction=0.0), guard=GuardConfig(skip_limit=0))
    config = replace(config, optim=replace(config.optim, lr=1e30, warmup_steps=0))
    with pytest.raises(FloatingPointError, match=r"1 step\(s\) in a row were skipped"):
        loop.train(config)
    skip, stop = [line for line in lines_of(tmp_path) if "event" in line]
    assert "its documents cannot be listed, as a stream is not read twice" in skip["text"]
    assert (stop["event"], stop["text"]) == ("stop", "stopped, as 1 step(s) in a row were skipped (guard.skip_limit)")
