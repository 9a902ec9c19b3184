"""Checkpoints for others: what plain diffusers opens, and what others published.

    export_bfl(pipe, folder)                  a packed NVFP4 or FP8 pipeline as Black Forest Labs publish theirs

    config = BFLQuantizationConfig(compute_dtype=torch.float32)          and then, without this package:
    transformer = Flux2Transformer2DModel.from_single_file(
        folder / "nvfp4.safetensors", config=folder, quantization_config=config, torch_dtype=torch.float32)

    pipe.transformer = load_published(file, folder)   any such checkpoint, into packed layers

The layout is modelopt's: `weight` holds codes, `weight_scale` the E4M3 scales of blocks (or, in FP8, a float32 scale of
each row), `weight_scale_2` and `input_scale` the float32 scales of tensors. A checkpoint says what is stored and leaves
open what is computed: on a Blackwell GPU with flashinfer diffusers multiplies in four bits, elsewhere it decodes the
weights and leaves inputs alone. Its output then differs from that of the packed pipeline, which rounds inputs too, by
just that rounding: decoded weights are the same bit for bit. `load_published` rounds inputs everywhere, so it shows
what such a checkpoint does to images on the hardware it was made for.

Smoothing and a low-rank branch have no place in this layout, INT8, INT4 and MXFP8 neither. modelopt's own export
(`modelopt.torch.export.export_hf_checkpoint`, on a simulated transformer) writes NVFP4 as it is here after giving q, k
and v one common range, and FP8 with one scale a tensor; `load_published` opens both. diffusers' own loader of such
checkpoints (`NVIDIAModelOptConfig`) fails with the modelopt of today.
"""

from pathlib import Path

import torch
from diffusers import BFLQuantizationConfig, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from diffusion_opt.datasets import write_sums
from diffusion_opt.datasets.writing import write_tensors
from diffusion_opt.kernels.quantizers.formats import NVFP4_MAX
from diffusion_opt.models.zoo import forget_origin
from diffusion_opt.quantization.formats import FORMATS, Numbers
from diffusion_opt.quantization.mixed.trajectory_points import only_denoiser
from diffusion_opt.quantization.packed.packing import PackedFormat, PackedLinear

NVFP4, FP8 = FORMATS["nvfp4"].weight, FORMATS["fp8"].weight
FP8_ROWS = Numbers((4, 3), "channel")  # of published checkpoints
FP8_TOKENS = Numbers((4, 3), "token")  # what diffusers rounds their inputs to on a GPU


READ = (
    "Flux2Transformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
)


def export_bfl(pipe: DiffusionPipeline, folder: str | Path) -> Path:
    """Write the transformer of a packed pipeline for diffusers' `from_single_file`; returns the file of weights.

    Beside it lies the configuration that `from_single_file` is to be given, and `SHA256SUMS`. Raises ValueError naming
    the first layer that the layout cannot hold, if no layer is packed, if the pipeline has two transformers, or for a
    class that diffusers does not open so.
    """
    folder, transformer = Path(folder), only_denoiser(pipe)
    _check_class(type(transformer))
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise ValueError("no layer of this pipeline is packed: call pack(pipe) after PTQ")
    tensors = {}
    for prefix, module in transformer.named_modules():
        own = _published(prefix, module) if prefix in layers else dict(module.named_parameters(recurse=False))
        tensors |= {f"{prefix}.{name}".lstrip("."): tensor.detach().cpu().contiguous() for name, tensor in own.items()}
    transformer.save_config(folder)
    forget_origin(folder)
    kinds = {layer.format.weight.bits for layer in layers.values()}
    file = folder / f"{'nvfp4' if kinds == {4} else 'fp8' if kinds == {8} else 'mixed'}.safetensors"
    write_tensors(file, tensors)
    write_sums(folder)
    return file


def _check_class(transformer_class: type) -> None:
    """Raise ValueError for a class whose checkpoints diffusers does not open from one file under its own names."""
    if transformer_class.__name__ not in READ:
        raise ValueError(
            f"diffusers does not open a checkpoint of {transformer_class.__name__} under the names of its own layers; "
            f"it does of {', '.join(READ)}. save_quantized(pipe, folder) holds any pipeline"
        )


def _published(name: str, layer: PackedLinear) -> dict[str, Tensor]:
    """The tensors of one layer under the names of the layout."""
    format = layer.format
    if format.smoothed or format.rank:
        raise ValueError(f"{name} is in {format.name}: this layout has no smoothing and no branch; nvfp4 and fp8 fit")
    bias = {} if layer.bias is None else {"bias": layer.bias}
    if format.weight == NVFP4 and format.input == NVFP4:
        scales = {"weight_scale": layer.scales, "weight_scale_2": layer.range}
        return {"weight": layer.codes, **scales, "input_scale": layer.input_amax / NVFP4_MAX, **bias}
    if format.weight in (FP8, FP8_ROWS):
        rows = layer.range.reshape(-1).expand(layer.out_features)
        return {"weight": layer.codes, "weight_scale": rows, **bias}
    raise ValueError(f"{name} is in {format.name}: this layout holds nvfp4 and fp8")


def load_published(
    file: str | Path, config: str | Path, transformer_class: type[ModelMixin], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A transformer with packed layers from a published checkpoint; `config` is the folder of its configuration.

    diffusers reads it, whatever its names are. Inputs of FP8 layers get a scale per token, as on a GPU. Raises
    ValueError for a file without quantized layers or with layers of another shape than the configuration's.
    """
    file = Path(file)
    _check_class(transformer_class)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give the checkpoint's own file, a .safetensors")
    transformer = transformer_class.from_single_file(
        str(file),
        config=str(config),
        quantization_config=BFLQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )
    for name, module in list(transformer.named_modules()):
        if hasattr(module, "weight_scale"):
            transformer.set_submodule(name, _from_published(module))
    transformer.hf_quantizer = None  # what is left is ours to move and save
    return transformer.eval()


def _from_published(layer: nn.Linear) -> PackedLinear:
    """The packed form of one of diffusers' layers."""
    shape = (layer.in_features, layer.out_features)
    tensors = {} if layer.bias is None else {"bias": layer.bias.detach()}
    if hasattr(layer, "weight_scale_2"):
        tensors |= {"codes": layer.weight.detach(), "scales": layer.weight_scale, "range": layer.weight_scale_2}
        tensors["input_amax"] = layer.input_scale * NVFP4_MAX
        return PackedLinear(PackedFormat("nvfp4", *shape, NVFP4, NVFP4, layer.bias is not None), tensors)
    whole = layer.weight_scale.ndim == 0  # modelopt's FP8, which diffusers reads and cannot run
    tensors |= {"codes": layer.weight.detach(), "range": layer.weight_scale if whole else layer.weight_scale[:, None]}
    numbers = FP8 if whole else FP8_ROWS
    return PackedLinear(PackedFormat("fp8", *shape, numbers, FP8_TOKENS, layer.bias is not None), tensors)
