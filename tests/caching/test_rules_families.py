"""Every rule on every family: at its identity limit it changes no bit, beyond it it skips, and it leaves no trace."""

import warnings

import pytest
import torch
from caching.calibrations import calibration_of, saved
from small_transformers import FAMILIES, family_pipeline, family_sample

from diffusion_opt.caching import (
    EasyCache,
    FirstBlockCache,
    FixedInterval,
    FixedSchedule,
    MagCache,
    StepTable,
    TeaCache,
    step_cache_report,
)
from diffusion_opt.caching.step.stack import attached_cut
from diffusion_opt.caching.step.technique import StepCacheTechnique

STEPS = 6


def techniques(calibration: str) -> list[tuple[StepCacheTechnique, StepCacheTechnique]]:
    """Each technique at its identity limit and far beyond it."""
    none, half = (True,) * STEPS, (True, False, True, False, False, True)
    return [
        (FixedInterval(1, "reuse"), FixedInterval(2, "reuse")),
        (FixedSchedule(none, "reuse"), FixedSchedule(half, "reuse")),
        (TeaCache(0.0), TeaCache(100.0)),
        (TeaCache(0.0, curve=calibration), TeaCache(100.0, curve=calibration)),
        (FirstBlockCache(0.0), FirstBlockCache(100.0)),
        (MagCache(0.0, calibration), MagCache(100.0, calibration)),
        (EasyCache(0.0), EasyCache(100.0)),
        (StepTable(0.0, calibration), StepTable(100.0, calibration)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_limit_effect_and_removal(family, tmp_path):
    pipe = family_pipeline(family, blocks=2)
    dense = family_sample(pipe, STEPS)
    for identity, strong in techniques(saved(calibration_of(pipe), tmp_path)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(family_sample(identity.apply(pipe), STEPS), dense), identity
        identity.remove(pipe)
        cached = family_sample(strong.apply(pipe), STEPS)
        report = step_cache_report(pipe)
        strong.remove(pipe)
        assert report.total_skipped >= 2, strong
        assert len(set(report.computed.values())) == 1, strong  # one decision for all branches
        assert cached.isfinite().all()
        assert not torch.equal(cached, dense), strong
    assert attached_cut(pipe.transformer) is None
    assert torch.equal(family_sample(pipe, STEPS), dense)
