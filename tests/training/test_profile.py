"""Traces of steps: their tables, in which scopes add up to the step, and the ways to ask for one."""

import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from jax.profiler import ProfileData

from gemma2_jax import __main__ as commands, config as configs
from gemma2_jax.training import loop, profile_tables, profiling
from gemma2_jax.training.profile_tables import Operation
from tests.small_runs import lines_of, small

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The working directory of a run whose steps 2 and 3 are traced."""
    workdir = tmp_path_factory.mktemp("traced")
    config = small("tiny_lora", workdir, steps=3)
    loop.train(replace(config, profile=configs.ProfileConfig(start=1, steps=2)))
    return workdir


def test_scopes_add_up_to_the_step(traced):
    profile = profile_tables.read_profile(profile_tables.find_trace(traced))
    assert (profile.first_step, profile.steps) == (2, 2)
    times = profile.devices[0]
    assert len(profile.devices) == 8
    scopes = profile_tables.list_scopes(times)
    assert sum(map(sum, scopes.values())) == pytest.approx(times.total, rel=1e-6)
    named = {name: sum(row) for name, row in scopes.items() if name.split("/")[0] in profile_tables.SCOPES}
    assert sum(named.values()) > 0.9 * times.sum_kind("computing"), "operations have no scope"
    parts = ("layers/attention/qkv", "layers/attention/attend", "layers/attention/o", "layers/mlp/gate_up")
    for name in (*parts, "layers/mlp/down"):
        forward, backward = scopes[name]
        assert forward > 0 and backward > 0, f"{name} has {forward} and {backward}"
    assert {"embedding", "loss", "optimizer"} <= named.keys()
    assert times.counts.total() % profile.steps == 0, "the trace holds other than whole steps"


def test_the_command_prints_what_the_run_did(traced, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gemma2-jax", "profile", str(traced)])
    commands.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"\nSteps 2 to 3 of {traced}/profile/plugins/profile/")
    assert "│ layers/mlp/gate_up " in printed and "│ step " in printed and "│ CPU 0 " in printed
    assert (profile_tables.find_trace(traced) / "memory.prof").stat().st_size > 0


@pytest.mark.parametrize(
    ("scopes", "trace", "message"),
    [
        (
            '{"scopes": {}, "module": "m", "first_step": 1, "steps": 1}',
            None,
            "has no trace, which is called NAME.xplane",
        ),
        ('{"scopes": {}, "module": "m", "first_step": 1, "steps": 1}', b"noise", r"a.xplane.pb is not as it was wri.*"),
        (
            '{"scopes": 5, "module": "m", "first_step": 1, "steps": 1}',
            b"",
            "scopes.json is not as it was written; trace",
        ),
        ("{}", b"", "scopes.json is not as it was written; trace the run again"),
        ("[" * 100_000, b"", "scopes.json is not as it was written; trace the run again"),
    ],
)
def test_a_damaged_trace_is_named(scopes, trace, message, tmp_path):
    (tmp_path / "scopes.json").write_text(scopes)
    if trace is not None:
        (tmp_path / "a.xplane.pb").write_bytes(trace)
    with pytest.raises(ValueError, match=message):
        profile_tables.read_profile(profile_tables.find_trace(tmp_path))
    with pytest.raises(ValueError, match=r"there is no folder .*/a.xplane.pb; give the working directory of a run"):
        profile_tables.find_trace(tmp_path / "a.xplane.pb")


def test_a_run_without_a_trace_is_told_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gemma2-jax", "profile", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert str(ended.value.code).startswith(f"error: there is no trace with scopes.json in {tmp_path}; train with ")


def test_scopes_are_read_from_the_names_of_operations():
    layer = "jit(train_step)/while/body/layers/while/body"
    assert profile_tables.parse_scope(f"{layer}/jvp(mlp)/down/dot_general") == ("layers", "mlp", "down")
    assert profile_tables.parse_scope(f"{layer}/transpose(jvp(mlp))/down/mul") == ("backward", "layers", "mlp", "down")
    assert profile_tables.parse_scope("jit(train_step)/backward/layers/add") == ("backward", "layers")
    assert profile_tables.parse_scope("jit(train_step)/transpose(jvp())/add") == ()


def test_an_operation_without_a_name_has_the_scope_of_what_is_in_or_around_it():
    program = """HloModule jit_train_step, is_scheduled=true

%inner.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p), metadata={op_name="jit(train_step)/layers/mlp/mul"}
}

%body (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %fusion.3 = f32[8]{0} fusion(%q), kind=kLoop, calls=%inner.1
  %copy.1 = f32[8]{0} copy(%fusion.3)
  ROOT %a = f32[8]{0} add(%copy.1, %q), metadata={op_name="jit(train_step)/layers/attention/add"}
}

ENTRY %main (r: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} parameter(0)
}
"""
    scopes = profile_tables.read_scopes(program)
    assert scopes["fusion.3"] == ("layers", "mlp")
    assert scopes["copy.1"] == ("layers", "attention")
    assert scopes["r"] == ()
    assert json.loads(profile_tables.scopes_json(program, 4, 2))["module"] == "jit_train_step"


# A trace of a GPU in text, times in us. Below, a column is 1 us: kernels, collectives and copies.
#
#     stream 1   AAAABBBB....CC....
#     stream 2   ..NNNNNNNN..NN....
#     stream 3   ..........H.....HH
GPU_EVENTS = {
    1: [("fusion_1", "fusion.1", 0, 4), ("nvjet_gemm", "gemm.2", 4, 4), ("fusion_7", None, 12, 2)],
    2: [("ncclDevKernel_AllGather", "all-gather-start.1", 2, 8), ("ncclDevKernel_Sum", "all-reduce-start.1", 12, 2)],
    3: [("MemcpyH2D", None, 10, 1), ("MemcpyD2H", None, 16, 2)],
}
GPU_SCOPES = {"fusion.1": ("layers", "mlp"), "gemm.2": ("backward", "layers", "mlp"), "fusion.7": ("loss",)}


def gpu_trace() -> ProfileData:
    names = [name for events in GPU_EVENTS.values() for name, *_ in events]
    lines = []
    for stream, events in GPU_EVENTS.items():
        shown = []
        for name, op, start, length in events:
            stats = f'stats {{ metadata_id: 1 str_value: "{op}" }} ' if op else ""
            stats += 'stats { metadata_id: 2 str_value: "jit_train_step" }' if op else ""
            number, times = names.index(name) + 1, f"offset_ps: {start * 10**6} duration_ps: {length * 10**6}"
            shown.append(f"events {{ metadata_id: {number} {times} {stats} }}")
        lines.append(f'lines {{ id: {stream} name: "Stream #{stream}(Compute)" {" ".join(shown)} }}')
    # A line that sums up others must not count.
    lines.append(f'lines {{ id: 9 name: "XLA Ops" events {{ metadata_id: 1 duration_ps: {99 * 10**6} }} }}')
    kernels = [
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names, start=1)
    ]
    stats = [
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for i, name in enumerate(("hlo_op", "hlo_module"), start=1)
    ]
    return ProfileData.from_text_proto(
        f'planes {{ name: "/device:GPU:0" {" ".join([*lines, *kernels, *stats])} }} planes {{ name: "/host:CPU" }}'
    )


def test_communication_counts_where_nothing_hides_it():
    events = profile_tables.read_events(gpu_trace(), "jit_train_step", GPU_SCOPES)
    assert [*events] == ["GPU 0"]
    times = profile_tables.divide_time("GPU 0", events["GPU 0"])
    assert times.total == 18_000
    assert times.communication == 10_000
    assert times.sum_kind("communication") == 2_000  # from 8 to 10
    assert times.sum_kind("copies") == 3_000
    assert times.idle == 3_000  # from 11 to 12 and from 14 to 16
    assert profile_tables.list_scopes(times) == {
        "layers/mlp": (4_000, 4_000),
        "loss": (2_000, 0),  # by the kernel's name
        "communication that nothing hides": (2_000, 0),
        "copies that nothing hides": (3_000, 0),
        "idle": (3_000, 0),
    }


def test_operations_that_run_at_once_share_the_time():
    first, second = (Operation(name, (), "computing") for name in ("a", "b"))
    events = [profile_tables.Event(0, 6, first), profile_tables.Event(2, 4, second)]
    assert profile_tables.divide_time("CPU 0", events).spent == {first: 5, second: 1}


@pytest.mark.parametrize("request_kind", [pytest.param("file", marks=pytest.mark.exhaustive), "signal"])
def test_a_trace_is_asked_for_in_a_running_job(request_kind, tmp_path, monkeypatch, capsys):
    """The steps after the request are traced, once, and the run goes on."""
    monkeypatch.setattr(profiling, "REQUESTED_STEPS", 2)
    monkeypatch.setattr(profiling, "_LOOK_SECONDS", 0.0)
    config = small("tiny_lora", tmp_path, steps=5)
    before_step = profiling.Trace.before_step

    def ask(trace, step):
        if step == 2 and request_kind == "file":
            (tmp_path / profiling.REQUEST_FILE).touch()
        elif step == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        before_step(trace, step)

    monkeypatch.setattr(profiling.Trace, "before_step", ask)
    former = signal.getsignal(signal.SIGUSR2)
    result = loop.train(config)
    assert signal.getsignal(signal.SIGUSR2) == former
    assert result.step == 5 and not (tmp_path / profiling.REQUEST_FILE).exists()
    (event,) = [line for line in lines_of(tmp_path) if line.get("event") == "profile"]
    assert event["text"] == f"steps 2 to 3 are traced in {profile_tables.find_trace(tmp_path)}"
    assert "Steps 2 to 3 of " in capsys.readouterr().out


def test_a_trace_is_whole_where_the_run_stops_within_it(tmp_path):
    events = []
    log = SimpleNamespace(pause=contextlib.nullcontext, log_event=lambda *event: events.append(event))
    config = small("tiny_lora", tmp_path)
    step = jax.jit(lambda x: x + 1).lower(1.0).compile()
    with profiling.Trace(replace(config, profile=configs.ProfileConfig(steps=3)), 5, log, step) as trace:
        for number in (6, 7):
            trace.before_step(number)
            jax.block_until_ready(step(1.0))
            trace.after_step(number)
    assert trace.folder == profile_tables.find_trace(tmp_path)
    assert events == [(7, "profile", f"steps 6 to 7 are traced in {trace.folder}")]
    kept = json.loads((trace.folder / profile_tables.SCOPES_FILE).read_text())
    assert (kept["first_step"], kept["steps"]) == (6, 2)


def test_a_trace_ends_with_a_run_that_fails(tmp_path):
    config = small("tiny_lora", tmp_path, steps=5)
    profile = configs.ProfileConfig(start=0, steps=3)
    log = SimpleNamespace(pause=contextlib.nullcontext)
    trace = profiling.Trace(replace(config, profile=profile), 0, log, None)
    with trace:
        trace.before_step(1)  # the first of three, which is not followed by the others
    jax.profiler.start_trace(tmp_path)  # raises where one still runs
    jax.profiler.stop_trace()
    assert trace.folder is None


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path):
    """It is said, and the next one is traced."""
    events = []
    log = SimpleNamespace(pause=contextlib.nullcontext, log_event=lambda *event: events.append(event))
    (tmp_path / "profile").touch()
    config = replace(small("tiny_lora", tmp_path, steps=9), profile=configs.ProfileConfig(steps=1))
    step = jax.jit(lambda x: x + 1).lower(1.0).compile()
    with profiling.Trace(config, 0, log, step) as trace:
        trace.before_step(1)
        trace.after_step(1)
        (tmp_path / "profile").unlink()
        (tmp_path / profiling.REQUEST_FILE).touch()
        trace.before_step(2)
        trace.after_step(2)
    [(_, _, failed), (_, _, traced)] = events
    assert failed.startswith(f"step 1 is not traced, as {tmp_path}/profile could not be written to (")
    assert traced == f"step 2 is traced in {profile_tables.find_trace(tmp_path)}"


def test_a_folder_is_no_request(tmp_path):
    (tmp_path / profiling.REQUEST_FILE).mkdir()
    log = SimpleNamespace(pause=contextlib.nullcontext, log_event=lambda *event: None)
    with profiling.Trace(small("tiny_lora", tmp_path), 0, log, None) as trace:
        trace.before_step(1)
    assert trace.folder is None


@pytest.mark.parametrize(
    ("first", "last"),
    [(1, 3), (4, 6), (5, 6), (6, 6), (7, 8), (8, 8), (9, 11), (11, 12), (13, 15), (18, 18), (99, 100)],
)
def test_a_trace_ends_before_something_else_is_done(first, last, tmp_path):
    """A save every 6 steps and an evaluation every 8, or the end of the run, would be counted as a step's."""
    config = small("tiny_lora", tmp_path, steps=100)
    config = replace(config, train=replace(config.train, checkpoint_every=6, eval_every=8))
    profile = configs.ProfileConfig(steps=3)
    trace = profiling.Trace(replace(config, profile=profile), 0, SimpleNamespace(), None)
    assert trace._find_last(first) == last
