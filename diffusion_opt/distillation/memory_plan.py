"""What a distillation run needs in memory, from the configuration files of a pipeline alone.

    print(memory_plan(transformer_of(folder), plan, Sizes(height=1024, width=1024, processes=8)))

No weight is read: the transformer is built on torch's meta device, with the networks around it that training would
build, and `training.memory` counts them. What autograd keeps of one pass of the student is found with fake tensors, for
the families whose inputs can be told from sizes alone: FLUX.2, Wan and LTX-2. For others the table leaves it out and
says so. A lower bound: see `training/memory.py` for what is not in it.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import (
    Flux2Transformer2DModel,
    LTX2VideoTransformer3DModel,
    ModelMixin,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion_opt.distillation.methods import method_named
from diffusion_opt.distillation.plan import StudentPlan
from diffusion_opt.flow import ClassCondition, Condition
from diffusion_opt.models import Flux2Velocity, LTX2Velocity, PixelShuffleVAE, TokenCondition, WanVelocity
from diffusion_opt.training import memory
from diffusion_opt.training.lora import Adapted, LoraSettings, adapters

SOUND_TOKENS_A_SECOND = 25  # of LTX-2


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one sample is, in pixels and frames, and how it is trained."""

    height: int = 1024
    width: int = 1024
    num_frames: int = 1
    micro_batch: int = 1  # samples at a time on each process
    processes: int = 1
    shard: bool = False  # whole networks in training are shared by the processes (FSDP2)
    shard_teacher: bool = False


class Flux2Latents(Flux2Velocity):
    """FLUX.2 on latents; it computes in the precision of its weights."""

    def tokens(self, condition: ClassCondition | TokenCondition) -> Tensor:
        return super().tokens(condition).to(self.transformer.dtype)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, r: Tensor | None = None) -> Tensor:
        return super().forward(x_t.to(self.transformer.dtype), t, condition, r).to(x_t.dtype)


def transformer_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> ModelMixin:
    """The transformer of a folder's configuration, without weights.

    Raises ValueError for a folder that holds none, or two.
    """
    found = [folder / name / "config.json" for name in ("transformer", "transformer_2")]
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} transformers; a student has one")
    config = json.loads(found[0].read_text())
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise ValueError(f"{found[0]} is of class {config.get('_class_name')!r}, which diffusers does not have")
    with torch.device("meta"):
        return kind.from_config(config).to(dtype)


def memory_plan(transformer: ModelMixin, plan: StudentPlan, sizes: Sizes = Sizes()) -> str:
    """The memory each process needs for this plan, as a table in GiB; the transformer may be on the meta device."""
    needs, method = [], method_named(plan.method)
    with torch.device("meta"):
        teacher = velocity_for(transformer, sizes).requires_grad_(False)
        needs.append(memory.need_of_frozen("teacher (base)", teacher, sizes.processes, sizes.shard_teacher))
        names = ("student", "fake_score") if method.kind == "distribution" else ("student",)
        if plan.lora_rank is not None:
            networks = adapters(teacher, names, LoraSettings(plan.lora_rank))
        else:
            networks = {name: copy.deepcopy(teacher).requires_grad_(True) for name in names}
            for network in networks.values():
                network.transformer.float()
    sharded = sizes.shard and plan.lora_rank is None
    for number, (name, network) in enumerate(networks.items()):
        needs.append(memory.need_of_role(name, network, sizes.processes, number == 0, sharded))
    title = f"{type(transformer).__name__}, {plan.method}, {sizes.processes} processes"
    kept = activations(networks["student"], sizes)
    if kept is None:
        return f"{title}\n{memory.table(needs)}\nwithout what autograd keeps of a pass, not estimated for this family"
    needs.append(memory.Need("one micro-batch", activations=kept))
    return f"{title}\n{memory.table(needs)}"


def velocity_for(transformer: ModelMixin, sizes: Sizes) -> nn.Module:
    """The transformer as a velocity model; of families whose inputs are not known here just something that holds it."""
    config = transformer.config
    if isinstance(transformer, Flux2Transformer2DModel):
        packing = PixelShuffleVAE(
            in_channels=config.in_channels // 4, block_out_channels=(1,)
        )  # latents stay as they are
        scale = {"guidance": 4.0} if config.guidance_embeds else {}
        return Flux2Latents(transformer, None, packing, **scale)
    if isinstance(transformer, WanTransformer3DModel):
        return WanVelocity(transformer)
    if isinstance(transformer, LTX2VideoTransformer3DModel):
        return LTX2Velocity(transformer, *_shapes(transformer, sizes))
    holder = nn.Module()
    holder.transformer = transformer
    return holder


def activations(student: nn.Module, sizes: Sizes) -> int | None:
    """Bytes that autograd keeps of the student's pass, blocks checkpointed; None where the inputs are unknown."""
    base = student.base if isinstance(student, Adapted) else student
    shapes = _shapes(base.transformer, sizes)
    if not shapes:
        return None
    shape = base.sample_shape if hasattr(base, "sample_shape") else shapes[0]
    length, width = _text(base.transformer)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=base is student):
        memory.fake_weights(base, student)
        text = TokenCondition(torch.empty(sizes.micro_batch, length, width), torch.empty(1, length, width))
        x, t = torch.empty(sizes.micro_batch, *shape), torch.empty(sizes.micro_batch)
        return memory.kept_with_checkpointing(lambda: student(x, t, text), base, base.transformer)


def _shapes(transformer: ModelMixin, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    """Shapes of a sample's streams in the latent space of the family's autoencoder; none for an unknown family."""
    config, frames = transformer.config, sizes.num_frames - 1
    if isinstance(transformer, Flux2Transformer2DModel):
        return ((config.in_channels // 4, sizes.height // 8, sizes.width // 8),)
    if isinstance(transformer, WanTransformer3DModel):
        return ((config.in_channels, frames // 4 + 1, sizes.height // 8, sizes.width // 8),)
    if isinstance(transformer, LTX2VideoTransformer3DModel):
        video = (config.in_channels, frames // 8 + 1, sizes.height // 32, sizes.width // 32)
        return video, (round(sizes.num_frames / 24 * SOUND_TOKENS_A_SECOND), config.audio_in_channels)
    return ()


def _text(transformer: ModelMixin) -> tuple[int, int]:
    """Tokens of a prompt, as the pipelines pad it, and their width."""
    config = transformer.config
    if isinstance(transformer, Flux2Transformer2DModel):
        return 512, config.joint_attention_dim
    if isinstance(transformer, WanTransformer3DModel):
        return 512, config.text_dim
    return 1024, 2 * config.caption_channels
