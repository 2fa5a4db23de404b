"""Running the scalar unit of a schedule: a small one, written as libtpu writes its final bundles."""

import numpy as np
import pytest

from pallas_kernels.analysis import bundle_runs, bundles

# Turns as often as operand 0 says: libtpu passes an array of one element in a register, without a pointer.
LOOP = """
= control target key end

     0   :  { %s9_s0 = inlined_call_operand.<no memory space> [shape: s32[1], index: 0, kind: input, shape index: {}]  ;;  %s10_s1 = inlined_call_operand.hbm [shape: f32[8,128], index: 1, kind: input, shape index: {}] }
   0x1   :  { %11 = sst [smem:[#allocation7]] %s9_s0  ;;  %s20_s3 = smov 0 } /* Start region 1 */
   0x2 LB: > { %s21_s3 = sphi %s20_s3, %s22_s3  ;;  %s23_s4 = sld [smem:[#allocation7]] } /* Start region 2 */
   0x3   : > { %s22_s3 = sadd.s32 1, %s21_s3 }
   0x4   : > { %p24_p0 = scmp.lt.s32.totalorder %s22_s3, %s23_s4 }
   0x5   : > { %30 = sbr.rel (%p24_p0) target = $region2 }
   0x6   :  { %31 = vsyncpa [#allocation10], 1 } /* Start region 3 */
"""  # noqa: E501


def test_an_operand_of_one_element_is_known_by_value():
    schedule = bundles.read(LOOP)
    assert [(o.index, o.shape, o.by_value) for o in schedule.operands] == [
        (0, "s32[1]", True),
        (1, "f32[8,128]", False),
    ]
    ran = bundle_runs.run(schedule, {0: np.array([5], np.int32)})
    assert ran.turns == [5]
    assert ran.bundles == 2 + 5 * 4 + 1
    with pytest.raises(bundle_runs.UnknownBranch):
        bundle_runs.run(schedule, {})


# 23 // 7 turns, then 23 % 7; libtpu writes what a division yields as a comment, and its results are popped in order.
DIVIDED = """
= control target key end

     0   :  { %s1_s0 = smov 23  ;;  %s20_s3 = smov 0 } /* Start region 1 */
   0x1   :  { %99 = sdivrem.u32 %s1_s0, 7 /* kDivAndRem */ }
   0x2   :  { %s2_s1 = spop.drf %99 }
   0x3   :  { %s3_s2 = spop.drf %99 }
   0x4 LB: > { %s21_s3 = sphi %s20_s3, %s22_s3 } /* Start region 2 */
   0x5   : > { %s22_s3 = sadd.s32 1, %s21_s3 }
   0x6   : > { %p24_p0 = scmp.lt.s32.totalorder %s22_s3, %COUNT }
   0x7   : > { %30 = sbr.rel (%p24_p0) target = $region2 }
   0x8   :  { %31 = vsyncpa [#allocation10], 1 } /* Start region 3 */
"""


@pytest.mark.parametrize(("count", "turns"), [("s2_s1", 3), ("s3_s2", 2)])
def test_a_division_yields_the_quotient_then_the_rest(count, turns):
    assert bundle_runs.run(bundles.read(DIVIDED.replace("COUNT", count)), {}).turns == [turns]


def test_a_store_that_may_not_take_place_leaves_its_place_unknown():
    """The barrier between the cores of a v5p stores what the vector unit says, and nothing depends on it."""
    stored = DIVIDED.replace("%99 = sdiv", "%98 = sst [smem:[#allocation7]] (%p5_p5), %s1_s0  ;;  %99 = sdiv")
    assert bundle_runs.run(bundles.read(stored.replace("COUNT", "s2_s1")), {}).turns == [3]
    read = stored.replace("%30", "%s7_s7 = sld [smem:[#allocation7]]  ;;  %30")
    with pytest.raises(bundle_runs.UnknownBranch):
        bundle_runs.run(bundles.read(read.replace("COUNT", "s7_s7")), {})
