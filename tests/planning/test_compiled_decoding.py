"""The engine's step compiled for H100s that are not there, and bytes counted by hand in typed-out HLO."""

from dataclasses import replace

import pytest
from compilers import needs_plugin

from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_27B
from gemma2_jax.planning.compiled_decoding import compile_decoding
from gemma2_jax.planning.memory_traffic import read_memory_traffic

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%looked_up (table: f32[1000,4], index: s32[2], more: f32[2,4]) -> f32[2,4] {
  %table = f32[1000,4]{1,0} parameter(0)
  %index = s32[2]{0} parameter(1)
  %more = f32[2,4]{1,0} parameter(2)
  %view = f32[1000,4]{1,0} bitcast(%table)
  %rows = f32[2,4]{1,0} gather(%view, %index), offset_dims={1}
  ROOT %result = f32[2,4]{1,0} add(%rows, %more)
}

%changed (cache: bf16[100,8], row: bf16[1,8], place: s32[]) -> bf16[100,8] {
  %cache = bf16[100,8]{1,0} parameter(0)
  %row = bf16[1,8]{1,0} parameter(1)
  %place = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = bf16[100,8]{1,0} dynamic-update-slice(%cache, %row, %place, %zero)
}

%small (x: (f32[2,4])) -> (f32[2,4]) {
  %x = (f32[2,4]{1,0}) parameter(0)
  %y = f32[2,4]{1,0} get-tuple-element(%x), index=0
  ROOT %result.1 = (f32[2,4]{1,0}) tuple(%y)
}

%large (x.1: (f32[2,4])) -> (f32[2,4]) {
  %x.1 = (f32[2,4]{1,0}) parameter(0)
  %y.1 = f32[2,4]{1,0} get-tuple-element(%x.1), index=0
  %z = f32[2,4]{1,0} negate(%y.1)
  ROOT %result.2 = (f32[2,4]{1,0}) tuple(%z)
}

%body (carry: (f32[2,4])) -> (f32[2,4]) {
  %carry = (f32[2,4]{1,0}) parameter(0)
  %part = f32[2,4]{1,0} get-tuple-element(%carry), index=0
  %twice = f32[2,4]{1,0} multiply(%part, %part), metadata={op_name="here/twice"}
  ROOT %out = (f32[2,4]{1,0}) tuple(%twice)
}

%condition (carry.1: (f32[2,4])) -> pred[] {
  %carry.1 = (f32[2,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (table.1: f32[1000,4], index.1: s32[2], more.1: f32[2,4], cache.1: bf16[100,8], row.1: bf16[1,8]) -> f32[] {
  %table.1 = f32[1000,4]{1,0} parameter(0)
  %index.1 = s32[2]{0} parameter(1)
  %more.1 = f32[2,4]{1,0} parameter(2)
  %cache.1 = bf16[100,8]{1,0} parameter(3)
  %row.1 = bf16[1,8]{1,0} parameter(4)
  %place.1 = s32[] constant(7)
  %found = f32[2,4]{1,0} fusion(%table.1, %index.1, %more.1), kind=kLoop, calls=%looked_up, metadata={op_name="lookup"}
  %new.1 = bf16[100,8]{1,0} fusion(%cache.1, %row.1, %place.1), kind=kLoop, calls=%changed, metadata={op_name="update"}
  %tuple = (f32[2,4]{1,0}) tuple(%found)
  %chosen = (f32[2,4]{1,0}) conditional(%place.1, %tuple, %tuple), true_computation=%large, false_computation=%small
  %loop = (f32[2,4]{1,0}) while(%chosen), condition=%condition, body=%body, metadata={op_name="loop"}TRIPS
  %result.3 = f32[2,4]{1,0} get-tuple-element(%loop), index=0
  ROOT %total = f32[] reduce(%result.3, %place.1), dimensions={0,1}, to_apply=%add, metadata={op_name="total"}
}
"""


@pytest.mark.parametrize(("trips", "times"), [("", 1), (', backend_config={"known_trip_count":{"n":"5"}}', 5)])
def test_bytes_of_memory_by_operation(trips, times):
    """Two rows of a table and their indices; a row of a cache; an array in a loop; of two branches, the smaller."""
    assert read_memory_traffic(PROGRAM.replace("TRIPS", trips)) == {
        "lookup": 32 + 8 + 32 + 32,
        "update": 16 + 4 + 16,
        "here/twice": times * (32 + 32 + 32),
        "total": 32 + 4 + 4,
    }


def test_one_run_of_a_loop():
    assert read_memory_traffic(PROGRAM, "loop") == {"here/twice": 96}
    with pytest.raises(ValueError, match="the program has no loop elsewhere"):
        read_memory_traffic(PROGRAM, "elsewhere")


@needs_plugin
@pytest.mark.parametrize(
    ("config", "gpus", "rows"),
    [
        (GEMMA2_2B, 2, 8),
        pytest.param(GEMMA2_27B, 1, 64, marks=pytest.mark.exhaustive),
        pytest.param(GEMMA2_27B, 4, 8, marks=pytest.mark.exhaustive),
    ],
)
def test_a_step_reads_weights_and_cache_once(config, gpus, rows):
    """Real widths, two layers: nothing is copied or gathered; of collectives, activations alone."""
    found = compile_decoding(replace(config, layers=2), gpus=gpus, rows=rows, context=8192)
    assert 1 < found.excess < 1.1
    (attended,) = {size for where, size in found.memory_traffic.items() if "attention_decode" in where}
    assert 1 < attended / found.cache < 1.05  # queries and the sums of parts are the rest
    cached = f"bf16[{rows},{config.kv_heads // gpus},"
    assert cached in found.text
    assert not [line for line in found.text.splitlines() if cached in line and " copy(" in line]
    largest = max((collective.sent for collective in found.collectives), default=0)
    assert largest < rows * config.vocab_size * 4 + 1  # logits, where tokens are drawn from them
    sent_always = [c.sent for c in found.collectives if c.kind == "all-reduce" and "mlp/down" in c.where]
    assert (len(sent_always) > 0) == (gpus > 1)
