"""TeaCache's published curves: polynomials of degree 4, fitted by least squares and copied from model to model.

    f(d) = c_4 d^4 + c_3 d^3 + c_2 d^2 + c_1 d + c_0                    (Liu et al. 2024, arXiv 2411.19108)

Nothing keeps such a fit from being negative, from falling, or from being far from 0 at no change at all. FLUX.1-dev's
gives 0.264 for no change, so below that threshold nothing is ever skipped; that of Wan2.1 14B gives -13, so the running
sum falls and skipping never ends. They are kept here as data, to compare with and to learn from: a `PolynomialCurve`
is used as it is, and a UserWarning says what is wrong with it. `curve.py` fits what cannot go wrong in this way.

The Wan sets below are for another signal too: without its `use_ret_steps`, TeaCache's script for Wan measures the
change of the time embedding, which is the same for every prompt, and not that of block 0's modulated input.
"""

import warnings
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

DEGREE = 4
CHECKED_UP_TO = 0.4  # relative change; few schedules move the input by more in a step


@dataclass(frozen=True, slots=True)
class PolynomialCurve:
    """f as published: `coefficients`, the highest power first, as `numpy.poly1d` takes them."""

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.coefficients or not np.isfinite(self.coefficients).all():
            raise ValueError(f"a polynomial needs one finite coefficient or more, got {self.coefficients}")

    def __call__(self, change: float) -> float:
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value

    def faults(self) -> list[str]:
        """What is wrong with it as a curve on [0, 0.4], in words; an empty list for a sound one."""
        at = [i * CHECKED_UP_TO / 400 for i in range(401)]
        values = [self(x) for x in at]
        faults = []
        lowest = min(range(401), key=values.__getitem__)
        if values[lowest] < 0:
            faults.append(f"negative ({values[lowest]:.3g} at a change of {at[lowest]:.3g})")
        falls = [x for x, (y, z) in zip(at, pairwise(values), strict=False) if z < y]
        if falls:
            faults.append(f"falling (first at a change of {falls[0]:.3g}, on {len(falls) / 4:.0f} % of [0, 0.4])")
        return faults

    def warn(self, name: str, also: str = "") -> None:
        """A UserWarning that says what is wrong, if anything is; `also` is said with it."""
        said = "; ".join([*self.faults(), *([also] if also else [])])
        if said:
            warnings.warn(f"the TeaCache polynomial {name} is {said}: calibrate on the model at hand", stacklevel=3)


def fit_polynomial(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> PolynomialCurve:
    """Least squares, unconstrained, of degree 4 or of as many as the distinct inputs allow: the published way."""
    degree = min(DEGREE, len(x.unique()) - 1)
    fit = np.polynomial.Polynomial.fit(x.double().numpy(), y.double().numpy(), degree)
    return PolynomialCurve(tuple(float(c) for c in fit.convert().coef[::-1]))


@dataclass(frozen=True, slots=True)
class PublishedPolynomial:
    """A published set of coefficients: the file it is from, whom it was fitted to, and the signal it takes."""

    curve: PolynomialCurve
    file: str  # in the repository ali-vilab/TeaCache, Apache 2.0
    family: str  # class of the transformer that it was fitted to
    signal: str = "modulated input"

    def load(self, name: str, transformer: nn.Module) -> PolynomialCurve:
        """The curve, with a UserWarning about whatever is wrong with it or with its use here.

        Raises ValueError for a transformer of another family: how far outputs follow inputs is a property of weights.
        """
        if type(transformer).__name__ != self.family:
            raise ValueError(
                f"the TeaCache polynomial {name!r} was fitted to a {self.family}, and this transformer is a "
                f"{type(transformer).__name__}: calibrate on the model at hand (calibrate_step_cache)"
            )
        other = "" if self.signal == "modulated input" else f"fitted to the change of the {self.signal}"
        self.curve.warn(f"{name!r} ({self.file})", other)
        return self.curve


_WAN = ("TeaCache4Wan2.1/teacache_generate.py", "WanTransformer3DModel", "time embedding")
PUBLISHED: dict[str, PublishedPolynomial] = {
    "FLUX.1-dev": PublishedPolynomial(
        PolynomialCurve((4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)),
        "TeaCache4FLUX/teacache_flux.py",
        "FluxTransformer2DModel",
    ),
    "HunyuanVideo": PublishedPolynomial(
        PolynomialCurve((7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02)),
        "TeaCache4HunyuanVideo/teacache_sample_video.py",
        "HunyuanVideoTransformer3DModel",
    ),
    "LTX-Video-0.9.1": PublishedPolynomial(
        PolynomialCurve((2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03)),
        "TeaCache4LTX-Video/teacache_ltx.py",
        "LTXVideoTransformer3DModel",
    ),
    "Wan2.1-T2V-1.3B": PublishedPolynomial(
        PolynomialCurve((2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01)), *_WAN
    ),
    "Wan2.1-T2V-14B": PublishedPolynomial(
        PolynomialCurve((-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404)), *_WAN
    ),
    "Wan2.1-I2V-14B-720P": PublishedPolynomial(
        PolynomialCurve((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683)), *_WAN
    ),
}
