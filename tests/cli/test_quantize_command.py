"""`diffusion-opt quantize`: what it writes opens with the error it reported, and clashing wishes are refused early."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from small_pipelines import small_pipeline
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.cli import main
from diffusion_opt.cli.options import Asked
from diffusion_opt.cli.quantize import REAL, UNSEEN, FormatName, quantize
from diffusion_opt.models import TinyFlux2Config
from diffusion_opt.quantization import FORMATS
from diffusion_opt.quantization.mixed.sensitivity import errors_by_time, record_probe
from diffusion_opt.quantization.packed.storage import load

WIDE = TinyFlux2Config(image_size=8, num_heads=4, head_dim=32, text_dim=24)  # wide enough for the real kernel


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    small_pipeline(default_steps=2, default_guidance=2.0).save_pretrained(tmp_path / "toy")
    return str(tmp_path / "toy")


def reported(text: str, stage: str) -> float:
    return float(re.search(rf"velocity, {stage}: ([0-9.]+)", text)[1])


def measured(original: str, saved: str, samples: int) -> float:
    """The error of the saved model, on the noise that the command says it measures with."""
    probe = record_probe(load(original), samples, torch.Generator().manual_seed(UNSEEN))
    errors = torch.tensor(errors_by_time(load(saved).transformer, probe))
    return float(errors.square().mean().sqrt())


def test_what_it_writes_opens_with_the_error_it_reported(folder, capsys):
    quantize(folder, Path("out"), format=("nvfp4",), calibrate=4, samples=2, skip=(r".*\.ff\..*",), last_blocks=1)
    text = capsys.readouterr().out
    assert reported(text, "as saved") == pytest.approx(measured(folder, "out", 2), abs=6e-5) != 0
    assert "skipped by" in text and "in one of the last blocks" in text and "modulation: one row a sample" in text
    assert re.search(r"12 of 25 quantized.* times smaller", text)


def test_a_mixture_keeps_its_budget_and_shows_the_table(folder, capsys):
    quantize(folder, Path("out"), format=("nvfp4", "int8"), bits=6.5, calibrate=2, samples=1)
    text = capsys.readouterr().out
    assert float(re.search(r"([0-9.]+) bits per weight", text)[1]) <= 6.5
    assert "half of the squared error in nvfp4" in text and " nvfp4 " in text and " int8 " in text


def test_training_and_attention_go_through(folder, capsys):
    quantize(folder, Path("out"), format=("w4a4",), calibrate=2, samples=2, qat_minutes=0.01, attention="int8")
    text = capsys.readouterr().out
    assert reported(text, "before training") > 0
    assert reported(text, "as saved") == pytest.approx(measured(folder, "out", 2), abs=6e-5) != 0
    quantize(folder, Path("same"), format=("w4a4",), calibrate=2, samples=2)
    assert measured(folder, "out", 2) != measured(folder, "same", 2)


def test_the_real_kernel_is_saved_too(tmp_path, capsys):
    small_pipeline(WIDE, default_steps=2).save_pretrained(tmp_path / "wide")
    quantize(str(tmp_path / "wide"), tmp_path / "out", format=(REAL,), samples=2, attention="fp8")
    text = capsys.readouterr().out
    assert (
        0
        < reported(text, "as saved")
        == pytest.approx(measured(str(tmp_path / "wide"), str(tmp_path / "out"), 2), abs=6e-5)
    )


def test_both_networks_of_wan_are_quantized_and_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tiny_pipeline("wan2.2").save_pretrained("two")
    run = tiny_run("wan2.2", 4)
    Path("call.json").write_text(json.dumps(dict(run.arguments)))
    asked = Asked(("a cat",), 4, height=32, width=32, num_frames=9, call=Path("call.json"))
    quantize("two", Path("out"), asked, format=("int8_per_token",), calibrate=2, samples=1)
    text = capsys.readouterr().out
    assert 0 < reported(text, "as saved") < 0.1
    assert (
        re.search(r"transformer_2\.blocks\.0\.attn1\.to_q .* int8_per_token", text) and " transformer.blocks.0" in text
    )
    before, after = load("two"), load("out")
    probe = record_probe(before, 1, torch.Generator().manual_seed(0), run=run, network="transformer_2")
    assert max(probe) < 0.9 and 0 < max(errors_by_time(after.transformer_2, probe)) < 0.1


def test_what_looks_at_one_network_is_refused_for_two(tmp_path, monkeypatch):
    tiny_pipeline("wan2.2").save_pretrained(tmp_path / "two")
    asked = Asked(("a cat",), 4, height=32, width=32, num_frames=9)
    for wish in ({"format": ("int8", "nvfp4"), "bits": 6.0}, {"qat_minutes": 1.0}):
        with pytest.raises(
            ValueError, match="serves pipelines with one denoising network, WanPipeline has transformer, "
        ):
            quantize(str(tmp_path / "two"), tmp_path / "out", asked, **wish)
    with pytest.raises(ValueError, match="has no denoiser 'unet'; it has transformer, transformer_2"):
        record_probe(load(tmp_path / "two"), 1, torch.Generator(), network="unet")


def test_every_format_has_its_name_here():
    assert set(get_args(FormatName)) == {REAL, *FORMATS}


def test_wishes_that_clash_are_refused_before_anything_is_loaded(tmp_path, capsys):
    for arguments, why in (
        (["--format", "int8", "fp8"], "--bits mixes two or more formats"),
        (["--format", "int8", "--bits", "5"], "--bits mixes two or more formats"),
        (["--format", "dynamic_int8", "--qat-minutes", "1"], "is a kernel and stands alone"),
        (["--calibrate", "0"], "--calibrate and --samples must be 1 or more, got 0 and 20"),
        (["--qat-minutes", "0"], "--qat-minutes must be above 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["quantize", "no such model", "--out", str(tmp_path / "out"), *arguments])
        assert ended.value.code == 2 and why in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        quantize("fashion", tmp_path / "full")
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert "--qat-minutes" in capsys.readouterr().out
