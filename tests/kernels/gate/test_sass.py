"""Reading machine code: hand-written listings whose resources, loops and matrix work are known."""

import pytest

from diffusion_opt.kernels.gate.sass import Instruction, instructions_of, main_loop, read_sass, unit


def listing(*lines: str, resources: str = "REG:40 STACK:16 SHARED:0 LOCAL:0") -> str:
    """A listing as cuobjdump prints it, 16 bytes an instruction, each with its encoding and control word behind it."""
    shown = [
        f"        /*{16 * i:04x}*/                   {line} ;   /* 0x00000a00ff017b82 */"
        for i, line in enumerate(lines)
    ]
    control = "                                                 /* 0x000e620000000800 */"
    return f"Resource usage:\n Function scores:\n  {resources} CONSTANT[0]:608\n" + f"\n{control}\n".join(shown)


TILES = (
    "S2R R0, SR_TID.X",
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
    "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT",  # 0x20: the loop begins
    "MUFU.EX2 R3, R3",
    "FMUL R3, R3, R5",
    "STL [R1+0x10], R3",
    "@!P3 BRA 0x20",  # and ends
    "LDL R3, [R1+0x10]",
    "EXIT",
    "BRA 0x90",
    "NOP",
)


def test_resources_spills_and_opcodes_are_read():
    code = read_sass(listing(*TILES))
    assert (code.registers, code.stack_bytes) == (40, 16)
    assert (code.spill_loads, code.spill_stores) == (1, 1)
    assert code.matrix == {"HGMMA": 1}
    assert (code.async_copies, code.tma) == (1, 0)
    assert code.instructions == 10  # NOP pads


def test_the_main_loop_is_what_lies_between_the_branch_and_its_target():
    loop = read_sass(listing(*TILES)).loop
    assert loop.instructions == 5
    assert loop.mix == {"control": 1, "exp": 1, "fp32": 1, "matrix": 1, "memory": 1}
    assert loop.exponentials == 1
    assert loop.matrix == {"HGMMA": 1}


def test_a_wait_placed_behind_the_code_is_no_loop():
    code = instructions_of(
        listing(
            "UTCHMMA gdesc[UR6], gdesc[UR16], tmem[UR14], tmem[UR52], idesc[UR53], !UPT",  # 0x00: before the loop
            "@!P0 BRA 0x80",
            "FADD R1, R1, R2",  # 0x20: reached from above, from the loop's end, and from the wait
            "UTCHMMA gdesc[UR6], gdesc[UR16], tmem[UR14], tmem[UR52], idesc[UR53], UPT",  # 0x30: the loop
            "FADD R1, R1, R2",
            "@P1 BRA 0x30",
            "EXIT",
            "NOP",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11], R4",  # 0x80: the wait
            "@!P0 BRA 0x80",
            "BRA 0x20",  # back, but 0x20 does not dominate this place
        )
    )
    loop = main_loop(code)
    assert loop.instructions == 3
    assert loop.matrix == {"UTCHMMA": 1}


def test_of_nested_loops_the_inner_one_with_matrix_work_counts():
    loop = main_loop(
        instructions_of(
            listing(
                "MOV R1, R2",
                "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0x10: outer loop
                "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0x20: inner loop
                "@P0 BRA 0x20",
                "FADD R1, R1, R2",  # 0x40: a loop without matrix work
                "@P2 BRA 0x40",
                "BRA.U !UP0, 0x10",
                "EXIT",
            )
        )
    )
    assert loop.instructions == 2


def test_a_kernel_without_matrix_work_has_no_main_loop():
    assert read_sass(listing("FADD R1, R1, R2", "@P0 BRA 0x0", "EXIT")).loop is None


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("IMMA.16832.S8.S8", 2 * 16 * 8 * 32),
        ("QMMA.16832.F32.E4M3.E4M3", 2 * 16 * 8 * 32),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),  # by four warps
        ("QGMMA.64x64x32.F32.E4M3.E4M3", 2 * 64 * 64 * 32 // 4),
        ("UTCHMMA", None),
        ("FFMA", None),
    ],
)
def test_the_opcode_tells_the_work_of_one_warp(opcode, flops):
    assert Instruction(0, opcode, "R0, R4, R8, R0", False).matrix_flops == flops


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("MUFU.EX2", "exp"),
        ("FFMA.FTZ", "fp32"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("IMAD.MOV.U32", "integer"),
        ("LDGSTS.E.BYPASS.128", "memory"),
        ("UTMALDG.2D", "memory"),
        ("UIADD3", "uniform"),
        ("UTCQMMA", "matrix"),
        ("UTCBAR", "uniform"),
        ("SHFL.BFLY", "shuffle"),
        ("VOTE.ALL", "other"),
    ],
)
def test_units(opcode, kind):
    assert unit(Instruction(0, opcode, "", False)) == kind


def test_a_text_without_code_is_refused_with_what_it_says():
    with pytest.raises(ValueError, match=r"no machine code.*cuobjdump fatal"):
        read_sass("cuobjdump fatal   : No input file")


@pytest.mark.parametrize(("waits", "serialized"), [(1, False), (2, True)])
def test_a_loop_that_waits_for_each_matrix_instruction_is_serialized(waits, serialized):
    product = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    body = [product, wait, product, wait if waits == 2 else "FADD R1, R1, R2"]  # 0x00 … 0x30
    loop = read_sass(listing(*body, "MUFU.EX2 R3, R3", "@!P3 BRA 0x0", "EXIT")).loop
    assert (loop.waits, loop.serialized) == (waits, serialized)


def test_instructions_of_single_warps_are_waited_for_by_nobody():
    loop = read_sass(listing("HMMA.16816.F32.BF16 R4, R8, R2, R4", "@!P3 BRA 0x0", "EXIT")).loop
    assert (loop.waits, loop.serialized) == (0, False)
