import pytest

from slimconv_jax.benchmark.compiled_program import collectives_of, operations_of, parts_of

HLO = """
HloModule jit_step

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %big = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%stop (r: (s32[], f32[8])) -> pred[] {
  %r = (s32[], f32[8]{0}) parameter(0)
  %most = s32[]{:T(128)} constant(3)
  %count = s32[]{:T(128)} get-tuple-element(%r), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %most), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %y = f32[8]{0} all-reduce(%x), to_apply=%inner, backend_config={"estimated_cycles":"7"}
  ROOT %z = (s32[], f32[8]{0}) tuple(%y)
}

ENTRY %main (a: bf16[4,2]) -> f32[8] {
  %a = bf16[4,2]{1,0} parameter(0)
  %b = (f32[8]{0:T(8)S(1)}, s8[4096]{0}) custom-call(%a), custom_call_target="x", \
metadata={op_name="jit(step)/jvp(conv2)/upper/norm/add"}, backend_config={"estimated_cycles":"30"}
  %c = f32[8]{0} get-tuple-element(%b), index=0
  %d = f32[8]{0} fusion(%c, %c), kind=kLoop, calls=%inner, \
metadata={op_name="jit(step)/transpose(jvp(conv1))/conv"}, backend_config={"estimated_cycles":"10"}
  %e = (f32[8]{0}, f32[8]{0}) all-reduce-start(%d), metadata={op_name="jit(step)/optimizer/add"}
  %s = ((f32[8]{0}), f32[2]{0:T(8)S(1)}, s32[]{:S(2)}) slice-start(%d), slice={[0:2]}
  %t = f32[2]{0:T(8)S(1)} slice-done(%s)
  %u = (f32[8]{0:T(8)S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%d), cross_program_prefetch_index=0
  %w = (s32[], f32[8]{0}) while(%d), condition=%stop, body=%body@TRIPS
  ROOT %f = f32[8]{0} all-reduce(%d), to_apply=%inner
}
"""


ON_GPU = HLO.replace("@TRIPS", ', backend_config={"known_trip_count":{"n":"3"}}')
HLO = HLO.replace("@TRIPS", "")


@pytest.mark.parametrize("text", [HLO, ON_GPU], ids=["tpu", "gpu"])
def test_operations_are_those_of_the_entry_in_order(text):
    custom_call, fusion, _, sliced, copied, *loop, _ = operations_of(text)
    # Without the scratch memory, and what stays on the chip.
    assert (custom_call.bytes, custom_call.cycles) == (16, 30)
    assert {"conv2", "upper", "norm"} <= custom_call.scopes
    assert (fusion.bytes, fusion.cycles) == (64, 10)  # an operand that it has twice is read once
    # What is brought onto the chip is read once, and of a slice no more than it is.
    assert (sliced.bytes, copied.bytes) == (8, 32)
    assert [(each.bytes, each.cycles) for each in loop] == 3 * [(64, 7)]  # its body, three times
    assert list(collectives_of(text)) == [
        ("all-reduce", 64),
        ("all-reduce", 32),
        *3 * [("all-reduce", 32)],
    ]


def test_a_conditional_counts_as_the_mean_of_its_branches():
    text = """
%none (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%one (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %q = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  %y = f32[8]{0} conditional(%i, %x, %x, /*index=2*/%x), \
branch_computations={%one, %one, %none}, metadata={op_name="jit(step)/augment/cond"}
  ROOT %z = f32[8]{0} conditional(%i, %y, %y), true_computation=%one, false_computation=%none
}
"""
    several, two = operations_of(text)
    assert (several.bytes, several.cycles) == (2 * 64 // 3, 2 * 999 // 3)
    assert "augment" in several.scopes
    assert (two.bytes, two.cycles) == (64 // 2, 999 // 2)


def test_parts_add_up_and_are_named_by_the_innermost():
    operations = list(operations_of(HLO))
    parts = parts_of(operations, clock=10)
    assert {name: part["bytes"] for name, part in parts.items()} == {
        "norms": 16,
        "1x1": 64,
        "optimiser": 64,
        "sums and rest": 8 + 32 + 3 * 64 + 64,
    }
    assert sum(part["bytes"] for part in parts.values()) == sum(o.bytes for o in operations)
    assert (parts["norms"]["estimated_seconds"], parts["1x1"]["estimated_seconds"]) == (3, 1)
