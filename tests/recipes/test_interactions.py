"""Interactions: exact where arithmetic is counted, told where two techniques refuse one another."""

from pathlib import Path

import pytest

from diffusion_opt.caching import FixedInterval, GuidanceCache
from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.quantization import DynamicInt8
from diffusion_opt.recipes import Solver
from diffusion_opt.recipes.interactions import (
    TEACHER,
    Effect,
    as_dict,
    combined,
    figure,
    interactions,
    recalibrated,
    study,
    table,
)
from diffusion_opt.subjects import Run

PLAIN = (1.0, 1.0, 1.0)


def test_product_predicted_and_product_found() -> None:
    single = [
        Effect(("a",), 2.0, (2.0, 1.8, 2.2), {"x.y": (0.1, 0.0, 0.2)}),
        Effect(("b",), 3.0, PLAIN, {"x.y": (0.2, 0.1, 0.3)}),
    ]
    (found,) = interactions([*single, Effect(("a", "b"), 3.0, (1.0, 0.9, 1.1), {"x.y": (0.5, 0.4, 0.6)})])
    assert found.macs_predicted == 6 and found.macs == 0.5
    assert found.time == pytest.approx((0.5, 0.45, 0.55))
    assert found.losses_predicted == {"x.y": pytest.approx(0.3)}


def test_pairs_that_refuse_one_another_are_told() -> None:
    recipes, refused = combined({"a": FixedInterval(2), "b": Solver(3), "c": FixedInterval(3)})
    assert ("a", "b") in recipes and [type(t) for t in recipes["a", "b"].techniques] == [Solver, FixedInterval]
    assert "can change the cache once" in refused["a", "c"] and ("a", "b", "c") in refused


def test_a_solver_and_a_guidance_interval_multiply_in_arithmetic(pipe: TinyFlux2Pipeline) -> None:
    """Half of the steps, and guidance at the same share of the times: the counted product is the predicted one."""
    factors = {"solver": Solver(3), "guidance": GuidanceCache(1, interval=(0.0, 0.7))}
    run = Run(("bag", "coat"), batch_size=2)
    effects = study(pipe, factors, run, ("paired.pixel",), samples=2, rounds=1, progress=False)
    assert [one.factors for one in effects] == [(TEACHER,), ("solver",), ("guidance",), ("solver", "guidance")]
    assert effects[0].macs == 1 and effects[1].macs == pytest.approx(2, rel=0.01)
    assert effects[2].macs == pytest.approx(12 / 10, rel=0.01)  # 4 of 6 times: 1, 0.83 lie outside
    (pair,) = interactions(effects)
    assert pair.macs == pytest.approx(1, rel=0.01)
    assert set(pair.effect.losses) == {"paired.pixel"}
    assert any("time" in line for line in table(effects)) and len(figure(effects).axes) == 2
    assert len(as_dict(effects)["interactions"]) == 1
    with pytest.raises(ValueError, match="two factors or more"):
        study(pipe, {"solver": Solver(3)}, run, ("paired.pixel",), samples=2)


def test_a_table_is_calibrated_before_and_after(pipe: TinyFlux2Pipeline, tmp_path: Path) -> None:
    recipes = recalibrated(pipe, DynamicInt8(min_width=0), Run(("bag", "coat"), guidance_scale=2.0), 1.0, tmp_path)
    assert list(recipes) == ["calibrated before", "calibrated after"]
    before, after = (tmp_path / f"calibrated-{when}.json" for when in ("before", "after"))
    assert before.read_text() != after.read_text()
