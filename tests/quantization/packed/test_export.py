"""Checkpoints that plain diffusers opens: the packed weights bit for bit, and back into packed layers."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import BFLQuantizationConfig, Flux2Transformer2DModel
from diffusers.quantizers.bfl.utils import BFLFP8RLinear, BFLNVFP4Linear
from quantization.pipelines import error, generate, packed, simulated

from diffusion_opt.datasets import verify
from diffusion_opt.quantization import PackedLinear, export_bfl, load_published
from diffusion_opt.quantization.packed.export import FP8_TOKENS


def with_transformer(pipe, transformer):
    twin = copy.deepcopy(pipe)
    twin.transformer = transformer
    return twin


def inputs_as_they_are(pipe):
    """The same weights without rounded inputs."""
    twin = copy.deepcopy(pipe)
    for module in twin.transformer.modules():
        if isinstance(module, PackedLinear):
            module.format = replace(module.format, input=None)
    return twin


@pytest.mark.parametrize(("format", "layer"), [("nvfp4", BFLNVFP4Linear), ("fp8", BFLFP8RLinear)])
def test_plain_diffusers_opens_it_and_decodes_the_same_weights(format, layer, tmp_path):
    pipe = packed(format)
    file = export_bfl(pipe, tmp_path)
    assert file == tmp_path / f"{format}.safetensors"
    verify(tmp_path)
    transformer = Flux2Transformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path),
        quantization_config=BFLQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    packed_names = [name for name, m in pipe.transformer.named_modules() if isinstance(m, PackedLinear)]
    assert [name for name, m in transformer.named_modules() if type(m) is layer] == packed_names
    images = generate(with_transformer(pipe, transformer))
    assert torch.equal(images, generate(inputs_as_they_are(pipe)))
    assert 0 < error(images, generate(pipe)) < 0.02  # inputs are rounded there, not here


def test_a_published_checkpoint_comes_back_as_it_was(tmp_path):
    pipe = packed("nvfp4")
    transformer = load_published(export_bfl(pipe, tmp_path), tmp_path, Flux2Transformer2DModel)
    assert torch.equal(generate(with_transformer(pipe, transformer)), generate(pipe))
    fp8 = packed("fp8")
    transformer = load_published(export_bfl(fp8, tmp_path / "fp8"), tmp_path / "fp8", Flux2Transformer2DModel)
    rows = next(module for module in transformer.modules() if isinstance(module, PackedLinear))
    assert rows.format.input == FP8_TOKENS  # published FP8 has no calibrated inputs
    again = export_bfl(with_transformer(fp8, transformer), tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "fp8/fp8.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_a_checkpoint_that_modelopt_wrote_opens_too(format, tmp_path):
    from modelopt.torch.export import export_hf_checkpoint

    pipe = simulated(format)
    expected = generate(pipe)
    export_hf_checkpoint(copy.deepcopy(pipe.transformer), export_dir=tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    images = generate(with_transformer(pipe, load_published(file, tmp_path, Flux2Transformer2DModel)))
    assert 0 < error(images, expected) < 0.02  # q, k and v share a range there; scales of inputs differ in FP8
    assert generate(pipe).equal(expected)


def test_what_the_layout_cannot_hold_is_named(pipe, tmp_path):
    for format, message in (
        ("nvfp4_svdquant", r"to_q is in nvfp4_svdquant: this layout has no smoothing and no branch"),
        ("int8", r"to_q is in int8: this layout holds nvfp4 and fp8"),
    ):
        with pytest.raises(ValueError, match=message):
            export_bfl(packed(format), tmp_path)
    with pytest.raises(ValueError, match="no layer of this pipeline is packed"):
        export_bfl(pipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_unquantized_file_is_refused(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is missing"):
        load_published(tmp_path / "none.safetensors", tmp_path, Flux2Transformer2DModel)
    pipe.transformer.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="not an fp8r or nvfp4 checkpoint"):
        load_published(file, tmp_path, Flux2Transformer2DModel)
