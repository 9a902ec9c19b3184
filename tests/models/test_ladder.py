"""Students at the times they were trained for: stored, used, and anything else refused; and guidance in one pass."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from small_pipelines import fill, generate, small_pipeline

from diffusion_opt.flow import ClassCondition, clean_from_velocity, interpolate
from diffusion_opt.models import flow_map_transformer, load, set_ladders, velocity_model
from diffusion_opt.models.ladder import ladder_of

LADDERS = [[1.0], [1.0, 0.9, 0.4]]


@pytest.fixture
def student():
    pipe = small_pipeline()
    set_ladders(pipe, LADDERS, renoise=True)
    return pipe


def start(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    latents = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    return latents, velocity_model(pipe).unpack(latents.flatten(2).transpose(1, 2), (4, 4))


def call(pipe, latents, seed=5, **settings):
    generator = torch.Generator().manual_seed(seed)
    return pipe([0, 1, 2], latents=latents, output_type="pt", generator=generator, **settings).images


@torch.no_grad()
def by_hand(pipe, x, ladder, seed=5, two_time=False):
    """Song et al. 2023, algorithm 1, with the noise of the same generator in token order."""
    model, condition, generator = velocity_model(pipe), ClassCondition(torch.arange(3), 10), torch.Generator()
    generator.manual_seed(seed)
    for t, r in zip(ladder, [*ladder[1:], 0.0], strict=True):
        at = torch.full((3,), t)
        extra = {"r": torch.zeros(3)} if two_time else {}
        clean = clean_from_velocity(x, model(x, at, condition, **extra), at)
        noise = model.unpack(torch.randn(3, 16, 16, generator=generator), (4, 4))
        x = interpolate(clean, noise, torch.full((3,), r))
    return ((x + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("ladder", LADDERS, ids=["one", "three"])
def test_renoising_is_the_algorithm_of_consistency_models(student, ladder):
    latents, x = start(student)
    found = call(student, latents, num_inference_steps=len(ladder))
    torch.testing.assert_close(found, by_hand(student, x, ladder), rtol=0, atol=1e-5)
    assert [round(t, 6) for t in student.scheduler.sigmas.tolist()] == [*ladder, 0.0]


def test_a_two_time_student_that_is_renoised_jumps_to_the_picture_at_each_pass():
    pipe = small_pipeline()
    pipe.transformer = flow_map_transformer(pipe.transformer)
    fill(pipe.transformer, std=0.3, seed=1)
    pipe.register_to_config(flow_map=True)
    set_ladders(pipe, LADDERS, renoise=True)
    latents, x = start(pipe)
    torch.testing.assert_close(call(pipe, latents), by_hand(pipe, x, LADDERS[1], two_time=True), rtol=0, atol=1e-5)


def test_noise_between_rungs_comes_from_the_callers_generator(student):
    latents, _ = start(student)
    torch.manual_seed(1)
    first = call(student, latents)
    torch.manual_seed(2)
    assert torch.equal(first, call(student, latents))
    assert not torch.equal(first, call(student, latents, seed=6))
    assert "step" not in vars(student.scheduler)


def test_other_step_counts_are_refused(student):
    latents, _ = start(student)
    with pytest.raises(ValueError, match=r"trained for 1, 3 steps, got num_inference_steps=2"):
        call(student, latents, num_inference_steps=2)
    with pytest.raises(ValueError, match="this student's sigmas are those of its ladders"):
        call(student, latents, sigmas=[1.0, 0.5, 0.2])


@torch.no_grad()
def test_a_run_may_begin_at_a_noised_picture(student):
    latents, x = start(student)
    rest = LADDERS[-1][1:]
    found = call(student, latents, num_inference_steps=len(rest), sigmas=rest)
    torch.testing.assert_close(found, by_hand(student, x, rest), rtol=0, atol=1e-5)


def test_a_ladder_survives_saving(student, tmp_path):
    student.save_pretrained(tmp_path, safe_serialization=True)
    again = load(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, FlowMatchLCMScheduler)
    assert again.config.default_steps == 3
    assert torch.equal(generate(again, steps=3, guidance=1.0), generate(student, steps=3, guidance=1.0))
    with pytest.raises(ValueError, match="trained for 1, 3 steps"):
        generate(again, steps=4, guidance=1.0)


def test_along_the_path_a_ladder_is_euler_at_its_own_times():
    pipe = small_pipeline()
    set_ladders(pipe, [[1.0, 0.75, 0.5, 0.25]], renoise=False)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert torch.equal(generate(pipe, steps=4, guidance=1.0), generate(small_pipeline(), steps=4, guidance=1.0))


@pytest.mark.parametrize(
    ("ladders", "message"),
    [
        ([], "one ladder for each number of steps"),
        ([[1.0, 0.5], [1.0, 0.4]], "one ladder for each number of steps"),
        ([[]], "falls from 1.0"),
        ([[0.9, 0.5]], "falls from 1.0"),
        ([[1.0, 0.5, 0.5]], "falls from 1.0"),
        ([[1.0, 0.0]], "leaves out the final 0"),
    ],
)
def test_ladders_that_cannot_be_are_refused(ladders, message):
    with pytest.raises(ValueError, match=message):
        set_ladders(small_pipeline(), ladders, renoise=True)


def test_a_ladder_is_found_by_its_length():
    assert ladder_of(LADDERS, 3) == [1.0, 0.9, 0.4]


def test_the_sigmas_of_a_ladder_are_the_ones_that_run():
    pipe, times = small_pipeline(), []
    set_ladders(pipe, [[1.0], [1.0, 0.5], [1.0, 0.7, 0.4]], renoise=True)
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: times.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    for ladder in ([1.0], [1.0, 0.5], [1.0, 0.7, 0.4]):
        times.clear()
        pipe("0", sigmas=ladder, output_type="latent")
        assert times == pytest.approx(ladder)
    with pytest.raises(ValueError, match="the sigmas given are 2 steps, and num_inference_steps=3: leave one out"):
        pipe("0", sigmas=[1.0, 0.5], num_inference_steps=3)


def test_noise_of_a_stochastic_scheduler_is_that_of_the_generator():
    pipe = small_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    one = generate(pipe, seed=7)
    torch.randn(3)  # the global generator moves on
    assert torch.equal(generate(pipe, seed=7), one)
    assert not torch.equal(generate(pipe, seed=8), one)


@pytest.fixture
def guided():
    """A student with the scale in its slot, for guidance 1 … 4."""
    pipe = small_pipeline()
    pipe.transformer = flow_map_transformer(pipe.transformer)
    fill(pipe.transformer, std=0.3, seed=1)
    pipe.register_to_config(guidance_range=(1.0, 4.0), default_guidance=2.0)
    return pipe


def test_a_guided_student_takes_the_scale_in_one_pass(guided):
    scales = []
    guided.transformer.time_guidance_embed.register_forward_pre_hook(
        lambda _, args: scales.append((args[1] / 1000).tolist())
    )
    images = generate(guided, steps=3, guidance=3.0)
    assert scales == [[3.0] * 3] * 3
    assert not torch.equal(images, generate(guided, steps=3, guidance=1.0))


def test_a_guided_student_is_the_velocity_model_with_that_scale(guided):
    latents, x = start(guided)
    model, condition, ones = velocity_model(guided), ClassCondition(torch.arange(3), 10), torch.ones(3)
    with torch.no_grad():
        expected = x - model(x, ones, condition, guidance=3 * ones)
        by_default = x - model(x, ones, condition)
    found = call(guided, latents, num_inference_steps=1, guidance_scale=3.0)
    torch.testing.assert_close(found, ((expected + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)
    found = call(guided, latents, num_inference_steps=1)
    torch.testing.assert_close(found, ((by_default + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)


def test_guidance_outside_the_trained_range_is_refused(guided):
    with pytest.raises(ValueError, match=r"trained for guidance 1 … 4, got 5"):
        generate(guided, guidance=5.0)


def test_a_scale_for_a_network_that_takes_none_is_refused():
    model = velocity_model(small_pipeline())
    with pytest.raises(ValueError, match="takes no guidance scale"):
        model(torch.zeros(2, 1, 16, 16), torch.ones(2), ClassCondition(torch.arange(2), 10), guidance=torch.ones(2))
