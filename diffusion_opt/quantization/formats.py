"""Number formats as data: what a weight and an input become, what that costs in bits, and modelopt's words for it.

    format             weights                                  inputs                          bits per weight
    int8               INT8, a scale per channel                INT8, one calibrated scale      8
    int8_per_token     INT8, a scale per channel                INT8, a scale per token         8
    int8_smoothquant   INT8 of W diag(s)                        INT8 of diag(1/s) x             8
    fp8                E4M3, one scale                          E4M3, one calibrated scale      8
    mxfp8              E4M3, 2^k for each 32                    the same, in each call          8.25
    int4_weight_only   INT4, a float scale for each 64          as they are                     4.5
    w4a8               INT4, a float scale for each 64          E4M3, one calibrated scale      4.5
    w4a4               INT4, a float scale for each 64          the same, in each call          4.5
    nvfp4              E2M1, E4M3 for each 16, one float scale  the same, blocks in each call   4.5
    nvfp4_svdquant     NVFP4 of W diag(s) - B A                 NVFP4 of diag(1/s) x, and B A in 16 bits

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) moves outliers of input channels into the weights; SVDQuant (Li et al.
2024, arXiv 2411.05007) does so too and lets a thin branch B A, computed with unrounded inputs, carry the largest
singular directions, so that what is left for four bits is small. MX is the open standard of block scales that are
powers of two (Rouhani et al. 2023, arXiv 2310.10537), NVFP4 is NVIDIA's.

modelopt's presets describe whole models by wildcards written for language models. Here a format is two `Numbers`, and
`quant_config` gives it to exactly the layers that were named: everything else is off, before calibration begins.
`arithmetic/` computes each format in a few lines.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Algorithm = Literal["max", "smoothquant", "svdquant"]
BACKEND = "diffusion_opt"  # the name under which `cpu_backend` registers its block formats with modelopt
FLOAT_BITS = 32  # of scales, where a format does not say otherwise
LOW_RANK_BITS = 16  # of the factors of SVDQuant's branch, held in bfloat16


@dataclass(frozen=True, slots=True)
class Numbers:
    """How the numbers of one tensor are rounded, and which of them share a scale."""

    num_bits: int | tuple[int, int]  # of an integer, or (exponent, mantissa) bits of a float, its sign beside
    per: Literal["tensor", "channel", "token", "block"] = "tensor"
    block: int | None = None  # neighbors along the last axis that share a scale
    scale_bits: tuple[int, int] | None = None  # of block scales: (4, 3), (8, 0) a power of two, None float32

    def __post_init__(self) -> None:
        if (self.per == "block") != (self.block is not None):
            raise ValueError(f"blocks need a size and nothing else has one, got per={self.per!r}, block={self.block}")

    @property
    def bits(self) -> int:
        """Bits of one number without its scale."""
        return self.num_bits if isinstance(self.num_bits, int) else 1 + sum(self.num_bits)

    @property
    def bits_with_scales(self) -> float:
        """Bits of one number with its share of a block's scale; scales of channels and tensors are not in it."""
        return self.bits + (0 if self.block is None else self._bits_of_scale / self.block)

    @property
    def calibrated(self) -> bool:
        """Whether a range has to be seen before use: one number for the whole tensor, or one a channel."""
        return self.per in ("tensor", "channel") or self.scale_bits == (4, 3)

    def total_bits(self, rows: int, columns: int) -> int:
        """Bits of a matrix of these numbers with all scales."""
        scales = {"tensor": 1, "channel": rows, "token": rows}.get(self.per)
        if scales is not None:
            return rows * columns * self.bits + scales * FLOAT_BITS
        blocks = rows * math.ceil(columns / self.block)
        whole = FLOAT_BITS if self.scale_bits == (4, 3) else 0  # NVFP4: one more scale for the tensor
        return rows * columns * self.bits + blocks * self._bits_of_scale + whole

    def attributes(self, weight: bool) -> dict[str, Any]:
        """The fields of modelopt's `QuantizerAttributeConfig` for a weight (o, i) or an input (..., i)."""
        if self.per == "token":
            return {"num_bits": self.num_bits, "type": "dynamic", "block_sizes": {-1: None}}
        if self.per != "block":
            return {"num_bits": self.num_bits, "axis": 0 if self.per == "channel" else None}
        if self.scale_bits is None and weight:
            return {"num_bits": self.num_bits, "block_sizes": {-1: self.block}}  # modelopt's own arithmetic
        blocks = {-1: self.block, "type": "dynamic"}
        if self.scale_bits is not None:
            blocks["scale_bits"] = self.scale_bits
        ranges = {} if self.calibrated else {"type": "dynamic"}
        return {"num_bits": self.num_bits, "block_sizes": blocks, "backend": BACKEND, **ranges}

    @property
    def _bits_of_scale(self) -> int:
        return FLOAT_BITS if self.scale_bits is None else 8


@dataclass(frozen=True, slots=True)
class Format:
    """What becomes of a linear layer: its weights, its inputs (None: as they are), and by which algorithm."""

    name: str
    weight: Numbers
    input: Numbers | None
    algorithm: Algorithm = "max"
    rank: int = 0  # of SVDQuant's branch
    alpha: float = 0.5  # SmoothQuant: how much of an outlier moves to the weights, 0 none, 1 all

    def __post_init__(self) -> None:
        if (self.algorithm == "svdquant") != (self.rank > 0):
            raise ValueError(f"{self.name}: a branch of rank {self.rank} does not go with {self.algorithm!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{self.name}: alpha must lie in [0, 1], got {self.alpha}")

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of block scales; what grows slower than the layer is in `weight_bits`."""
        return self.weight.bits_with_scales

    @property
    def static_input(self) -> bool:
        """Whether inputs have one range that calibration fixes, so that it can also be a percentile or the best MSE."""
        return self.input is not None and self.input.per == "tensor" and self.algorithm == "max"

    @property
    def needs_data(self) -> bool:
        """Whether calibration has to show inputs to it: for a fixed range of inputs, for smoothing or for a branch."""
        return self.changes_weights or (self.input is not None and self.input.calibrated)

    @property
    def changes_weights(self) -> bool:
        """Whether the algorithm changes the stored weights: part of them moves into inputs or a branch."""
        return self.algorithm != "max"

    def weight_bits(self, out_features: int, in_features: int) -> int:
        """All bits of one layer's weights (o, i): codes, every scale, smoothing, and the branch. Without the bias."""
        bits = self.weight.total_bits(out_features, in_features)
        smoothing = FLOAT_BITS * in_features if self.changes_weights else 0
        return bits + smoothing + LOW_RANK_BITS * self.rank * (out_features + in_features)

    def with_rank(self, rank: int) -> "Format":
        """The same format with a branch of another rank. Raises ValueError for a format that has no branch."""
        if not self.rank:
            raise ValueError(f"{self.name} has no low-rank branch; nvfp4_svdquant has")
        return replace(self, rank=rank)


_INT8 = Numbers(8, "channel")
_INT4 = Numbers(4, "block", 64)
_E4M3 = Numbers((4, 3))
_MXFP8 = Numbers((4, 3), "block", 32, (8, 0))
_NVFP4 = Numbers((2, 1), "block", 16, (4, 3))

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("int8", _INT8, Numbers(8)),
        Format("int8_per_token", _INT8, Numbers(8, "token")),
        Format("int8_smoothquant", _INT8, Numbers(8), "smoothquant"),
        Format("fp8", _E4M3, _E4M3),
        Format("mxfp8", _MXFP8, _MXFP8),
        Format("int4_weight_only", _INT4, None),
        Format("w4a8", _INT4, _E4M3),
        Format("w4a4", _INT4, _INT4),
        Format("nvfp4", _NVFP4, _NVFP4),
        Format("nvfp4_svdquant", _NVFP4, _NVFP4, "svdquant", rank=4),  # 32 suits widths in the thousands
    )
}


def format_named(name: str) -> Format:
    """The format of a name. Raises ValueError that lists the names there are."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def quant_config(layers: Mapping[str, Format]) -> dict[str, Any]:
    """modelopt's configuration that gives each named linear layer its format and leaves everything else off.

    It calibrates nothing: `algorithm` is None, and the technique runs each format's own.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, format in layers.items():
        for kind, numbers in (("weight", format.weight), ("input", format.input)):
            if numbers is not None:
                quantizer = {"quantizer_name": f"{name}.{kind}_quantizer", "parent_class": "nn.Linear"}
                entries.append({**quantizer, "cfg": numbers.attributes(weight=kind == "weight")})
    return {"quant_cfg": entries, "algorithm": None}
