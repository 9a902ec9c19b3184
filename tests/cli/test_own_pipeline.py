"""The whole way of a user's own pipeline, typed: planned, cached, quantized, distilled, measured, opened again."""

import json
from pathlib import Path

import pytest
from tiny_pipelines import tiny_pipeline, tiny_run

import diffusion_opt
from diffusion_opt.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def flags(name: str, folder: Path) -> list[str]:
    """The small call that suits a pipeline, as a user types it."""
    run = tiny_run(name, 4)
    (folder / "call.json").write_text(json.dumps(dict(run.arguments)))
    said = {"height": run.height, "width": run.width, "num-frames": run.num_frames, "guidance": run.guidance_scale}
    typed = [word for flag, value in said.items() if value is not None for word in (f"--{flag}", f"{value:g}")]
    return ["--prompts", "a cat", "two dogs", "--steps", "4", "--call", str(folder / "call.json"), *typed]


@pytest.mark.parametrize("name", ["flux2-klein", "wan", "ltx2-cfg"])
def test_from_load_to_a_quantized_cached_distilled_measured_and_reopened_pipeline(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(name).save_pretrained("mine")
    asked = flags(name, tmp_path)
    main(["plan", "mine", *asked])
    assert "a generation of 4 steps" in capsys.readouterr().out
    main(["cache", "search", "mine", *asked, "--budgets", "2", "--trials", "1", "--held-out", "0", "--out", "found"])
    fast = {"techniques": [{"technique": "scheduled_cache", "schedule": "found/mine-2.json"}]}
    Path("fast.json").write_text(json.dumps(fast))
    main(
        [
            "quantize",
            "mine",
            *asked,
            "--format",
            "int8_per_token",
            "--calibrate",
            "2",
            "--samples",
            "2",
            "--out",
            "int8",
        ]
    )
    main(["generate", "int8", *asked, "--recipe", "fast.json", "--samples", "1", "--out", "made"])
    assert len(list(Path("made").glob("0-a-cat.*"))) >= 1
    place = asked.index("--steps")
    student = ["--teacher", "mine", "--steps", "1", "--method", "ode", "--pairs", "2", "--updates", "1", "--lora", "2"]
    main(["distill", *student, *asked[:place], *asked[place + 2 :], "--batch-size", "1", "--out", "student"])
    main(["measure", "mine", *asked, "--against", "fast.json", "int8", "--samples", "2", "--rounds", "1", "--out", "m"])
    found = json.loads(Path("m/measurement.json").read_text())
    assert set(found) == {"mine", "fast", "int8"} and found["fast"]["macs"] < 0.8 * found["mine"]["macs"]
    assert found["int8"]["weight_bytes"] < 0.6 * found["mine"]["weight_bytes"]
    assert found["int8"]["judged"]["paired.pixel"]["value"] < 0.5
    for folder in ("int8", "student/pipeline"):
        diffusion_opt.load(folder)
