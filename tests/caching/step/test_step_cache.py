"""The core: anchors, safeguards, shared decisions, resets and reports, with a rule that says when."""

import threading

import pytest
import torch
from caching.pipelines import generate, inputs_at, small_pipeline
from small_transformers import family_pipeline, family_sample

from diffusion_opt.caching.step.predictors import PREDICTORS, Extrapolation
from diffusion_opt.caching.step.report import step_cache_report
from diffusion_opt.caching.step.stack import StackCut
from diffusion_opt.caching.step.step_cache import Rule, StepCache
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler


class Eager(Rule):
    """Skips whenever it may."""

    def __init__(self) -> None:
        self.seen, self.starts, self.willing = [], 0, True

    def start(self):
        self.starts += 1

    def skip(self, stack, forced):
        self.seen.append((stack.context, forced))
        return self.willing and not forced


def cached(pipe, predictor="reuse", known=True) -> StepCache:
    cache = StepCache(Eager(), PREDICTORS[predictor])
    StackCut(pipe.transformer, cache, pipe if known else None).attach(pipe.transformer)
    return cache


def pattern(pipe, name: str) -> str:
    return "".join("#" if ran else "." for _, ran in step_cache_report(pipe).passes[name])


@pytest.mark.parametrize(("predictor", "expected"), [("reuse", "#......#"), ("forecast", "##.....#")])
def test_first_steps_and_last_are_computed_for_both_branches(pipe, predictor, expected):
    cache = cached(pipe, predictor)
    generate(pipe, steps=8)
    assert pattern(pipe, "cond") == pattern(pipe, "uncond") == expected
    assert {context for context, _ in cache.rule.seen} == {"cond"}  # one decision a step
    report = step_cache_report(pipe)
    assert report.computed == {"cond": expected.count("#"), "uncond": expected.count("#")}
    assert report.total_computed + report.total_skipped == 16
    assert str(report).startswith(f"cond: {expected.count('#')} computed, {expected.count('.')} skipped [{expected}]")


@torch.no_grad()
@pytest.mark.parametrize("order", [0, 1])
def test_a_skipped_pass_is_head_plus_prediction_plus_tail(pipe, order):
    transformer = pipe.transformer
    ends = []
    handle = transformer.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    times, residuals = [0.9, 0.7], []
    for i, time in enumerate(times):
        given = inputs_at(time, seed=i)
        transformer(**given)
        residuals.append(ends[-1] - transformer.x_embedder(given["hidden_states"]))
    handle.remove()
    slope = (residuals[1] - residuals[0]) / (times[1] - times[0])
    residual = residuals[1] + (slope * (0.4 - times[1]) if order else 0)
    given = inputs_at(0.4, seed=2)
    embedding = transformer.time_guidance_embed(given["timestep"] * 1000, None)
    start = transformer.x_embedder(given["hidden_states"])
    expected = transformer.proj_out(transformer.norm_out(start + residual, embedding))

    cache = StepCache(Eager(), Extrapolation(order))
    StackCut(transformer, cache).attach(transformer)
    if order == 0:  # a first pass would already be reused at the second: leave it out
        times = times[1:]
    for i, time in enumerate(times, start=2 - len(times)):
        transformer(**inputs_at(time, seed=i))
    torch.testing.assert_close(transformer(**given)[0], expected, rtol=1e-5, atol=1e-5)
    assert cache.report().passes["default"][-1][1] is False


def test_the_second_generation_equals_the_first(pipe):
    cache = cached(pipe, "forecast")
    first = generate(pipe)
    generate(pipe, seed=99)
    assert torch.equal(generate(pipe), first)
    assert cache.rule.starts == 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([(0.9, {}), (0.8, {})], (0.95, {})),  # time goes up
        ([(0.9, {})], (0.9, {"seed": 5})),  # and back at the same start
        ([(0.9, {}), (0.8, {})], (0.7, {"batch": 3})),  # another batch size
        ([(0.9, {}), (0.8, {})], (0.7, {"image_tokens": 9})),  # another image size
    ],
)
def test_a_custom_loop_resets_by_itself(pipe, first, then):
    cache = cached(pipe, known=False)
    with pytest.warns(UserWarning) if len(first) == 1 else torch.no_grad():
        for time, change in (*first, then):
            pipe.transformer(**inputs_at(time, **change))
    assert cache.rule.starts == 2
    assert cache.report().passes == {"default": ((pytest.approx(then[0]), True),)}


@torch.no_grad()
def test_another_type_resets(pipe):
    cache = cached(pipe, known=False)
    pipe.transformer(**inputs_at(0.9))
    pipe.transformer(**inputs_at(0.8))
    pipe.transformer.double()
    given = {name: value.double() if torch.is_tensor(value) else value for name, value in inputs_at(0.7).items()}
    pipe.transformer(**given)
    assert cache.rule.starts == 2


def test_an_interrupted_generation_leaves_nothing_to_one_that_starts_lower(pipe):
    cache = cached(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(prompt="bag", num_inference_steps=6, callback_on_step_end=stop)
    with pytest.warns(UserWarning, match="none of 1 steps"):
        pipe(prompt="bag", sigmas=[0.6, 0.4, 0.2], num_inference_steps=3)
    assert cache.rule.starts == 2
    assert pattern(pipe, "cond") == "#.#"


def test_two_pipelines_share_nothing():
    one, other = small_pipeline(), small_pipeline()
    dense = generate(other)
    cached(one, "reuse")
    alone = generate(one)
    assert torch.equal(generate(other), dense)
    cached(other, "forecast")
    for step_of_one, step_of_other in ((4, 7), (6, 5)):
        generate(one, steps=step_of_one)
        generate(other, steps=step_of_other)
    assert torch.equal(generate(one), alone)
    assert pattern(one, "cond") == "#....#"
    assert pattern(other, "cond") == "##..#"


@torch.no_grad()
def test_a_follower_without_a_leader_computes(pipe):
    cache = cached(pipe, known=False)

    def run(name, time):
        with pipe.transformer.cache_context(name):
            pipe.transformer(**inputs_at(time))

    for name, time in [("cond", 0.9), ("uncond", 0.9), ("cond", 0.8), ("uncond", 0.7), ("cond", 0.6), ("uncond", 0.6)]:
        run(name, time)
    assert [ran for _, ran in cache.report().passes["cond"]] == [True, False, False]
    assert [ran for _, ran in cache.report().passes["uncond"]] == [True, True, False]


@torch.no_grad()
def test_the_last_step_is_known_from_the_context(pipe):
    cache = cached(pipe, known=False)
    for i, time in enumerate((0.9, 0.8, 0.7)):
        with pipe.transformer.cache_context("cond", step_index=i, num_inference_steps=3):
            pipe.transformer(**inputs_at(time))
    assert [ran for _, ran in cache.report().passes["cond"]] == [True, False, True]


@torch.no_grad()
def test_two_calls_at_one_time_are_one_anchor(pipe):
    """As Heun's method makes them: a line through two anchors at the same time would be vertical."""
    cache = cached(pipe, "forecast", known=False)
    for seed, time in enumerate((0.9, 0.8, 0.8, 0.6, 0.6)):
        assert pipe.transformer(**inputs_at(time, seed=seed))[0].isfinite().all()
    assert cache.rule.starts == 1
    assert [ran for _, ran in cache.report().passes["default"]] == [True, True, False, False, False]

    cache.rule.willing = False
    for seed, time in enumerate((1.0, 0.8, 0.8)):
        pipe.transformer(**inputs_at(time, seed=seed))
    cache.rule.willing = True
    assert pipe.transformer(**inputs_at(0.5))[0].isfinite().all()
    assert cache.report().passes["default"][-1][1] is False


def test_a_scheduler_put_in_later_is_asked_for_the_last_step(pipe):
    cached(pipe, "reuse")
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(pipe.scheduler.config, shift=3.0)
    generate(pipe, steps=5)
    assert pattern(pipe, "cond") == "#...#"


def test_never_hitting_warns_with_the_reason(pipe):
    cached(pipe, "forecast")
    with pytest.warns(UserWarning, match="none of 3 steps: 3 steps are too few, 4 are the least"):
        generate(pipe, steps=3)


@torch.no_grad()
def test_threads_on_one_transformer_share_nothing(pipe):
    """Passes of two generations, alternating: each as if it were alone, contexts and copies of the rule included."""
    alone = {}
    for seed in (1, 2):
        fresh = small_pipeline()
        cached(fresh, "forecast", known=False)
        alone[seed] = _loop(fresh.transformer, seed)
    cache = cached(pipe, "forecast", known=False)
    together, turn = {}, threading.Barrier(2)

    def work(seed):
        with torch.no_grad():
            together[seed] = _loop(pipe.transformer, seed, turn.wait)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for seed in (1, 2):
        assert torch.equal(together[seed], alone[seed])
    assert cache.rule.starts == 0  # this thread generated nothing
    assert cache.report().passes == {}


def _loop(transformer, seed, wait=lambda: None):
    """Six steps with two passes each; `wait` before each pass."""
    x, prompts = inputs_at(1.0, seed=seed)["hidden_states"], (1.0, -seed)
    for i in range(6):
        velocities = []
        for name, scale in zip(("cond", "uncond"), prompts, strict=True):
            given = inputs_at(1 - i / (5 + seed), seed=seed) | {"hidden_states": x}
            given["encoder_hidden_states"] *= scale
            wait()
            with transformer.cache_context(name, step_index=i, num_inference_steps=6):
                wait()
                velocities.append(transformer(**given)[0])
        x = x - 0.1 * (2 * velocities[0] - velocities[1])
    return x


@torch.no_grad()
def test_the_number_of_steps_told_starts_a_new_generation(pipe):
    cache = cached(pipe, known=False)
    told = [(0, 3, 0.9), (1, 3, 0.8), (1, 4, 0.7), (2, 4, 0.6), (0, 4, 0.5)]
    for index, steps, time in told:
        with pipe.transformer.cache_context("cond", step_index=index, num_inference_steps=steps):
            pipe.transformer(**inputs_at(time))
    assert cache.rule.starts == 3


def test_anchors_are_dropped_with_the_last_step(pipe):
    """On SD3 nobody tells the cache that a call has ended; memory is free all the same, and a miss is reported."""
    sd3 = family_pipeline("sd3")
    cache = cached(sd3)
    family_sample(sd3)
    assert [anchors for anchors in cache._thread.state.anchors.values() if anchors] == []
    cache.rule.willing = False
    with pytest.warns(UserWarning, match="none of 6 steps: raise its threshold"):
        family_sample(sd3)


@torch.no_grad()
def test_a_probe_is_kept_apart_from_the_rest(pipe):
    """ParaAttention's first-block cache: first block fresh, the rest as it was at the last computed step."""

    class Probing(Eager):
        probe_blocks = 1

    transformer, ends, firsts = pipe.transformer, [], []
    transformer.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    transformer.transformer_blocks[1].register_forward_pre_hook(
        lambda m, args, kwargs: firsts.append(kwargs["hidden_states"]), with_kwargs=True
    )
    cache = StepCache(Probing(), PREDICTORS["reuse"])
    StackCut(transformer, cache).attach(transformer)
    for seed, time in enumerate((0.9, 0.8)):
        transformer(**inputs_at(time, seed=seed))
    assert [ran for _, ran in cache.report().passes["default"]] == [True, False]
    torch.testing.assert_close(ends[1], firsts[1] + (ends[0] - firsts[0]), rtol=1e-5, atol=1e-5)


def test_no_cache_no_report(pipe):
    with pytest.raises(ValueError, match="no step cache on this pipeline"):
        step_cache_report(pipe)
