"""A folder opens in one type for all its parts, runs no code of its own, and lies where it was asked to."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

import diffusion_opt
from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.models.opening import open_folder, place, stored_dtype


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A folder of a tiny Wan, whose transformer class keeps some modules in single precision (no tokenizer)."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
        num_layers=1, freq_dim=8,
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    text = T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    folder = tmp_path_factory.mktemp("wan")
    pipe = WanPipeline(None, text, vae, UniPCMultistepScheduler(use_flow_sigmas=True), transformer)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> dict[str, None]:
    return {"tokenizer": None}


def types(pipe) -> dict[str, set[torch.dtype]]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: {p.dtype for p in part.parameters()} for name, part in parts.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float32])
def test_every_part_has_the_type_that_was_asked_for(wan, tokenizer, dtype):
    asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    pipe = open_folder(wan, dtype, **tokenizer)
    assert types(pipe)["vae"] == {asked}
    kept = {name for name, p in pipe.transformer.named_parameters() if p.dtype != asked}
    assert bool(kept) == (asked != torch.float32)
    assert all(any(part in name for part in pipe.transformer._keep_in_fp32_modules) for name in kept)
    assert types(open_folder(wan, {"vae": torch.float32, "default": torch.bfloat16}, **tokenizer)) != types(pipe)


def test_auto_is_the_type_of_the_network_for_all_parts(wan, tokenizer, tmp_path):
    """diffusers by itself opens networks in single precision and the text encoder as it is stored."""
    assert stored_dtype(wan) == torch.float32
    pipe = open_folder(wan, **tokenizer)
    assert types(pipe) == {name: {torch.float32} for name in types(pipe)}
    open_folder(wan, "bfloat16", **tokenizer).save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) == torch.bfloat16
    again = open_folder(tmp_path, **tokenizer)
    assert types(again)["vae"] == types(again)["text_encoder"] == {torch.bfloat16}
    assert types(again)["transformer"] == {torch.bfloat16, torch.float32}  # its norms, as stored


def test_types_and_places_that_cannot_be(pipe):
    with pytest.raises(ValueError, match=r"dtype must be auto, float32, bfloat16, float16 .*, got 'bf16'"):
        diffusion_opt.load("fashion", dtype="bf16")
    with pytest.raises(ValueError, match=r"dtype must be auto, .*, got torch\.int8"):
        diffusion_opt.load("fashion", dtype=torch.int8)
    with pytest.raises(ValueError, match="offload must be None or one of model, sequential, group, got 'disk'"):
        place(pipe, "cpu", "disk")
    with pytest.raises(ValueError, match="the device is the CPU"):
        place(pipe, "cpu", "model")
    assert place(pipe, "auto") is pipe


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloaded_on_a_gpu_it_makes_the_same_picture(make_pipe, offload):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plain, away = place(make_pipe(), "cuda"), place(make_pipe(), "cuda", offload)
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).cuda()
    images = [p("bag", latents=noise, num_inference_steps=2, output_type="pt").images for p in (plain, away)]
    assert torch.equal(*images)


def test_a_folder_with_code_of_its_own_is_refused_and_nothing_of_it_runs(wan, tmp_path):
    def folder(**changes) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        (path / "transformer").mkdir(parents=True)
        (path / "model_index.json").write_text(json.dumps(json.loads((wan / "model_index.json").read_text()) | changes))
        for code in ("mine.py", "transformer/mine.py", "transformer/diffusers.py"):
            (path / code).write_text("raise SystemExit('ran')")
        return path

    for changes, message in (
        ({"_class_name": ["mine", "Pipeline"]}, "Python code of its own"),
        ({"_class_name": "NoSuchPipeline"}, "NoSuchPipeline, which the installed diffusers .* does not have"),
        ({"transformer": ["mine", "Net"]}, "transformer from 'mine'"),
        ({}, r"Python code of its own \(transformer/diffusers\.py\)"),
    ):
        with pytest.raises(ValueError, match=message):
            open_folder(folder(**changes))
    (tmp_path / "0" / "model_index.json").write_text("[]")
    with pytest.raises(CorruptFileError, match="names no pipeline class"):
        open_folder(tmp_path / "0")


def test_pickles_and_broken_headers_are_refused(wan, tokenizer, tmp_path):
    pipe = open_folder(wan, **tokenizer)
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        open_folder(tmp_path / "pickled", **tokenizer)
    pipe.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(CorruptFileError, match="is no safetensors file"):
        open_folder(tmp_path / "cut", **tokenizer)
