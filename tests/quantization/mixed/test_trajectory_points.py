"""Points of the float network's own trajectories: the very passes of a generation, whatever the family."""

import pytest
import torch
from quantization.pipelines import small_pipeline
from small_transformers import family_pipeline, family_sample

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models import velocity_model
from diffusion_opt.quantization.mixed.trajectory_points import squared_error, trajectory_points, velocity_error


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_points_are_the_passes_of_a_generation_at_the_times_of_its_scheduler():
    pipe = small_pipeline(default_steps=3, default_guidance=2.0)
    points = trajectory_points(pipe, 4, seeded())
    assert len(points) == 4 * 3 * 2  # samples, steps, branches of guidance
    times = points.arguments["timestep"].reshape(3, 2, 4)
    assert times[:, 0, 0].tolist() == pytest.approx([1.0, 2 / 3, 1 / 3]) and (times == times[:, :1, :1]).all()
    hidden, text = points.arguments["hidden_states"], points.arguments["encoder_hidden_states"]
    first, second = hidden.unflatten(0, (3, 2, 4))[0]
    assert torch.equal(first, second)  # both branches stand at the same point, with another text
    assert not torch.equal(*text.unflatten(0, (3, 2, 4))[0])


@torch.no_grad()
def test_outputs_are_those_of_the_network_and_the_points_lie_on_its_path():
    pipe = small_pipeline(default_steps=3, default_guidance=1.0)
    points = trajectory_points(pipe, 4, seeded())
    assert velocity_error(pipe.transformer, points, batch_size=5) < 1e-6  # batches of other sizes, other sums
    noise, after = points.arguments["hidden_states"].unflatten(0, (3, 4))[:2]
    step = noise + (2 / 3 - 1) * points.outputs[0].unflatten(0, (3, 4))[0]
    torch.testing.assert_close(after, step, rtol=1e-5, atol=1e-6)
    labels = torch.randint(10, (4,), generator=seeded())
    velocity = velocity_model(pipe)
    expected = velocity(velocity.unpack(noise, (4, 4)), torch.ones(4), ClassCondition(labels, 10))
    torch.testing.assert_close(velocity.unpack(points.outputs[0][:4], (4, 4)), expected, rtol=1e-5, atol=1e-6)


def test_the_same_generator_gives_the_same_points_and_some_of_them_can_be_taken():
    pipe = small_pipeline(default_steps=2, default_guidance=1.0)
    points, again, other = (trajectory_points(pipe, 3, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(points.outputs[0], again.outputs[0]) and not torch.equal(points.outputs[0], other.outputs[0])
    some = points[torch.tensor([4, 1])]
    assert len(some) == 2 and torch.equal(some.outputs[0], points.outputs[0][[4, 1]])
    assert torch.equal(some.arguments["hidden_states"], points.arguments["hidden_states"][[4, 1]])
    assert some.arguments.keys() == points.arguments.keys()


@pytest.mark.parametrize(("family", "streams"), [("ltx2", 2), ("wan", 1), ("sd3", 1)])
def test_other_families_need_nothing_but_their_own_pipeline(family, streams):
    pipe = family_pipeline(family, blocks=2)

    def generate(pipe, number, generator):
        seed = int(torch.randint(1000, (), generator=generator))
        family_sample(pipe, steps=2, batch=number, seed=seed)

    points = trajectory_points(pipe, 2, seeded(), generate)
    assert len(points.outputs) == streams and len(points) == 2 * 2 * 2
    assert velocity_error(pipe.transformer, points) < 1e-6
    with torch.no_grad():
        assert float(squared_error(pipe.transformer, points[:3])) < 1e-12


def test_the_error_is_relative_and_has_a_gradient():
    pipe = small_pipeline(default_steps=2, default_guidance=1.0)
    points = trajectory_points(pipe, 3, seeded())
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.1)  # the last layer: the output scales with it
    assert velocity_error(pipe.transformer, points) == pytest.approx(0.1, rel=1e-4)
    squared_error(pipe.transformer, points).backward()
    assert pipe.transformer.proj_out.weight.grad.norm() > 0


def test_the_pipeline_is_left_as_it_was():
    pipe = small_pipeline(default_steps=2)
    pipe.set_progress_bar_config(disable=False, leave=False)
    trajectory_points(pipe, 2, seeded())
    assert not pipe.transformer._forward_hooks and pipe._progress_bar_config == {"disable": False, "leave": False}


def test_what_gives_no_points_is_refused():
    pipe = small_pipeline(default_steps=2)
    with pytest.raises(ValueError, match="generated without a pass"):
        trajectory_points(pipe, 2, seeded(), lambda *_: None)

    def two_sizes(pipe, number, generator):
        for value in (True, False):
            pipe.transformer(**{**given, "joint_attention_kwargs": {"scale": value}})

    given = trajectory_points(pipe, 1, seeded()).arguments
    with pytest.raises(ValueError, match="differ in 'joint_attention_kwargs'"):
        trajectory_points(pipe, 2, seeded(), two_sizes)


def test_arguments_by_position_get_their_names():
    pipe = small_pipeline(default_steps=1, default_guidance=1.0)
    given = trajectory_points(pipe, 1, seeded()).arguments
    rest = {name: value for name, value in given.items() if name != "hidden_states"}
    points = trajectory_points(pipe, 1, seeded(), lambda pipe, *_: pipe.transformer(given["hidden_states"], **rest))
    assert torch.equal(points.arguments["hidden_states"], given["hidden_states"])
