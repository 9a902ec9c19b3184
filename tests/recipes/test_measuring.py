"""Any pipeline is measured by its run; without one only a pipeline that has classes is."""

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt import measure
from diffusion_opt.evaluation.speed import weight_bytes
from diffusion_opt.recipes import as_rung
from diffusion_opt.subjects import Run, denoisers


@pytest.mark.parametrize("kind", ["flux2-klein", "wan2.2"])
def test_a_stock_pipeline_is_measured_by_its_run(kind: str) -> None:
    pipe, run = tiny_pipeline(kind), tiny_run(kind, 2)
    found = measure(pipe, run, rounds=1, progress=False)
    weights = sum(weight_bytes(network) for network in denoisers(pipe).values())
    assert found.weight_bytes == weights
    assert found.nfe >= run.num_inference_steps
    assert found.judged == {}


def test_a_stock_pipeline_without_a_run_is_refused_with_the_reason() -> None:
    pipe = tiny_pipeline("flux2-klein")
    with pytest.raises(ValueError, match="no classes to ask for"):
        measure(pipe)
    with pytest.raises(ValueError, match="takes no 'num_frames'"):
        as_rung(pipe, Run("a cat", num_frames=9))


def test_clips_are_made_in_the_range_of_pictures() -> None:
    pipe, run = tiny_pipeline("wan2.2"), tiny_run("wan2.2", 2)
    with torch.no_grad():
        clip = as_rung(pipe, run).generate(run.prompts[:1], torch.Generator().manual_seed(0))
    assert clip.ndim == 5
    assert clip.abs().max() <= 1
