"""A pass of the transformer as two functions without state: one that runs the blocks, one that has none.

    full(call)      ->  output, r       what the blocks added to the streams, beside the output
    skip(call, r)   ->  output          r added in the place of all blocks

Both are the stock `forward` of the class on a shallow copy of the transformer that shares its weights and has other
blocks in its lists: for `full` the same ones, the first and the last of which note what passes through them; for
`skip` a single one that adds r. Nothing is rewritten for a family, and nothing in either depends on values, so
torch.compile captures each whole (`compiled.py`).
"""

import copy
from typing import Any

from torch import nn

from diffusion_opt.caching.step.hooks import parameter_names
from diffusion_opt.models.block_stack import BlockStack, Streams


class _Noting(nn.Module):
    """A block that remembers the streams that enter it, that leave it, or both, within one pass."""

    def __init__(self, block: nn.Module, family: BlockStack, first: bool, last: bool) -> None:
        super().__init__()
        self.block = block
        self.family = family
        self.names = parameter_names(type(block))
        self.first, self.last = first, last
        self.context_pre_only = getattr(block, "context_pre_only", False)  # SD3's forward asks its blocks
        self.start: Streams | None = None
        self.output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self.start = self.family.entering(dict(zip(self.names, args, strict=False)) | kwargs)
        output = self.block(*args, **kwargs)
        if self.last:
            self.output = output
        return output


class _Shortcut(nn.Module):
    """In the place of all blocks: adds a given residual."""

    context_pre_only = True  # as SD3's last block, after which nothing is added

    def __init__(self, block: nn.Module, family: BlockStack) -> None:
        super().__init__()
        self.family = family
        self.names = parameter_names(type(block))
        self.residual: Streams | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        end = {name: start + self.residual[name] for name, start in self.family.entering(given).items()}
        return self.family.replaced(self.family.handed_on(given), end)


class FullPass(nn.Module):
    """`full`: the transformer as it is, with the residual of its stack beside the output."""

    def __init__(self, transformer: nn.Module, family: BlockStack) -> None:
        super().__init__()
        blocks, last = family.blocks, len(family.blocks) - 1
        noting = {0: _Noting(blocks[0], family, first=True, last=not last)}
        noting |= {last: _Noting(blocks[last], family, first=False, last=True)} if last else {}
        self.transformer = _with_blocks(transformer, family, [noting.get(i, block) for i, block in enumerate(blocks)])
        self.ends = [noting[0], noting[last]]
        self.family = family

    def forward(self, call: dict[str, Any]) -> tuple[Any, Streams]:
        output = self.transformer(**call)
        start, end = self.ends[0].start, self.ends[1].output
        residual = {name: stream - start[name] for name, stream in self.family.leaving(end, start).items()}
        self.ends[0].start = self.ends[1].output = None
        return output, residual


class SkippedPass(nn.Module):
    """`skip`: the transformer with a residual given in the place of its blocks."""

    def __init__(self, transformer: nn.Module, family: BlockStack) -> None:
        super().__init__()
        self.shortcut = _Shortcut(family.blocks[0], family)
        self.transformer = _with_blocks(transformer, family, [self.shortcut])

    def forward(self, call: dict[str, Any], residual: Streams) -> Any:
        self.shortcut.residual = residual
        output = self.transformer(**call)
        self.shortcut.residual = None
        return output


def _with_blocks(transformer: nn.Module, family: BlockStack, blocks: list[nn.Module]) -> nn.Module:
    """A transformer that shares everything with this one but the lists of blocks, and has no hooks."""
    twin = copy.copy(transformer)
    for name in ("forward", "_diffusers_hook"):
        twin.__dict__.pop(name, None)
    twin._modules = dict(transformer._modules)
    left = list(blocks)
    for name in family.lists:
        length = len(transformer._modules[name])
        twin._modules[name] = nn.ModuleList(left[:length])
        left = left[length:]
    return twin
