"""Each family's description of its stack against what really flows in the transformer."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from small_transformers import FAMILIES, TIMESTEP_SCALE, family_pass, small_transformer
from torch import nn

from diffusion_opt.models.block_stack import block_stack

TAILS = {"ltx2": {"video": "norm_out", "audio": "audio_norm_out"}}


def watch(transformer: nn.Module, family: str) -> dict:
    """What enters block 0's attention and the tail, and what enters and leaves each block."""
    seen = {"blocks": []}

    def first(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    stack = block_stack(transformer)
    attention = stack.blocks[0].attn if hasattr(stack.blocks[0], "attn") else stack.blocks[0].attn1
    attention.register_forward_pre_hook(lambda m, a, k: seen.update(modulated=first(a, k)), with_kwargs=True)
    for name, tail in TAILS.get(family, {"hidden": "norm_out"}).items():
        transformer.get_submodule(tail).register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0]}))
    for block in stack.blocks:
        names = list(type(block).forward.__code__.co_varnames[1:])
        block.register_forward_hook(
            lambda m, a, k, out, names=names: seen["blocks"].append((dict(zip(names, a, strict=False)) | k, out)),
            with_kwargs=True,
        )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_description_is_what_flows(family):
    transformer = small_transformer(family)
    seen, stack = watch(transformer, family), block_stack(transformer)
    transformer(**family_pass(family, 0.7))
    assert len(seen["blocks"]) == len(stack.blocks) == 4
    given, _ = seen["blocks"][0]
    start = stack.entering(given)
    assert list(start) == list(stack.widths) == list(TAILS.get(family, ["hidden"]))
    assert {name: stream.shape[-1] for name, stream in start.items()} == stack.widths
    torch.testing.assert_close(stack.modulated(given), seen["modulated"], rtol=0, atol=0)
    end = stack.leaving(seen["blocks"][-1][1], start)
    for name, stream in end.items():
        assert torch.equal(stream.float(), seen[name].float())
    for _, output in seen["blocks"][:-1]:  # in the middle too
        assert {n: s.shape for n, s in stack.leaving(output, start).items()} == {n: s.shape for n, s in start.items()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_that_changes_nothing(family):
    """What is handed on has the form of the block's own output, and its streams are the block's own inputs."""
    transformer = small_transformer(family)
    seen, stack = watch(transformer, family), block_stack(transformer)
    transformer(**family_pass(family, 0.7))
    start = stack.entering(seen["blocks"][0][0])
    for given, output in seen["blocks"]:
        handed_on = stack.handed_on(given)
        assert isinstance(handed_on, tuple) == isinstance(output, tuple)
        for stream in stack.leaving(handed_on, start).values():
            assert any(stream.equal(value[:, -stream.shape[1] :]) for value in given.values() if torch.is_tensor(value))
    last, output = seen["blocks"][-1]
    end = {name: torch.randn_like(stream) for name, stream in start.items()}
    replaced = stack.replaced(stack.handed_on(last), end)
    if family == "sd3":
        assert output[0] is None is replaced[0]
    for name, stream in stack.leaving(replaced, start).items():
        assert torch.equal(stream, end[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_time_of_a_call(family):
    stack, scale = block_stack(small_transformer(family, blocks=2)), TIMESTEP_SCALE[family]
    assert stack.time(torch.tensor([0.7, 0.7]) * scale) == pytest.approx(0.7)
    assert stack.time(torch.tensor(0.7) * scale) == pytest.approx(0.7)
    assert stack.time(torch.tensor([0.7, 0.6]) * scale) is None
    first_frame_clean = torch.tensor([[0.0, 0.0, 0.7], [0.0, 0.0, 0.7]]) * scale
    assert stack.time(first_frame_clean) == pytest.approx(0.7)
    assert stack.time(first_frame_clean * torch.tensor([[1.0], [0.5]])) is None


@torch.no_grad()
def test_wan_with_a_time_for_each_token():
    """Wan 2.2's image-to-video modulates each token by its own time."""
    transformer = small_transformer("wan")
    seen, stack = watch(transformer, "wan"), block_stack(transformer)
    given = family_pass("wan", 0.7)
    times = torch.full((2, 12), 700.0)
    times[:, :4] = 0
    transformer(**given | {"timestep": times})
    torch.testing.assert_close(stack.modulated(seen["blocks"][0][0]), seen["modulated"], rtol=0, atol=0)


def test_unknown_classes_and_empty_stacks_are_refused():
    with pytest.raises(ValueError, match=r"step caches know Flux2Transformer2DModel, LTX2.*, got Linear$"):
        block_stack(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got DiTTransformer2DModel"):
        block_stack(DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=1))
    with pytest.raises(ValueError, match="no blocks"):
        block_stack(small_transformer("wan", blocks=0))
    with pytest.raises(ValueError, match=r"got 1 \+ 0"):
        block_stack(small_transformer("flux2", blocks=1))
