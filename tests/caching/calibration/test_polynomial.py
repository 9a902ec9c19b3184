"""Polynomials as published: evaluated as numpy does, fitted by least squares, and their faults named."""

import warnings

import numpy as np
import pytest
import torch
from small_transformers import small_transformer
from tiny_pipelines import networks

from diffusion_opt.caching.calibration.polynomial import PUBLISHED, PolynomialCurve, fit_polynomial
from diffusion_opt.models.block_stack import FAMILIES


@pytest.mark.parametrize("name", PUBLISHED)
def test_evaluated_as_numpy_does(name):
    curve = PUBLISHED[name].curve
    for x in (0.0, 0.05, 0.2, 0.37):
        assert curve(x) == pytest.approx(float(np.poly1d(curve.coefficients)(x)), rel=1e-9)
    assert len(curve.coefficients) == 5


def test_the_fit_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, dtype=torch.float64, generator=generator) * 0.3
    y = x.sqrt() + 0.1 * torch.rand(40, dtype=torch.float64, generator=generator)
    assert fit_polynomial(x, y).coefficients == pytest.approx(np.polyfit(x.numpy(), y.numpy(), 4), rel=1e-6)


def test_few_inputs_lower_the_degree():
    x, y = torch.tensor([0.1, 0.1, 0.3]), torch.tensor([1.0, 2.0, 5.5])
    assert fit_polynomial(x, y).coefficients == pytest.approx((20.0, -0.5), rel=1e-5)
    assert fit_polynomial(x[:1], y[:1]).coefficients == pytest.approx((1.0,))


def test_faults_are_found_by_value_and_place():
    assert PolynomialCurve((1.0, 0.0)).faults() == []
    assert PolynomialCurve((1.0, -0.1)).faults() == ["negative (-0.1 at a change of 0)"]
    parabola = PolynomialCurve((-1.0, 0.4, 0.0))  # rises to 0.2, falls back to 0 at 0.4
    assert parabola.faults() == ["falling (first at a change of 0.2, on 50 % of [0, 0.4])"]
    with pytest.raises(ValueError, match=r"got \(\)"):
        PolynomialCurve(())
    with pytest.raises(ValueError, match="finite"):
        PolynomialCurve((1.0, float("nan")))


def test_published_sets_warn_of_their_faults_and_serve_their_own_family():
    flux, wan, ltx = networks.flux(), small_transformer("wan"), small_transformer("ltx")
    with pytest.warns(UserWarning, match=r"'FLUX.1-dev' \(TeaCache4FLUX/teacache_flux.py\) is falling"):
        assert PUBLISHED["FLUX.1-dev"].load("FLUX.1-dev", flux)(0.0) == pytest.approx(0.264, abs=1e-3)
    with pytest.warns(UserWarning, match=r"negative \(-13 at a change of 0\).*fitted to the change of the time emb"):
        PUBLISHED["Wan2.1-T2V-14B"].load("Wan2.1-T2V-14B", wan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PUBLISHED["LTX-Video-0.9.1"].load("LTX-Video-0.9.1", ltx)
    with pytest.raises(ValueError, match=r"fitted to a FluxTransformer2DModel, and this transformer is a Wan"):
        PUBLISHED["FLUX.1-dev"].load("FLUX.1-dev", wan)
    families = {family.__name__ for family in FAMILIES}
    assert {published.family for published in PUBLISHED.values()} <= families
