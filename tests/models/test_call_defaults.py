"""One pipeline has defaults of its own for its call: they fill in, are shown, saved, opened, and go without a trace."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from tiny_pipelines import tiny_pipeline, tiny_run

import diffusion_opt
from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.models.call_defaults import FILE, call_defaults, drop_call_defaults, set_call_defaults

CALL = {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 32, "output_type": "latent"}


def steps_of(pipe, *arguments, **settings) -> int:
    pipe(*arguments, **{**CALL, **settings})
    return pipe.scheduler.num_inference_steps


def test_what_is_left_out_is_filled_in_and_what_is_said_counts():
    pipe, other = tiny_pipeline("sd3"), tiny_pipeline("sd3")
    plain = type(pipe)
    set_call_defaults(pipe, "a", num_inference_steps=3, guidance_scale=1.0)
    assert isinstance(pipe, plain) and type(pipe).__name__ == plain.__name__ and type(other) is plain
    assert inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default == 3
    assert steps_of(pipe) == steps_of(pipe, num_inference_steps=None) == 3
    assert steps_of(pipe, num_inference_steps=2) == 2
    assert not pipe.do_classifier_free_guidance
    set_call_defaults(pipe, "b", num_inference_steps=4)
    assert call_defaults(pipe) == {"num_inference_steps": 4, "guidance_scale": 1.0}
    drop_call_defaults(pipe, "a")  # the first of two goes first
    assert steps_of(pipe) == 4 and pipe.do_classifier_free_guidance
    drop_call_defaults(pipe, "b")
    assert (
        type(pipe) is plain
        and call_defaults(pipe) == {}
        and vars(pipe).keys()
        == vars(other).keys()
        | {name for name in vars(pipe) if name.startswith("_") and not name.startswith("_diffusion_opt")}
    )


def test_an_argument_that_the_call_does_not_have_is_refused():
    pipe = tiny_pipeline("wan")
    with pytest.raises(ValueError, match="WanPipeline takes no 'sigmas', so it can have no default for it"):
        set_call_defaults(pipe, "a", sigmas=[1.0])
    assert call_defaults(pipe) == {}


def test_other_steps_than_those_of_its_times_are_refused():
    pipe = tiny_pipeline("sd3")
    set_call_defaults(pipe, "a", num_inference_steps=2, sigmas=[1.0, 0.6])
    assert steps_of(pipe) == 2
    with pytest.raises(ValueError, match=r"was made for 2 steps at times .*, got 5 steps"):
        steps_of(pipe, num_inference_steps=5)


def test_saved_beside_the_pipeline_and_opened_with_it(tmp_path: Path):
    pipe = tiny_pipeline("sd3")
    set_call_defaults(pipe, "a", num_inference_steps=3, guidance_scale=1.0)
    pipe.save_pretrained(tmp_path)
    opened = diffusion_opt.load(tmp_path)
    assert call_defaults(opened) == call_defaults(pipe) and steps_of(opened) == 3
    (tmp_path / FILE).write_text("[1]")
    with pytest.raises(CorruptFileError, match="holds no arguments of a call"):
        diffusion_opt.load(tmp_path)


def test_a_student_that_adds_noise_between_its_steps_repeats_its_seed():
    """diffusers calls `step` without the caller's generator, so the noise would come from the global one."""
    pipe, run = tiny_pipeline("flux2-klein"), tiny_run("flux2-klein", 2, batch_size=1)
    pipe.scheduler = FlowMatchLCMScheduler(shift=1.0)
    set_call_defaults(pipe, "student", sigmas=[1.0, 0.6])
    once, again, other = (run.generate(pipe, [seed]) for seed in (0, 0, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)
