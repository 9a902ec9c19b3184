"""Adversarial distillation: heads on the features of a diffusion network tell real pictures from the student's.

A diffusion network judges pictures already: its blocks hold features of x_t at every noise level. Small heads on them
make a discriminator for almost nothing, and noise on both sides keeps it from winning at once. With D the logit:

    discriminator   softplus(D(fake_t)) + softplus(-D(real_t)) + weight |D(real_t) - D(real_t + s n)|^2
    student         softplus(-D(fake_t))

LADD (Sauer et al. 2024, arXiv 2403.12015) reads a frozen teacher and needs nothing else: `AdversarialDistillation`.
ADD (2311.17042) adds a pull towards what the teacher makes of the student's picture, |x - sg x_T|^2 (`teacher_weight`).
DMD2 (2405.14867) reads the fake score instead, which it trains anyway; see `dmd.py`. The last term of the first line
approximates R1, the gradient penalty of real pictures, without a second derivative (Lin et al. 2025, arXiv 2501.08316,
equation 4): the same real x_t, at the same time t, with a little more noise. (FastGen and modelopt.torch.fastgen
compare the logit of x_t with that of a clean picture plus s n at that t, which is no small step.)

A discriminator alone does not hold a student that is good already. At one budget, from one start (`ode`, 4.3), the row
`ladd` of `benchmarks/results/distillation_methods.json` ends at 12.4 with r1_weight 1, worse than it began; it is there
for the comparison. `--set gan.r1_weight=100` tries another.

Features are read by forward hooks during one pass, so that any network will do and no forward is copied; each stream
of tokens that a block returns is one feature. The loss functions equal modelopt.torch.fastgen's (tests).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_opt.distillation.distribution.rollout import Noised, StudentRollout
from diffusion_opt.flow import Condition, VelocityModel, interpolate, randn
from diffusion_opt.subjects import UNCONDITIONAL, Conditions
from diffusion_opt.training import Role


def generator_loss(fake: Float[Tensor, "b heads"]) -> Float[Tensor, ""]:
    """mean softplus(-D(fake)): what the student minimizes; non-saturating (Goodfellow et al. 2014, arXiv 1406.2661)."""
    return nn.functional.softplus(-fake).mean()


def discriminator_loss(real: Float[Tensor, "b heads"], fake: Float[Tensor, "b heads"]) -> Float[Tensor, ""]:
    """mean softplus(D(fake)) + mean softplus(-D(real)); its optimum is D = log(p_real / p_fake)."""
    return nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()


def approximate_r1(real: Float[Tensor, "b heads"], perturbed: Float[Tensor, "b heads"]) -> Float[Tensor, ""]:
    """mean |D(x_t) - D(x_t + s n)|^2, about s^2 |grad D|^2 for small s."""
    return (real - perturbed).square().mean()


@dataclass(frozen=True, slots=True)
class GanSettings:
    """Weights of the adversarial terms. The defaults are those of an addition to distribution matching."""

    student_weight: float = 3e-3
    critic_weight: float = 1e-2
    r1_weight: float = 0.0  # times critic_weight; 100 and more in Lin et al. 2025, at large scale
    r1_noise: float = 0.1  # s above

    def __post_init__(self) -> None:
        if min(self.student_weight, self.critic_weight, self.r1_weight) < 0 or self.r1_noise <= 0:
            raise ValueError(f"weights must not be negative and r1_noise must be positive, got {self}")


class FeatureHeads(nn.Module):
    """One small head for each feature: normalized, a hidden layer on each token, the mean over tokens, one logit."""

    def __init__(self, layers: tuple[str, ...], widths: tuple[int, ...], hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.layers = layers
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(n), nn.Linear(n, hidden), nn.SiLU(), nn.Linear(hidden, 1)) for n in widths
            )

    @classmethod
    def of(
        cls,
        network: nn.Module,
        sample_shape: tuple[int, ...],
        conditions: Conditions = UNCONDITIONAL,
        layers: tuple[str, ...] | None = None,
        hidden: int = 64,
        seed: int = 0,
    ) -> "FeatureHeads":
        """Heads that fit `network`; one pass on an empty picture tells the widths.

        `layers` are names of submodules, by default `feature_layers(network)`. Raises ValueError as `captured` does.
        """
        layers = feature_layers(network) if layers is None else layers
        device = next(network.parameters()).device
        condition = conditions.draw(1, torch.Generator(device).manual_seed(0))
        with torch.no_grad(), captured(network, layers) as features:
            network(torch.zeros(1, *sample_shape, device=device), torch.ones(1, device=device), condition)
        return cls(layers, tuple(feature.shape[-1] for feature in features), hidden, seed).to(device)

    def forward(self, features: list[Float[Tensor, "b ..."]]) -> Float[Tensor, "b heads"]:
        """Logits (B, heads) of features (B, width) or (B, tokens, width). Raises ValueError for another number."""
        if len(features) != len(self.heads):
            raise ValueError(f"{len(self.heads)} heads need as many features, got {len(features)}")
        logits = [head(feature).flatten(1).mean(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.stack(logits, dim=1)


def feature_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the blocks at 50, 75 and 100 % of the depth: the members of the outermost module lists, in order.

    A network without lists has the activations of its sequences instead. Raises ValueError if it has neither.
    """
    blocks = [name for name, _ in _members(network, nn.ModuleList)]
    if not blocks:
        blocks = [name for name, module in _members(network, nn.Sequential) if not list(module.parameters())]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no list of blocks: name the layers whose output is to be read")
    places = dict.fromkeys(max(0, round(depth * len(blocks)) - 1) for depth in (0.5, 0.75, 1.0))
    return tuple(blocks[place] for place in places)


def _members(network: nn.Module, kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Name and module of each member of the containers of a kind; containers inside members do not count."""
    outer = []
    for name, module in network.named_modules():
        if isinstance(module, kind) and not any(name.startswith(f"{other}.") for other in outer):
            outer.append(name)
    return [
        (f"{name}.{child}", module) for name in outer for child, module in network.get_submodule(name).named_children()
    ]


@contextmanager
def captured(network: nn.Module, layers: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """During this block a pass of `network` leaves the outputs of `layers` in the list, in the order of the pass.

    A layer that returns several tensors gives several features. Raises ValueError for a layer that does not exist.
    """
    features: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        features.extend(part for part in outputs if isinstance(part, Tensor))

    modules = dict(network.named_modules())
    if missing := [name for name in layers if name not in modules]:
        raise ValueError(f"{type(network).__name__} has no layers {missing}; see named_modules()")
    handles = [modules[name].register_forward_hook(keep) for name in layers]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """During this block gradients flow through the modules to their inputs and not into their weights."""
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def critic_terms(
    logits: Callable[[Tensor, Tensor, Condition | None], Tensor],
    real: Float[Tensor, "b *s"],
    real_condition: Condition | None,
    fake: Float[Tensor, "b heads"],
    t: Float[Tensor, " b"],
    settings: GanSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The discriminator's terms: "loss" is weighted, "gan" not, `real_logit` and `fake_logit` are means.

    `real` is clean; it is noised to the times t at which the student's pictures got their logits `fake`.
    """
    real_t = interpolate(real, randn(tuple(real.shape), generator), t)
    found = logits(real_t, t, real_condition)
    terms = {"gan": discriminator_loss(found, fake), "real_logit": found.detach().mean()}
    terms |= {"fake_logit": fake.detach().mean(), "loss": terms["gan"]}
    if settings.r1_weight:
        nearby = real_t + settings.r1_noise * randn(tuple(real.shape), generator)
        terms["r1"] = approximate_r1(found, logits(nearby, t, real_condition))
        terms["loss"] = terms["loss"] + settings.r1_weight * terms["r1"]
    return terms | {"loss": settings.critic_weight * terms["loss"]}


@dataclass(kw_only=True)
class AdversarialDistillation(StudentRollout):
    """A `Distiller`: `student` against `head` on the features of `network`, a frozen velocity network (the teacher's).

    `data` are the real pictures: images of a training set, or the teacher's own. With `teacher_weight` (ADD) `teacher`,
    guided or not, pulls as well.
    """

    network: nn.Module
    head: FeatureHeads
    gan: GanSettings = field(default_factory=lambda: GanSettings(1.0, 1.0, 1.0))
    teacher: VelocityModel | None = None
    teacher_weight: float = 0.0

    critic: ClassVar[str] = "discriminator"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise ValueError("a discriminator needs real pictures: give data=, the training images or the teacher's")
        if (self.teacher_weight > 0) != (self.teacher is not None):
            raise ValueError(f"teacher= and teacher_weight > 0 go together, got a weight of {self.teacher_weight}")

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student), self.critic: Role(self.head, self.fake_rate)}

    def student_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """`gan` and, with a teacher, `teacher_distance`; `fake_logit` is 0 where the head cannot tell."""
        with frozen(self.head):
            fake = self.logits(batch.x_t, batch.t, batch.condition)
        losses = {"gan": generator_loss(fake), "fake_logit": fake.detach().mean()}
        losses["loss"] = self.gan.student_weight * losses["gan"]
        if self.teacher is not None:
            with torch.no_grad():
                teacher_x = batch.clean(self.teacher)
            losses["teacher_distance"] = (batch.x - teacher_x).square().mean()
            losses["loss"] = losses["loss"] + self.teacher_weight * losses["teacher_distance"]
        return losses

    def critic_losses(self, batch: Noised, generator: torch.Generator) -> dict[str, Tensor]:
        """See `critic_terms`."""
        fake = self.logits(batch.x_t, batch.t, batch.condition)
        real, condition = self.real(generator, len(batch.x))
        return critic_terms(self.logits, real, condition, fake, batch.t, self.gan, generator)

    def logits(
        self, x_t: Float[Tensor, "b *s"], t: Float[Tensor, " b"], condition: Condition | None
    ) -> Float[Tensor, "b heads"]:
        """D of noisy pictures; gradients go to x_t and to the heads, never into `network`."""
        with frozen(self.network), captured(self.network, self.head.layers) as features:
            self.network(x_t, t, condition)
        return self.head(features)
