"""One door to every pipeline: shipped models are checked byte for byte, and only a hub name goes to the hub."""

import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from diffusers.utils import logging as diffusers_logging

import diffusion_opt
from diffusion_opt.datasets import CorruptFileError, verify
from diffusion_opt.models import SHIPPED, TinyFlux2Pipeline, load, ship

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def shipped(make_pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in which "fashion-micro" is a tiny model; the folder of that model."""
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    folder = SHIPPED["fashion-micro"].folder
    ship(make_pipe(default_steps=3, default_guidance=2.0), folder, "# Card\n")
    return folder


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    return pipe(["bag", "coat"], latents=noise, output_type="pt").images


def test_shipped_in_half_precision_and_opened_in_single(shipped, make_pipe):
    pipe, original = load("fashion-micro"), make_pipe(default_steps=3, default_guidance=2.0)
    assert isinstance(pipe, TinyFlux2Pipeline)
    for part in ("transformer", "class_embedder"):
        found, expected = (getattr(p, part).state_dict() for p in (pipe, original))
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected[name].half().float())
    torch.testing.assert_close(draw(pipe), draw(original), rtol=0, atol=5e-3)
    assert (shipped / "README.md").read_text() == "# Card\n"
    num = sum(p.numel() for p in original.transformer.parameters())
    assert 2 * num < (shipped / WEIGHTS).stat().st_size < 2 * num + 20_000


def test_shipping_leaves_the_pipeline_as_it_was(pipe, tmp_path):
    before = draw(pipe)
    ship(pipe, tmp_path, "card")
    assert torch.equal(draw(pipe), before)


def test_shipping_twice_gives_the_same_bytes_and_no_path_of_this_machine(shipped, tmp_path):
    """A student starts as an opened teacher, and diffusers notes in each config where it was opened."""
    once = load("fashion-micro")
    ship(once, tmp_path / "again", "# Card\n")
    assert str(tmp_path) in json.dumps(once.transformer.config._name_or_path)
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
            assert path.read_bytes() == (shipped / path.relative_to(tmp_path / "again")).read_bytes(), path
    verify(tmp_path / "again")
    assert not [p for p in shipped.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


@pytest.mark.parametrize("name", [WEIGHTS, "class_embedder/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_one_flipped_byte_is_refused_by_name(shipped, name):
    content = bytearray((shipped / name).read_bytes())
    content[len(content) // 2] ^= 1
    (shipped / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{name} is damaged: its SHA-256 is .* restore it with git"):
        load("fashion-micro")


def test_missing_weights_and_missing_model(shipped):
    (shipped / WEIGHTS).unlink()
    with pytest.raises(CorruptFileError, match=f"{WEIGHTS} is missing"):
        load("fashion-micro")
    with pytest.raises(CorruptFileError, match="models/fashion-1step/SHA256SUMS is missing"):
        load("fashion-1step")


def test_dtype_and_the_front_door(shipped):
    pipe = diffusion_opt.load("fashion-micro", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.class_embedder.dtype == torch.bfloat16


def test_a_folder_opens_by_path_in_any_form(shipped):
    expected = draw(load("fashion-micro"))
    for name in (shipped, str(shipped)):
        assert torch.equal(draw(load(name)), expected)


def test_a_folder_of_another_pipeline_class_opens_with_diffusers_and_without_network(pipe, tmp_path, monkeypatch):
    Flux2KleinPipeline(pipe.scheduler, pipe.vae, None, None, pipe.transformer).save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *a, **k: calls.append((a, k)) or pipe)
    assert load(tmp_path) is pipe
    ((folder,), settings) = calls[-1]
    assert folder == tmp_path and settings["local_files_only"] and settings["use_safetensors"]


def test_opening_leaves_the_progress_bars_of_diffusers_as_they_were(shipped, capsys):
    enabled = diffusers_logging.is_progress_bar_enabled()
    try:
        for switch in (diffusers_logging.disable_progress_bar, diffusers_logging.enable_progress_bar):
            switch()
            before = diffusers_logging.is_progress_bar_enabled()
            load("fashion-micro")
            assert diffusers_logging.is_progress_bar_enabled() == before
    finally:
        (diffusers_logging.enable_progress_bar if enabled else diffusers_logging.disable_progress_bar)()
    assert "Loading pipeline" not in capsys.readouterr().err


def test_only_a_hub_name_goes_to_the_hub(shipped, pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "cached")
    calls = []
    monkeypatch.setattr(
        DiffusionPipeline, "download", lambda name, **k: calls.append((name, k)) or str(tmp_path / "cached")
    )
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("tried to connect"))
    for name in ("nosuch", "./no/such", "/no/such", "~/such", "a/b/c"):
        with pytest.raises(ValueError, match=r"unknown model .*: use one of fashion, .*, a folder .* or a hub name"):
            load(name)
    assert calls == []
    assert load("black-forest-labs/FLUX.2-klein-4B", dtype="bfloat16").transformer.dtype == torch.bfloat16
    assert calls == [("black-forest-labs/FLUX.2-klein-4B", {"use_safetensors": True})]


def test_a_typing_error_beside_folders_does_not_go_to_the_hub(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "models" / "klein")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(ValueError, match=r"unknown model 'models/klien' \(did you mean klein\?\)"):
        load("models/klien")
    with pytest.raises(ValueError, match="the folder models has no other: it holds klein"):
        load("models/other")
    with pytest.raises(ValueError, match=r"unknown model 'fashon-4step' \(did you mean fashion-4step\?\)"):
        load("fashon-4step")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("Please check out the root cause in the stacktrace above.") from ConnectionError("no route.\nat")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(OSError, match=r"cannot open someone/model from the hub, and it is not in its cache: no route$"):
        load("someone/model")


def test_folders_without_a_readable_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a diffusers pipeline: it has no model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(CorruptFileError, match=r"model_index\.json is damaged"):
        load(tmp_path)


def test_table_of_shipped_models():
    assert all(name == model.name and model.summary for name, model in SHIPPED.items())
    assert all(model.teacher is None or SHIPPED[model.teacher].teacher is None for model in SHIPPED.values())
    assert all(model.quantized_from in (None, *SHIPPED) for model in SHIPPED.values())
