"""The static roofline: worked by hand for one loop, and the stated peaks of the hardware."""

from dataclasses import replace

import pytest
from kernels.gate.example_kernels import DEPTH, scores_case

from diffusion_opt.kernels.gate.roofline import HARDWARE, matrix_work, programs_per_multiprocessor, roofline, unrolled
from diffusion_opt.kernels.gate.sass import Loop
from diffusion_opt.kernels.launch import ARCHITECTURES, LaunchConfig

CHOICE = LaunchConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
FLOPS_A_WARP = 2 * DEPTH * 64 * 32 // 4


def loop(instructions: int = 100, exponentials: int = 16, flops: int | None = FLOPS_A_WARP) -> Loop:
    return Loop(instructions, {}, exponentials, {"HGMMA": 2}, flops)


def case(archs: tuple[int, ...] = ARCHITECTURES):
    return scores_case("example", CHOICE, archs)


def test_cycles_of_one_tile_by_hand():
    bound = roofline(case(), 90, loop())
    assert bound.tensor == bound.needed == 2 * DEPTH * 64 * 32 / 4096
    assert bound.special == 16 * 32 * 4 / 16  # MUFU x threads / 16 a cycle
    assert bound.issue == 100 * 4 / 4  # one warp each for four schedulers
    assert bound.bound_by == "special"
    assert bound.serial == 32 / (32 + 128)
    assert bound.overlapped == 32 / 128


def test_more_matrix_throughput_lowers_the_reachable_fraction():
    fractions = [roofline(case(), arch, loop()).serial for arch in (89, 80, 90, 100)]  # 512, 2048, 4096, 8192 a cycle
    assert fractions == sorted(fractions, reverse=True)
    assert len(set(fractions)) == 4


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_an_unrolled_loop_gives_the_same_cycles_a_tile(passes):
    long = loop(100 * passes, 16 * passes, FLOPS_A_WARP * passes)
    assert unrolled(case(), 90, long) == passes
    assert roofline(case(), 90, long) == roofline(case(), 90, loop())


def test_repeated_matrix_work_costs_time_and_does_not_count_as_reached():
    once, twice = (roofline(case(), 90, loop(flops=factor * FLOPS_A_WARP)) for factor in (1, 2))
    assert matrix_work(case(), 90, loop(flops=2 * FLOPS_A_WARP)) == 2
    assert (twice.tensor, twice.needed) == (2 * once.tensor, once.needed)
    assert twice.serial == 32 / (64 + 128)
    assert matrix_work(case(), 100, loop(flops=None)) is None
    assert roofline(case(), 100, loop(flops=None)).tensor == 2 * DEPTH * 64 * 32 / 8192


def test_the_few_exponentials_of_the_rescaling_are_no_second_pass():
    extra = 16 + 2  # 16 for the elements of a tile
    assert unrolled(case(), 100, loop(exponentials=extra, flops=None)) == 1
    assert unrolled(case(), 100, loop(exponentials=2 * extra, flops=None)) == 2


def test_exponentials_repeated_with_their_products_are_no_second_pass():
    """Two halves of eight warps compute the same scores and different values: twice the exponentials, 1.5 the work."""
    repeated = loop(exponentials=32, flops=3 * FLOPS_A_WARP // 2)
    assert unrolled(case(), 90, repeated) == 1
    assert matrix_work(case(), 90, repeated) == 1.5
    assert roofline(case(), 90, repeated).special == 2 * roofline(case(), 90, loop()).special


def test_without_exponentials_the_matrix_work_tells_the_unrolling():
    product = replace(case(), loop_exps=0)
    assert unrolled(product, 90, loop(exponentials=0, flops=4 * FLOPS_A_WARP)) == 4
    assert unrolled(product, 100, loop(exponentials=0, flops=None)) == 1


def test_a_kernel_without_matrix_loop_has_no_roofline():
    assert roofline(case(), 90, None) is None


def test_a_serialized_loop_has_no_roofline():
    loop = Loop(100, {}, 64, {"HGMMA": 4}, 2 * 64 * 32 * DEPTH // 4, waits=4)
    assert roofline(scores_case("x", LaunchConfig(64, 32, 4, 2), (90,)), 90, loop) is None
    assert roofline(scores_case("x", LaunchConfig(64, 32, 4, 2), (90,)), 90, replace(loop, waits=1)) is not None


def test_an_operand_the_hardware_lacks_is_refused():
    with pytest.raises(ValueError, match=r"A100.*sm_80.*multiplies no fp8"):
        roofline(replace(case(), loop_flops={"fp8": 64}), 80, loop())


@pytest.mark.parametrize(
    ("arch", "operand", "tflops"),
    [  # dense peaks as the vendor states them
        (80, "bf16", 312), (80, "int8", 624), (89, "bf16", 165.2), (89, "fp8", 330.3), (89, "int8", 660.6),
        (90, "bf16", 989.4), (90, "fp8", 1979), (100, "bf16", 2250), (100, "fp4", 9000),
        (120, "bf16", 209.5), (120, "fp8", 419), (120, "fp4", 1676),
    ],
)  # fmt: skip
def test_rates_per_cycle_give_the_stated_peaks(arch, operand, tflops):
    assert HARDWARE[arch].peak_tflops(operand) == pytest.approx(tflops, rel=0.01)


def test_every_architecture_has_hardware_with_a_source():
    assert set(HARDWARE) == set(ARCHITECTURES)
    assert all(hardware.source and hardware.shared_bytes for hardware in HARDWARE.values())


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (128, 16 * 1024, 4, 4),  # registers: 65536 / (128 x 128)
        (129, 16 * 1024, 4, 3),  # a warp's registers are given out by 256: 136 x 32
        (32, 112 * 1024, 4, 2),  # shared memory: 228 / 113 KiB
        (32, 227 * 1024, 4, 1),
        (32, 228 * 1024, 4, 0),  # does not fit at all
        (16, 0, 32, 2),  # threads: 2048 / 1024
    ],
)
def test_programs_per_sm_are_limited_by_the_scarcest_resource(registers, shared, warps, programs):
    assert programs_per_multiprocessor(90, registers, shared, warps) == programs
