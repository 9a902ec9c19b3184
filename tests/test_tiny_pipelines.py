"""The tiny pipelines themselves: they generate, repeat themselves, and are moved by their prompt."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import TINY, tiny_pipeline, tiny_run


@pytest.mark.parametrize("name", TINY)
def test_it_generates_from_text_and_repeats_itself(name):
    state = torch.get_rng_state()
    pipe, run = tiny_pipeline(name), tiny_run(name, num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), state)  # building one takes nothing from the global generator
    run.check(pipe)
    made = run.generate(pipe, [0])
    assert made.isfinite().all()
    assert torch.equal(run.generate(pipe, [0]), made)
    other = replace(run, prompts=run.prompts[::-1])
    assert not torch.equal(other.generate(pipe, [0]), made)
