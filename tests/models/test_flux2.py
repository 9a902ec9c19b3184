"""The adapter equals the pipelines: ours bit for bit over whole generations, and stock FLUX.2 layouts call for call."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import nn

from diffusion_opt.flow import ClassCondition, Condition, Guided, adams_bashforth2, euler
from diffusion_opt.models import (
    ClassEmbedder,
    FlowMatchAdamsBashforthScheduler,
    Flux2Velocity,
    PixelShuffleVAE,
    TokenCondition,
    position_ids,
    velocity_model,
)

SOLVERS = {
    "euler": (FlowMatchEulerDiscreteScheduler, euler),
    "ab2": (FlowMatchAdamsBashforthScheduler, adams_bashforth2),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AtTimesteps:
    """Evaluate at timestep / 1000, as the pipeline does: sigma * 1000 / 1000 can differ from sigma in its last bit."""

    def __init__(self, model, scheduler) -> None:
        self.model = model
        times = scheduler.timesteps / 1000
        self.times = {float(sigma): t for sigma, t in zip(scheduler.sigmas[:-1], times, strict=True)}

    def __call__(self, x_t, t, condition=None):
        return self.model(x_t, self.times[float(t[0])].expand(len(t)), condition)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("solver", SOLVERS)
@torch.no_grad()
def test_samplers_over_the_adapter_equal_the_pipeline_bit_for_bit(pipe, solver, num_steps, guidance_scale):
    scheduler, sampler = SOLVERS[solver]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    x = noise(3, 1, 16, 16)
    latents = Flux2KleinPipeline._patchify_latents(pipe.vae.encode(x).latents)
    drawn, again = (
        pipe(["bag", 3, "7"], num_steps, guidance_scale, latents=latents, output_type="latent").images for _ in range(2)
    )
    assert torch.equal(again, drawn)
    model = AtTimesteps(velocity_model(pipe), pipe.scheduler)
    condition = ClassCondition(torch.tensor([8, 3, 7]), 10)
    found = sampler(Guided(model, guidance_scale), x, pipe.scheduler.sigmas, condition)
    assert torch.equal(found, pipe.vae.decode(drawn).sample)
    plain = sampler(Guided(velocity_model(pipe), guidance_scale), x, pipe.scheduler.sigmas, condition)
    torch.testing.assert_close(plain, found, rtol=0, atol=1e-3)


def test_pack_and_unpack_are_inverse_on_any_rectangle(pipe):
    model, x = velocity_model(pipe), noise(2, 1, 8, 20)
    tokens, grid = model.pack(x)
    assert tokens.shape == (2, 10, 16) and grid == (2, 5)
    assert torch.equal(model.unpack(tokens, grid), x)
    patch = tokens[1, 7].reshape(1, 2, 2, 2, 2)  # channel, pixel in its cell (row, column), cell (row, column)
    assert torch.equal(patch[0].permute(2, 0, 3, 1).reshape(4, 4), x[1, 0, 4:8, 8:12])


def test_position_ids_are_those_of_the_stock_pipeline():
    expected = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 16, 3, 5))[0]
    assert torch.equal(position_ids(3, 5, torch.device("cpu")), expected.float())


LAYOUT = {
    "in_channels": 4 * 4 * 3, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 20,
    "num_attention_heads": 3, "joint_attention_dim": 28, "timestep_guidance_channels": 32,
    "axes_dims_rope": (2, 4, 6, 8), "rope_theta": 2000,
}  # fmt: skip
TOKENS = TokenCondition(noise(2, 7, 28), noise(1, 7, 28, seed=1))
T = torch.tensor([0.25, 0.875])


def full_layout(guidance_embeds: bool) -> Flux2Transformer2DModel:
    """The class as in FLUX.2 [dev] and klein: several blocks of both kinds, uneven rotary axes, three colors."""
    return Flux2Transformer2DModel(**LAYOUT, guidance_embeds=guidance_embeds).eval()


@pytest.mark.parametrize("guidance", [None, 4.0])
@torch.no_grad()
def test_full_layout_equals_a_direct_call_with_the_stock_ids(guidance):
    transformer, vae = full_layout(guidance is not None), PixelShuffleVAE(in_channels=3)
    x = noise(2, 3, 12, 20)
    latents = Flux2KleinPipeline._patchify_latents(vae.encode(x).latents)
    direct = transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(latents),
        encoder_hidden_states=TOKENS.tokens,
        timestep=T,
        img_ids=Flux2KleinPipeline._prepare_latent_ids(latents),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(TOKENS.tokens),
        guidance=None if guidance is None else torch.full((2,), guidance),
    ).sample
    model = Flux2Velocity(transformer, None, vae, guidance)
    found = model(x, T, TOKENS)
    assert torch.equal(model.pack(found)[0], direct)
    assert found.shape == x.shape and found.std() > 0.01
    if guidance is not None:
        assert not torch.allclose(Flux2Velocity(transformer, None, vae, 1.5)(x, T, TOKENS), found, atol=1e-6)


@torch.no_grad()
def test_a_step_of_the_stock_klein_pipeline_on_a_long_prompt_is_an_euler_step_of_the_adapter():
    transformer, vae = full_layout(guidance_embeds=False), PixelShuffleVAE(in_channels=3)
    stock = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    stock.set_progress_bar_config(disable=True)
    x = noise(2, 3, 12, 20)
    latents = Flux2KleinPipeline._patchify_latents(vae.encode(x).latents)
    drawn = stock(
        prompt_embeds=TOKENS.tokens, negative_prompt_embeds=TOKENS.null.expand(2, -1, -1), guidance_scale=3.0,
        height=12, width=20, num_inference_steps=1, latents=latents, output_type="latent",
    ).images  # fmt: skip
    guided = Guided(Flux2Velocity(transformer, None, vae), 3.0)
    assert torch.equal(x - guided(x, torch.ones(2), TOKENS), vae.decode(drawn).sample)


@torch.no_grad()
def test_rows_columns_and_the_order_of_words_matter():
    transformer, vae = full_layout(guidance_embeds=False), PixelShuffleVAE(in_channels=3)
    model, x = Flux2Velocity(transformer, None, vae), noise(2, 3, 12, 12)
    straight = model(x, T, TOKENS)
    backwards = model(x, T, TokenCondition(TOKENS.tokens.flip(1), TOKENS.null))
    assert not torch.allclose(straight, backwards, atol=1e-6)
    token = x[..., :4, :4].repeat(1, 1, 3, 3)  # the same patch everywhere: only position tells tokens apart
    patches = model.pack(model(token, T, TOKENS))[0]
    for a, b in itertools.combinations((0, 1, 3, 4), 2):
        assert not torch.allclose(patches[:, a], patches[:, b], atol=1e-7)


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(pipe):
    model, x = velocity_model(pipe), noise(2, 1, 16, 16)
    condition = ClassCondition(torch.tensor([4, 10]), 10)
    both = model(x, T, condition)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], model(x[i : i + 1], T[i : i + 1], condition[[i]]))


def test_guidance_is_needed_by_guidance_embedded_transformers_and_refused_by_others(pipe):
    vae = PixelShuffleVAE(in_channels=3)
    with pytest.raises(ValueError, match="needs guidance=<scale> or two_time=True, one of them"):
        Flux2Velocity(full_layout(guidance_embeds=True), None, vae)
    with pytest.raises(ValueError, match="takes no guidance and no second time"):
        Flux2Velocity(full_layout(guidance_embeds=False), None, vae, guidance=4.0)
    with pytest.raises(ValueError, match="takes no guidance"):
        velocity_model(pipe, guidance=4.0)


def test_gradients_reach_every_weight_of_transformer_and_embedder(pipe):
    model = velocity_model(pipe)
    condition = ClassCondition(torch.tensor([3, 5]), 10).drop(torch.tensor([False, True]))
    model(noise(2, 1, 16, 16), T, condition).square().mean().backward()
    own = {f"transformer.{name}" for name, _ in pipe.transformer.named_parameters()} | {"embedder.table.weight"}
    assert {name for name, _ in model.named_parameters()} == own
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == set()
    used = pipe.class_embedder.table.weight.grad.abs().sum(1) > 0
    assert used.nonzero()[:, 0].tolist() == [3, 10]


def test_adapter_shares_the_modules_of_the_pipeline(pipe):
    model = velocity_model(pipe)
    assert model.transformer is pipe.transformer and model.embedder is pipe.class_embedder
    assert not any("vae" in name for name in model.state_dict())


def test_what_the_adapter_cannot_do(pipe):
    model, x = velocity_model(pipe), noise(2, 1, 16, 16)
    condition = ClassCondition(torch.tensor([1, 2]), 10)
    with pytest.raises(ValueError, match=r"pass condition\.drop\(\) for no condition, not None"):
        model(x, T)
    with pytest.raises(ValueError, match="a target time r needs a flow-map student"):
        model(x, T, condition, r=T / 2)
    bare = Flux2Velocity(pipe.transformer, None, pipe.vae)
    with pytest.raises(TypeError, match="takes a ClassCondition or a TokenCondition, got ClassCondition"):
        bare(x, T, condition)


def test_pipelines_without_an_adapter(pipe):
    vae = pipe.vae
    pipe.vae = AutoencoderKLFlux2(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    with pytest.raises(TypeError, match="needs a PixelShuffleVAE, got AutoencoderKLFlux2"):
        velocity_model(pipe)
    pipe.vae, pipe.transformer = vae, nn.Linear(2, 2)
    with pytest.raises(TypeError, match="no velocity adapter for Linear yet; Flux2Transformer2DModel has one"):
        velocity_model(pipe)


def test_token_condition_is_counted_indexed_and_dropped():
    condition: Condition = TokenCondition(noise(3, 7, 28), noise(1, 7, 28, seed=1))
    assert len(condition) == 3
    picked = condition[torch.tensor([2, 0])]
    assert torch.equal(picked.tokens, condition.tokens[[2, 0]]) and torch.equal(picked.null, condition.null)
    assert len(condition[1:]) == 2
    assert torch.equal(condition.drop().tokens, condition.null.expand(3, -1, -1))
    some = condition.drop(torch.tensor([True, False, True])).tokens
    assert torch.equal(some[1], condition.tokens[1]) and torch.equal(some[[0, 2]], condition.null.expand(2, -1, -1))


@torch.no_grad()
def test_class_tokens_are_a_token_condition_like_any_other(pipe):
    model, x = velocity_model(pipe), noise(2, 1, 16, 16)
    labels = ClassCondition(torch.tensor([1, 2]), 10)
    embedder: ClassEmbedder = pipe.class_embedder
    tokens = TokenCondition(embedder(labels.labels), embedder(torch.tensor([10])))
    assert torch.equal(model(x, T, tokens), model(x, T, labels))
    assert torch.equal(model(x, T, tokens.drop()), model(x, T, labels.drop()))
