"""How long it takes, and how much memory: timings that can be compared, and bytes that are really there.

Two programs timed one after the other are compared under different temperatures, neighbors and clock rates. So all
candidates take turns in one process, A B C A B C ..., and each gets the median over its turns with the interquartile
range; a slow minute then touches all of them. A call that is too short for the clock is repeated within its turn. On a
GPU the queue is drained before and after each turn.

Memory is the rise while a call runs, above what was resident when it began; the weights, which lie there already, are
counted apart by `weight_bytes`. On a GPU the rise is that of torch's allocator. On Linux without one it is that of the
process's resident set (VmHWM of /proc/self/status, reset through /proc/self/clear_refs): the system's own figure,
libraries' scratch space included, exact to a megabyte or so because free pages are reused and the kernel counts in
batches. Where neither exists the answer is None and never a guess.
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

T = TypeVar("T")
MIN_TURN_S = 0.05  # a turn lasts at least this long, by repeating the call


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call takes, one sample a round; `repeats` calls were averaged within each sample."""

    samples_s: tuple[float, ...]
    repeats: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile (the sample itself if there is one)."""
        if len(self.samples_s) == 1:
            return self.samples_s[0], self.samples_s[0]
        first, _, third = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return first, third

    @property
    def iqr_s(self) -> float:
        first, third = self.quartiles_s
        return third - first


def interleaved(
    callables: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    min_turn_s: float = MIN_TURN_S,
    progress: bool = True,
) -> dict[str, Timing]:
    """Time all callables in turns (A B A B ...), after `warmup` >= 1 calls of each that also set the repeats.

    Raises ValueError if there is nothing to time or `rounds` or `warmup` is below 1.
    """
    if not callables:
        raise ValueError("nothing to time: pass at least one named callable")
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got rounds={rounds}, warmup={warmup}")
    samples: dict[str, list[float]] = {name: [] for name in callables}
    repeats = {}
    with tqdm(total=(rounds + warmup) * len(callables), desc="timing", disable=not progress, leave=False) as bar:
        for name, call in callables.items():
            for _ in range(warmup):
                bar.set_postfix_str(f"warm up {name}")
                elapsed = _seconds(call, 1)
                bar.update()
            repeats[name] = max(1, math.ceil(min_turn_s / max(elapsed, 1e-9)))
        for _ in range(rounds):
            for name, call in callables.items():
                bar.set_postfix_str(name)
                samples[name].append(_seconds(call, repeats[name]) / repeats[name])
                bar.update()
    return {name: Timing(tuple(values), repeats[name]) for name, values in samples.items()}


def timed(call: Callable[[], T], min_turn_s: float = MIN_TURN_S) -> tuple[T, float]:
    """Result of a call and the seconds it takes; one too short for the clock is repeated and averaged."""
    _drain()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < min_turn_s:
        result = call()
        calls += 1
        _drain()
    return result, (time.perf_counter() - start) / calls


def _seconds(call: Callable[[], object], times: int) -> float:
    _drain()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _drain()
    return time.perf_counter() - start


def _drain() -> None:
    """Wait for the GPU if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Bytes by which memory rose at most while `call` ran; None where the system cannot tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    if not _reset_high_water():
        call()
        return None
    before = _resident_bytes("VmRSS")
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def _return_free_memory() -> None:
    """Give freed heap pages back (glibc), or the next call would reuse them unseen."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@runtime_checkable
class StoresPacked(Protocol):
    """A module that keeps weights where torch does not see them (packed, compressed) says how many bytes they take."""

    @property
    def weight_bytes(self) -> int: ...


def weight_bytes(module: nn.Module) -> int:
    """Bytes that the weights of a module really occupy: parameters and buffers, shared storage once, packed int8 too.

    A submodule with its own `weight_bytes` is believed and not entered. The packed linears of `torch.ao` count one byte
    per weight, a float32 scale and an int32 zero point per channel, and their bias.
    """
    seen: set[int] = set()
    return sum(_stored(part, seen) for part in _parts(module))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, each once; not what lies below a module that answers for itself."""
    pending, seen = [module], set()
    while pending:
        part = pending.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            if not isinstance(part, StoresPacked):
                pending.extend(part.children())


def _stored(module: nn.Module, seen: set[int]) -> int:
    if isinstance(module, StoresPacked):
        return int(module.weight_bytes)
    if isinstance(module, torch.ao.nn.quantized.modules.linear.LinearPackedParams):
        weight, bias = module._weight_bias()
        channels = weight.shape[0] if weight.qscheme() == torch.per_channel_affine else 1
        return weight.numel() * weight.element_size() + 8 * channels + (0 if bias is None else bias.nbytes)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(_storage_bytes(tensor, seen) for tensor in tensors)


def _storage_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    key = storage.data_ptr() or id(tensor)  # tensors without memory (meta) have no address to share
    if key in seen:
        return 0
    seen.add(key)
    return storage.nbytes()
