"""Both stages of the teachers of clips: two tiny steps, a start from the stage before, and what the losses see."""

import pytest
import torch

from diffusion_opt.cli import main
from diffusion_opt.distillation.clip_teachers import MODEL, ClipTeaching, make_clip_teacher
from diffusion_opt.models.causal import ClipModel
from diffusion_opt.training import TrainConfig


def tiny():
    return ClipModel.build(dim=24, layers=1, heads=2, channels=8, window=2, sink=1, patch=4, codec_clips=8)


CONFIG = TrainConfig(steps=2, batch_size=2, warmup_steps=1, checkpoint_seconds=1000, log_every=1)


def test_both_stages_train_resume_and_follow_each_other(tmp_path):
    first, result = make_clip_teacher("teacher", tiny(), CONFIG, tmp_path / "a", num_chunks=3, progress=False)
    assert result.finished and result.step == 2
    assert first.causal.transformer is first.transformer  # the average is a model of its own
    again, _ = make_clip_teacher("teacher", tiny(), CONFIG, tmp_path / "a", num_chunks=3, progress=False)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    start = ClipModel.open(tmp_path / "a" / MODEL, window=2, sink=1)
    second, result = make_clip_teacher("autoregressive", start, CONFIG, tmp_path / "b", num_chunks=3, progress=False)
    assert result.step == 2 and (tmp_path / "b" / MODEL / "transformer" / "config.json").is_file()
    assert torch.equal(second.codec.basis, first.codec.basis)


@pytest.mark.parametrize("stage", ["teacher", "autoregressive"])
def test_the_loss_is_repeatable_and_reaches_every_weight(stage):
    model = tiny()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    losses = []
    for _ in range(2):
        teaching = ClipTeaching(model, stage, num_chunks=3)
        losses.append(teaching.losses(torch.Generator().manual_seed(7), 3)["loss"])
    assert torch.equal(losses[0], losses[1]) and losses[0].isfinite()
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.wrong_shapes
def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="stage must be one of teacher, autoregressive"):
        ClipTeaching(tiny(), "student")
    with pytest.raises(ValueError, match="2 chunks or more"):
        ClipTeaching(tiny(), "teacher", num_chunks=1)


def test_the_command_wants_a_budget(capsys):
    with pytest.raises(SystemExit):
        main(["video", "train", "teacher"])
    assert "--minutes or --steps" in capsys.readouterr().err
