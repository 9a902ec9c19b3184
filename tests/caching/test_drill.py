"""The drill of caches: nothing of what is disturbed between two generations is seen in the second."""

from functools import partial

import pytest
import torch
from tiny_pipelines import tiny_pipeline, tiny_run

from diffusion_opt.caching import FixedInterval
from diffusion_opt.caching.drill import COMPILED, LASTING, PASSING, TECHNIQUES, Subject, calibrated, drill, one_try

KINDS = ("flux2-klein", "sd3", "wan", "ltx", "ltx2-cfg")


def subject(kind: str) -> Subject:
    return Subject(partial(tiny_pipeline, kind), tiny_run(kind))


def test_a_disturbance_of_each_class_is_survived():
    for disturbance in ("an error in a callback", "an adapter comes"):
        assert one_try(subject("flux2-klein"), FixedInterval(2, "reuse"), disturbance) == "held"


def test_a_cache_that_remembers_is_found_out():
    class Forgetful(type(FixedInterval(2))):
        __slots__ = ()

        def remove(self, pipe):
            super().remove(pipe)
            with torch.no_grad():
                next(pipe.transformer.parameters()).add_(1.0)

    end = one_try(subject("flux2-klein"), Forgetful(2, "reuse"), "another size")
    assert "its removal did not bring the pipeline back" in end


@pytest.mark.parametrize("disturbance", ["other steps", "weights written to"])
def test_calibrated_caches_and_streams_are_disturbed_too(tmp_path, disturbance):
    klein = subject("flux2-klein")
    curve, table = calibrated(klein, tmp_path)
    ends = [one_try(klein, one, disturbance) for one in (curve, table, TECHNIQUES[-1])]
    assert ends == (["held"] * 3 if disturbance in PASSING else ["refused", "refused", "held"])


@pytest.mark.compiled
def test_a_compiled_schedule_is_disturbed_too():
    for disturbance in ("an error in a callback", "weights written to"):
        assert one_try(subject("flux2-klein"), COMPILED[0], disturbance) == "held"


@pytest.mark.slow
def test_random_disturbances_over_families():
    rows = drill({kind: subject(kind) for kind in KINDS}, tries=len(PASSING) + len(LASTING), seed=1)
    assert {row.fault for row in rows} == {*PASSING, *LASTING}
    assert [row.examples for row in rows if row.wrong] == []
    assert sum(row.held for row in rows) > sum(row.refused for row in rows)
