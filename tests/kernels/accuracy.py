"""The tolerance a kernel is held to: not a number somebody chose, but twice the error of torch at the same job.

The rule of FlashAttention's tests: with the same inputs in the same type, compare with the exact result in float64; a
kernel may be at most twice as far from it, in the largest element, as torch's own operator is.
"""

import torch
from torch import Tensor

SLACK = 2.0
ORDER_OF_SUMMATION = 2.0**-22  # of the largest number: what two orders of summation in float32 differ by


def largest_error(x: Tensor, exact: Tensor) -> float:
    """The largest absolute error against a float64 result."""
    return (x.double() - exact).abs().max().item()


def assert_at_most_twice_the_error_of_torch(got: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    """Fails if `got` is further from the float64 result than the rule allows, or NaN.

    One rounding of the largest number is allowed on top, because in a handful of numbers torch can be lucky.
    """
    assert exact.dtype == torch.float64 and got.dtype == by_torch.dtype
    tiny = torch.finfo(got.dtype).eps / 2 + ORDER_OF_SUMMATION
    allowed = SLACK * largest_error(by_torch, exact) + tiny * exact.abs().max().item()
    error = largest_error(got, exact)
    assert error <= allowed, f"error {error:.3g}, at most {allowed:.3g} is allowed"  # a NaN fails here too
