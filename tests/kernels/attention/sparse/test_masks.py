"""Masks as lists of tiles: equal to the patterns written out token by token, and the same in every form."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_opt.kernels.attention.sparse.masks import BlockMask, radial, sliding_tile
from diffusion_opt.kernels.attention.sparse.packing import token_tiles
from diffusion_opt.kernels.attention.sparse.predicted_masks import (
    keep_largest,
    keep_mass,
    pool,
    predicted_mask,
    similarity,
)

axes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


def random_mask(rows: int = 5, columns: int = 4, block_m: int = 32, block_n: int = 48, **settings) -> BlockMask:
    return BlockMask.from_dense(torch.rand(2, 3, rows, columns) > 0.5, block_m, block_n, **settings)


@given(axes, axes, st.integers(0, 40), st.booleans())
def test_packing_is_undone_and_tiles_are_boxes_of_neighbors(grid, tile, num_text, text_first):
    tile = tuple(min(side, whole) for side, whole in zip(tile, grid, strict=True))
    tiles = token_tiles(grid, tile, num_text, text_first)
    assert tiles.block % 16 == 0 and int(tiles.lengths.sum()) == math.prod(grid) + num_text
    x = torch.randn(2, math.prod(grid) + num_text, 3)
    packed = tiles.pack(x)
    assert torch.equal(tiles.unpack(packed), x)
    assert packed.abs().sum() == pytest.approx(float(x.abs().sum()))  # slots without a token are zero
    text = slice(0, num_text) if text_first else slice(math.prod(grid), None)
    image = tiles.slot_of_token[num_text:] if text_first else tiles.slot_of_token[: math.prod(grid)]
    assert bool((tiles.slot_of_token[text] >= math.prod(tiles.counts) * tiles.block).all())
    places = itertools.product(*(range(whole) for whole in grid))
    for place, slot in zip(places, image.tolist(), strict=True):
        t, h, w = (coordinate // side for coordinate, side in zip(place, tile, strict=True))
        number = (t * tiles.counts[1] + h) * tiles.counts[2] + w
        assert slot // tiles.block == number and slot % tiles.block < tiles.lengths[number]


def test_lists_and_table_say_the_same():
    dense = torch.rand(2, 3, 5, 4) > 0.5
    dense[0, 0, 2] = False
    mask = BlockMask.from_dense(dense, 32, 48)
    assert torch.equal(mask.dense(), dense)
    assert torch.equal(mask.transposed().dense(), dense.mT)
    assert mask.density == pytest.approx(float(dense.float().mean()))
    for b, h, row in itertools.product(range(2), range(3), range(5)):
        listed = mask.indices[b, h, row, : mask.counts[b, h, row]].tolist()
        assert listed == dense[b, h, row].nonzero().flatten().tolist()


def test_elements_are_the_tokens_of_the_tiles():
    lengths = torch.tensor([48, 1, 20, 30], dtype=torch.int32)
    mask = random_mask(lengths=lengths)
    elements = mask.elements(150, 4 * 48)
    assert elements.shape == (2, 3, 150, 192)
    for i, j in ((0, 0), (149, 47), (31, 48), (31, 49), (32, 2 * 48 + 19), (33, 2 * 48 + 20), (64, 191)):
        expected = mask.dense()[:, :, i // 32, j // 48] & (j % 48 < int(lengths[j // 48]))
        assert torch.equal(elements[:, :, i, j], expected)


@pytest.mark.parametrize("lengths", [None, torch.tensor([48, 1, 20, 30], dtype=torch.int32)])
def test_smaller_blocks_are_the_same_mask(lengths):
    mask = random_mask(lengths=lengths)
    fine = mask.refined(16, 24)
    assert (fine.block_m, fine.block_n) == (16, 24)
    assert torch.equal(fine.elements(150, 180), mask.elements(150, 180))
    assert fine.density == pytest.approx(mask.density)
    assert mask.refined(32, 48) is mask
    with pytest.raises(ValueError, match="must divide the blocks of 32 x 48"):
        mask.refined(32, 32)


def near(window: tuple[int, ...], counts: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether tile b is in the window around tile a, the window moved inside the grid."""
    for width, count, center, place in zip(window, counts, a, b, strict=True):
        width = min(width, count)
        first = min(max(center - width // 2, 0), count - width)
        if not first <= place < first + width:
            return False
    return True


@pytest.mark.parametrize("window", [(1, 1, 1), (1, 2, 3), (3, 3, 3), (9, 1, 2)])
def test_sliding_tile_equals_the_mask_by_coordinates(window):
    grid, tile, num_text = (3, 5, 7), (2, 2, 3), 5  # no axis is a multiple of the tile
    tiles = token_tiles(grid, tile, num_text)
    mask = sliding_tile(tiles, window)
    packed = mask.elements(tiles.num_slots, tiles.num_slots)[0, 0]
    found = packed[tiles.slot_of_token][:, tiles.slot_of_token]
    places = list(itertools.product(*(range(whole) for whole in grid)))
    tile_of = [tuple(c // side for c, side in zip(place, tile, strict=True)) for place in places]
    expected = torch.ones_like(found)
    for (i, a), (j, b) in itertools.product(enumerate(tile_of), repeat=2):
        expected[i, j] = near(window, tiles.counts, a, b)
    assert torch.equal(found, expected)
    assert int(packed.sum(1).max()) <= len(found)  # no slot without a token is attended to


def test_windows_at_the_border_have_the_same_work():
    mask = sliding_tile(token_tiles((8, 16, 16), (2, 4, 4)), (3, 3, 3))
    assert mask.counts.unique().tolist() == [27]
    assert mask.density == pytest.approx(27 / 64)


def radial_by_tokens(num_frames: int, frame_tokens: int, block: int, decay: float) -> Tensor:
    tokens = range(num_frames * frame_tokens)
    table = torch.zeros(-(-len(tokens) // block), -(-len(tokens) // block), dtype=torch.bool)
    for i, j in itertools.product(tokens, repeat=2):
        distance = abs(i // frame_tokens - j // frame_tokens)
        apart = abs(i % frame_tokens - j % frame_tokens)
        width = decay * frame_tokens / 2 ** math.floor(math.log2(max(distance, 1)))
        kept = distance % max(1, math.ceil(block / width)) == 0 and apart <= max(int(width), block)
        table[i // block, j // block] |= distance == 0 or j < frame_tokens or kept
    return table


@pytest.mark.parametrize(("frames", "size", "block", "decay"), [(9, 6, 4, 0.5), (5, 16, 3, 0.25), (7, 5, 8, 1.0)])
def test_radial_equals_the_mask_by_tokens(frames, size, block, decay):
    mask = radial(frames, size, block, decay)
    assert torch.equal(mask.dense()[0, 0], radial_by_tokens(frames, size, block, decay))


def test_radial_gets_sparser_with_length():
    densities = [radial(frames, 256, 64, decay=0.5).density for frames in (4, 8, 16, 32)]
    assert densities == sorted(densities, reverse=True) and densities[-1] < 0.6 * densities[0]


@pytest.mark.parametrize("lengths", [None, torch.tensor([16, 3, 16], dtype=torch.int32)])
def test_pooling_and_similarity_of_real_tokens(lengths):
    x = torch.randn(2, 3, 48 if lengths is not None else 37, 5)
    real = lengths if lengths is not None else torch.tensor([16, 16, 5])
    blocks = [x[:, :, 16 * i : 16 * i + int(n)] for i, n in enumerate(real)]
    torch.testing.assert_close(pool(x, 16, lengths), torch.stack([block.mean(2) for block in blocks], 2))
    for i, block in enumerate(blocks):
        directions = torch.nn.functional.normalize(block, dim=-1)
        pairs = (directions @ directions.mT).mean((-1, -2))
        torch.testing.assert_close(similarity(x, 16, lengths)[:, :, i], pairs)


@given(st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_keep_largest_and_keep_mass(columns, share, seed):
    scores = torch.randn(2, 1, 3, columns, generator=torch.Generator().manual_seed(seed)).double()
    kept = keep_largest(scores, share)
    assert bool((kept.sum(-1) == max(1, math.ceil(share * columns))).all())
    assert bool((scores.masked_fill(~kept, torch.inf).amin(-1) >= scores.masked_fill(kept, -torch.inf).amax(-1)).all())
    probabilities = scores.softmax(-1)
    kept = keep_mass(probabilities, share)
    mass = (probabilities * kept).sum(-1)
    smallest = probabilities.masked_fill(~kept, torch.inf).amin(-1)
    assert bool((mass >= share - 1e-9).all()) and bool((mass - smallest < share).all())  # enough, and none too many


def test_predicted_mask_finds_the_tiles_that_matter():
    """Queries of block i point where the keys of block 3 - i do."""
    directions = torch.eye(4, 8).repeat_interleave(16, 0)[None, None] * 9
    q, k = directions + 0.1 * torch.randn(1, 1, 64, 8), directions.flip(2) + 0.1 * torch.randn(1, 1, 64, 8)
    expected = torch.eye(4, dtype=torch.bool).flip(0)
    for settings in ({"keep": 0.25}, {"mass": 0.9}):
        mask = predicted_mask(q, k, 16, 16, **settings)
        assert torch.equal(mask.dense()[0, 0], expected)
    assert predicted_mask(q, k, 16, 16, keep=1.0).density == 1


def test_blocks_of_unlike_tokens_are_computed_in_full():
    q, k = torch.ones(1, 1, 64, 8), torch.ones(1, 1, 64, 8)
    q[:, :, 16:32], k[:, :, 48:] = torch.randn(16, 8), torch.randn(16, 8)
    table = predicted_mask(q, k, 16, 16, keep=0.25, least_similarity=0.9).dense()[0, 0]
    assert bool(table[1].all()) and bool(table[:, 3].all())
    assert table.sum(-1).tolist() == [2, 4, 2, 2]  # else one tile by score, and the column that was not judged
    assert bool(
        predicted_mask(torch.randn_like(q), torch.randn_like(k), 16, 16, mass=0.5, least_similarity=1).dense().all()
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="tile has 1 token or more"):
        token_tiles((1, 4, 4), (2, 2, 2))
    with pytest.raises(ValueError, match="made for 16 tokens, got 15"):
        token_tiles((1, 4, 4), (1, 2, 2)).pack(torch.zeros(15, 3))
    with pytest.raises(ValueError, match=r"5 x 5 blocks of 32 x 32, this mask has 4 x 4"):
        random_mask(4, 4, 32, 32).check(150, 150)
    with pytest.raises(ValueError, match="1 tile or more along each axis"):
        sliding_tile(token_tiles((1, 4, 4), (1, 2, 2)), (0, 1, 1))
    with pytest.raises(ValueError, match="sizes are positive"):
        radial(3, 16, 8, decay=0.0)
    q = torch.randn(1, 1, 32, 8)
    with pytest.raises(ValueError, match="either keep or mass"):
        predicted_mask(q, q, 16, 16)
    with pytest.raises(ValueError, match="keep is a share"):
        predicted_mask(q, q, 16, 16, keep=0.0)
    with pytest.raises(ValueError, match="mass is a share"):
        predicted_mask(q, q, 16, 16, mass=1.5)
    with pytest.raises(ValueError, match="int32"):
        BlockMask(torch.zeros(1, 1, 2, 2).long(), torch.zeros(1, 1, 2).int(), 2, 16, 16)
    with pytest.raises(ValueError, match="lengths are 4 int32"):
        random_mask(lengths=torch.tensor([16, 16], dtype=torch.int32))
