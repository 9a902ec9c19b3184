"""A recording is the run itself, a replay without blocks gives the same velocity, and nothing is left behind."""

import pytest
import torch
from caching.pipelines import generate, run_of
from diffusers import DiffusionPipeline
from small_transformers import FAMILIES, family_pipeline, family_sample

from diffusion_opt.caching import FixedSchedule
from diffusion_opt.caching.schedules.recording import GenerationTask, Replay, generation_tasks, record, relative_error
from diffusion_opt.caching.step.stack import attached_cut
from diffusion_opt.models.block_stack import block_stack
from diffusion_opt.subjects import Run


@pytest.fixture
def task() -> GenerationTask:
    return generation_tasks(run_of("0", "1", "2", steps=5, guidance=2.5))[0]


class Embedded(Run):
    """A run of ready embeddings, as the small pipelines of the families take them."""

    def generate(self, pipe, indices, **overrides):
        generator = torch.Generator().manual_seed(5)
        return pipe(**self.arguments["given"], generator=generator, output_type="latent", return_dict=False)[0]


def family_task(family: str) -> tuple[DiffusionPipeline, GenerationTask]:
    """A pipeline, and the call that `family_sample` makes as a task."""
    pipe, calls = family_pipeline(family), []

    def listen(self, **call):
        calls.append(call)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(type(pipe), "__call__", listen)
        family_sample(pipe, steps=3, guidance=2.0, batch=2, seed=5)
    taken = {"generator", "output_type", "return_dict"}
    arguments = {name: value for name, value in calls[0].items() if name not in taken}
    return pipe, GenerationTask(Embedded(("a",), batch_size=2, arguments={"given": arguments}), (0, 1))


def test_tasks_are_batches_with_noise_of_their_own(pipe):
    run = run_of(*map(str, range(5)), steps=4, guidance=1.0, batch_size=2)
    tasks = generation_tasks(run)
    assert [task.samples for task in tasks] == [(0, 1), (2, 3), (4,)]
    assert [task.samples for task in generation_tasks(run, 3, first=4)] == [(4, 5), (6,)]
    first, again, other = tasks[0].run(pipe), tasks[0].run(pipe), tasks[1].run(pipe)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    with pytest.raises(ValueError, match="got num_samples=0"):
        generation_tasks(run, 0)


def test_relative_error_is_per_sample_and_in_the_l2_norm():
    reference = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    output = torch.tensor([[[3.0, 5.0]], [[1.5, 0.0]]])
    torch.testing.assert_close(relative_error(output, reference), torch.tensor([0.2, 1.25]))
    assert relative_error(reference, reference).tolist() == [0, 0]


def test_a_recording_changes_nothing_and_holds_the_whole_run(pipe, task):
    dense = task.run(pipe)
    recording = record(pipe, task)
    assert torch.equal(recording.output, dense)
    assert torch.equal(task.run(pipe), dense)
    assert attached_cut(pipe.transformer) is None
    assert recording.times == pytest.approx((1, 0.8, 0.6, 0.4, 0.2, 0))
    assert (recording.run.guidance_scale, recording.run.num_inference_steps) == (2.5, 5)
    assert {name: len(passes) for name, passes in recording.passes.items()} == {"cond": 5, "uncond": 5}


def test_the_guided_velocity_is_what_moves_the_samples(pipe, task):
    """Euler from the recorded x_t of each step lands on that of the next."""
    recording = record(pipe, task)
    states = [one.call["hidden_states"] for one in recording.passes["cond"]]
    for step in range(4):
        dt = recording.times[step + 1] - recording.times[step]
        moved = states[step] + dt * recording.velocity(step)
        torch.testing.assert_close(moved, states[step + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_of_the_recorded_residuals_gives_the_recorded_velocities(family):
    pipe, task = family_task(family)
    recording = record(pipe, task)
    blocks_ran = []
    for part in (
        block_stack(pipe.transformer).blocks[1].children()
    ):  # hooks of the block itself also see what is skipped
        part.register_forward_hook(lambda *_: blocks_ran.append(1))
    with Replay(pipe.transformer, recording) as replay:
        for step in range(recording.num_steps):
            recorded = {name: passes[step].residual for name, passes in recording.passes.items()}
            torch.testing.assert_close(replay.velocity(step, recorded), recording.velocity(step), rtol=1e-3, atol=1e-4)
    assert not blocks_ran
    assert attached_cut(pipe.transformer) is None


def test_a_replay_with_another_residual_gives_another_velocity(pipe, task):
    recording = record(pipe, task)
    with Replay(pipe.transformer, recording) as replay:
        zeros = {
            name: {key: torch.zeros_like(value) for key, value in passes[2].residual.items()}
            for name, passes in recording.passes.items()
        }
        assert not torch.allclose(replay.velocity(2, zeros), recording.velocity(2), rtol=0.1)


def test_a_pipeline_with_a_cache_on_it_is_refused(pipe, task):
    technique = FixedSchedule((True, True, False, False, True))
    technique.apply(pipe)
    with pytest.raises(ValueError, match="already on this transformer"):
        record(pipe, task)
    technique.remove(pipe)
    assert torch.equal(generate(pipe), generate(pipe))
