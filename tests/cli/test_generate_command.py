"""`diffusion-opt generate`: files named after seed and prompt, from the very noise of that seed; clips and sound."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import tiny_pipeline

import diffusion_opt
from diffusion_opt.cli import main
from diffusion_opt.recipes import Recipe, Solver
from diffusion_opt.subjects import Run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_of_a_shipped_model(tmp_path, capsys):
    main(["generate", "fashion-4step", "--prompts", "sneaker", "ankle boot", "--seed", "3", "--out", str(tmp_path)])
    assert names(tmp_path) == ["3-sneaker.png", "4-ankle-boot.png"]
    assert capsys.readouterr().out.count("written to") == 2
    expected = diffusion_opt.load("fashion-4step")(**Run(("ankle boot",), seed=4).call([0])).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "4-ankle-boot.png")), np.asarray(expected))


def test_with_a_recipe_prompts_from_a_file_and_further_arguments(tmp_path):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "call.json").write_text(json.dumps({"max_sequence_length": 32}))
    Recipe((Solver(2),)).save(tmp_path / "fast.json")
    main(
        ["generate", str(tmp_path / "sd3"), "--prompts", str(tmp_path / "prompts.txt"), "--height", "32", "--width",
         "32", "--call", str(tmp_path / "call.json"), "--recipe", str(tmp_path / "fast.json"), "--samples", "3",
         "--batch-size", "2", "--steps", "3", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert names(tmp_path / "out") == ["0-a-cat.png", "1-a-dog.png", "2-a-cat.png"]
    assert Image.open(tmp_path / "out" / "0-a-cat.png").size == (32, 32)


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_clips_with_sound(tmp_path, suffix):
    tiny_pipeline("ltx2").save_pretrained(tmp_path / "ltx2")
    further = {"max_sequence_length": 32, "spatio_temporal_guidance_blocks": [2], "frame_rate": 25.0}
    (tmp_path / "call.json").write_text(json.dumps(further))
    main(
        ["generate", str(tmp_path / "ltx2"), "--prompts", "rain", "--height", "32", "--width", "32", "--num-frames",
         "9", "--steps", "2", "--call", str(tmp_path / "call.json"), "--clip", suffix, "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert names(tmp_path / "out") == [f"0-rain.{suffix}", "0-rain.wav"] or suffix == "webp"
    with Image.open(tmp_path / "out" / f"0-rain.{suffix}") as clip:
        assert clip.n_frames > 1 and clip.size == (32, 32)
    with wave.open(str(tmp_path / "out" / "0-rain.wav")) as sound:
        assert sound.getnframes() > 0 and sound.getsampwidth() == 2


def test_a_picture_as_an_argument_is_opened(tmp_path):
    tiny_pipeline("wan-i2v").save_pretrained(tmp_path / "wan")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "cat.png")
    (tmp_path / "call.json").write_text(json.dumps({"max_sequence_length": 32, "image": "cat.png"}))
    main(
        ["generate", str(tmp_path / "wan"), "--prompts", "a cat", "--height", "32", "--width", "32", "--num-frames",
         "5", "--steps", "2", "--call", str(tmp_path / "call.json"), "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert names(tmp_path / "out") == ["0-a-cat.webp"]


def test_a_pipeline_that_takes_no_such_argument_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "fashion-4step", "--num-frames", "3", "--out", str(tmp_path)])
    assert "num_frames" in capsys.readouterr().err
