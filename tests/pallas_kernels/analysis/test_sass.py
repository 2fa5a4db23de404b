"""The count of the instructions of a kernel's innermost loops, on texts as nvdisasm writes them."""

import pytest

from pallas_kernels.analysis.sass import loops


def text(*lines: str) -> str:
    """Labels end in a colon; the others are instructions."""
    return "\n".join(x if x.endswith(":") else f"        /*{16 * i:04x}*/ {x} ;" for i, x in enumerate(lines))


NESTED = text(
    "MOV R1, c[0x0][0x28]",
    ".L_x_1:",
    "LDG.E.64 R8, desc[UR4][R2.64]",
    ".L_x_0:",
    "LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64]",
    "@P2 LDG.E.U8 R4, desc[UR4][R2.64]",
    "HMMA.16816.F32.BF16 R12, R4, R10, R12",
    "@!P0 BRA `(.L_x_0)",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_9:",
    "BRA `(.L_x_9)",
)


def test_the_innermost_loop_is_counted():
    (loop,) = loops(NESTED)
    assert (loop.instructions, loop.loaded_bytes, loop.per_byte) == (4, 17, 4 / 17)
    assert loop.opcodes == {"LDGSTS": 1, "LDG": 1, "HMMA": 1, "BRA": 1}


def test_two_loops_in_a_row_are_two():
    one = (".L_x_{0}:", "LDS R4, [R2]", "FADD R4, R4, R5", "@!P0 BRA `(.L_x_{0})")
    found = loops(text(*(x.format(i) for i in range(2) for x in one), "EXIT"))
    assert [x.instructions for x in found] == [3, 3]
    assert [x.per_byte for x in found] == [None, None]


@pytest.mark.parametrize("leaves", ["@P3 BRA `(.L_x_4)", "BRA.DIV ~URZ, `(.L_x_4)", "BRA.U UP0, `(.L_x_4)"])
def test_a_detour_out_of_line_is_a_part_of_its_loop(leaves):
    """Its jump back is a backward branch too, but does not make a loop of all that lies between."""
    (loop,) = loops(
        text(
            ".L_x_0:",
            "FADD R4, R4, R5",
            leaves,
            ".L_x_3:",
            "FMUL R4, R4, R5",
            "@!P0 BRA `(.L_x_0)",
            "STG.E desc[UR4][R2.64], R4",
            "EXIT",
            ".L_x_4:",
            "SHFL.BFLY PT, R4, R4, 0x1, 0x1f",
            "BRA `(.L_x_3)",
        )
    )
    assert loop.instructions == 6
    assert "STG" not in loop.opcodes


def test_a_kernel_without_loops_has_none():
    assert loops(text("MOV R1, R2", "EXIT", ".L_x_1:", "BRA `(.L_x_1)")) == ()
    assert loops("") == ()
