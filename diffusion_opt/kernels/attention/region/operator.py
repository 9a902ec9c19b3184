"""Attention for the part of an image or a video that changes: queries of a region, keys and values of everything.

A step cache that recomputes only some tokens needs attention of n active tokens against all l, whose keys and values
it kept from an earlier step:

    region = Region.from_mask(active)                                # (b, l) bool -> lists of tokens, once a step
    out, lse = region.attention(q, k, v, k_cache, v_cache)           # per layer: q, k, v are the active rows

First the fresh rows of k and v are written into the caches, in place, in one launch; then each query attends to the
whole cache. Cost is n/l of full attention: linear in the active tokens, and bound by arithmetic, not by reading the
cache, from a few hundred of them on. With the caches holding what full attention would use, the rows are exactly those
of full attention. Batch entries can have regions of different size: shorter lists end in -1.

A mask restricts the keys: its rows are blocks of *active* queries. `packed_mask` makes one from a mask of the whole
sequence, each block of active queries taking all that any of its tokens wanted.

diffusers' Flux2 KV processors cache the reference images' tokens only, and concatenate whole K and V in every call.
Inference only: there is no gradient through a cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.arguments import checked_scale
from diffusion_opt.kernels.attention.region import oracle as reference
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.attention.sparse.operator import check_kernel_can
from diffusion_opt.kernels.attention.sparse.oracle import wide


@dataclass(frozen=True, slots=True)
class Region:
    """Which tokens are active, as a list for each batch entry. Made by `from_mask` or `from_index`, which check it."""

    index: Int[Tensor, "b n"]  # int32; ends in -1 where a batch entry has fewer
    num_tokens: int  # of the whole sequence

    @classmethod
    def from_mask(cls, active: Bool[Tensor, "b l"]) -> "Region":
        """The active tokens in order. Waits for the device once.

        Raises ValueError if none is active, and for a mask that is not bool.
        """
        if active.dtype is not torch.bool:
            raise ValueError(f"a region is a bool mask of tokens, True for active ones, got {active.dtype}")
        longest = int(active.sum(-1).max())
        if longest == 0:
            raise ValueError("no token is active in any batch entry: there is nothing to compute")
        order = active.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :longest]
        return cls(torch.where(active.gather(1, order), order, -1).to(torch.int32), active.shape[1])

    @classmethod
    def from_index(cls, index: Int[Tensor, "b n"], num_tokens: int) -> "Region":
        """Tokens as listed, -1 for none. Waits for the device once.

        Raises ValueError if one is out of range or appears twice for a batch entry: two rows cannot be written to one.
        """
        if bool(((index < -1) | (index >= num_tokens)).any()):
            raise ValueError(f"tokens are 0 to {num_tokens - 1}, or -1 for none, got {index.unique().tolist()}")
        ordered = index.sort(dim=-1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("a token is listed twice for one batch entry: list each once")
        return cls(index.to(torch.int32), num_tokens)

    def gather(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b n c"]:
        """The active rows of hidden states; 0 where the list has none."""
        if x.shape[:2] != (len(self.index), self.num_tokens):
            raise ValueError(
                f"this region is one of {len(self.index)} batch entries of {self.num_tokens} tokens, got "
                f"{tuple(x.shape[:2])}"
            )
        rows = x.gather(1, self.index.clamp(min=0).long()[..., None].expand(-1, -1, x.shape[-1]))
        return rows * (self.index >= 0)[..., None].to(x.dtype)

    def update_(
        self,
        k_cache: Float[Tensor, "b h l d"],
        v_cache: Float[Tensor, "b h l d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
    ) -> None:
        """Write the active rows of k and v into the caches, in place. Raises ValueError if they do not fit them."""
        for cache, rows in ((k_cache, k), (v_cache, v)):
            b, h, length, d = cache.shape
            if length != self.num_tokens or rows.shape != (b, h, self.index.shape[1], d) or cache.dtype != rows.dtype:
                raise ValueError(
                    f"for this region a cache has {self.num_tokens} tokens and takes {self.index.shape[1]} rows of its "
                    f"type: got a cache {tuple(cache.shape)} {cache.dtype}, rows {tuple(rows.shape)} {rows.dtype}"
                )
        if k_cache.shape != v_cache.shape or len(self.index) != k_cache.shape[0]:
            raise ValueError(
                f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}, a region for a batch of {len(self.index)}"
            )
        write_rows_op(k_cache, v_cache, k, v, self.index)

    def attention(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        k_cache: Float[Tensor, "b h l d"],
        v_cache: Float[Tensor, "b h l d"],
        mask: BlockMask | None = None,
        scale: float | None = None,
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n"]]:
        """Write k and v into the caches, then attend from q to all of them: the active rows of the output and the lse.

        Places of the list without a token give 0 and -inf. `mask` has a row for each block of active queries; `scale`
        is 1 / sqrt(d) unless given. Raises ValueError as `block_sparse_attention` does.
        """
        scale = checked_scale(q, k, v, None, scale)
        if q.shape[2] != self.index.shape[1]:
            raise ValueError(
                f"this region has {self.index.shape[1]} active rows, q has {q.shape[2]}: gather them first"
            )
        if mask is not None:
            mask.check(q.shape[2], self.num_tokens)
            mask.check_heads(*q.shape[:2])
        self.update_(k_cache, v_cache, k, v)
        parts = (None, None, None, 1, 1, 1) if mask is None else mask.parts()
        return attention_op(q, k_cache, v_cache, self.index, *parts, scale)

    def packed_mask(self, mask: BlockMask, block_m: int) -> BlockMask:
        """The mask for blocks of `block_m` active queries: each takes the tiles that any of its tokens had.

        Exact if the active tokens come in whole blocks of the mask, else more than it. Raises ValueError if the mask is
        not one of the whole sequence.
        """
        if -(-self.num_tokens // mask.block_m) != mask.num_rows:
            raise ValueError(
                f"{self.num_tokens} tokens are not {mask.num_rows} blocks of {mask.block_m}: the mask must be one of "
                "the whole sequence"
            )
        b, n = self.index.shape
        mask.check_heads(b, mask.counts.shape[1])
        table = mask.dense().expand(b, -1, -1, -1)
        row = self.index.clamp(min=0).long() // mask.block_m
        wanted = table.gather(2, row[:, None, :, None].expand(-1, table.shape[1], -1, mask.num_columns))
        wanted = wanted & (self.index >= 0)[:, None, :, None]
        wanted = F.pad(wanted, (0, 0, 0, -n % block_m)).unflatten(2, (-1, block_m)).any(3)
        return BlockMask.from_dense(wanted, block_m, mask.block_n, mask.lengths)


@torch.library.custom_op("diffusion_opt::write_rows", mutates_args=("k_cache", "v_cache"))
def write_rows_op(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    """cache[b, :, index[b, i]] = rows[b, :, i] for both caches, where the index is not -1."""
    if runtime.mode(k) == "reference":
        for cache, rows in ((k_cache, k), (v_cache, v)):
            cache.copy_(reference.with_rows(cache, rows, index))
        return
    from diffusion_opt.kernels.attention.region.forward import write_rows  # Triton exists on Linux only

    write_rows(k_cache, v_cache, k, v, index)


@write_rows_op.register_fake
def _(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, index: Tensor) -> None:
    return None


@torch.library.custom_op("diffusion_opt::region_attention", mutates_args=())
def attention_op(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor,
    indices: Tensor | None, counts: Tensor | None, lengths: Tensor | None,
    num_columns: int, block_m: int, block_n: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse, for a mask in parts."""
    mask = None if indices is None else BlockMask(indices, counts, num_columns, block_m, block_n, lengths)
    if runtime.mode(q) == "reference":
        return reference.region_attention(q, k_cache, v_cache, index, mask, scale)
    check_kernel_can(q)
    from diffusion_opt.kernels.attention.region.forward import forward

    return forward(q, k_cache, v_cache, index, mask, scale)


@attention_op.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor,
    indices: Tensor | None, counts: Tensor | None, lengths: Tensor | None,
    num_columns: int, block_m: int, block_n: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide(q.dtype))
