"""The kernels as an attention backend of diffusers, for as long as a `with` lasts.

    with attention_backend(pipe, "diffopt-int8", keep_dense=(1, 1)):
        image = pipe("sneaker").images[0]

diffusers sends the attention of its transformers through one function, `dispatch_attention_fn`, and each attention
processor may name the backend it wants. The names are members of a closed enum; `register` adds ours to it, after which
`transformer.set_attention_backend("diffopt-int8")` works as well. That method has two traps, though: it also changes
the default of the whole process, which every other model then follows, and it stays. Here the backend is written on
the processors of one pipeline only and taken off again at the end, whatever happened in between; a `with` inside a
`with` gives back what the outer one had chosen.

Not every layer bears low precision equally well, and the first and last blocks are the usual exceptions:
`keep_dense=(2, 1)` leaves the first two blocks and the last one on what they had. Steps are left out by leaving the
`with` (SageAttention3, Zhang et al. 2025, arXiv 2505.11594, advises 8 bits for the first and last of them).

The tensors of diffusers are (batch, tokens, heads, head dimension); ours have tokens and heads exchanged, a view. The
dispatcher has no channel for anything beyond q, k, v and a mask, and drops what a backend does not name. So a sparse
pattern, which depends on the layer, is asked for by a function of the layer's name, and that name travels in a context
variable that a hook sets around each attention module.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial

from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.kernels.attention.door import Precision, attention
from diffusion_opt.kernels.attention.sparse.masks import BlockMask

BACKENDS: dict[str, Precision] = {
    "diffopt-dense": "dense",
    "diffopt-int8": "int8",
    "diffopt-int8-fp8": "int8-fp8",
    "diffopt-fp8": "fp8",
    "diffopt-nvfp4": "nvfp4",
}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]  # (q, k, v, mask, scale) -> output

# (name of the attention module, q, k) -> the tiles to compute, or None for all; q, k are (b, h, tokens, d)
SparsityOf = Callable[[str, Tensor, Tensor], BlockMask | None]

_pattern: ContextVar[Callable[[Tensor, Tensor], BlockMask | None] | None] = ContextVar("_pattern", default=None)


def register() -> None:
    """Teach diffusers the names in BACKENDS. Its default backend stays what it is; doing this twice changes nothing."""
    for name, precision in BACKENDS.items():
        register_backend(name, partial(_attend, precision))


def register_backend(name: str, attend: Attend) -> None:
    """Teach diffusers one more name; doing it twice changes nothing.

    `attend` gets q, k, v (batch, heads, tokens, head dimension), a mask or None, and the scale or None.
    """
    if name not in AttentionBackendName._value2member_map_:
        _AttentionBackendRegistry.register(_new_member(name))(_backend(attend))


@contextmanager
def attention_backend(
    model: DiffusionPipeline | nn.Module,
    name: str,
    keep_dense: tuple[int, int] = (0, 0),
    sparsity: SparsityOf | None = None,
) -> Iterator[tuple[str, ...]]:
    """Let the attention of a pipeline's transformers, or of one transformer, run on a backend of ours.

    Gives the names of the attention modules that were switched. `keep_dense` counts blocks at the beginning and at the
    end that keep what they have. `sparsity` gives the tiles to compute for a module, from its name and its q and k.
    Raises ValueError for an unknown name, if blocks cannot be left out as asked, or if an attention module of this
    class does not go through diffusers' dispatcher, so that the backend would be ignored.
    """
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    if sparsity is not None and BACKENDS[name] != "dense":
        raise ValueError(f"sparsity needs the backend 'diffopt-dense', got {name!r}: no kernel is both")
    register()
    chosen = [module for part in transformers_of(model) for module in switchable(part, keep_dense)]
    with ExitStack() as undo:
        for processor in {id(module.processor): module.processor for _, module in chosen}.values():
            undo.callback(put_back, processor, vars(processor).get("_attention_backend"))
            processor._attention_backend = AttentionBackendName(name)
        if sparsity is not None:
            for layer, module in chosen:
                undo.enter_context(_announced(module, partial(sparsity, layer)))
        yield tuple(layer for layer, _ in chosen)


def _new_member(name: str) -> AttentionBackendName:
    """Append a member to diffusers' enum, as `enum` itself does when a class is made."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper().replace("-", "_"), name
    member.__objclass__ = AttentionBackendName
    member._sort_order_ = len(AttentionBackendName._member_names_)
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[name] = member
    return member


def _attend(
    precision: Precision, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Float[Tensor, "b h lq d"]:
    pattern = _pattern.get()
    sparsity = None if pattern is None else pattern(q, k)
    return attention(q, k, v, mask, precision=precision, sparsity=sparsity, scale=scale)


def _backend(attend: Attend) -> Callable[..., Tensor]:
    """The function that diffusers calls. It names every argument of the dispatcher, so that none is dropped unseen."""

    def run(
        query: Float[Tensor, "b lq h d"],
        key: Float[Tensor, "b lk h d"],
        value: Float[Tensor, "b lk h d"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: object | None = None,
    ) -> Float[Tensor, "b lq h d"]:
        asked = {"dropout": dropout_p > 0, "is_causal": is_causal, "enable_gqa": enable_gqa}
        asked["context parallelism"] = _parallel_config is not None
        if any(asked.values()):
            names = ", ".join(what for what, wanted in asked.items() if wanted)
            raise ValueError(f"the diffopt attention backends have no {names}; use diffusers' native backend")
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(q, k, v, attn_mask, scale).transpose(1, 2)

    return run


def transformers_of(model: DiffusionPipeline | nn.Module) -> list[nn.Module]:
    """The denoisers: of a pipeline `transformer`, and `transformer_2` where there are two of them (Wan 2.2)."""
    if isinstance(model, nn.Module):
        return [model]
    parts = [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    found = [part for part in parts if part is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer to switch")
    return found


def switchable(transformer: nn.Module, keep_dense: tuple[int, int]) -> list[tuple[str, nn.Module]]:
    """Attention modules by name, without those of the blocks to keep. Raises ValueError as `attention_backend` does."""
    found = [(name, module) for name, module in transformer.named_modules() if hasattr(module, "processor")]
    deaf = [name for name, module in found if not hasattr(module.processor, "_attention_backend")]
    if deaf or not found:
        what = f"{deaf[0]} uses {type(dict(found)[deaf[0]].processor).__name__}" if deaf else "it has no processors"
        raise ValueError(
            f"{type(transformer).__name__} does not send its attention through diffusers' dispatcher ({what}), so a "
            "backend would be ignored"
        )
    blocks = list(dict.fromkeys(_block_of(name) for name, _ in found))
    first, last = keep_dense
    if min(keep_dense) < 0 or first + last >= len(blocks):
        raise ValueError(f"keep_dense={keep_dense} must leave some of the {len(blocks)} blocks to be switched")
    switched = set(blocks[first : len(blocks) - last])
    chosen = [(name, module) for name, module in found if _block_of(name) in switched]
    kept = {id(module.processor) for name, module in found if _block_of(name) not in switched}
    if kept & {id(module.processor) for _, module in chosen}:
        raise ValueError("keep_dense needs a processor for each attention module; here blocks share one")
    return chosen


def _block_of(name: str) -> str:
    """ "transformer_blocks.3.attn" lies in block "transformer_blocks.3"."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else name


def put_back(processor: object, chosen: AttentionBackendName | None) -> None:
    """Give a processor the backend that was chosen for it; None: it is again read off the class."""
    if chosen is not None:
        processor._attention_backend = chosen
    else:
        vars(processor).pop("_attention_backend", None)


@contextmanager
def _announced(module: nn.Module, pattern: Callable[[Tensor, Tensor], BlockMask | None]) -> Iterator[None]:
    """While this lasts, calls of the module find its pattern in the context variable."""
    tokens = []
    before = module.register_forward_pre_hook(lambda *_: tokens.append(_pattern.set(pattern)))
    after = module.register_forward_hook(lambda *_: _pattern.reset(tokens.pop()), always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
