"""What a step does, read off typed-out HLO, and how long that takes by rates that are easy to reckon with."""

import pytest

from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_27B
from gemma2_jax.planning.dense_step import DenseModel, DenseStep, describe_gemma
from gemma2_jax.planning.schedule import (
    Loop,
    Product,
    Send,
    Wait,
    Work,
    count_attention,
    list_work,
    name_part,
    name_pass,
    read_schedule,
    sum_flops,
)

LAYERS = "jit(train_step)/while/body/eval_jaxpr"
PROGRAM = f"""
%product (x.1: bf16[8,16], w.1: bf16[3,16,32], layer.1: s32[]) -> bf16[8,32] {{
  %x.1 = bf16[8,16]{{1,0}} parameter(0)
  %w.1 = bf16[3,16,32]{{2,1,0}} parameter(1)
  %layer.1 = s32[] parameter(2)
  %cut = bf16[1,16,32]{{2,1,0}} dynamic-slice(%w.1, %layer.1), dynamic_slice_sizes={{1,16,32}}
  %one = bf16[16,32]{{1,0}} bitcast(%cut)
  %y = bf16[8,32]{{1,0}} dot(%x.1, %one), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, \
metadata={{op_name="{LAYERS}/layers/while/body/jvp(mlp)/down/dot_general"}}
  ROOT %z = bf16[8,32]{{1,0}} tanh(%y), metadata={{op_name="{LAYERS}/layers/while/body/jvp(norm)/tanh"}}
}}
%body (carry: (bf16[8,16], bf16[3,16,32], s32[])) -> (bf16[8,16], bf16[3,16,32], s32[]) {{
  %carry = (bf16[8,16]{{1,0}}, bf16[3,16,32]{{2,1,0}}, s32[]) parameter(0)
  %x = bf16[8,16]{{1,0}} get-tuple-element(%carry), index=0
  %w = bf16[3,16,32]{{2,1,0}} get-tuple-element(%carry), index=1
  %layer = s32[] get-tuple-element(%carry), index=2
  %gather-start = (bf16[4,16]{{1,0}}, bf16[8,16]{{1,0}}) all-gather-start(%x), replica_groups=[1,2]<=[2]
  %start = ((bf16[8,16]{{1,0}}, bf16[3,16,32]{{2,1,0}}, s32[]), bf16[8,32]{{1,0}}, u32[]) \
fusion-start(%x, %w, %layer), kind=kCustom, calls=%product
  %done = bf16[8,32]{{1,0}} fusion-done(%start)
  %gather-done = bf16[8,16]{{1,0}} all-gather-done(%gather-start)
  ROOT %out = (bf16[8,16]{{1,0}}, bf16[3,16,32]{{2,1,0}}, s32[]) tuple(%gather-done, %w, %layer)
}}
ENTRY %main (p: (bf16[8,16], bf16[3,16,32], s32[])) -> f32[8] {{
  %p = (bf16[8,16]{{1,0}}, bf16[3,16,32]{{2,1,0}}, s32[]) parameter(0)
  %loop = (bf16[8,16]{{1,0}}, bf16[3,16,32]{{2,1,0}}, s32[]) while(%p), condition=%c, body=%body, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %q = bf16[2,64,8,32]{{3,2,1,0}} bitcast(%loop)
  %dq = bf16[2,64,8,32]{{3,2,1,0}} custom-call(%q), custom_call_target="mosaic_gpu_v2", \
metadata={{op_name="{LAYERS}/backward/layers/attention/attend/gemma2_attention_dq/mpmd_map"}}
  ROOT %sum = f32[8]{{0}} all-reduce(%dq), replica_groups={{{{0,1}}}}, to_apply=%add
}}
"""


def test_a_program_in_its_order():
    items = read_schedule(PROGRAM, {"fsdp": 2}, lambda B, T, N, H: B * T * N * H)
    loop, attention, send = items
    assert isinstance(loop, Loop) and loop.times == 3
    gather, work, wait = loop.items
    assert gather == Send(name="gather-start", kind="all-gather", axes="fsdp", sent=8 * 16 * 2 / 2, is_async=True)
    assert wait == Wait("gather-start")
    assert isinstance(work, Work) and (work.part, work.pass_name) == ("mlp/down", "forward")
    assert work.products == (Product(rows=8, columns=32, depth=16),)
    assert work.memory == 2 * (8 * 16 + 16 * 32 + 8 * 32) + 4, "one layer of the stack, its number, input and output"
    assert isinstance(attention, Work) and (attention.part, attention.pass_name) == ("attention/attend", "backward")
    assert attention.attention == 3 * (2 * 64 * 8 * 32), "the scores, their gradient, and that of the queries"
    assert send == Send(name="sum", kind="all-reduce", axes="fsdp", sent=32, is_async=False)
    assert [times for _, times in list_work(items)] == [3, 1]
    assert sum_flops(items) == {("mlp/down", "forward"): 3 * 8192, ("attention/attend", "backward"): 98304}


LIBRARY = """
ENTRY %main (x: bf16[4,8,16], w: bf16[4,16,32]) -> bf16[4,8,32] {
  %x = bf16[4,8,16]{2,1,0} parameter(0)
  %w = bf16[4,16,32]{2,1,0} parameter(1)
  %both = (bf16[4,8,32]{2,1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(train_step)/mlp/down/dot_general"}, backend_config={"operation_queue_id":"0",\
"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
  ROOT %y = bf16[4,8,32]{2,1,0} get-tuple-element(%both), index=0
}
"""


def test_products_of_cublas_count_without_their_workspace():
    """XLA takes them where it has timed kernels on a GPU; where it compiles for one that is described, it has none."""
    (work,) = read_schedule(LIBRARY, {}, lambda *sizes: 0)
    assert isinstance(work, Work) and (work.part, work.pass_name) == ("mlp/down", "forward")
    assert work.products == (Product(batch=4, rows=8, columns=32, depth=16),) and work.memory == 2 * (
        4 * 8 * 16 + 4 * 16 * 32 + 4 * 8 * 32
    )


@pytest.mark.parametrize(
    ("where", "part", "pass_name"),
    [
        ("layers/while/body/jvp(mlp)/gate_up/dot_general", "mlp/gate_up", "forward"),
        ("backward/layers/transpose(jvp(jvp()))/checkpoint/mlp/down/dot_general", "mlp/down", "backward"),
        (
            "backward/layers/transpose(jvp())/checkpoint/rematted_computation/attention/o/dot_general",
            "attention/o",
            "recomputed",
        ),
        ("jvp(loss)/while/body/BTD,VD->BTV/dot_general", "loss", "forward"),
        ("jvp(loss)/while/body/BTV,VD->BTD/dot_general", "loss", "backward"),
        ("jvp(loss)/while/body/transpose(dot)", "loss", "backward"),
        ("jvp(loss)/while/body/log", "loss", "forward"),
        ("optimizer/mul", "optimizer", "update"),
        ("while/body/add", "other", "forward"),
    ],
)
def test_parts_and_passes(where, part, pass_name):
    assert (name_part(where), name_pass(where, is_product="dot" in where)) == (part, pass_name)


def test_pairs_of_attention():
    """Typed out: eight tokens, of which a local layer sees three; a shard of half the positions has half of them."""
    model = DenseModel(
        width=4, mlp_width=4, heads=2, kv_heads=1, head_width=4, layers=2, vocab_size=8, windows=(3, None)
    )
    assert model.count_pairs(8) == ((1 + 2 + 3 * 6) + 36) / 2
    for config, length in ((GEMMA2_2B, 8192), (GEMMA2_27B, 4096)):
        one = count_attention(config, length)
        pairs = describe_gemma(config).count_pairs(length)
        assert one(3, length, 8, 128) == pytest.approx(2 * 3 * pairs * 8 * 128)
        assert one(3, length // 2, 8, 128) == pytest.approx(3 * pairs * 8 * 128)


def test_a_dense_step_has_the_flops_of_the_closed_formula():
    """Six for each weight and token, and again two where layers are recomputed (arXiv:2001.08361, section 2.1)."""
    model = describe_gemma(GEMMA2_2B)
    tokens, matrices = 2 * 512, GEMMA2_2B.parameter_count() - (4 * 26 + 1) * GEMMA2_2B.width
    layers = matrices - GEMMA2_2B.vocab_size * GEMMA2_2B.width
    scores = GEMMA2_2B.attention_flops(512) * tokens
    step = DenseStep(model=model, rows=2, length=512, remat="none", attention_products=4)
    assert sum_flops(step.describe()).total() == pytest.approx(6 * matrices * tokens + 3 * scores)
    step = DenseStep(model=model, rows=1, length=512, passes=2, attention_products=4)
    assert sum_flops(step.describe()).total() == pytest.approx((6 * matrices + 2 * layers) * tokens + 4 * scores)
    step = DenseStep(model=model, rows=2, length=512, remat="none", rank=16, adapted=("mlp/down",))
    adapters = 6 * 26 * 16 * (GEMMA2_2B.mlp_width + GEMMA2_2B.width)
    expected = (4 * matrices + adapters) * tokens + 4.5 * scores
    assert sum_flops(step.describe()).total() == pytest.approx(expected)
