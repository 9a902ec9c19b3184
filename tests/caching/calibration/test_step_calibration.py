"""Calibration: one recording measures what it says, is saved as it is, and serves its own model and run only."""

import json
import weakref
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from caching.calibrations import calibration_of
from caching.pipelines import generate, run_of, small_pipeline
from diffusers import MagCacheConfig
from small_transformers import FAMILIES, family_pipeline, family_sample

from diffusion_opt.caching import CalibratedRun, StepCalibration, calibrate_step_cache
from diffusion_opt.caching.calibration.step_calibration import calibrate_runs
from diffusion_opt.caching.step.running import Running
from diffusion_opt.caching.step.stack import attached_cut
from diffusion_opt.models import FlowMatchAdamsBashforthScheduler

PROMPTS = ["0", "1", "2"]


def last_run(pipe, place: int = 0) -> Running:
    """The last run of a pipeline, seen from one of its passes."""
    timesteps = pipe.scheduler.timesteps
    return Running(weakref.ref(pipe), timesteps, tuple(t / 1000 for t in timesteps.tolist()), place)


def calibrate(pipe, steps=4, guidance=1.0, prompts=PROMPTS, **settings) -> StepCalibration:
    return calibrate_step_cache(pipe, run_of(*prompts, steps=steps, guidance=guidance, seed=3, **settings))


def test_the_recorded_changes_and_ratios_are_the_real_ones(pipe):
    dense = generate(pipe)
    ends = []
    pipe.transformer.norm_out.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    pipe.transformer.x_embedder.register_forward_hook(lambda m, args, out: ends.append(out))
    found = calibrate(pipe)
    residuals = [end - start for start, end in zip(ends[::2], ends[1::2], strict=True)]
    table = [
        ((new - old).abs().mean((1, 2)) / old.abs().mean((1, 2))).mean().item() for old, new in pairwise(residuals)
    ]
    ratios = [(new.norm(dim=-1) / old.norm(dim=-1)).mean().item() for old, new in pairwise(residuals)]
    assert found.step_table == pytest.approx(table, rel=1e-5)
    assert found.magnitude_ratios == pytest.approx([1.0, *ratios], rel=1e-5)
    assert found.num_pairs == 9
    assert all(r2 <= 1 for r2 in (found.r2, found.r2_polynomial, found.r2_step_table))
    assert torch.equal(generate(pipe), dense)
    assert attached_cut(pipe.transformer) is None


def test_ratios_are_those_that_diffusers_prints(pipe, capsys):
    ours = calibrate(pipe, steps=6, prompts=["1"])
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=6))
    generator = torch.Generator().manual_seed(3)
    pipe(["1"], num_inference_steps=6, guidance_scale=1.0, generator=generator, output_type="latent")
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("["
        ) and not line.startswith("[Mag"))  # fmt: skip
    assert ours.magnitude_ratios == pytest.approx(json.loads(printed), rel=1e-4)


def test_both_branches_and_all_batches_count(pipe):
    assert calibrate(pipe, 5, 2.0, batch_size=2).num_pairs == 3 * 4 * 2
    assert calibrate(pipe, 5, 2.0, batch_size=2).run.guidance_scale == 2
    with pytest.raises(ValueError, match="num_inference_steps=1"):
        calibrate(pipe, steps=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_any_family_are_recorded(family):
    """SD3 names no passes, LTX-2 has two streams: the main one counts."""
    pipe = family_pipeline(family, blocks=2)
    found = calibrate_runs(pipe, [lambda seed=seed: family_sample(pipe, 4, batch=1, seed=seed) for seed in (1, 2)])
    assert found.num_pairs == 2 * 3 * 2  # generations, changes, branches of guidance, in one pass or in two
    assert found.run.num_inference_steps == 4
    assert found.run.guidance_scale == 2
    with pytest.raises(ValueError, match="needs a generation or more"):
        calibrate_runs(pipe, [])
    assert all(r2 <= 1 for r2 in (found.r2, found.r2_polynomial, found.r2_step_table))


def test_a_failed_calibration_leaves_no_hook(pipe):
    with pytest.raises(ValueError, match="unknown prompt"):
        calibrate(pipe, prompts=["zebra"])
    assert attached_cut(pipe.transformer) is None


def test_the_line_names_the_fits_and_the_control(pipe):
    generate(pipe)
    assert calibration_of(pipe).describe() == (
        "30 pairs, 6 steps of FlowMatchEulerDiscreteScheduler, guidance 2: R2 0.900 isotonic, 0.800 as a "
        "polynomial; no-signal control (mean of each step): R2 0.950"
    )


def test_a_saved_calibration_reads_back_equal(pipe, tmp_path, monkeypatch):
    found = calibrate(pipe)
    found.save(tmp_path / "calibration.json")
    assert StepCalibration.load(tmp_path / "calibration.json") == found
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    assert StepCalibration.load("calibration.json") == found
    (tmp_path / "caching").mkdir()
    found.save(tmp_path / "caching" / "shipped.json")
    assert StepCalibration.load("shipped") == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": {"changes": [0.0, 0.3, 0.1], "rescaled": [0.0, 0.4, 0.5]}}, "knots of a curve rise"),
        ({"curve": [0.0, 0.3]}, "IsotonicCurve has exactly changes, rescaled"),
        ({"surplus": 1}, "not a calibration: StepCalibration has exactly"),
        ({"polynomial": {"coefficients": []}}, "a polynomial needs"),
        ({"step_table": [0.1]}, "6 steps have 5 changes and 6 ratios, got 1 and 6"),
    ],
)
def test_a_malformed_file_is_refused(pipe, tmp_path, change, message):
    generate(pipe)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(asdict(calibration_of(pipe)) | change))
    with pytest.raises(ValueError, match=message):
        StepCalibration.load(path)


def test_a_truncated_or_missing_file_is_refused(pipe, tmp_path):
    generate(pipe)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(asdict(calibration_of(pipe)))[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        StepCalibration.load(path)
    with pytest.raises(FileNotFoundError, match=r"no calibration named .* make one by calibrate_step_cache"):
        StepCalibration.load(tmp_path / "none.json")


def test_a_run_is_held_to_scheduler_steps_grid_and_guidance(pipe):
    generate(pipe)
    run = CalibratedRun.of(pipe)
    run.check_run(last_run(pipe), ())
    run.check_model(pipe)
    with pytest.raises(ValueError, match=r"calibrated on model [0-9a-f]{16}, this one is"):
        run.check_model(small_pipeline(seed=1))
    with pytest.raises(ValueError, match=r"for guidance 4, this run has guidance 2: calibrate anew for this run$"):
        replace(run, guidance_scale=4.0).check_run(last_run(pipe), ())
    replace(run, guidance_scale=2.1).check_run(last_run(pipe), (), near=0.05)
    with pytest.raises(ValueError, match=r"or allow it knowingly with near=0\.05"):
        replace(run, guidance_scale=2.1).check_run(last_run(pipe), ())
    with pytest.raises(ValueError, match=r"on samples of \(16, 16\), this run has \(9, 16\)"):
        replace(run, size=(16, 16)).check_run(last_run(pipe), (9, 16))
    replace(run, size=(16, 16)).check_run(last_run(pipe), (9, 16), near=0.01)
    with pytest.raises(ValueError, match="runs that begin at step 0, this one begins at step 2 of 6"):
        run.check_run(last_run(pipe, place=2), ())
    run.check_run(last_run(pipe, place=1), (), near=0.2)  # it begins .17 later
    with pytest.raises(ValueError, match="runs that begin at step 2, this one begins at step 1"):
        replace(run, begin=2).check_run(last_run(pipe, place=1), (), near=0.5)  # of an earlier step nothing is known
    generate(pipe, steps=7)
    with pytest.raises(ValueError, match=r"this run is .* with 7 steps"):
        run.check_run(last_run(pipe), ())
    euler = pipe.scheduler
    pipe.scheduler = FlowMatchAdamsBashforthScheduler.from_config(euler.config)
    generate(pipe)
    with pytest.raises(ValueError, match="this run is FlowMatchAdamsBashforthScheduler"):
        run.check_run(last_run(pipe), ())
    pipe.scheduler = type(euler).from_config(euler.config, shift=3.0)
    generate(pipe)
    with pytest.raises(ValueError, match=r"another time grid: step 1 was at t = 0.83333, in this run it is at 0.9375"):
        run.check_run(last_run(pipe), ())


def test_a_pipeline_that_was_never_called_counts_as_unguided():
    assert CalibratedRun.of(family_pipeline("flux2")).guidance_scale == 1
