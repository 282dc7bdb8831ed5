"""Memory by owner, from a dump that is typed out."""

import pytest

from gemma2_jax.planning.memory import Buffer, Dump, find_peak, name_owner, name_place, read_dump, squeeze_type

PROGRAM = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %kept = bf16[1,4,16,8]{3,2,1,0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="layers/while"}
  %gradient = f32[4,8,8]{2,1,0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="backward/layers/dot"}
  %gathered = bf16[8,64]{1,0} all-gather(%p), replica_groups={}, metadata={op_name="layers/gather"}
  %logits = f32[16,100]{1,0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jvp(loss)/while/dot"}
  ROOT %sum = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="optimizer/add"}
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 32, page 0, parameter 0, shape |f32[8]| at ShapeIndex {}:
 value: <1 p @0> (size=32,offset=0): f32[8]{0}
allocation 1: size 12000, page 0, preallocated-temp:
 value: <2 kept @0> (size=1024,offset=0): bf16[1,4,16,8]{3,2,1,0}
 value: <3 gradient @0> (size=1024,offset=1024): f32[4,8,8]{2,1,0}
 value: <4 gathered @0> (size=1024,offset=4096): bf16[8,64]{1,0}
 value: <5 logits @0> (size=6400,offset=5120): f32[16,100]{1,0}
 value: <6 carry{1} (phi) @0> (size=6400,offset=5120): f32[16,100]{1,0}
"""
LIVE = """HloLiveRange (max 9):
  InstructionSequence:
    0:p
    4:logits
  BufferLiveRange:
    kept{}:1-5
  Live ranges at 4 (peak):
    logits{}: 6400 bytes (cumulative: 6400 bytes)
    carry{1}: 6400 bytes (cumulative: 12800 bytes)
    kept{}: 1024 bytes (cumulative: 13824 bytes)
    gradient{}: 1024 bytes (cumulative: 14848 bytes)
    gathered{}: 1024 bytes (cumulative: 15872 bytes)
    p{}: 32 bytes (cumulative: 15904 bytes)
  Stack trace breakdown for peak usage: 15904 bytes
    p{}: 99 bytes
"""


def find(assignment: str = ASSIGNMENT, live: str = LIVE, temporaries: int = 12000):
    return find_peak(Dump(assignment, live), PROGRAM, temporaries, {squeeze_type("f32[4,8,8]")}, layers=4)


def test_owners_where_a_step_needs_most():
    found = find()
    assert found.where == "loss"
    assert found.owners == {
        "logits and loss": 6400,
        "kept for backward": 1024,
        "gradients": 1024,
        "gathered weights and other collectives' buffers": 1024,
        "gaps between buffers": 12000 - 6400 - 3 * 1024,
    }
    assert sum(found.owners.values()) == 12000
    largest = Buffer(owner="logits and loss", size=6400, shape="f32[16,100]", operation="jvp(loss)/while/dot")
    assert found.buffers[0] == largest, "the loop's name for the same bytes is not counted again"
    assert [buffer.size for buffer in found.buffers] == [6400, 1024, 1024, 1024]


def test_buffers_that_overlap_count_once():
    assert find(ASSIGNMENT.replace("offset=1024)", "offset=512)")).owners["gradients"] == 512


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(assignment=ASSIGNMENT.replace("preallocated-temp", "heap")), "no allocation preallocated-temp"),
        (dict(live=LIVE.replace("(peak)", "")), "no line 'Live ranges at N \\(peak\\)'"),
        (dict(temporaries=9000), "take 472 bytes more than all temporaries"),
    ],
)
def test_dumps_that_are_written_otherwise(changes, said):
    with pytest.raises(ValueError, match=said):
        find(**changes)


def test_folders_without_a_dump(tmp_path):
    with pytest.raises(ValueError, match=r"XLA dumped 0 files \*after_optimizations-buffer-assignment.txt"):
        read_dump(tmp_path)


def test_names():
    assert squeeze_type("f32[1,4,8,1]{3,2,1,0}") == "f32[4,8]"
    assert name_owner("f32[7,8]", "all-reduce-start", "x", (), 4).startswith("gathered weights")
    assert name_owner("f32[4,8]", "fusion", "layers", (), 4) == "other temporaries", "not a stack of activations"
    assert [name_place(where) for where in ("backward/layers/x", "layers/x", "embedding")] == [
        "backward",
        "forward",
        "elsewhere",
    ]
