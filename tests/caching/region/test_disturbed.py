"""What a region cache keeps belongs to one network, one frame and one thread; else it is computed anew."""

import contextlib
import threading

import pytest
import torch
from peft import LoraConfig
from small_pipelines import small_pipeline
from tiny_pipelines import tiny_pipeline

from diffusion_opt.caching import (
    ChunkRegionCache,
    EditRegionCache,
    FixedInterval,
    ReferenceRegionCache,
    StreamingRegionCache,
    edit,
    region_report,
    stream,
)
from diffusion_opt.caching.region.source import encode, noised, schedule
from diffusion_opt.models import TinyFlux2Pipeline


def frame(seed: int) -> torch.Tensor:
    return torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def picture(pipe: TinyFlux2Pipeline, image: torch.Tensor, **call: object) -> torch.Tensor:
    """One frame of `stream`, whose call can be disturbed."""
    clean = encode(pipe, image)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    plan = schedule(pipe, 4, 0.5, num_tokens=clean[0, 0].numel())
    return pipe(
        ["0"], 4, 1.0, latents=noised(clean, noise, plan.times[0]), sigmas=list(plan.sigmas), height=16, width=16,
        output_type="pt", **call,
    ).images  # fmt: skip


def streaming(**settings: object) -> TinyFlux2Pipeline:
    return StreamingRegionCache(probe=0.0, **settings).apply(small_pipeline())


def reasons(pipe: TinyFlux2Pipeline) -> list[str]:
    return [done.reason for done in region_report(pipe).passes]


def interrupt(pipe, step, time, kept):
    pipe._interrupt = True
    return kept


def crash(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("callback", [interrupt, crash])
def test_a_canceled_frame_leaves_nothing_of_the_one_before(callback):
    one, two, alone = frame(1), frame(2), picture(small_pipeline(), frame(2))
    pipe = streaming(refresh_every=0)
    picture(pipe, one)
    with contextlib.suppress(KeyboardInterrupt):
        picture(pipe, two, callback_on_step_end=callback)
    torch.testing.assert_close(picture(pipe, two), alone)
    assert reasons(pipe)[1:] == ["other frame"] * 3
    torch.testing.assert_close(picture(pipe, two), alone)
    assert reasons(pipe) == ["nothing changed"] * 4


def test_the_next_frame_may_begin_later_than_the_last_one_stopped():
    """Strength .2 after an interrupted run from .5: a time that goes on falling is no sign of the same generation."""
    pipe = streaming()
    with pytest.raises(KeyboardInterrupt):
        picture(pipe, frame(1), callback_on_step_end=crash)
    images = list(stream(pipe, [frame(2)], ["0"], steps=2, strength=0.2, guidance_scale=1.0))
    dense = list(stream(small_pipeline(), [frame(2)], ["0"], steps=2, strength=0.2, guidance_scale=1.0))
    assert torch.equal(images[0], dense[0])


def adapter(pipe: TinyFlux2Pipeline) -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


CHANGES = {
    "adapter comes": adapter,
    "weight": lambda pipe: torch.nn.init.normal_(pipe.transformer.proj_out.weight),
    "state loaded": lambda pipe: pipe.transformer.load_state_dict(
        {name: 1.5 * value for name, value in pipe.transformer.state_dict().items()}
    ),
    "layer": lambda pipe: setattr(
        pipe.transformer, "proj_out", torch.nn.Linear(*pipe.transformer.proj_out.weight.T.shape)
    ),
    "there and back": lambda pipe: pipe.transformer.to(torch.bfloat16).to(torch.float32),
    "backend": lambda pipe: pipe.transformer.set_attention_backend("native"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_network_is_a_full_frame(change):
    pipe = streaming()
    for _ in range(2):
        picture(pipe, frame(1))
    assert reasons(pipe) == ["nothing changed"] * 4
    CHANGES[change](pipe)
    picture(pipe, frame(1))
    assert reasons(pipe) == ["other weights"] * 4
    picture(pipe, frame(1))
    assert reasons(pipe) == ["nothing changed"] * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.disable_adapters(),
        lambda model: model.set_adapters(["default"], [0.5]),
        lambda model: model.fuse_lora(),
        lambda model: model.delete_adapters(["default"]),
    ],
    ids=["disabled", "scaled", "fused", "deleted"],
)
def test_whatever_becomes_of_an_adapter_is_seen(change):
    pipe = small_pipeline()
    adapter(pipe)
    StreamingRegionCache(probe=0.0).apply(pipe)
    for _ in range(2):
        picture(pipe, frame(1))
    change(pipe.transformer)
    picture(pipe, frame(1))
    assert reasons(pipe)[0] == "other weights"


def test_threads_have_slots_of_their_own():
    images = {seed: [frame(seed), frame(seed + 10), frame(seed)] for seed in (1, 2)}
    alone = {seed: [picture(small_pipeline(), image) for image in images[seed]] for seed in images}
    first = streaming()
    pipes = {1: first, 2: TinyFlux2Pipeline(**first.components)}
    pipes[2].scheduler = type(first.scheduler).from_config(first.scheduler.config)
    pipes[2].set_progress_bar_config(disable=True)
    turn, made = threading.Barrier(2, timeout=60), {1: [], 2: []}

    def wait(pipe, step, time, kept):
        turn.wait()
        return kept

    def work(seed):
        for image in images[seed]:
            turn.wait()
            made[seed].append(picture(pipes[seed], image, callback_on_step_end=wait))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for seed in images:
        for mine, expected in zip(made[seed], alone[seed], strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_removal_that_would_undo_something_is_refused_and_changes_nothing():
    pipe = streaming()
    attention = pipe.transformer.transformer_blocks[0].attn
    ours, theirs = attention.processor, type(attention.processor.stock)()
    expected = picture(small_pipeline(), frame(1))
    attention.set_processor(theirs)
    with pytest.raises(ValueError, match="layer 0 has Flux2AttnProcessor since the region cache was applied"):
        StreamingRegionCache().remove(pipe)
    attention.set_processor(ours)
    assert torch.equal(picture(pipe, frame(1)), expected)
    StreamingRegionCache().remove(pipe)
    assert torch.equal(picture(pipe, frame(1)), expected)


@pytest.mark.parametrize("kind", ["wan", "ltx", "ltx2"])
def test_frames_of_a_video_are_no_reference_pictures(kind):
    pipe = tiny_pipeline(kind)
    with pytest.raises(ValueError, match="later frames of a video are no references"):
        ReferenceRegionCache().apply(pipe)
    ChunkRegionCache(0.1).apply(pipe)


def test_a_pipeline_with_a_cache_in_its_weights_is_refused_beforehand():
    pipe = tiny_pipeline("flux2-klein-kv")
    for technique in (ReferenceRegionCache(), FixedInterval(2)):
        with pytest.raises(ValueError, match="keeps keys and values of its references"):
            technique.apply(pipe)


def moving_square(size: int) -> list[torch.Tensor]:
    base = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = [base.clone() for _ in range(3)]
    for i, one in enumerate(frames):
        one[:, :, 8 * i : 8 * i + 8, :8] = 1.0
    return frames


@pytest.mark.parametrize(("kind", "size"), [("flux2-klein", 128), ("flux2-klein-inpaint", 64), ("flux2-dev", 64)])
def test_through_a_real_vae_the_default_skips_and_is_right(kind, size):
    """Its norms spread a change over the whole picture, by a thousandth; what moved is a few tokens all the same."""
    pipe = tiny_pipeline(kind)
    call = {"prompt": "a cat", "steps": 2, "strength": 0.6, "guidance_scale": 1.0}
    dense = list(stream(pipe, moving_square(size), **call))
    StreamingRegionCache().apply(pipe)
    work = []
    for image, expected in zip(stream(pipe, moving_square(size), **call), dense, strict=True):
        work.append(region_report(pipe).work)
        assert float((image - expected).norm() / expected.norm()) < 2e-3
    assert work[0] == 1 and max(work[1:]) <= 0.5


def test_who_saves_nothing_is_told_why_once():
    pipe = StreamingRegionCache(threshold=0.0).apply(tiny_pipeline("flux2-klein"))
    call = {"prompt": "a cat", "steps": 2, "strength": 0.6, "guidance_scale": 1.0}
    with pytest.warns(
        UserWarning, match=r"computed every token of every pass: more than 70% .* threshold, \.01"
    ) as seen:
        list(stream(pipe, moving_square(64), **call))
    assert len([one for one in seen if "computed every token" in str(one.message)]) == 1
    wan = ChunkRegionCache(1e-6).apply(tiny_pipeline("wan"))
    with pytest.warns(UserWarning, match="every frame changed by 1e-06 or more at each step; raise the threshold"):
        wan("a cat", height=32, width=32, num_frames=9, num_inference_steps=2, max_sequence_length=32)


def test_an_inpainting_pipeline_edits_by_its_parts():
    pipe = tiny_pipeline("flux2-klein-inpaint")
    image, mask = moving_square(64)[0], torch.zeros(64, 64, dtype=torch.bool)
    mask[:16, :16] = True
    call = {"prompt": "a cat", "steps": 4, "guidance_scale": 1.0}
    dense = edit(pipe, image, mask, **call)
    EditRegionCache(refresh_every=2).apply(pipe)
    cached = edit(pipe, image, mask, **call)
    assert region_report(pipe).work < 0.8
    assert float((cached - dense).norm() / dense.norm()) < 0.05
