"""Solver, student and compilation on pipelines as users have them: they serve, or refuse, and leave no trace."""

import warnings
from pathlib import Path

import pytest
import torch
from tiny_pipelines import TINY, tiny_pipeline, tiny_run

from diffusion_opt.models.call_defaults import call_defaults, set_call_defaults
from diffusion_opt.recipes import Compile, Recipe, Solver, Student
from diffusion_opt.recipes.sampling import repeated_blocks
from diffusion_opt.subjects import denoisers

EVERY_DAY = ("flux2-klein", "wan", "sd3")
NO_FLOW = {"pixart": "predicts epsilon", "cogvideox": "predicts epsilon", "sdxl": "with a UNet"}
DISTILLED = "flux2-klein-distilled"
UNSTEADY = "z-image"  # does not repeat its own seed in plain diffusers
KINDS = [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in TINY if name != UNSTEADY]


def make(pipe, name: str, steps: int | None = 3) -> torch.Tensor:
    return tiny_run(name, steps, batch_size=1).generate(pipe, [0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:Solver:UserWarning")
def test_solver_serves_or_refuses_and_is_taken_off(name):
    pipe = tiny_pipeline(name)
    before, kind = make(pipe, name), type(pipe)
    if name in NO_FLOW or name == DISTILLED:
        with pytest.raises(ValueError, match=NO_FLOW.get(name, "distilled for its own steps")):
            Solver(4).apply(pipe)
    else:
        solver = Solver(4)
        solver.apply(pipe)
        assert not torch.equal(make(pipe, name, steps=None), before)
        assert pipe.scheduler.num_inference_steps == 4
        make(pipe, name, steps=2)
        assert pipe.scheduler.num_inference_steps == 2
        solver.remove(pipe)
    assert type(pipe) is kind and torch.equal(make(pipe, name), before)


@pytest.mark.parametrize("name", ["flux2-klein", "sd3", "ltx2"])
def test_euler_in_euler_s_place_changes_nothing(name):
    pipe = tiny_pipeline(name)
    before = make(pipe, name)
    assert torch.equal(make(Solver(3, "euler").apply(pipe), name, steps=None), before)


def test_what_is_replaced_is_said_where_it_was_better_than_euler():
    with pytest.warns(UserWarning, match="Adams-Bashforth replaces UniPCMultistepScheduler"):
        Solver(4).apply(tiny_pipeline("wan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Solver(4).apply(tiny_pipeline("sd3"))


@pytest.fixture(scope="module")
def wan_student(tmp_path_factory) -> Path:
    """A saved student of Wan 2.2: other weights in both networks, and a call of two steps without guidance."""
    pipe = tiny_pipeline("wan2.2")
    for seed, network in enumerate(denoisers(pipe).values()):
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    set_call_defaults(pipe, "student", num_inference_steps=2, guidance_scale=1.0)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("student"))
    return folder


def test_a_student_replaces_both_networks_of_wan_22_and_goes_again(wan_student):
    pipe = tiny_pipeline("wan2.2")
    before, text_encoder, networks = make(pipe, "wan2.2"), pipe.text_encoder, denoisers(pipe)
    student = Student(str(wan_student))
    student.apply(pipe)
    assert all(denoisers(pipe)[name] is not network for name, network in networks.items())
    assert pipe.text_encoder is text_encoder, "what the student shares is not opened again"
    run = tiny_run("wan2.2", None, guidance_scale=None, negative_prompt=None)
    made = run.generate(pipe, [0])
    assert pipe.scheduler.num_inference_steps == 2 and not pipe.do_classifier_free_guidance
    with pytest.raises(ValueError, match="applied to this pipeline already"):
        student.apply(pipe)
    student.remove(pipe)
    assert torch.equal(make(pipe, "wan2.2"), before) and call_defaults(pipe) == {}
    import diffusion_opt

    assert torch.equal(run.generate(diffusion_opt.load(wan_student), [0]), made)


def test_students_of_another_kind_are_refused_before_anything_is_touched(wan_student, tmp_path):
    klein, wan = tiny_pipeline("flux2-klein"), tiny_pipeline("wan")
    before = make(wan, "wan")
    with pytest.raises(ValueError, match="denoises with transformer, transformer_2, the pipeline with transformer"):
        Student(str(wan_student)).apply(wan)
    klein.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a Flux2Transformer2DModel, the pipeline a WanTransformer3DModel"):
        Student(str(tmp_path)).apply(wan)
    assert torch.equal(make(wan, "wan"), before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in TINY]
)
def test_compile_finds_the_blocks_of_every_network(name):
    pipe = tiny_pipeline(name)
    if name == "sdxl":
        with pytest.raises(ValueError, match="with a UNet"):
            Compile().apply(pipe)
        return
    technique = Compile()
    technique.apply(pipe)
    for network in denoisers(pipe).values():
        blocks = repeated_blocks(network)
        assert len(blocks) >= 2 and all(block._compiled_call_impl is not None for block in blocks)
    technique.remove(pipe)
    for network in denoisers(pipe).values():
        assert all(module._compiled_call_impl is None for module in network.modules())


def test_recipe_on_a_stock_pipeline_is_all_or_nothing():
    pipe = tiny_pipeline("sdxl")
    with pytest.raises(ValueError, match="with a UNet"):
        Recipe((Solver(4), Compile())).apply(pipe)
    pipe = tiny_pipeline("sd3")
    before, recipe = make(pipe, "sd3"), Recipe((Solver(4), Compile()))
    recipe.apply(pipe)
    recipe.remove(pipe)
    assert torch.equal(make(pipe, "sd3"), before)
