"""A user's latents and pictures: what they become, and what is said where something is missing."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.subjects import PromptedPipeline
from diffusion_opt.subjects.real_samples import captioned, encoded, latents_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color, caption in (("a", (250, 0, 0), "red"), ("b", (0, 0, 250), "blue"), ("c", (230, 0, 0), "red")):
        Image.new("RGB", (50, 30), color).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{caption}\n")
    return tmp_path


@pytest.mark.parametrize("name", ["flux2-klein", "sd3"])
def test_pictures_are_samples_of_the_pipeline(name: str, folder: Path) -> None:
    pipe, run = tiny_pipeline(name), tiny_run(name)
    paths, captions = captioned(folder)
    data, prompts = encoded(pipe, paths, captions, run.height, run.width)
    assert prompts == ("red", "blue") and data.labels.tolist() == [0, 1, 0]
    subject = PromptedPipeline(pipe, tiny_run(name, prompts=prompts), data=data)
    x, condition = subject.data.draw(5, torch.Generator().manual_seed(0))
    assert x.shape == (5, *subject.sample_shape) and condition.num_classes == 2
    red, blue, other = subject.data.images
    assert (red - other).norm() < (red - blue).norm()
    again = encoded(pipe, paths, captions, run.height, run.width)[0]
    assert torch.equal(again.images, data.images)


def test_pictures_need_captions_and_a_known_autoencoder(folder: Path) -> None:
    paths, captions = captioned(folder)
    with pytest.raises(ValueError, match="pictures cannot be encoded for WanPipeline here: give latents"):
        encoded(tiny_pipeline("wan"), paths, captions, 32, 32)
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.png has no caption: write one to b\.txt"):
        captioned(folder)
    with pytest.raises(ValueError, match="holds no pictures"):
        captioned(folder / "..")


def test_latents_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.zeros(3, 2, 5), "prompts": torch.tensor([0, 1, 1])}, path)
    assert latents_of(path, ("a", "b")).labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="labels must lie in 0 … 0"):
        latents_of(path, ("a",))
    save_file({"latents": torch.zeros(3, 2, 5)}, path)
    with pytest.raises(ValueError, match="has no prompts; it holds latents"):
        latents_of(path, ("a", "b"))
    path.write_bytes(b"no")
    with pytest.raises(CorruptFileError, match="cannot be read as safetensors"):
        latents_of(path, ("a", "b"))
