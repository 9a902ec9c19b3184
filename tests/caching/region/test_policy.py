"""Which tokens each policy chooses."""

import pytest
import torch
from caching.region.models import noise

from diffusion_opt.caching.region.families import grid_positions
from diffusion_opt.caching.region.policy import Changing, Choice, Masked, Seen, Streaming
from diffusion_opt.caching.region.slots import Slot

ROWS = COLUMNS = 10
POSITIONS = grid_positions(1, ROWS, COLUMNS, torch.device("cpu"))
TOKENS = noise(2, 100, 4)


def stored(tokens: torch.Tensor = TOKENS) -> Slot:
    slot = Slot([], torch.tensor([0.5]))
    slot.fill(tokens, tokens)
    return slot


def seen(tokens: torch.Tensor = TOKENS, step: int = 0, slot: Slot | None = None, **changes: object) -> Seen:
    fields = {"missing": "" if slot else "nothing stored", "mask": None} | changes
    return Seen(step, tokens, POSITIONS, slot, fields["missing"], fields["mask"])


def moved(*indices: int) -> torch.Tensor:
    tokens = TOKENS.clone()
    tokens[:, list(indices)] += 1.0
    return tokens


def streaming(**changes: object) -> Streaming:
    settings = {"threshold": 0.0, "ring": 1, "refresh_every": 0, "probe": 0.0, "alarm": 0.1} | changes
    policy = Streaming(**settings, generator=torch.Generator().manual_seed(0))
    policy.begin()
    return policy


def test_streaming_takes_what_changed_its_ring_and_fills_the_bucket():
    choice = streaming().choose(seen(moved(45), slot=stored()))
    ring = {34, 35, 36, 44, 45, 46, 54, 55, 56}
    assert ring <= set(choice.index.tolist())
    assert len(choice.index) == 13, "an eighth of 100, rounded up"
    assert choice.index.tolist() == sorted(set(choice.index.tolist()))
    assert len(streaming(ring=2).choose(seen(moved(45), slot=stored())).index) == 25


def test_streaming_decides_once_a_frame():
    policy = streaming()
    first = policy.choose(seen(moved(45), slot=stored()))
    assert policy.choose(seen(moved(*range(90)), step=1, slot=stored())) is first
    policy.begin()
    assert policy.choose(seen(moved(*range(90)), slot=stored())).index is None


def test_streaming_threshold_mask_and_still_frames():
    assert streaming().choose(seen(slot=stored())).index.tolist() == []
    assert streaming(threshold=9.0).choose(seen(moved(45), slot=stored())).index.tolist() == []
    mask = torch.zeros(100, dtype=torch.bool)
    mask[:2] = True
    choice = streaming(ring=0).choose(seen(moved(45), slot=stored(), mask=mask))
    assert {0, 1} <= set(choice.index.tolist())


def test_streaming_refreshes_every_so_many_frames():
    policy, full = streaming(refresh_every=3), []
    for frame in range(8):
        policy.begin()
        full.append(policy.choose(seen(moved(45), slot=stored() if frame else None)).index is None)
    assert full == [True, False, False, True, False, False, True, False]


def test_probes_are_a_tenth_of_the_rest_and_differ_from_frame_to_frame():
    policy, drawn = streaming(ring=0, probe=0.1), []
    for _ in range(2):
        policy.begin()
        choice = policy.choose(seen(moved(0, 1, 2), slot=stored()))
        assert int(choice.probed.sum()) == 10
        assert not choice.probed[:3].any()
        drawn.append(set(choice.index[choice.probed].tolist()))
    assert drawn[0] != drawn[1]


def test_the_alarm_listens_to_the_probes_alone_and_holds_for_the_frame():
    policy = streaming(ring=0, probe=0.1, alarm=0.1)
    choice = policy.choose(seen(moved(0, 1, 2), slot=stored()))
    old = TOKENS[:, choice.index]
    elsewhere = old.clone()
    elsewhere[:, ~choice.probed] += 5
    assert not policy.judge(choice, elsewhere, old)
    assert not policy.judge(choice, old * 1.09, old)
    assert policy.choose(seen(slot=stored(), step=1)) is choice
    assert policy.judge(choice, old * 1.11, old)
    assert policy.choose(seen(slot=stored(), step=1)) == Choice(None, "alarm")


def test_a_masked_run_refreshes_on_schedule_and_needs_a_mask():
    mask = torch.zeros(100, dtype=torch.bool)
    mask[45] = True
    policy = Masked(ring=1, refresh_every=3)
    choices = [policy.choose(seen(step=i, slot=stored() if i else None, mask=mask)).index for i in range(6)]
    assert [c is None for c in choices] == [True, False, False, True, False, False]
    assert {34, 45, 56} <= set(choices[1].tolist())
    with pytest.raises(ValueError, match="no region is set"):
        policy.choose(seen(slot=stored()))


def test_plain_generation_takes_the_tokens_that_moved_most():
    policy = Changing(share=0.02, refresh_every=4)
    assert policy.choose(seen()).index is None
    assert policy.choose(seen(moved(7, 70), step=1, slot=stored())).index.tolist() == [7, 70]
    assert policy.choose(seen(moved(7, 70), step=4, slot=stored())).index is None
