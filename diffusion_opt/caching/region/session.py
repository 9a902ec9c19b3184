"""The region cache on one transformer: takes each call, decides which tokens to compute, and fills in the rest.

A `RegionSession` is reached by one diffusers `ModelHook` on the transformer instance, so a pipeline calls its
transformer as ever and gets the velocity of all tokens back:

    tokens to compute?   all: dense pass, fill the slot       some: pass over them, update the slot
    v = slot velocity, with the computed tokens replaced

Slots are keyed by context ("cond", "uncond", or the order of passes that nobody named) and step. What makes them
invalid is checked at each pass: another condition, size, type or device, another schedule (time of the step), other
weights or LoRA scales (at the start of a generation). A generation starts when time rises, returns to where it began,
or a pipeline call has ended. In doubt everything is computed. `attach` puts hook and attention processors in place,
`detach` takes every trace away.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffusion_opt.caching.region.attention import Board, exchange_processors
from diffusion_opt.caching.region.detect import bucket_size
from diffusion_opt.caching.region.families import Call, Family, Forward, Velocity, family_of
from diffusion_opt.caching.region.policy import Choice, Policy, Seen
from diffusion_opt.caching.region.slots import LayerSlot, Precision, Slot, check_precision
from diffusion_opt.caching.step.generation import DEFAULT_CONTEXT
from diffusion_opt.caching.step.hooks import InstanceHook, PassNames, arguments_of, hook_on, remove_hook
from diffusion_opt.caching.step.stack import COMPILED_HOOK_NAME, REGION_HOOK_NAME


@dataclass(frozen=True, slots=True)
class RegionPass:
    """One pass of the transformer: how many of its tokens were computed, and why those."""

    context: str
    step: int
    num_computed: int  # both passes together where a partial one raised the alarm
    num_tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class RegionReport:
    """What the region cache did in the last generation, and the memory its slots take."""

    passes: tuple[RegionPass, ...]
    slot_bytes: int

    @property
    def work(self) -> float:
        """Share of the tokens that were computed, over all passes."""
        return sum(p.num_computed for p in self.passes) / max(sum(p.num_tokens for p in self.passes), 1)

    def __str__(self) -> str:
        if not self.passes:
            return "no passes yet"
        steps = ", ".join(f"{p.context} {p.step}: {p.num_computed}/{p.num_tokens} ({p.reason})" for p in self.passes)
        return f"{self.work:.0%} of the tokens computed, slots {self.slot_bytes / 1e6:.1f} MB [{steps}]"


class RegionSession:
    """State of the region cache on one transformer."""

    def __init__(self, family: Family, policy: Policy, precision: Precision = "native", offload: bool = False) -> None:
        check_precision(precision)
        self.family, self.policy = family, policy
        self.precision, self.offload = precision, offload
        self.board = Board()
        self.mask: Bool[Tensor, " n"] | None = None
        self.slots: dict[tuple[str, int], Slot] = {}
        self.passes: list[RegionPass] = []
        self._conditions: dict[str, dict[str, Any]] = {}
        self._weights: tuple = ()
        self._counts: dict[str, int] = {}  # passes of the generation under way by context; empty: none under way
        self._start = self._time = 0.0

    def run(self, forward: Forward, call: Call, context: str) -> Any:
        """One call of the transformer. Raises ValueError for arguments the family cannot split into tokens."""
        self.family.check(call)
        tokens = self.family.tokens(call)
        missing = self._follow(context, float(call["timestep"].max()))
        step = self._counts[context] - 1
        missing = self._forget_other_conditions(context, call) or missing
        slot, missing = self._find(context, step, tokens, call["timestep"], missing)
        mask = self._mask_for(tokens)
        choice = self.policy.choose(Seen(step, tokens, self.family.positions(call), slot, missing, mask))
        if slot is None and choice.index is not None:  # a step that earlier generations did not have
            choice = Choice(None, missing)
        velocity, num_computed, reason = self._compute(forward, call, tokens, slot, choice, (context, step))
        self.passes.append(RegionPass(context, step, num_computed, tokens.shape[1], reason))
        return self.family.output(call, velocity)

    def end_generation(self) -> None:
        """The next pass begins a new generation. Slots of a policy that keeps none for it are dropped."""
        self._counts = {}
        if not self.policy.slot_per_step:
            self.slots.clear()

    def reset(self) -> None:
        """Forget everything."""
        self.end_generation()
        self.slots.clear()
        self._conditions.clear()

    def report(self) -> RegionReport:
        """Of the last generation, or of the one under way."""
        return RegionReport(tuple(self.passes), sum(slot.bytes for slot in self.slots.values()))

    def _compute(
        self,
        forward: Forward,
        call: Call,
        tokens: Float[Tensor, "b n c"],
        slot: Slot | None,
        choice: Choice,
        at: tuple[str, int],
    ) -> tuple[Velocity, int, str]:
        """The velocity of all tokens, how many were computed for it, and why."""
        num_tried, reason = 0, choice.reason
        if choice.index is not None:
            index = choice.index
            if not len(index) and self.family.can_skip_all:
                return Velocity(slot.velocity.clone()), 0, reason
            if not len(index):
                index = torch.arange(bucket_size(1, tokens.shape[1]), device=tokens.device)
            new = self._pass(forward, call, slot, index)
            if not self.policy.judge(choice, new.tokens, slot.velocity[:, index]):
                whole = slot.update(index, tokens[:, index], new.tokens)
                return Velocity(whole, new.others), len(index), reason
            num_tried, reason = len(index), "alarm"
        if slot is None:
            self.slots.pop(self._key(*at), None)  # one of another size goes before its successor comes
            layers = [LayerSlot(self.precision, self.offload) for _ in range(self.family.num_layers)]
            slot = Slot(layers, call["timestep"].clone())
        velocity = self._pass(forward, call, slot, None)
        slot.fill(tokens, velocity.tokens)
        self.slots[self._key(*at)] = slot
        return velocity, num_tried + tokens.shape[1], reason

    def _pass(self, forward: Forward, call: Call, slot: Slot, index: Int[Tensor, " a"] | None) -> Velocity:
        self.board.layers = slot.layers
        self.board.rows = None if index is None else self.family.rows(call, index)
        try:
            return self.family.velocity(forward, call, index)
        except BaseException:
            self.slots.clear()  # some layers of this one are new and some are old
            raise
        finally:
            self.board.layers = self.board.rows = None

    def _follow(self, context: str, time: float) -> str:
        """Count the pass; the reason to drop all slots if a new generation with other weights begins, else ""."""
        back_at_start = time == self._start and self._counts.get(context)
        missing = ""
        if not self._counts or time > self._time or back_at_start:
            self.end_generation()
            self.policy.begin()
            self.passes, self._start = [], time
            weights = _weights(self.family.module)
            if self._weights and weights != self._weights:
                self.slots.clear()
                missing = "other weights"
            self._weights = weights
        self._time = time
        self._counts[context] = self._counts.get(context, 0) + 1
        return missing

    def _forget_other_conditions(self, context: str, call: Call) -> str:
        condition = self.family.condition(call)
        known = self._conditions.get(context)
        if known is not None and all(_same(condition[name], known[name]) for name in condition):
            return ""
        self._conditions[context] = {name: _kept(value) for name, value in condition.items()}
        for key in [key for key in self.slots if key[0] == context]:
            del self.slots[key]
        return "" if known is None else "other condition"

    def _find(self, context: str, step: int, tokens: Tensor, timestep: Tensor, missing: str) -> tuple[Slot | None, str]:
        slot = self.slots.get(self._key(context, step))
        if slot is None:
            return None, missing or "nothing stored"
        if (slot.tokens.shape, slot.tokens.dtype, slot.tokens.device) != (tokens.shape, tokens.dtype, tokens.device):
            return None, "other size or type"
        if self.policy.slot_per_step and not _same(slot.timestep, timestep):
            return None, "other schedule"
        return slot, ""

    def _key(self, context: str, step: int) -> tuple[str, int]:
        return context, step if self.policy.slot_per_step else 0

    def _mask_for(self, tokens: Float[Tensor, "b n c"]) -> Bool[Tensor, " n"] | None:
        if self.mask is not None and len(self.mask) != tokens.shape[1]:
            raise ValueError(f"the region has {len(self.mask)} tokens, but the transformer was given {tokens.shape[1]}")
        return None if self.mask is None else self.mask.to(tokens.device)


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else dict(value) if isinstance(value, dict) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        kind = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return kind and torch.equal(one, other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return one == other


def _weights(module: nn.Module) -> tuple:
    """Changes when a parameter is replaced or written to, or the scale of an adapter is set."""
    versions = tuple((id(p), -1 if p.is_inference() else p._version) for p in module.parameters())
    scales = tuple(tuple(m.scaling.items()) for m in module.modules() if isinstance(getattr(m, "scaling", None), dict))
    return versions, scales


class _RegionHook(InstanceHook):
    """In place of the transformer's forward."""

    _is_stateful = True

    def __init__(self, session: RegionSession, restore: Callable[[], None]) -> None:
        super().__init__()
        self.session, self.restore = session, restore
        self.names = PassNames()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if torch.is_grad_enabled():
            if not module.training:
                warnings.warn(
                    "the region cache leaves passes with gradients alone: call under torch.no_grad()", stacklevel=2
                )
            return forward(*args, **kwargs)
        call = arguments_of(module, args, kwargs)
        name = self.names.identify(float(call["timestep"].max()), call["hidden_states"])["context"]
        return self.session.run(forward, call, name or DEFAULT_CONTEXT)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline call has ended."""
        self.session.end_generation()
        self.names.forget()
        return module


def attach(
    transformer: nn.Module, policy: Policy, precision: Precision = "native", offload: bool = False
) -> RegionSession:
    """Put the region cache on a transformer. Raises ValueError, saying why, where it cannot be."""
    family = family_of(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("diffusers' own cache is enabled on this transformer: call transformer.disable_cache() first")
    taken = [name for m in transformer.modules() for name in getattr(getattr(m, "_diffusers_hook", None), "hooks", {})]
    if clash := [name for name in taken if name.endswith("_cache") or name == COMPILED_HOOK_NAME]:
        raise ValueError(f"there is a cache on this transformer already ({clash[0]}): remove it first")
    session = RegionSession(family, policy, precision, offload)
    restore = exchange_processors(family.attentions(), session.board)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(
        _RegionHook(session, restore), REGION_HOOK_NAME
    )
    transformer._diffusers_hook.invalidate_child_registries_cache()
    return session


def _hook_on(transformer: nn.Module) -> _RegionHook | None:
    return hook_on(transformer, REGION_HOOK_NAME)


def has_session(transformer: nn.Module, policy: type) -> bool:
    """Whether there is a region cache with this kind of policy on a transformer."""
    hook = _hook_on(transformer)
    return hook is not None and isinstance(hook.session.policy, policy)


def attached_session(transformer: nn.Module) -> RegionSession:
    """The session on a transformer. Raises ValueError if there is none."""
    hook = _hook_on(transformer)
    if hook is None:
        raise ValueError(
            "there is no region cache on this pipeline: apply one first, for example StreamingRegionCache()"
        )
    return hook.session


def detach(transformer: nn.Module) -> None:
    """Take the region cache off again. Raises ValueError if there is none."""
    attached_session(transformer)
    hook_on(transformer, REGION_HOOK_NAME).restore()
    remove_hook(transformer, REGION_HOOK_NAME)
