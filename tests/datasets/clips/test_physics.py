import math

import pytest
import torch

from diffusion_opt.datasets.clips import ACTIONS, CHUNK, PHYSICS, PICTURES, Chance, Physics, simulate
from diffusion_opt.datasets.clips.physics import CORNER, HIGH, LOW, bounced, driven, mirrored


def run(position, velocity, actions, angle=0.0, turn=1, picture=0):
    frames = CHUNK * len(actions)
    chance = Chance(torch.full((1, frames), turn), torch.full((1, frames), angle))
    state = torch.tensor([position]), torch.tensor([velocity]), torch.tensor([picture])
    return simulate(*state, torch.tensor([[ACTIONS.index(a) for a in actions]]), chance)


@pytest.mark.parametrize(("action", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_an_action_pushes_its_way(action, axis, sign):
    motion = run((32.0, 32.0), (0.0, 0.0), [action, action])
    moved = motion.positions[0, -1] - torch.tensor([32.0, 32.0])
    drag, push = PHYSICS.drag, PHYSICS.push
    velocities = [push * sum(drag**i for i in range(1, n + 1)) for n in range(1, 5)]
    assert moved[axis].item() == pytest.approx(sign * sum(velocities), abs=1e-5)
    assert moved[1 - axis] == 0 and not motion.hits.any()


def test_without_an_action_only_drag_acts():
    motion = run((20.0, 30.0), (1.0, -0.5), ["none"] * 3)
    expected = torch.tensor([1.0, -0.5]) * PHYSICS.drag ** torch.arange(1, 7)[:, None]
    torch.testing.assert_close(motion.velocities[0], expected)
    torch.testing.assert_close(motion.positions[0], torch.tensor([20.0, 30.0]) + expected.cumsum(0))


def test_speed_is_limited():
    fast = driven(torch.tensor([[2.5, 2.5]]), torch.tensor([2]))
    assert fast.norm().item() == pytest.approx(PHYSICS.top, abs=1e-5)


def test_a_wall_mirrors_the_place_turns_the_picture_and_sends_it_away_mirrored():
    motion = run((HIGH - 1, 30.0), (2.0, 0.5), ["none"], turn=3, picture=8)
    v = torch.tensor([2.0, 0.5]) * PHYSICS.drag
    assert motion.hits[0].tolist() == [True, False]
    assert motion.pictures[0].tolist() == [(8 + 3) % len(PICTURES)] * 2
    torch.testing.assert_close(motion.positions[0, 0], torch.tensor([2 * HIGH - (HIGH - 1 + v[0]), 30 + v[1]]))
    left = motion.velocities[0, 0]
    assert left.norm().item() == pytest.approx(PHYSICS.keep * v.norm().item(), abs=1e-5)
    torch.testing.assert_close(left / left.norm(), torch.tensor([-v[0], v[1]]) / v.norm())


def test_slow_hits_are_kicked_and_grazing_ones_lead_away():
    slow = bounced(torch.tensor([[0.1, 0.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([0.0]))
    torch.testing.assert_close(slow, torch.tensor([[-PHYSICS.kick, 0.0]]))
    grazing = bounced(torch.tensor([[2.0, 0.01]]), torch.tensor([[0.0, -1.0]]), torch.tensor([-0.3]))
    assert math.degrees(math.atan2(abs(grazing[0, 0]), -grazing[0, 1])) <= math.degrees(PHYSICS.widest) + 1e-3


def test_a_corner_leads_away_from_both_walls():
    angles = torch.linspace(-PHYSICS.spread, PHYSICS.spread, 41)
    normal = torch.tensor([[1.0, 1.0]]).expand(41, 2)
    away = bounced(torch.tensor([[-2.0, -0.2]]).expand(41, 2), normal, angles)
    assert (away > 0).all()
    aside = torch.atan2(away[:, 1], away[:, 0]) - math.pi / 4
    assert aside.abs().max() <= CORNER + 1e-5


def test_the_angle_is_added_to_the_mirrored_direction():
    normal, velocity = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.4, -2.0]])
    plain, turned = (bounced(velocity, normal, torch.tensor([a])) for a in (0.0, 0.2))
    angle = torch.atan2(turned[0, 1], turned[0, 0]) - torch.atan2(plain[0, 1], plain[0, 0])
    assert angle.item() == pytest.approx(0.2, abs=1e-5)


def test_pressed_against_a_wall_a_picture_does_not_turn_at_each_frame():
    motion = run((LOW + 1, 32.0), (-2.0, 0.0), ["left"] * 30)
    at = motion.hits[0].nonzero()[:, 0]
    assert len(at) >= 3 and at.diff().min() >= 6
    assert ((motion.positions >= LOW) & (motion.positions <= HIGH)).all()


def test_mirrored_tells_the_wall():
    folded, normal = mirrored(torch.tensor([[LOW - 1, 30.0], [30.0, HIGH + 2], [30.0, 30.0]]))
    assert folded.tolist() == [[LOW + 1, 30.0], [30.0, HIGH - 2], [30.0, 30.0]]
    assert normal.tolist() == [[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "says"),
    [({"kick": 3.0}, "kick"), ({"push": -1.0}, "push"), ({"drag": 1.2}, "drag"), ({"widest": 2.0}, "widest")],
)
def test_impossible_constants_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Physics(**change)


def test_another_number_of_draws_is_refused():
    chance = Chance.draw(2, 3, torch.Generator().manual_seed(0))
    state = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="4 frames of 2 clips"):
        simulate(*state, torch.zeros(2, 2, dtype=torch.long), chance)
