"""`save_pretrained` of a pipeline that cannot be saved so refuses before it has written a file."""

from pathlib import Path

import pytest
from small_pipelines import small_pipeline

from diffusion_opt import load
from diffusion_opt.models import TinyFlux2Config
from diffusion_opt.quantization import PTQ, W8A8, DynamicInt8, pack, save_quantized

WIDE = TinyFlux2Config(image_size=8, num_heads=4, head_dim=32, text_dim=24)


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (PTQ("mxfp8"), "no float weights to save"),
        (DynamicInt8(min_width=0), "8-bit weights are saved with save_quantized"),
        (W8A8("int8", require_fast=False), "8-bit weights are saved with save_quantized"),
    ],
)
def test_nothing_is_written_and_after_remove_all_is(technique: object, message: str, tmp_path: Path) -> None:
    pipe = technique.apply(small_pipeline(WIDE))
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    technique.remove(pipe)
    pipe.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model_index.json").is_file()


def test_a_packed_pipeline_refuses_too_when_it_is_opened_again(tmp_path: Path) -> None:
    pipe = pack(PTQ("mxfp8").apply(small_pipeline(WIDE)))
    save_quantized(pipe, tmp_path / "packed")
    for one in (pipe, load(tmp_path / "packed")):
        with pytest.raises(ValueError, match="packed weights are saved with save_quantized"):
            one.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
