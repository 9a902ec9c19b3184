"""Formats as data: what they cost in bits, and that they say to modelopt what its own presets say."""

import warnings

import pytest

from diffusion_opt.quantization import FORMATS, Format, Numbers, format_named
from diffusion_opt.quantization.formats import BACKEND, quant_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.config import QuantizeConfig

BITS = {
    "int8": 8, "int8_per_token": 8, "int8_smoothquant": 8, "fp8": 8, "mxfp8": 8.25, "int4_weight_only": 4.5,
    "w4a8": 4.5, "w4a4": 4.5, "nvfp4": 4.5, "nvfp4_svdquant": 4.5,
}  # fmt: skip


def test_names_and_bits():
    assert {name: format.bits_per_weight for name, format in FORMATS.items()} == BITS
    assert all(format.name == name for name, format in FORMATS.items())
    with pytest.raises(ValueError, match=r"format must be one of int8, .*, got 'int3'"):
        format_named("int3")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8", 8 * 96 * 80 + 32 * 96),
        ("int8_smoothquant", 8 * 96 * 80 + 32 * 96 + 32 * 80),
        ("fp8", 8 * 96 * 80 + 32),
        ("mxfp8", 8 * 96 * 80 + 8 * 96 * 3),  # rows of 80 are 3 blocks of 32
        ("w4a4", 4 * 96 * 80 + 32 * 96 * 2),
        ("nvfp4", 4 * 96 * 80 + 8 * 96 * 5 + 32),
        ("nvfp4_svdquant", 4 * 96 * 80 + 8 * 96 * 5 + 32 + 32 * 80 + 16 * 4 * (96 + 80)),
    ],
)
def test_all_bits_of_a_layer(name, bits):
    assert FORMATS[name].weight_bits(96, 80) == bits


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("int8", "INT8_DEFAULT_CFG"),
        ("int8_smoothquant", "INT8_SMOOTHQUANT_CFG"),
        ("fp8", "FP8_DEFAULT_CFG"),
        ("mxfp8", "MXFP8_DEFAULT_CFG"),
        ("nvfp4", "NVFP4_DEFAULT_CFG"),
        ("nvfp4_svdquant", "NVFP4_SVDQUANT_DEFAULT_CFG"),
    ],
)
def test_formats_are_those_of_modelopts_own_presets(name, preset):
    theirs = {entry["quantizer_name"]: entry.get("cfg") for entry in getattr(mtq, preset)["quant_cfg"]}
    ours = QuantizeConfig(**quant_config({"layer": FORMATS[name]})).quant_cfg
    ours = {entry["quantizer_name"]: entry.get("cfg") for entry in ours}
    for kind in ("weight", "input"):
        both = [_plain(ours[f"layer.{kind}_quantizer"]), _plain(theirs[f"*{kind}_quantizer"])]
        assert both[0] == both[1]
    method = getattr(mtq, preset)["algorithm"]
    method = method["method"] if isinstance(method, dict) else method
    assert FORMATS[name].algorithm == (method or "max")  # MX has nothing to calibrate


def _plain(config) -> dict[str, object]:
    """What a quantizer's configuration says about rounding."""
    config = dict(config) if isinstance(config, dict) else config.model_dump(exclude_unset=True)
    names = {"e4m3": (4, 3), "e2m1": (2, 1), "e8m0": (8, 0)}
    blocks = {key: names.get(value, value) for key, value in (config.get("block_sizes") or {}).items()}
    bits = config["num_bits"]
    return {"num_bits": names.get(bits, bits), "axis": config.get("axis"), "blocks": blocks}


def test_only_the_named_layers_are_on():
    entries = quant_config({"a.b": FORMATS["int4_weight_only"], "c": FORMATS["nvfp4"]})["quant_cfg"]
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    assert [entry["quantizer_name"] for entry in entries[1:]] == [
        "a.b.weight_quantizer", "c.weight_quantizer", "c.input_quantizer",
    ]  # fmt: skip
    assert all(entry["parent_class"] == "nn.Linear" for entry in entries[1:])
    assert entries[2]["cfg"]["backend"] == BACKEND


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="blocks need a size and nothing else has one, got per='block', block=None"):
        Numbers(4, "block")
    with pytest.raises(ValueError, match=r"a branch of rank 0 does not go with 'svdquant'"):
        Format("x", Numbers(8), None, "svdquant")
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        Format("x", Numbers(8), None, "smoothquant", alpha=2.0)
    with pytest.raises(ValueError, match="int8 has no low-rank branch"):
        FORMATS["int8"].with_rank(4)
    assert FORMATS["nvfp4_svdquant"].with_rank(3).rank == 3
