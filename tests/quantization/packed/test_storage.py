"""A folder with a packed pipeline: opened anew it computes the same, and each thing wrong with it has its own error."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantization.pipelines import classes, error, generate, packed, small_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusion_opt
from diffusion_opt import models
from diffusion_opt.datasets import CorruptFileError, write_sums
from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.models import SHIPPED
from diffusion_opt.quantization import PTQ, DynamicInt8, load_quantized, pack, quantization_report, save_quantized
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention
from diffusion_opt.quantization.packed.storage import WEIGHTS

LAYER = "transformer_blocks.0.attn.to_q"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "nvfp4"
    save_quantized(packed(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder, and its checksums with them."""
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata)
    write_sums(folder)


def rewrite_record(folder: Path, change) -> None:
    record = json.loads((folder / "quantization.json").read_text())
    change(record)
    (folder / "quantization.json").write_text(json.dumps(record))
    write_sums(folder)


@pytest.mark.parametrize("format", ["nvfp4_svdquant", "w4a8", "mxfp8", "int8_smoothquant", "fp8"])
def test_a_round_trip_changes_nothing(format, tmp_path):
    pipe = packed(format)
    save_quantized(pipe, tmp_path / "saved")
    opened = quiet(diffusion_opt.load(tmp_path / "saved"))
    assert torch.equal(generate(opened), generate(pipe))
    assert weight_bytes(opened.transformer) == weight_bytes(pipe.transformer)
    assert type(opened) is type(pipe) and not opened.transformer.training
    save_quantized(opened, tmp_path / "again")
    for path in (tmp_path / "saved").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "saved")).read_bytes(), path


def test_dynamic_int8_comes_back_to_its_kernel(tmp_path):
    pipe = DynamicInt8(min_width=0).apply(small_pipeline())
    save_quantized(pipe, tmp_path / "int8")
    opened = quiet(diffusion_opt.load(tmp_path / "int8"))
    assert torch.equal(generate(opened), generate(pipe))
    assert weight_bytes(opened.transformer) == weight_bytes(pipe.transformer)


def test_low_precision_attention_comes_back_too(tmp_path):
    technique = LowPrecisionAttention("nvfp4", keep_dense=(1, 0))
    pipe = technique.apply(packed())
    save_quantized(pipe, tmp_path / "attention")
    opened = quiet(diffusion_opt.load(tmp_path / "attention"))
    assert torch.equal(generate(opened), generate(pipe))
    technique.remove(opened)
    assert not torch.equal(generate(opened), generate(pipe))


def test_what_fits_in_half_precision_is_stored_so_and_nothing_else(tmp_path):
    pipe = small_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.copy_(pipe.transformer.proj_out.weight.half())
    technique = PTQ("nvfp4", run=classes(num_inference_steps=1), samples=2)
    save_quantized(pack(technique.apply(pipe)), tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / WEIGHTS)
    assert stored["proj_out.weight"].dtype == torch.float16
    assert stored["x_embedder.weight"].dtype == torch.float32
    assert stored[f"{LAYER}.codes"].dtype == torch.uint8
    opened = diffusion_opt.load(tmp_path / "saved")
    assert opened.transformer.proj_out.weight.dtype == torch.float32
    assert diffusion_opt.load(tmp_path / "saved", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_new_process_gives_the_same_pictures(saved, tmp_path):
    DynamicInt8(min_width=0).apply(pipe := small_pipeline())
    save_quantized(pipe, tmp_path / "int8")
    program = (
        "import sys, torch, diffusion_opt\n"
        "torch.set_num_threads(1)\n"
        "for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    pipe = diffusion_opt.load(folder)\n"
        "    noise = torch.Generator().manual_seed(7)\n"
        "    images = pipe(['0', '1', '2'], 3, 2.0, generator=noise, output_type='pt').images\n"
        "    torch.save(images, out)\n"
        "assert 'modelopt' not in sys.modules\n"
    )
    folders = [saved, tmp_path / "int8"]
    pairs = [str(part) for i, folder in enumerate(folders) for part in (folder, tmp_path / f"{i}.pt")]
    subprocess.run([sys.executable, "-c", program, *pairs], check=True, capture_output=True)
    for i, folder in enumerate(folders):
        assert torch.equal(torch.load(tmp_path / f"{i}.pt"), generate(quiet(diffusion_opt.load(folder))))


@pytest.mark.parametrize("name", [WEIGHTS, "quantization.json", "transformer/config.json"])
def test_one_flipped_byte_or_a_missing_file_is_named(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{name} is damaged: its SHA-256 is"):
        diffusion_opt.load(folder)
    (folder / name).unlink()
    with pytest.raises(CorruptFileError, match=f"{name} is missing"):
        diffusion_opt.load(folder)


def test_another_shape_and_another_type_are_named(folder):
    rewrite(folder, lambda tensors: tensors.update({f"{LAYER}.codes": tensors[f"{LAYER}.codes"][:-1].contiguous()}))
    with pytest.raises(ValueError, match=rf"{LAYER} does not fit .*codes .* must be torch.uint8 \(32, 16\), got .*31"):
        load_quantized(folder)
    rewrite(folder, lambda tensors: tensors.update({f"{LAYER}.codes": torch.zeros(32, 16)}))
    with pytest.raises(ValueError, match=r"codes .* must be torch.uint8 \(32, 16\), got torch.float32"):
        load_quantized(folder)
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}.codes"))
    with pytest.raises(ValueError, match=f"{LAYER} does not fit .*codes is missing"):
        load_quantized(folder)


def test_another_format_than_the_stored_one_is_named(folder, saved):
    entry = {"num_bits": 8, "per": "channel", "block": None, "scale_bits": None}
    rewrite_record(folder, lambda record: record["networks"]["transformer"]["layers"][LAYER].update(weight=entry))
    with pytest.raises(ValueError, match=rf"{LAYER} does not fit .*codes .* must be torch.int8 \(32, 32\)"):
        load_quantized(folder)
    rewrite_record(
        folder, lambda record: record["networks"]["transformer"]["layers"][LAYER].update(weight=entry | {"num_bits": 6})
    )
    with pytest.raises(ValueError, match=f"{LAYER} does not fit .*no packed form"):
        load_quantized(folder)
    rewrite_record(folder, lambda record: record["networks"]["transformer"]["layers"][LAYER].update(kind="gguf"))
    with pytest.raises(ValueError, match=f"{LAYER} does not fit .*no kind of layer"):
        load_quantized(folder)
    rewrite_record(folder, lambda record: record.update(version=3))
    with pytest.raises(CorruptFileError, match="is of version 3, this package reads version 2"):
        load_quantized(folder)


def test_files_of_different_models_are_told_apart(folder, saved, tmp_path):
    save_quantized(packed(seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    write_sums(folder)
    with pytest.raises(ValueError, match=r"but the weights beside it are of model .* do not belong together"):
        load_quantized(folder)
    config = json.loads((saved / "transformer/config.json").read_text())
    for change, message in (
        ({"attention_head_dim": 32, "axes_dims_rope": [8, 8, 8, 8]}, "they belong to different models"),
        ({"num_single_layers": 1}, "is no linear layer: they belong to different models"),
        ({"num_layers": 2}, "lacks transformer_blocks.1.* of another model"),
        ({"_class_name": "NoSuchTransformer"}, "of class 'NoSuchTransformer', which diffusers does not have"),
    ):
        shutil.copy(saved / WEIGHTS, folder / WEIGHTS)
        (folder / "transformer/config.json").write_text(json.dumps(config | change))
        write_sums(folder)
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)


def test_what_cannot_be_saved_is_refused(folder, pipe, tmp_path):
    with pytest.raises(ValueError, match=r"no layer of this pipeline is packed: call pack\(pipe\)"):
        save_quantized(pipe, tmp_path / "float")
    with pytest.raises(ValueError, match="copy is not empty: name a new folder"):
        save_quantized(packed(), folder)


def test_the_front_door_knows_packed_pipelines_and_the_lower_room_says_so(saved, pipe, tmp_path):
    with pytest.raises(ValueError, match=r"holds packed weights: open it with diffusion_opt\.load"):
        models.load(saved)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(quiet(diffusion_opt.load(tmp_path))), generate(pipe))


@pytest.mark.parametrize(("name", "most"), [("fashion-4step-int8", 0.1), ("fashion-4step-nvfp4", 0.2)])
def test_shipped_models_draw_what_their_originals_draw_in_fewer_bytes(shipped, name, most):
    original = shipped(SHIPPED[name].quantized_from)
    quantized = shipped(name)
    images = generate(quantized, steps=4, guidance=1.0)
    assert 0 < error(images, generate(original, steps=4, guidance=1.0)) < most
    report = quantization_report(quantized)
    layers = [layer for layer in report.layers if layer.kind != "float"]
    assert len(layers) == 16
    assert sum(layer.weight_bytes for layer in layers) < sum(layer.float32_bytes for layer in layers) / 3.9
