"""What a network attends with: the q, k, v of every attention it computes, caught on the way.

    with listen() as heard:
        pipe("sneaker")
    q, k, v = heard[0]                                 # (batch, heads, tokens, head dimension) each

Every attention of diffusers on a CPU ends in PyTorch's `scaled_dot_product_attention`, behind norms, RoPE and the
joining of text and image. Listening there (a `TorchFunctionMode`) needs no hook on any module and no knowledge of how a
model names its projections; single-stream blocks of FLUX.2 compute q, k, v and the MLP in one product, so a hook on
"to_q" would find nothing. Nothing is changed: the call goes on as it came.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

Inputs = tuple[Float[Tensor, "b h lq d"], Float[Tensor, "b h lk d"], Float[Tensor, "b h lk d"]]


@contextmanager
def listen() -> Iterator[list[Inputs]]:
    """A list that grows by the q, k and v, contiguous and detached, of each attention computed in the block."""
    mode = _Listening()
    with mode:
        yield mode.heard


class _Listening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Inputs] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.heard.append(tuple(given[name].detach().contiguous() for name in ("query", "key", "value")))
        return function(*args, **kwargs)
