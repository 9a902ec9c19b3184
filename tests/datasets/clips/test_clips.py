import shutil

import pytest
import torch

from diffusion_opt.datasets import CorruptFileError, data_dir
from diffusion_opt.datasets.clips import ACTIONS, PICTURES, SCENES, SIZE, clips, draw_actions, parse, render, sheet
from diffusion_opt.datasets.clips.clips import is_held_out
from diffusion_opt.datasets.clips.physics import HIGH, LOW, driven
from diffusion_opt.datasets.clips.render import SQUARE, corner, squares, stamp


@pytest.fixture(scope="module")
def many():
    return clips(150, 8, seed=5)


def test_clips_are_a_function_of_seed_and_split(many):
    again = clips(150, 8, seed=5)
    torch.testing.assert_close(again.frames, many.frames, rtol=0, atol=0)
    assert again.prompts == many.prompts
    assert clips(9, 8, seed=6).prompts != many.prompts[:9] != clips(9, 8, seed=5, split="test").prompts


def test_shapes_range_and_truth(many):
    assert many.frames.shape == (150, 16, 3, SIZE, SIZE) and many.frames.dtype == torch.float32
    assert many.frames.min() >= -1 and many.frames.max() <= 1
    motion = many.motion
    assert ((motion.positions >= LOW) & (motion.positions <= HIGH)).all()
    free = ~motion.hits[:, 1:]
    driven_on = driven(motion.velocities[:, :-1], many.actions.repeat_interleave(2, 1)[:, 1:])
    torch.testing.assert_close(motion.velocities[:, 1:][free], driven_on[free])
    torch.testing.assert_close((motion.positions[:, :-1] + driven_on)[free], motion.positions[:, 1:][free])
    changed = motion.pictures[:, 1:] != motion.pictures[:, :-1]
    assert torch.equal(changed, motion.hits[:, 1:]) and changed.any()


def test_scenes_pictures_and_turns_are_uniform(many):
    """Chi-square at 0.1 %: 11 and 9 degrees of freedom."""

    def statistic(counts):
        expected = counts.sum() / len(counts)
        return ((counts - expected) ** 2 / expected).sum().item()

    assert statistic(many.scenes.bincount(minlength=len(SCENES)).float()) < 31.3
    assert statistic(many.motion.pictures[:, 0].bincount(minlength=len(PICTURES)).float()) < 27.9
    pictures, hits = many.motion.pictures, many.motion.hits[:, 1:]
    turned = (pictures[:, 1:] - pictures[:, :-1])[hits] % len(PICTURES)
    assert statistic(turned.bincount(minlength=len(PICTURES))[1:].float()) < 26.1


def test_held_out_combinations_occur_nowhere_else(many):
    held = clips(60, 8, seed=5, split="held_out")
    test = clips(60, 4, seed=5, split="test")
    for drawn, expected in ((held, True), (many, False), (test, False)):
        assert ((is_held_out(drawn.scenes, drawn.motion.pictures[:, 0], drawn.actions) == 0) == expected).all()
    assert held.scenes.unique().numel() == len(SCENES)


def test_the_shortest_clips():
    short = clips(3, 3, seed=1)
    assert short.frames.shape[1] == 6 and short.actions.shape == (3, 3)


def test_actions_are_held():
    actions = draw_actions(500, 20, torch.Generator().manual_seed(0))
    assert 0.75 < (actions[:, 1:] == actions[:, :-1]).float().mean() < 0.85
    assert set(actions.unique().tolist()) == set(range(len(ACTIONS)))


def test_prompts_are_parsed_back(many):
    for text, scene, actions in zip(many.prompts[:20], many.scenes, many.actions, strict=False):
        picture, place, pushes = parse(text)
        assert (place, pushes) == (scene.item(), actions.tolist())
        assert PICTURES[picture] == text.split(",")[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [("frog beach: left", "asked for as"), ("frog, beach:", "asked for as"), ("dog, beach: left", "picture must be"),
     ("frog, moon: left", "scene must be"), ("frog, beach: jump", "action must be")],
)  # fmt: skip
def test_a_wrong_prompt_says_what_is_known(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="num_chunks >= 3"):
        clips(4, 2, seed=0)


@pytest.mark.wrong_shapes
def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, held_out, test"):
        clips(4, 4, seed=0, split="validation")


def test_outside_of_the_square_a_frame_is_its_scene(many):
    shown = (many.frames[:40] - sheet().scenes[many.scenes[:40]][:, None]).abs().amax(2) > 1e-6
    grid = torch.arange(SIZE) + 0.5
    x, y = many.motion.positions[:40].unbind(-1)
    near_x = (grid - x[..., None]).abs() <= SQUARE / 2 + 1
    near_y = (grid - y[..., None]).abs() <= SQUARE / 2 + 1
    assert not (shown & ~(near_y[..., :, None] & near_x[..., None, :])).any()


def test_alpha_has_its_middle_where_the_picture_is():
    """The center of mass of alpha moves exactly as the position does, and its sum does not change."""
    pictures = torch.arange(len(PICTURES))
    base = torch.full((len(PICTURES), 2), 30.0)

    def center(positions):
        corners = corner(positions)
        alpha = stamp(pictures, positions, corners)[:, 3]
        grid = torch.arange(SQUARE) + 0.5
        mass = alpha.sum((1, 2))
        x = (alpha * (corners[:, :1] + grid)[:, None]).sum((1, 2)) / mass
        y = (alpha * (corners[:, 1:] + grid)[:, :, None]).sum((1, 2)) / mass
        return torch.stack([x, y], 1), mass

    middle, mass = center(base)
    for shift in ((0.25, 0.0), (0.6, -0.3), (3.1, 2.9)):
        moved, same = center(base + torch.tensor(shift))
        torch.testing.assert_close(moved - middle, torch.tensor(shift).expand_as(moved), atol=0.01, rtol=0)
        torch.testing.assert_close(same, mass, rtol=1e-3, atol=0)
    symmetric = [PICTURES.index(name) for name in ("soccer-ball", "basketball")]
    torch.testing.assert_close(middle[symmetric], base[symmetric], atol=0.06, rtol=0)


def test_squares_read_what_render_wrote():
    position = torch.tensor([[[LOW, HIGH]]])
    frame = render(torch.tensor([3]), torch.tensor([[1]]), position)[:, 0]
    corners = corner(position[0])
    square = stamp(torch.tensor([1]), position[0], corners)
    scene = squares(sheet().scenes[3:4], corners)
    inside = squares(torch.ones(1, 1, SIZE, SIZE), corners) == 1
    expected = torch.where(inside, scene * (1 - square[:, 3:]) + square[:, :3], 0.0)
    torch.testing.assert_close(squares(frame, corners), expected)


def test_an_altered_sheet_is_refused(tmp_path, monkeypatch):
    shutil.copytree(data_dir() / "clips", tmp_path / "clips")
    with (tmp_path / "clips" / "scenes.png").open("ab") as file:
        file.write(b"x")
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    with pytest.raises(CorruptFileError, match=r"scenes\.png is damaged"):
        sheet()
