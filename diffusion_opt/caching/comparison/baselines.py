"""Caches of other libraries, to stand beside ours in one table: diffusers' own, and cache-dit.

Each is a small frozen object with `on(pipe)`, a context manager: the cache is on the pipeline inside it and every trace
of it is gone behind it, so that a comparison can go from one to the next on one pipeline. One `with` serves one
generation: state that a library carries into the next (cache-dit refreshes one call late, diffusers' step counters run
on in loops of one's own) would make the second run another than the first.

    with taylor_seer(every=5, first=3).on(pipe): pipe("sneaker")

What cannot run says why, as `CannotRunError`, in the library's own words where it has any: FirstBlockCache stumbles
over the block types of FLUX.2 and LTX-2, a pattern of TaylorSeer may match no module at all (which diffusers takes in
silence), cache-dit may not be installed. What runs and does nothing is not refused here: its arithmetic tells.

Of diffusers, PyramidAttentionBroadcast (Zhao et al. 2024, arXiv 2408.12588) and FasterCache (Lv et al. 2024, arXiv
2410.19355) keep one state for all guidance passes. Where guidance takes two passes per step, one pass gets the
attention of the other; they are shown as they are. FasterCache's own treatment of guidance wants both halves in one
batch and images rather than tokens, so only its attention part can run on these pipelines. MagCache takes the ratios of
our calibration, because its own are only printed. cache-dit (github.com/vipshop/cache-dit) runs its first `Fn` blocks
at every step, in FLUX.2 in both stacks.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

from diffusion_opt.caching.step.hooks import remove_hook

# What the libraries' hooks raise on models they do not fit.
MISFITS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, AssertionError, NotImplementedError)


class CannotRunError(ValueError):
    """This cache cannot run on this pipeline, and here is why."""


@dataclass(frozen=True, slots=True)
class DiffusersCache:
    """A cache of diffusers: its name, and its configuration for a pipeline."""

    name: str
    configure: Callable[[DiffusionPipeline], Any]

    def describe(self) -> str:
        return f"diffusers' {self.name}"

    @contextmanager
    def on(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """The cache is enabled within. Raises CannotRunError, also for what goes wrong in the passes."""
        transformer = pipe.transformer
        before = _hooked(transformer)
        with _only_errors("diffusers"):
            try:
                transformer.enable_cache(self.configure(pipe))
                if _hooked(transformer) == before:
                    raise CannotRunError(
                        f"{self.describe()} matched none of the modules of {type(transformer).__name__}"
                    )
                yield
            except MISFITS as error:
                raise _refusal(self.describe(), transformer, error) from error
            finally:
                if transformer.is_cache_enabled:
                    transformer.disable_cache()
                _sweep(transformer, before)


def first_block(threshold: float) -> DiffusersCache:
    """First-block cache: skip while the first block's residual has changed less than the threshold."""
    return DiffusersCache(f"FirstBlockCache at {threshold:.4g}", lambda pipe: FirstBlockCacheConfig(threshold))


def mag_cache(threshold: float, ratios: Sequence[float], max_skips: int, retention: float) -> DiffusersCache:
    """MagCache on calibrated ratios, one a step."""

    def configure(pipe: DiffusionPipeline) -> MagCacheConfig:
        return MagCacheConfig(
            threshold=threshold,
            max_skip_steps=max_skips,
            retention_ratio=retention,
            num_inference_steps=len(ratios),
            mag_ratios=list(ratios),
        )

    return DiffusersCache(f"MagCache at {threshold:.4g}", configure)


def taylor_seer(
    every: int, first: int = 3, order: int = 1, last: int | None = None, identifiers: tuple[str, ...] | None = None
) -> DiffusersCache:
    """TaylorSeer: compute the first steps, then every n-th, and all from step `last` on.

    Without `identifiers` it is the light variant, which predicts the output of the transformer alone: the only one that
    spares the whole stack. With them, the modules that match are predicted.
    """

    def configure(pipe: DiffusionPipeline) -> TaylorSeerCacheConfig:
        return TaylorSeerCacheConfig(
            cache_interval=every,
            disable_cache_before_step=first,
            disable_cache_after_step=last,
            max_order=order,
            taylor_factors_dtype=pipe.transformer.dtype,
            cache_identifiers=None if identifiers is None else list(identifiers),
            use_lite_mode=identifiers is None,
        )

    until = "" if last is None else f", all from {last}"
    return DiffusersCache(f"TaylorSeer of order {order}, first {first}, then every {every}{until}", configure)


def pyramid_attention(every: int) -> DiffusersCache:
    """Pyramid attention broadcast at all times: attention is computed every n-th time, the rest of a block always."""

    def configure(pipe: DiffusionPipeline) -> PyramidAttentionBroadcastConfig:
        everywhere = (-1, 1001)
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every,
            cross_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=everywhere,
            cross_attention_timestep_skip_range=everywhere,
            current_timestep_callback=lambda: pipe.current_timestep,
        )

    return DiffusersCache(f"PyramidAttentionBroadcast every {every}", configure)


def faster_cache(every: int) -> DiffusersCache:
    """FasterCache's attention part at all times: attention is computed every n-th time and extrapolated between."""

    def configure(pipe: DiffusionPipeline) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=(-1, 1000),  # not the first step, where it has nothing to go by
            current_timestep_callback=lambda: pipe.current_timestep,
            is_guidance_distilled=True,
        )

    return DiffusersCache(f"FasterCache every {every}", configure)


@dataclass(frozen=True, slots=True)
class CacheDit:
    """cache-dit's DBCache: by threshold, or by a `mask` of steps; with an `order` it predicts by TaylorSeer."""

    num_steps: int
    two_passes: bool  # guidance in a second pass of each step
    threshold: float = 0.08  # change of the first block's residual; its own default
    mask: tuple[bool, ...] | None = None  # True: compute; the threshold is then not asked
    order: int | None = None  # None: reuse
    warmup: int = 2  # steps always computed at the start; 8 in cache-dit

    def describe(self) -> str:
        how = f"at {self.threshold:.4g}" if self.mask is None else f"on {sum(self.mask)} given steps"
        return f"cache-dit's DBCache {how}" + ("" if self.order is None else f", TaylorSeer of order {self.order}")

    @contextmanager
    def on(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """The cache is enabled within. Raises CannotRunError, also for what goes wrong in the passes."""
        if importlib.util.find_spec("cache_dit") is None:
            raise CannotRunError("cache-dit is not installed: pip install cache-dit==1.5.3")
        import cache_dit

        transformer = pipe.transformer
        before = [(module, dict(vars(module)), dict(module._modules)) for module in transformer.modules()]
        with _only_errors("cache_dit"):
            try:
                cache_dit.enable_cache(transformer, cache_config=self._config(), calibrator_config=self._calibrator())
                yield
            except MISFITS as error:
                raise _refusal(self.describe(), transformer, error) from error
            finally:
                cache_dit.disable_cache(transformer)
                _restore(before)

    def _config(self) -> Any:
        from cache_dit import DBCacheConfig

        by_mask = {} if self.mask is None else {
            "steps_computation_mask": [int(computed) for computed in self.mask], "steps_computation_policy": "static",
        }  # fmt: skip
        return DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup,
            num_inference_steps=self.num_steps,
            enable_separate_cfg=self.two_passes,
            **by_mask,
        )

    def _calibrator(self) -> Any:
        from cache_dit import TaylorSeerCalibratorConfig

        return None if self.order is None else TaylorSeerCalibratorConfig(taylorseer_order=self.order)


def _refusal(name: str, transformer: nn.Module, error: Exception) -> CannotRunError:
    if isinstance(error, CannotRunError):
        return error
    reason = str(error).strip().splitlines() or ["no message"]
    return CannotRunError(f"{name} fails on {type(transformer).__name__}: {type(error).__name__}: {reason[0]}")


def _hooked(transformer: nn.Module) -> set[tuple[str, str]]:
    """Names of modules and of the diffusers hooks on them."""
    return {
        (name, hook)
        for name, module in transformer.named_modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks
    }


def _sweep(transformer: nn.Module, before: set[tuple[str, str]]) -> None:
    """Take off the hooks that came since: `disable_cache` leaves some behind when `enable_cache` failed midway."""
    modules = dict(transformer.named_modules())
    for name, hook in _hooked(transformer) - before:
        remove_hook(modules[name], hook)
    if hasattr(transformer, "_diffusers_hook"):
        transformer._diffusers_hook.invalidate_child_registries_cache()


def _restore(before: list[tuple[nn.Module, dict[str, Any], dict[str, nn.Module]]]) -> None:
    """Give modules their attributes and their parts back.

    cache-dit leaves a bound `forward`, of LTX-2 one with another signature, and of FLUX.2 the two block lists in the
    other order, after which diffusers' caches take the last block for the first.
    """
    for module, attributes, parts in before:
        now = vars(module)
        for name in set(now) - set(attributes) - {"_diffusers_hook"}:
            del now[name]
        if "forward" in attributes:
            now["forward"] = attributes["forward"]
        module._modules.clear()
        module._modules.update(parts)


@contextmanager
def _only_errors(package: str) -> Iterator[None]:
    """Libraries that announce each step of theirs are heard only if something fails."""
    known = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == package]
    loggers = [logging.getLogger(name) for name in known]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
