"""Dense attention, forward, with warps of two kinds: some fetch keys and values, the others compute.

The arithmetic is that of `forward.py` in its form "inside": one loop over the tiles of keys, each bounds-checked. What
differs is who does what, as in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, section 3.1):

    producer    one warp (group) asks the copy engine for a tile, by a tensor descriptor: no address arithmetic, no
                registers for data on its way, zeros where the tile reaches past the last key or channel
    consumers   multiply and exponentiate, and meet the producer at barriers in shared memory only

Triton's compiler splits the loop (`warp_specialize=True`) if it is the only one, has descriptors, and on sm_90 if there
are four warps: the mask of the last tile must therefore stand in the loop. FlashAttention-3 goes further in two ways
that this language has no words for: consumer groups that take turns at the matrix units, and the softmax of one tile
beside the products of the next.

A descriptor wants rows that begin at multiples of 16 bytes and a last axis without gaps; `fits` says whether tensors
have them. The plain kernel serves the rest.

A compiler pass this young is not taken on trust: before a device's first call, `obstacle` compares this kernel with the
plain one there, once for each type and padded head dimension. If they differ, or it does not compile or start, the
plain kernel stays in use, and `obstacle` says why.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.attention.dense import forward as plain
from diffusion_opt.kernels.attention.softmax_tiles import finish_softmax, softmax_turn, start_softmax
from diffusion_opt.kernels.launch import LAUNCH, LaunchConfig, chosen, padded_head_dim
from diffusion_opt.kernels.tiles import head_of, program_of_head, store_rows

ROW = "dense_forward_specialized"
HALVES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes, of what a tensor descriptor points to and of its strides
PROBED_QUERIES, PROBED_KEYS = 200, 330  # of the comparison: several tiles of each, none whole at the end


@triton.jit
def specialized_kernel(
    Q, K, V, OUT, LSE, scale, num_heads, num_queries, num_keys, q_strides, k_strides, v_strides, out_strides,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M queries of one head; `scale` is sigma log2 e, LSE is contiguous (b, h, lq)."""
    tile, head, b, h = program_of_head(num_queries, num_heads, BLOCK_M)
    start = tile * BLOCK_M
    queries = tl.make_tensor_descriptor(
        head_of(Q, q_strides, b, h), [num_queries, HEAD_DIM], [q_strides[2], 1], [BLOCK_M, PADDED_DIM]
    )
    keys = tl.make_tensor_descriptor(
        head_of(K, k_strides, b, h), [num_keys, HEAD_DIM], [k_strides[2], 1], [BLOCK_N, PADDED_DIM]
    )
    values = tl.make_tensor_descriptor(
        head_of(V, v_strides, b, h), [num_keys, HEAD_DIM], [v_strides[2], 1], [BLOCK_N, PADDED_DIM]
    )
    rows, dims, places = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_N)
    q = queries.load([start, 0])
    peak, norm, total = start_softmax(BLOCK_M, PADDED_DIM)
    for first in tl.range(0, num_keys, BLOCK_N, warp_specialize=True):
        scores = tl.dot(q, tl.trans(keys.load([first, 0])))
        scores = tl.where((first + places < num_keys)[None, :], scores, -float("inf"))
        weights, correction, peak, norm = softmax_turn(scores, scale, peak, norm, False, False)
        v = values.load([first, 0])
        total = tl.dot(weights.to(v.dtype), v, total * correction[:, None])
    out, lse = finish_softmax(peak, norm, total)
    tl.store(LSE + head * num_queries + start + rows, lse, mask=start + rows < num_queries)
    store_rows(head_of(OUT, out_strides, b, h), start, rows, dims, out_strides, num_queries, out, HEAD_DIM)


def served(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> LaunchConfig | None:
    """The launch table's choice for these tensors on their GPU; None: the plain kernel serves them."""
    return None if why_not(q, k, v, mask) else chosen(ROW, q.shape[-1])[runtime.architecture(q.device)]


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why the plain kernel serves these tensors on their GPU; None: it does not."""
    arch = runtime.architecture(q.device)
    if arch not in LAUNCH[ROW]:
        return f"sm_{arch} has no warps to specialize"
    if padded_head_dim(q.shape[-1]) not in LAUNCH[ROW][arch]:
        return f"heads of {q.shape[-1]} have no launch choice there"
    if mask is not None:
        return "there is a mask"
    if q.dtype not in HALVES:
        return "q is not in half precision"
    if q.numel() == 0 or k.shape[2] == 0:
        return "there is nothing to compute"
    if not fits(q, k, v):
        return "the layout of q, k or v does not fit tensor descriptors"
    return obstacle(q.device, q.dtype, padded_head_dim(q.shape[-1]))


@cache
def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this kernel is not used on a device, None if it gives what the plain one gives there."""
    generator = torch.Generator(device).manual_seed(0)
    lengths = (PROBED_QUERIES, PROBED_KEYS, PROBED_KEYS)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=generator, device=device).to(dtype) for n in lengths)
    choice = chosen(ROW, head_dim)[runtime.architecture(device)]
    try:
        results = forward(q, k, v, head_dim**-0.5, choice)
    except (RuntimeError, triton.TritonError) as error:
        return f"it does not run here: {str(error).strip().splitlines()[0]}"
    expected = plain.forward(q, k, v, None, head_dim**-0.5)
    for what, got, wanted in zip(("output", "lse"), results, expected, strict=True):
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not error <= 4 * torch.finfo(dtype).eps:
            return f"its {what} differs from the plain kernel's by {error:.1e} of the largest number"
    return None


def fits(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can be made of heads of these tensors."""
    return all(
        x.stride(3) == 1
        and x.data_ptr() % ALIGNMENT == 0
        and all(stride * x.element_size() % ALIGNMENT == 0 for stride in x.stride()[:3])
        for x in tensors
    )


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, choice: LaunchConfig) -> tuple[Tensor, Tensor]:
    """Launch the kernel on tensors that `fits` accepts: output with the strides of `q`, lse (b, h, lq) in float32."""
    b, h, lq, d = q.shape
    out, lse = torch.empty_like(q), torch.empty(b, h, lq, dtype=torch.float32, device=q.device)
    runtime.run(
        specialized_kernel,
        (triton.cdiv(lq, choice.block_m) * b * h,),
        *(q, k, v, out, lse, scale / math.log(2), h, lq, k.shape[2]),
        *(q.stride(), k.stride(), v.stride(), out.stride()),
        HEAD_DIM=d,
        PADDED_DIM=padded_head_dim(d),
        scratch=True,
        **choice.tuning(),
    )
    return out, lse
