"""How each kernel is cut into tiles on each GPU generation: a table, not a search at run time.

An autotuner times every choice on the first call of every new shape, gives other bits on other days, and needs a GPU.
Here the choice is data: kernel, architecture and padded head dimension give tile sizes, warps and pipeline stages. The
ahead-of-time gate (`gate/cases.py`) compiles each row for its architecture and fails when registers spill, so a row
is checked without a GPU; the benchmark on a GPU is what decides between rows that do not spill.

A tile of scores is `block_m` queries by `block_n` keys. Larger tiles load K and V less often and need more registers;
what fits differs: on sm_90 and sm_100 the matrix units read from shared memory and leave registers to the
accumulators, on sm_80, 89 and 120 the operands are in registers too. float32 operands are twice as large, so they
have their own rows. On sm_90 four warps share an instruction of 64 rows, so of what a program owns, 64 rows ask for
four warps and 128 for eight; with eight warps on 64 rows, half of them repeat the products of the others.

Where every tile spills, there is no row: `launch` then raises, and `attention/door.py` takes torch's attention for a
dense call and says so, or refuses. A kernel family adds its rows to `LAUNCH` under its own name.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Form = Literal["loop", "peeled", "inside"]

ARCHITECTURES = (80, 89, 90, 100, 120)  # compute capability x 10: A100, 4090/L40, H100/H200, B200, 5090
HEAD_DIMS = (16, 32, 64, 128, 256)  # what a head dimension is padded to: matrix units take powers of two from 16


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile and pipeline of one kernel on one architecture."""

    block_m: int  # queries (or rows of a matrix) a program works on at a time
    block_n: int  # keys (or columns)
    num_warps: int  # of 32 threads
    num_stages: int  # tiles in flight between global and shared memory
    form: Form = "loop"  # how what is left over of whole tiles is walked; see `attention/dense/forward.py`

    def tuning(self) -> dict[str, int]:
        """What a kernel's launch takes of it: tile sizes, warps and stages."""
        tiles = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return {**tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def padded_head_dim(head_dim: int) -> int:
    """The smallest of 16, 32, 64, 128, 256 that holds `head_dim`. Raises ValueError outside 1 to 256."""
    if not 1 <= head_dim <= HEAD_DIMS[-1]:
        raise ValueError(
            f"head dimension {head_dim}: the kernels hold a whole head in registers, so 1 to {HEAD_DIMS[-1]} is "
            "possible; use torch's scaled_dot_product_attention for larger heads"
        )
    return next(size for size in HEAD_DIMS if size >= head_dim)


def heads(
    up_to_64: LaunchConfig, of_128: LaunchConfig | None = None, of_256: LaunchConfig | None = None
) -> dict[int, LaunchConfig]:
    """Choices by padded head dimension; a tile that fits heads of 64 numbers fits shorter ones. None: no tile fits."""
    choices = {16: up_to_64, 32: up_to_64, 64: up_to_64, 128: of_128, 256: of_256}
    return {head_dim: choice for head_dim, choice in choices.items() if choice is not None}


def peeled(by_head_dim: dict[int, LaunchConfig]) -> dict[int, LaunchConfig]:
    """The same tiles in the form "peeled", those in another but "loop" excepted: for sm_90 and sm_100."""
    return {
        head_dim: replace(choice, form="peeled") if choice.form == "loop" else choice
        for head_dim, choice in by_head_dim.items()
    }


def same_everywhere(by_head_dim: dict[int, LaunchConfig]) -> dict[int, dict[int, LaunchConfig]]:
    """One choice for all architectures: for kernels limited by memory, where the tile hardly matters."""
    return dict.fromkeys(ARCHITECTURES, by_head_dim)


# Dense attention in 16 bits. sm_90 and sm_100 keep operands or accumulators out of the registers, so the largest tiles
# do not spill there; the others take the largest that do not, within the 99 KiB of shared memory of sm_89 and sm_120.
DENSE_FORWARD = {
    80: heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 64, 8, 2)),
    89: heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(32, 32, 4, 2)),
    90: peeled(heads(LaunchConfig(128, 64, 4, 3), LaunchConfig(128, 128, 8, 2), LaunchConfig(128, 32, 8, 2))),
    100: peeled(heads(LaunchConfig(128, 64, 4, 3), LaunchConfig(128, 128, 8, 2), LaunchConfig(128, 32, 8, 2))),
    120: heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(32, 32, 4, 2)),
}
# Warps of two kinds (`attention/dense/specialized.py`): Triton splits the loop of four warps on sm_90, of eight on 100.
DENSE_FORWARD_SPECIALIZED = {
    90: heads(LaunchConfig(128, 128, 4, 2, "inside"), LaunchConfig(128, 128, 4, 2, "inside")),
    100: heads(LaunchConfig(128, 128, 8, 3, "inside"), LaunchConfig(128, 128, 8, 2, "inside")),
}
DENSE_KEYS = {
    80: heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(16, 64, 8, 1)),
    89: heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(16, 64, 8, 1)),
    90: peeled(heads(LaunchConfig(64, 128, 8, 2), LaunchConfig(32, 128, 8, 2), LaunchConfig(32, 64, 8, 2, "inside"))),
    100: peeled(heads(LaunchConfig(64, 128, 8, 2), LaunchConfig(64, 128, 8, 2), LaunchConfig(32, 64, 8, 2))),
    120: heads(LaunchConfig(64, 128, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(16, 64, 8, 1)),
}
DENSE_QUERIES = {
    80: heads(LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 32, 8, 2), LaunchConfig(64, 64, 8, 2)),
    89: heads(LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 32, 8, 2), LaunchConfig(64, 32, 8, 1)),
    90: peeled(heads(LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 32, 8, 2))),
    100: peeled(heads(LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 64, 8, 2), LaunchConfig(64, 64, 8, 2))),
    120: heads(LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 32, 8, 2), LaunchConfig(64, 32, 8, 1)),
}
# A mask's tile passes through shared memory and registers as well.
DENSE_FORWARD_MASKED = {
    80: heads(LaunchConfig(128, 32, 8, 3), LaunchConfig(128, 32, 8, 3), LaunchConfig(32, 32, 4, 2)),
    89: heads(LaunchConfig(128, 32, 8, 3), LaunchConfig(128, 32, 8, 3), LaunchConfig(32, 32, 4, 2)),
    90: peeled(heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 32, 8, 2))),
    100: peeled(heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 32, 8, 2))),
    120: heads(LaunchConfig(128, 32, 8, 3), LaunchConfig(128, 32, 8, 3), LaunchConfig(32, 32, 4, 2)),
}
DENSE_KEYS_MASKED = {
    80: heads(LaunchConfig(32, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(16, 32, 8, 1)),
    89: heads(LaunchConfig(32, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(16, 32, 8, 1)),
    90: peeled(heads(LaunchConfig(32, 128, 8, 1), LaunchConfig(32, 128, 8, 1), LaunchConfig(16, 32, 8, 1))),
    100: peeled(heads(LaunchConfig(64, 128, 8, 2), LaunchConfig(64, 128, 8, 2), LaunchConfig(16, 32, 8, 1))),
    120: heads(LaunchConfig(32, 64, 8, 2), LaunchConfig(32, 64, 8, 2), LaunchConfig(16, 32, 8, 1)),
}
DENSE_QUERIES_MASKED = {
    **same_everywhere(heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 16, 8, 1))),
    100: peeled(heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 16, 8, 1))),
    90: peeled(heads(LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 64, 8, 2), LaunchConfig(128, 16, 8, 2))),
}
# float32 is three products of TF32 with operands twice as large: small tiles, or thousands of spills. Heads of 256
# spill at every tile, and so do the gradients at heads of 128 on sm_89 and sm_120: no rows.
DENSE_FORWARD_FP32 = {
    **same_everywhere(heads(LaunchConfig(32, 32, 4, 2), LaunchConfig(32, 16, 8, 1))),
    90: heads(LaunchConfig(128, 32, 8, 2), LaunchConfig(32, 16, 8, 1)),
}
DENSE_KEYS_FP32 = {
    **dict.fromkeys((80, 90, 100), heads(LaunchConfig(32, 32, 8, 1), LaunchConfig(16, 16, 8, 1))),
    **dict.fromkeys((89, 120), heads(LaunchConfig(32, 32, 8, 1))),
}
DENSE_QUERIES_FP32 = {
    **dict.fromkeys((80, 90, 100), heads(LaunchConfig(32, 32, 8, 1), LaunchConfig(16, 16, 4, 1))),
    **dict.fromkeys((89, 120), heads(LaunchConfig(32, 32, 8, 1))),
}

# Block-sparse and region attention. Masks have blocks of 64 or 128, mostly: larger tiles would never be used.
SPARSE_FORWARD = {
    **same_everywhere(heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 32, 8, 2))),
    90: heads(LaunchConfig(128, 64, 4, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 16, 4, 2)),
    100: heads(LaunchConfig(128, 64, 4, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 64, 8, 1)),
    120: heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 32, 8, 3), LaunchConfig(64, 32, 8, 2)),
}
SPARSE_QUERIES = {
    **same_everywhere(heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 32, 8, 1))),
    90: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(128, 64, 8, 2), LaunchConfig(64, 16, 4, 1)),
    100: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 1)),
    120: heads(LaunchConfig(64, 32, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 32, 8, 1)),
}
SPARSE_KEYS = {
    **same_everywhere(heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 32, 8, 1))),
    90: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(32, 128, 8, 2), LaunchConfig(16, 64, 8, 2)),
    100: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 1)),
    120: heads(LaunchConfig(32, 64, 4, 2), LaunchConfig(64, 64, 8, 1), LaunchConfig(32, 32, 8, 1)),
}
SPARSE_FORWARD_FP32 = {
    **dict.fromkeys((80, 120), heads(LaunchConfig(64, 32, 4, 1), LaunchConfig(32, 32, 8, 1))),
    **dict.fromkeys((89, 90), heads(LaunchConfig(64, 32, 4, 1), LaunchConfig(32, 32, 4, 1))),
    100: heads(LaunchConfig(64, 32, 8, 1), LaunchConfig(32, 32, 8, 1)),
}
SPARSE_QUERIES_FP32 = same_everywhere(heads(LaunchConfig(32, 32, 4, 1), LaunchConfig(16, 32, 8, 1)))
SPARSE_KEYS_FP32 = same_everywhere(heads(LaunchConfig(32, 32, 8, 1), LaunchConfig(16, 16, 8, 1)))

# Attention on codes of 8 bits. e4m3 does not exist on sm_80.
EIGHT_BIT = heads(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 64, 8, 2))
EIGHT_BIT_MASKED = heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 64, 8, 2))
WIDE = heads(LaunchConfig(128, 128, 8, 3), LaunchConfig(128, 128, 8, 2), LaunchConfig(64, 64, 8, 2))
INT8_SCORES_FP16_VALUES = {
    **same_everywhere(EIGHT_BIT),
    90: peeled({**WIDE, 256: LaunchConfig(64, 64, 4, 2)}),
    100: peeled(EIGHT_BIT),
}
INT8_SCORES_FP16_VALUES_MASKED = {
    **same_everywhere(EIGHT_BIT_MASKED),
    90: peeled(heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 32, 4, 2))),
    120: {**EIGHT_BIT_MASKED, 256: LaunchConfig(64, 32, 8, 2)},
}
FP8_SCORES = {
    **dict.fromkeys((89, 100), EIGHT_BIT),
    90: WIDE,
    120: {**EIGHT_BIT, 128: LaunchConfig(128, 32, 8, 3)},
}
INT8_SCORES_FP8_VALUES = FP8_SCORES
FP8_VALUES_MASKED = {
    89: EIGHT_BIT_MASKED,
    90: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 32, 8, 2)),
    100: heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 32, 8, 2), LaunchConfig(64, 64, 8, 2)),
    120: heads(LaunchConfig(64, 64, 8, 2), LaunchConfig(64, 32, 8, 2), LaunchConfig(64, 32, 8, 2)),
}

# FP4 weights are rounded in tiles of 64 keys: that tile is part of the number format and no choice. Of float32, the
# gradient of the keys spills at every tile but these.
FP4_FORWARD = {
    80: heads(LaunchConfig(32, 64, 4, 1), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 64, 8, 1)),
    89: heads(LaunchConfig(32, 64, 4, 1), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 64, 8, 1)),
    90: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 64, 8, 1)),
    100: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 64, 8, 1)),
    120: heads(LaunchConfig(32, 64, 8, 1), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
}
# On FP4 matrix units (`attention/fp4/blackwell.py`): heads of 64 and 128, as their packed rows are.
FP4_FORWARD_PACKED = {
    100: {64: LaunchConfig(128, 64, 8, 2), 128: LaunchConfig(128, 64, 8, 2)},
    120: {64: LaunchConfig(128, 64, 8, 2), 128: LaunchConfig(128, 64, 8, 2)},
}
FP4_QUERIES = {
    80: heads(LaunchConfig(64, 64, 8, 1), LaunchConfig(64, 64, 8, 1), LaunchConfig(32, 64, 8, 1)),
    89: heads(LaunchConfig(64, 64, 8, 1), LaunchConfig(64, 64, 8, 2), LaunchConfig(32, 64, 8, 1)),
    90: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(128, 64, 8, 1), LaunchConfig(32, 64, 8, 1)),
    100: heads(LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 8, 1), LaunchConfig(32, 64, 8, 1)),
    120: heads(LaunchConfig(32, 64, 4, 1), LaunchConfig(64, 64, 8, 1), LaunchConfig(32, 64, 8, 1)),
}
FP4_KEYS = {
    80: heads(LaunchConfig(32, 64, 8, 1), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
    89: heads(LaunchConfig(32, 64, 8, 1), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
    90: heads(LaunchConfig(64, 64, 4, 1), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
    100: heads(LaunchConfig(32, 64, 8, 1), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
    120: heads(LaunchConfig(16, 64, 8, 1), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
}
FP4_KEYS_MASKED = {
    **FP4_KEYS,
    89: heads(LaunchConfig(16, 64, 8, 2), LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
}
FP4_QUERIES_FP32 = same_everywhere(heads(LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)))
FP4_FORWARD_FP32 = {
    **same_everywhere(heads(LaunchConfig(16, 64, 8, 1), LaunchConfig(16, 64, 8, 1))),
    90: heads(LaunchConfig(32, 64, 8, 1), LaunchConfig(16, 64, 8, 1)),
    100: heads(LaunchConfig(32, 64, 4, 1), LaunchConfig(16, 64, 8, 1)),
}
FP4_KEYS_FP32 = dict.fromkeys((90, 100), heads(LaunchConfig(16, 64, 8, 1)))

# Products of 8-bit matrices have no head dimension: architecture -> choice.
GEMM_INT8 = {
    80: LaunchConfig(128, 128, 8, 3),
    89: LaunchConfig(128, 128, 8, 3),
    90: LaunchConfig(128, 256, 8, 3),
    100: LaunchConfig(128, 128, 8, 4),
    120: LaunchConfig(128, 128, 8, 3),
}
GEMM_FP8 = {**{arch: GEMM_INT8[arch] for arch in (89, 100, 120)}, 90: LaunchConfig(128, 128, 8, 4)}  # from sm_89 on

# kernel -> architecture -> padded head dimension -> choice
LAUNCH: dict[str, dict[int, dict[int, LaunchConfig]]] = {
    "dense_forward": DENSE_FORWARD,
    "dense_forward_fp32": DENSE_FORWARD_FP32,
    "dense_forward_masked": DENSE_FORWARD_MASKED,
    "dense_forward_specialized": DENSE_FORWARD_SPECIALIZED,
    "dense_keys": DENSE_KEYS,
    "dense_keys_masked": DENSE_KEYS_MASKED,
    "dense_keys_fp32": DENSE_KEYS_FP32,
    "dense_queries": DENSE_QUERIES,
    "dense_queries_masked": DENSE_QUERIES_MASKED,
    "dense_queries_fp32": DENSE_QUERIES_FP32,
    "int8_scores_fp16_values": INT8_SCORES_FP16_VALUES,
    "int8_scores_fp16_values_masked": INT8_SCORES_FP16_VALUES_MASKED,
    "int8_scores_fp8_values": INT8_SCORES_FP8_VALUES,
    "int8_scores_fp8_values_masked": FP8_VALUES_MASKED,
    "fp8_scores_fp8_values": FP8_SCORES,
    "fp8_scores_fp8_values_masked": FP8_VALUES_MASKED,
    "fp4_forward": FP4_FORWARD,
    "fp4_forward_fp32": FP4_FORWARD_FP32,
    "fp4_forward_packed": FP4_FORWARD_PACKED,
    "fp4_keys": FP4_KEYS,
    "fp4_keys_masked": FP4_KEYS_MASKED,
    "fp4_keys_fp32": FP4_KEYS_FP32,
    "fp4_queries": FP4_QUERIES,
    "fp4_queries_fp32": FP4_QUERIES_FP32,
    "block_sparse_forward": SPARSE_FORWARD,
    "block_sparse_forward_fp32": SPARSE_FORWARD_FP32,
    "block_sparse_queries": SPARSE_QUERIES,
    "block_sparse_queries_fp32": SPARSE_QUERIES_FP32,
    "block_sparse_keys": SPARSE_KEYS,
    "block_sparse_keys_fp32": SPARSE_KEYS_FP32,
    "region": SPARSE_FORWARD,
    "region_fp32": SPARSE_FORWARD_FP32,
}


def row_of(kernel: str, dtype: torch.dtype, masked: bool = False) -> str:
    """The table's name of a kernel: float32 has rows of its own, and in fewer bits a mask, where the table has them."""
    own = (f"{kernel}_fp32",) if dtype == torch.float32 else ()
    own += (f"{kernel}_masked",) if masked else ()
    return next((name for name in own if name in LAUNCH), kernel)


def chosen(kernel: str, head_dim: int) -> dict[int, LaunchConfig]:
    """The table's choices for a kernel and a head dimension, by architecture; one without a choice is absent."""
    padded = padded_head_dim(head_dim)
    return {arch: by_dim[padded] for arch, by_dim in LAUNCH[kernel].items() if padded in by_dim}


def launch(kernel: str, arch: int, head_dim: int) -> LaunchConfig:
    """The table's choice for a kernel on an architecture (80, 89, 90, 100, 120) at a head dimension (1 to 256).

    Raises ValueError if the kernel has no row, none for this architecture (e4m3 does not exist on sm_80, say), or none
    for heads of this size (every tile spills registers).
    """
    if kernel not in LAUNCH:
        raise ValueError(f"no kernel named {kernel!r} in the launch table; it has {', '.join(sorted(LAUNCH))}")
    if arch not in LAUNCH[kernel]:
        supported = ", ".join(f"sm_{known}" for known in LAUNCH[kernel])
        raise ValueError(f"kernel {kernel!r} has no launch choice for sm_{arch}; it runs on {supported}")
    padded = padded_head_dim(head_dim)
    if padded not in LAUNCH[kernel][arch]:
        raise ValueError(
            f"kernel {kernel!r} on sm_{arch} has no choice for heads of {padded} numbers: no tile of it fits in the "
            "registers there"
        )
    return LAUNCH[kernel][arch][padded]
