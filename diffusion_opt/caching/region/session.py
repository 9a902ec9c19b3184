"""The region cache on one transformer: takes each call, decides which tokens to compute, and fills in the rest.

A `RegionSession` is reached by one diffusers `ModelHook` on the transformer instance, so a pipeline calls its
transformer as ever and gets the velocity of all tokens back:

    tokens to compute?   all: dense pass, fill the slot       some: pass over them, update the slot
    v = slot velocity, with the computed tokens replaced

Slots are keyed by context ("cond", "uncond", or the order of passes that nobody named) and step. What makes them
invalid is checked at each pass: another condition, size, type or device, another schedule (time of the step), another
network (`network.py`: at the start of a generation), and another frame: all slots that a generation uses must have
been brought up to date by the same earlier one, so what a canceled frame left undone is computed in full. Generations
are told apart as step caches tell them (`generation.py`), and each thread has slots of its own. In doubt everything is
computed.
`attach` puts hook and attention processors in place, `detach` takes every trace away.
"""

import copy
import threading
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffusion_opt.caching.region.attention import Board, Exchanged
from diffusion_opt.caching.region.detect import bucket_size
from diffusion_opt.caching.region.families import Call, Family, Forward, Velocity, family_of
from diffusion_opt.caching.region.policy import Choice, Policy, Seen
from diffusion_opt.caching.region.slots import LayerSlot, Precision, Slot, check_precision
from diffusion_opt.caching.step.generation import Generation, Moment
from diffusion_opt.caching.step.hooks import (
    InstanceHook,
    PassNames,
    arguments_of,
    check_removable,
    hook_on,
    put_hook,
    remove_hook,
)
from diffusion_opt.caching.step.network import NetworkState
from diffusion_opt.caching.step.running import Whereabouts
from diffusion_opt.caching.step.stack import COMPILED_HOOK_NAME, REGION_HOOK_NAME
from diffusion_opt.models.block_stack import block_stack

Kind = TypeVar("Kind", bound=Policy)


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


class _Memory(threading.local):
    """What one thread keeps."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.slots: dict[tuple[str, int], Slot] = {}
        self.passes: list[RegionPass] = []
        self.conditions: dict[str, dict[str, Any]] = {}
        self.network: NetworkState | None = None
        self.at: Generation | None = None  # None: no generation is under way
        self.number = 0  # of the generation under way
        self.source: int | None = None  # the generation whose slots this one uses, from its first pass on


class RegionSession:
    """State of the region cache on one transformer. The thread that makes it uses the policy given, others a copy."""

    def __init__(self, family: Family, policy: Policy, precision: Precision = "native", offload: bool = False) -> None:
        check_precision(precision)
        self.family = family
        self.precision, self.offload = precision, offload
        self.board = Board()
        self.mask: Bool[Tensor, " n"] | None = None
        self.last_report = RegionReport((), 0)
        self._fresh_policy = copy.deepcopy(policy)
        self._memory = _Memory()
        self._memory.policy = policy
        self._warned = False

    @property
    def policy(self) -> Policy:
        """The policy of this thread."""
        if self._memory.policy is None:
            self._memory.policy = copy.deepcopy(self._fresh_policy)
        return self._memory.policy

    @property
    def slots(self) -> dict[tuple[str, int], Slot]:
        """The slots of this thread."""
        return self._memory.slots

    @property
    def passes(self) -> list[RegionPass]:
        """The passes of this thread's last generation, or of the one under way."""
        return self._memory.passes

    def run(self, forward: Forward, call: Call, moment: Moment) -> Any:
        """One call of the transformer. Raises ValueError for arguments the family cannot split into tokens."""
        self.family.check(call)
        tokens, context = self.family.tokens(call), moment.context
        missing = self._follow(moment)
        step = len(self._memory.at.passes[context])
        missing = self._forget_other_conditions(context, call) or missing
        slot, missing = self._find(context, step, tokens, call["timestep"], missing)
        mask = self._mask_for(tokens)
        choice = self.policy.choose(Seen(step, tokens, self.family.positions(call), slot, missing, mask))
        if slot is None and choice.index is not None:  # a step that earlier generations did not have
            choice = Choice(None, missing)
        velocity, num_computed, reason = self._compute(forward, call, tokens, slot, choice, (context, step))
        self.slots[self._key(context, step)].number = self._memory.number
        self._memory.at.passes[context].append((moment.time, num_computed > 0))
        self.passes.append(RegionPass(context, step, num_computed, tokens.shape[1], reason))
        return self.family.output(call, velocity)

    def end_generation(self) -> None:
        """The next pass begins a new generation. Slots of a policy that keeps none for it are dropped."""
        memory = self._memory
        if memory.at is not None:
            self.last_report = self.report()
            self._conclude()
        memory.at = None
        if not self.policy.slot_per_step:
            self.slots.clear()

    def reset(self) -> None:
        """Forget everything that this thread has kept."""
        self._memory.at = None
        self.slots.clear()
        self._memory.conditions.clear()

    def report(self) -> RegionReport:
        """Of this thread's last generation, or of the one under way; where it had none, of the last of any thread."""
        if not self.passes:
            return self.last_report
        return RegionReport(tuple(self.passes), sum(slot.bytes for slot in self.slots.values()))

    def _conclude(self) -> None:
        """Warn, once, if nothing was saved where something should have been."""
        remedy = self.policy.remedy(self.passes)
        if remedy is not None and not self._warned:
            self._warned = True
            warnings.warn(f"the region cache computed every token of every pass: {remedy}", UserWarning, stacklevel=2)

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

    def _follow(self, moment: Moment) -> str:
        """Note the pass; the reason to drop all slots if a new generation with another network begins, else ""."""
        memory, missing = self._memory, ""
        if memory.at is None or not memory.at.goes_on_with(moment):
            self.end_generation()
            self.policy.begin()
            memory.passes, memory.at, memory.source = [], Generation.beginning(moment), None
            memory.number += 1
            network = NetworkState(self.family.module)
            if memory.network is not None and network != memory.network:
                self.slots.clear()
                missing = "other weights"
            memory.network = network
        memory.at.note(moment)
        return missing

    def _forget_other_conditions(self, context: str, call: Call) -> str:
        condition, conditions = self.family.condition(call), self._memory.conditions
        known = conditions.get(context)
        if known is not None and all(_same(condition[name], known[name]) for name in condition):
            return ""
        conditions[context] = {name: _kept(value) for name, value in condition.items()}
        for key in [key for key in self.slots if key[0] == context]:
            del self.slots[key]
        return "" if known is None else "other condition"

    def _find(self, context: str, step: int, tokens: Tensor, timestep: Tensor, missing: str) -> tuple[Slot | None, str]:
        slot = self.slots.get(self._key(context, step))
        if slot is None:
            return None, missing or "nothing stored"
        if (slot.tokens.shape, slot.tokens.dtype, slot.tokens.device) != (tokens.shape, tokens.dtype, tokens.device):
            return None, "other size or type"
        if not self.policy.slot_per_step:
            return slot, ""
        if not _same(slot.timestep, timestep):
            return None, "other schedule"
        if self._memory.source is None:
            self._memory.source = slot.number
        return (slot, "") if slot.number == self._memory.source else (None, "other frame")

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


class _RegionHook(InstanceHook):
    """In place of the transformer's forward."""

    _is_stateful = True

    def __init__(self, session: RegionSession, pipe: DiffusionPipeline | None, processors: Exchanged) -> None:
        super().__init__()
        self.session, self.processors = session, processors
        self.names = PassNames()
        self._whereabouts = Whereabouts(pipe)
        self._stack = block_stack(session.family.module)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if torch.is_grad_enabled():
            if not module.training:
                warnings.warn(
                    "the region cache leaves passes with gradients alone: call under torch.no_grad()", stacklevel=2
                )
            return forward(*args, **kwargs)
        call = arguments_of(module, args, kwargs)
        time, sample = float(call["timestep"].max()) / self._stack.timestep_scale, call["hidden_states"]
        running = self._whereabouts.of(module, lambda: time)
        seen = self.names.identify(time if running is None else running.time, sample)
        moment = Moment.of(seen["context"], seen["time"], seen["step"], running, sample=sample)
        return self.session.run(forward, call, moment)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline call has ended."""
        self.session.end_generation()
        self.names.forget()
        return module


def attach(
    transformer: nn.Module,
    policy: Policy,
    precision: Precision = "native",
    offload: bool = False,
    pipe: DiffusionPipeline | None = None,
) -> RegionSession:
    """Put the region cache on a transformer. Raises ValueError, saying why, where it cannot be.

    `pipe` is what loops without a pipeline are asked for (`step/running.py`).
    """
    family = family_of(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("diffusers' own cache is enabled on this transformer: call transformer.disable_cache() first")
    taken = [name for m in transformer.modules() for name in getattr(getattr(m, "_diffusers_hook", None), "hooks", {})]
    if clash := [name for name in taken if name.endswith("_cache") or name == COMPILED_HOOK_NAME]:
        raise ValueError(f"there is a cache on this transformer already ({clash[0]}): remove it first")
    session = RegionSession(family, policy, precision, offload)
    processors = Exchanged(family.attentions(), session.board)
    put_hook(transformer, _RegionHook(session, pipe, processors), REGION_HOOK_NAME)
    transformer._diffusers_hook.invalidate_child_registries_cache()
    return session


def _hook_on(transformer: nn.Module) -> _RegionHook | None:
    return hook_on(transformer, REGION_HOOK_NAME)


def policy_of(transformer: nn.Module, kind: type[Kind]) -> Kind | None:
    """The policy of this thread in the region cache on a transformer, if it is of this kind."""
    hook = _hook_on(transformer)
    return hook.session.policy if hook is not None and isinstance(hook.session.policy, kind) else None


def attached_session(transformer: nn.Module) -> RegionSession:
    """The session on a transformer. Raises ValueError if there is none."""
    hook = _hook_on(transformer)
    if hook is None:
        raise ValueError(
            "there is no region cache on this pipeline: apply one first, for example StreamingRegionCache()"
        )
    return hook.session


def detach(transformer: nn.Module) -> None:
    """Take the region cache off again.

    Raises ValueError, before anything is touched, if there is none, or if something was put over it since.
    """
    attached_session(transformer)
    processors = hook_on(transformer, REGION_HOOK_NAME).processors
    processors.check()
    check_removable(transformer, REGION_HOOK_NAME)
    processors.restore()
    remove_hook(transformer, REGION_HOOK_NAME)
