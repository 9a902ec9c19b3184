"""Techniques on full pipelines of other classes: all their networks, in their types, saved and opened, and undone."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tiny_pipelines import tiny_pipeline, tiny_run

import diffusion_opt
from diffusion_opt.quantization import (
    PTQ,
    W8A8,
    Bfloat16,
    DynamicInt8,
    export_bfl,
    pack,
    quantization_report,
    save_quantized,
)
from diffusion_opt.quantization.mixed.sensitivity import record_probe
from diffusion_opt.quantization.simulation.simulate import simulated_formats

ANYWHERE = W8A8("e4m3", require_fast=False)


def opened(name: str, folder: Path, dtype: str = "float32") -> DiffusionPipeline:
    """A tiny pipeline as a user opens it, from disk in a type."""
    tiny_pipeline(name).save_pretrained(folder / name)
    pipe = diffusion_opt.load(folder / name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    return tiny_run(name, 2, batch_size=1).generate(pipe, [0])


@pytest.mark.parametrize(("name", "dtype"), [("wan2.2", "bfloat16"), ("flux", "float16"), ("pixart", "float32")])
def test_calibrated_packed_saved_and_opened_in_its_own_type(name, dtype, tmp_path):
    pipe = opened(name, tmp_path, dtype)
    PTQ("nvfp4", run=tiny_run(name, 2, batch_size=1), samples=1).apply(pipe)
    simulated = latents(pipe, name)
    pack(pipe)
    assert torch.equal(latents(pipe, name), simulated)
    save_quantized(pipe, tmp_path / "packed")
    again = diffusion_opt.load(tmp_path / "packed")
    again.set_progress_bar_config(disable=True)
    assert again.transformer.dtype == getattr(torch, dtype)
    assert torch.equal(latents(again, name), simulated)


def test_both_networks_of_wan22_are_quantized_and_put_back():
    pipe = tiny_pipeline("wan2.2")
    exact = latents(pipe, "wan2.2")
    for technique in (
        DynamicInt8(min_width=0),
        ANYWHERE,
        Bfloat16(require_fast=False),
        PTQ("int8_smoothquant", run=tiny_run("wan2.2", 2, batch_size=1), samples=1),
    ):
        technique.apply(pipe)
        if not isinstance(technique, Bfloat16):
            kinds = {(layer.name.split(".")[0], layer.kind != "float") for layer in quantization_report(pipe).layers}
            assert {("transformer", True), ("transformer_2", True)} < kinds
        assert not torch.equal(latents(pipe, "wan2.2"), exact)
        technique.remove(pipe)
        assert torch.equal(latents(pipe, "wan2.2"), exact)
    with pytest.raises(ValueError, match="two transformers"):
        record_probe(pipe, 1, torch.Generator(), run=tiny_run("wan2.2", 2))


def test_scales_of_8_bit_layers_survive_every_cast():
    pipe = ANYWHERE.apply(tiny_pipeline("flux"))
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    scales, codes = layer.scales.clone(), layer.codes.clone()
    for cast in (pipe.transformer.half, pipe.transformer.double, lambda: pipe.transformer.to(torch.bfloat16)):
        cast()
        assert layer.scales.dtype == torch.float32 and torch.equal(layer.scales, scales)
        assert layer.codes.dtype == codes.dtype and torch.equal(layer.codes.float(), codes.float())
    ANYWHERE.remove(pipe)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}  # the float layers went the same way


def test_ranges_of_a_simulation_survive_a_cast():
    pipe = tiny_pipeline("flux")
    PTQ("int8", run=tiny_run("flux", 1, batch_size=1), samples=1).apply(pipe)
    quantizer = pipe.transformer.transformer_blocks[0].attn.to_q.input_quantizer
    before = quantizer.amax.clone()
    pipe.transformer.to(torch.bfloat16)
    assert quantizer.amax.dtype == torch.float32 and torch.equal(quantizer.amax, before)


@pytest.mark.parametrize("technique", [PTQ("int8", samples=1), DynamicInt8(), W8A8(), Bfloat16()])
def test_a_unet_is_refused_with_the_reason(technique):
    with pytest.raises(ValueError, match="denoises with a UNet"):
        technique.apply(tiny_pipeline("sdxl"))


def test_the_run_is_checked_before_anything_is_touched():
    pipe = tiny_pipeline("wan-i2v")
    with pytest.raises(ValueError, match="cannot be called without image"):
        PTQ("int8", run=tiny_run("wan", 2), samples=1).apply(pipe)
    assert simulated_formats(pipe.transformer) == {}


def test_formats_without_ranges_run_nothing(monkeypatch):
    pipe = tiny_pipeline("sd3")
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("calibrated for nothing"))
    for format in ("int4_weight_only", "mxfp8", "int8_per_token"):
        technique = PTQ(format, run=tiny_run("sd3", 2))
        technique.apply(pipe)
        assert "calibrated" not in technique.describe()
        technique.remove(pipe)


def test_the_probe_holds_only_the_times_it_was_asked_for():
    pipe = tiny_pipeline("flux")
    run = tiny_run("flux", 4, batch_size=1)
    probe = record_probe(pipe, 2, torch.Generator().manual_seed(0), num_times=2, run=run)
    assert [len(points) for points in probe.values()] == [2, 2]
    with pytest.raises(ValueError, match=r"the passes of 2 samples do not fit into 0\.0 GiB"):
        record_probe(pipe, 2, torch.Generator().manual_seed(0), run=run, max_bytes=1000)


@pytest.mark.parametrize(("name", "message"), [("sd3", "does not open a checkpoint of SD3"), ("wan2.2", "two trans")])
def test_what_diffusers_could_not_open_is_not_exported(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_bfl(tiny_pipeline(name), tmp_path)


def add_lora(pipe: DiffusionPipeline) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


@pytest.mark.parametrize("format", ["int8", "int8_smoothquant", "nvfp4_svdquant"])
def test_a_lora_may_come_and_go_while_a_simulation_is_taken_off(format):
    layers = dict.fromkeys(("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"), format)
    technique = PTQ(layers=layers, run=tiny_run("flux", 1, batch_size=1), samples=1)
    pipe = tiny_pipeline("flux")
    exact = latents(pipe, "flux")
    technique.apply(pipe)
    add_lora(pipe)
    with pytest.raises(ValueError, match="a LoRA cannot be fused into weights whose rounding is fixed"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="is a LoRA layer: fuse it"):
        pack(pipe)
    technique.remove(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe, "flux"), exact)
    technique.apply(pipe)


@pytest.mark.parametrize("technique", [DynamicInt8(min_width=0), ANYWHERE])
def test_a_lora_on_8_bit_layers_is_refused_in_words_of_loras(technique):
    pipe = technique.apply(tiny_pipeline("flux"))
    with pytest.raises(ValueError, match=r"8-bit layers take no LoRA: .* load and fuse the LoRA there"):
        add_lora(pipe)
    with pytest.raises(RuntimeError, match="To add a LoRA: take the quantization off"):
        pipe.transformer.state_dict()


@pytest.mark.parametrize("kind", ["simulated", "8-bit"])
def test_layerwise_casting_before_and_after(kind):
    technique = PTQ("int8", run=tiny_run("flux", 1, batch_size=1), samples=1) if kind == "simulated" else ANYWHERE
    pipe = tiny_pipeline("flux")
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match=r"are stored in torch\.float8_e4m3fn: quantize the pipeline before layerwise"):
        technique.apply(pipe)
    latents(pipe, "flux")  # works as before
    pipe = technique.apply(tiny_pipeline("flux"))
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    latents(pipe, "flux")
    if kind == "simulated":
        technique.remove(pipe)
    else:
        with pytest.raises(ValueError, match="is under layerwise casting, which holds its layers: turn it off"):
            technique.remove(pipe)
    latents(pipe, "flux")  # still a working pipeline


def test_offloading_is_refused_before_a_simulation_and_may_come_after_it():
    technique, cpu = PTQ("int8", run=tiny_run("flux", 1, batch_size=1), samples=1), torch.device("cpu")
    offload = {"onload_device": cpu, "offload_device": cpu, "offload_type": "leaf_level"}
    pipe = tiny_pipeline("flux")
    exact = latents(pipe, "flux")
    technique.apply(pipe)
    quantized = latents(pipe, "flux")
    pipe.transformer.enable_group_offload(**offload)
    assert torch.equal(latents(pipe, "flux"), quantized)
    technique.remove(pipe)
    assert torch.equal(latents(pipe, "flux"), exact)
    with pytest.raises(ValueError, match="group offloading, which holds its layers: quantize the pipeline first"):
        technique.apply(pipe)
    assert torch.equal(latents(pipe, "flux"), exact)


def test_bfloat16_gives_back_the_bits_whatever_lora_came_or_went():
    technique, pipe = Bfloat16(require_fast=False), tiny_pipeline("flux")
    exact = latents(pipe, "flux")
    add_lora(pipe)
    technique.apply(pipe)
    pipe.unload_lora_weights()
    technique.remove(pipe)
    assert torch.equal(latents(pipe, "flux"), exact)
    technique.apply(pipe)
    add_lora(pipe)
    with pytest.raises(ValueError, match="a LoRA cannot be fused"):
        pipe.fuse_lora()
    technique.remove(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe, "flux"), exact)


@pytest.mark.parametrize("name", ["pixart", "hunyuan-video-1.5"])
def test_bfloat16_runs_where_inputs_come_by_position_or_in_several_streams(name):
    pipe, technique = tiny_pipeline(name), Bfloat16(require_fast=False)
    exact = latents(pipe, name)
    technique.apply(pipe)
    assert latents(pipe, name).isfinite().all()
    technique.remove(pipe)
    assert torch.equal(latents(pipe, name), exact)


def test_plain_saving_of_a_simulation_is_refused_and_copies_compute_alike(tmp_path):
    pipe = PTQ("int8_smoothquant", run=tiny_run("flux", 1, batch_size=1), samples=1).apply(tiny_pipeline("flux"))
    with pytest.raises(ValueError, match="quantized in simulation has no float weights to save: call pack"):
        pipe.save_pretrained(tmp_path)
    twin = copy.deepcopy(pack(pipe).transformer)
    thawed = pickle.loads(pickle.dumps(pipe.transformer))
    expected = latents(pipe, "flux")
    for other in (twin, thawed):
        pipe.transformer = other
        assert torch.equal(latents(pipe, "flux"), expected)
