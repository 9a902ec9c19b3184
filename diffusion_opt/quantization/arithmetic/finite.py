"""The one thing no format can hold."""

from torch import Tensor


def finite(*tensors: Tensor) -> None:
    """Raise ValueError if a number is inf or NaN: no scale brings it into any range, and its block would be lost."""
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"{count} of {tensor.numel()} numbers are inf or NaN: find where they come from first")
