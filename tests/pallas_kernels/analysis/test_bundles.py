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
