"""The cut at the block stack: what it sees, what it replaces, and that it leaves nothing behind."""

import copy

import pytest
import torch
from caching.pipelines import generate, inputs_at, small_pipeline
from diffusers import DiTTransformer2DModel, FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from diffusion_opt.caching import FixedInterval, StreamingRegionCache
from diffusion_opt.caching.step.stack import StackCut, attached_cut, check_can_cut


class Script:
    """A controller that does what it is told and keeps what it saw."""

    def __init__(self, residual: dict[str, torch.Tensor] | None = None, probe_blocks: int = 0) -> None:
        self.residual, self.probe_blocks = residual, probe_blocks
        self.stacks, self.residuals, self.outputs, self.ended = [], [], [], 0

    def begin(self, stack):
        self.stacks.append(stack)
        return self.residual

    def computed(self, stack, residual):
        self.residuals.append(residual)

    def finished(self, stack, output):
        self.outputs.append(output)

    def end_generation(self):
        self.ended += 1


def attach(transformer: nn.Module, controller: Script) -> StackCut:
    cut = StackCut(transformer, controller)
    cut.attach(transformer)
    return cut


def traces(transformer: nn.Module) -> list[str]:
    """Modules that carry a hook registry or a wrapped forward."""
    return [name for name, m in transformer.named_modules() if {"_diffusers_hook", "forward"} & set(vars(m))]


@pytest.mark.parametrize(("num_double", "num_single"), [(2, 3), (1, 1)])
@torch.no_grad()
def test_sees_the_two_ends_of_the_stack(num_double, num_single):
    transformer = small_pipeline(num_double=num_double, num_single=num_single).transformer
    seen = {}
    transformer.x_embedder.register_forward_hook(lambda m, i, out: seen.update(start=out))
    transformer.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(modulated=kwargs["hidden_states"]), with_kwargs=True
    )
    transformer.norm_out.register_forward_hook(lambda m, args, out: seen.update(end=args[0]))
    dense = transformer(**inputs_at(0.7))[0]
    script = Script()
    attach(transformer, script)
    with transformer.cache_context("uncond", step_index=3, num_inference_steps=9):
        out = transformer(**inputs_at(0.7))[0]
    assert torch.equal(out, dense)
    (stack,) = script.stacks
    assert (stack.context, stack.step, stack.time) == ("uncond", (3, 9), pytest.approx(0.7))
    assert torch.equal(stack.main, seen["start"])
    assert torch.equal(stack.modulated(), seen["modulated"])
    torch.testing.assert_close(script.residuals[0]["hidden"], seen["end"] - seen["start"])


@torch.no_grad()
def test_a_skipped_stack_adds_the_residual_and_runs_no_block():
    transformer = small_pipeline().transformer
    given = inputs_at(0.4)
    residual = torch.randn(2, 16, 32)
    start = transformer.x_embedder(given["hidden_states"])
    embedding = transformer.time_guidance_embed(given["timestep"] * 1000, None)
    expected = transformer.proj_out(transformer.norm_out(start + residual, embedding))
    ran = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    attach(transformer, Script({"hidden": residual}))
    assert torch.equal(transformer(**given)[0], expected)
    assert not ran


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [False, True])
def test_the_controller_gets_the_output_of_computed_and_skipped_passes(pipe, return_dict):
    script = Script()
    cut = attach(pipe.transformer, script)
    for residual in (None, {"hidden": torch.randn(2, 16, 32)}):
        script.residual = residual
        output = pipe.transformer(**inputs_at(0.7) | {"return_dict": return_dict})
        assert torch.equal(script.outputs[-1], output[0])
        assert cut.now.last_skipped == (residual is not None)
    assert len(script.outputs) == 2
    assert len(script.residuals) == 1
    assert (cut.now.call, cut.now.stack, cut.now.skipped) == (None, None, None)  # no tensor outlives the pass


@torch.no_grad()
def test_detach_leaves_no_trace_and_the_same_bits(pipe):
    before, clean = generate(pipe), set(traces(pipe.transformer)) - {""}
    cut = attach(pipe.transformer, Script())
    assert len(traces(pipe.transformer)) == 6
    cut.detach(pipe.transformer)
    assert traces(pipe.transformer) == []
    assert clean == set()
    assert attached_cut(pipe.transformer) is None
    assert torch.equal(generate(pipe), before)


@torch.no_grad()
def test_hooks_of_others_survive_detach(pipe):
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return (output[0] * 2,)

    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    cut = attach(pipe.transformer, Script())
    registry.register_hook(Doubling(), "doubling")
    expected = pipe.transformer(**inputs_at(0.7))[0]
    cut.detach(pipe.transformer)
    assert torch.equal(pipe.transformer(**inputs_at(0.7))[0], expected)
    registry.remove_hook("doubling", recurse=False)
    assert torch.equal(pipe.transformer(**inputs_at(0.7))[0] * 2, expected)


def test_pipelines_report_the_context_the_time_and_the_end(pipe):
    script = Script()
    attach(pipe.transformer, script)
    generate(pipe, steps=4)
    assert [(s.context, round(s.time, 6)) for s in script.stacks] == [
        (name, time) for time in (1.0, 0.75, 0.5, 0.25) for name in ("cond", "uncond")
    ]
    assert script.ended == 1


def test_training_is_left_alone(pipe):
    script = Script({"hidden": torch.zeros(2, 16, 32)})
    attach(pipe.transformer, script)
    pipe.transformer.train()
    pipe.transformer(**inputs_at(0.7))[0].sum().backward()
    assert script.stacks == []
    assert all(p.grad is not None for p in pipe.transformer.transformer_blocks[0].attn.to_q.parameters())
    pipe.transformer.eval()
    with pytest.warns(UserWarning, match=r"torch.no_grad"):
        pipe.transformer(**inputs_at(0.7))


@torch.no_grad()
def test_mixed_times_are_left_alone(pipe):
    given = inputs_at(0.7) | {"timestep": torch.tensor([0.7, 0.6])}
    expected = pipe.transformer(**given)[0]
    script = Script({"hidden": torch.zeros(2, 16, 32)})
    attach(pipe.transformer, script)
    assert torch.equal(pipe.transformer(**given)[0], expected)
    assert script.stacks == []


@torch.no_grad()
def test_what_cannot_be_cut_says_why(pipe):
    with pytest.raises(ValueError, match="got Linear"):
        check_can_cut(nn.Linear(2, 2))
    with torch.device("meta"):
        dit = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=1)
    with pytest.raises(ValueError, match="got DiTTransformer2DModel"):
        StackCut(dit, Script())
    with pytest.raises(ValueError, match=r"OptimizedModule \(apply a step cache before torch.compile"):
        check_can_cut(torch.compile(pipe.transformer))
    with pytest.raises(ValueError, match=r"got 1 \+ 0"):
        check_can_cut(small_pipeline(num_double=1, num_single=0).transformer)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        check_can_cut(pipe.transformer)
    pipe.transformer.disable_cache()
    attach(pipe.transformer, Script())
    with pytest.raises(ValueError, match="already on this transformer"):
        StackCut(pipe.transformer, Script())
    with pytest.raises(ValueError, match="kv_cache_mode='extract'"):
        pipe.transformer(**inputs_at(0.7), kv_cache_mode="extract")
    with pytest.raises(ValueError, match="cannot be deep-copied"):
        copy.deepcopy(pipe)


def test_a_region_cache_on_the_transformer_is_refused_until_it_is_removed(pipe):
    """Its passes are over some of the tokens, so a residual of the whole stack would not fit them."""
    region = StreamingRegionCache()
    region.apply(pipe)
    with pytest.raises(ValueError, match="a region cache is on this transformer"):
        check_can_cut(pipe.transformer)
    with pytest.raises(ValueError, match="a region cache is on this transformer"):
        FixedInterval(2).apply(pipe)
    region.remove(pipe)
    assert check_can_cut(pipe.transformer).blocks
