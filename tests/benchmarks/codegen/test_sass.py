"""Machine code is read right: widths of accesses, work of matrix instructions, and which instructions form a loop."""

import pytest

from benchmarks.codegen.sass import Instruction, parse, pipes

# A loop (.L_x_1 … BRA) that leaves through an out-of-line spin block, as the barriers of Hopper do, and an outer one.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   FFMA R8, R9, R10, R11 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R3 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_2) ;
"""


def test_an_inner_loop_holds_its_out_of_line_blocks_and_nothing_else():
    instructions, loops = parse(LISTING)
    assert len(instructions) == 13
    (loop,) = loops
    assert sorted(x.word for x in loop) == sorted(
        ["SYNCS", "BRA", "HGMMA", "FFMA", "BRA", "SYNCS", "BRA", "BRA"],
    )
    assert pipes(loop)["mma"] == 1
    assert pipes(instructions)["global"] == 2


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("FFMA", 0),
    ],
)
def test_work_of_a_matrix_instruction(name, flops):
    assert Instruction(None, name, "").flops == flops


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.128.CONSTANT", 16),
        ("STG.E.64", 8),
        ("LDG.E", 4),
        ("LDG.E.U16", 2),
        ("LDG.E.S8", 1),
        ("STG.E.EF.128", 16),
        ("LDG.E.ENL2.256", 32),
        ("LDS.128", 0),
    ],
)
def test_bytes_of_an_access_to_global_memory(name, size):
    assert Instruction(None, name, "").bytes == size
