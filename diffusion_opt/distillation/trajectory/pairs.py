"""A store of teacher trajectories: noise in, picture out, and the rungs in between.

Distilling along the teacher's ODE (Luhman & Luhman 2021, arXiv 2101.02388; multi-rung as in CausVid's initialization,
Yin et al. 2024, arXiv 2412.07772) needs its solutions and no data. They are made once: for sample i the noise comes
from a generator seeded by (seed, i) and the condition has the number i mod n, so the store does not depend on how the
work is split; the guided teacher is solved from t = 1 to 0 and its states at the rungs are kept in half precision.

The store is a folder of safetensors shards and a manifest: each shard's SHA-256, the settings, and the `source`, which
says whose trajectories these are. Another source is refused, since a student would learn from a teacher that is not
its own. Interrupt it at any time: finished shards are kept, and calling `generate_pairs` again makes the missing ones.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.datasets import CorruptFileError, folder_lock, read_json, write_json, write_tensors
from diffusion_opt.datasets.integrity import sha256
from diffusion_opt.flow import ALL_TIMES, SAMPLERS, Condition, Guided, VelocityModel, sampling_times
from diffusion_opt.subjects import Classes, Conditions
from diffusion_opt.subjects.subject import described, same_source

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class PairConfig:
    """Which trajectories to make."""

    num_pairs: int
    guidance_scale: float
    guidance_interval: tuple[float, float] = ALL_TIMES  # times at which it counts, see `Guided`
    num_rungs: int = 4  # jumps that are kept: states at 1, 1 - 1/n, …, 0
    num_steps: int = 16  # solver steps from 1 to 0; a multiple of num_rungs
    solver: str = "adams_bashforth2"
    seed: int = 0
    shard_size: int = 256

    def __post_init__(self) -> None:
        if self.num_pairs < 1 or self.num_rungs < 1 or self.shard_size < 1:
            raise ValueError(f"num_pairs, num_rungs and shard_size must be at least 1, got {self}")
        if self.num_steps % self.num_rungs:
            raise ValueError(f"num_steps={self.num_steps} must be a multiple of num_rungs={self.num_rungs}")
        if self.solver not in SAMPLERS:
            raise ValueError(f"solver must be one of {sorted(SAMPLERS)}, got {self.solver!r}")


@dataclass(frozen=True)
class OdePairs:
    """Trajectories: `states` (N, rungs + 1, *sample) from noise to picture, `times` (rungs + 1,) and `labels` (N,), the
    numbers of their `conditions`.
    """

    states: Float[Tensor, "n rungs *s"]
    labels: Int[Tensor, " n"]
    times: Float[Tensor, " rungs"]
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "OdePairs":
        """The same trajectories on a device."""
        return OdePairs(self.states.to(device), self.labels.to(device), self.times.to(device), self.conditions)


def sample_noise(indices: range, shape: tuple[int, ...], seed: int) -> Float[Tensor, "n *s"]:
    """Noise (N, *shape) in which row i depends on (seed, i) only.

    torch's CPU generator keeps the low 32 bits of a seed. Ours lie in the upper half of them, away from the small
    seeds that people and evaluations use, so that no student is judged on noise it was trained on.
    """
    generator = torch.Generator()
    seeds = [2**31 + (seed * 10_000_019 + i) % 2**31 for i in indices]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])


def solve(
    teacher: VelocityModel, noise: Float[Tensor, "b *s"], condition: Condition | None, config: PairConfig
) -> Float[Tensor, "b r *s"]:
    """The states at the rungs of `teacher` with the config's guidance, first the noise and last the picture."""
    return follow(Guided(teacher, config.guidance_scale, config.guidance_interval), noise, condition, config)


@torch.no_grad()
def follow(
    guided: VelocityModel, noise: Float[Tensor, "b *s"], condition: Condition | None, config: PairConfig
) -> Float[Tensor, "b r *s"]:
    """The same for a teacher that is guided already, in whatever way."""
    stride, states = config.num_steps // config.num_rungs, []

    def keep(step: int, x: Tensor, _velocity: Tensor) -> None:
        if step % stride == 0:
            states.append(x)

    states.append(SAMPLERS[config.solver](guided, noise, sampling_times(config.num_steps), condition, on_step=keep))
    return torch.stack(states, dim=1)


def generate_pairs(
    guided: Callable[[float, tuple[float, float]], VelocityModel],
    sample_shape: tuple[int, ...],
    conditions: Conditions,
    config: PairConfig,
    folder: Path,
    *,
    source: Mapping[str, str],
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> OdePairs:
    """Make (or finish making) the store in `folder` and return it.

    `guided` gives the teacher with a guidance scale in an interval of times, those of the config: `subject.guided`, or
    `partial(Guided, teacher)`. `source` is what the teacher is, a `Subject`'s identity; it is stored and compared.

    Raises ValueError if the folder holds trajectories of another source or other settings,
    CorruptFileError for a damaged shard, FloatingPointError for a teacher whose pictures are not finite, and
    FolderInUseError if another process makes them just now.
    """
    wanted = {
        "source": dict(source),
        "config": json.loads(json.dumps(asdict(config))),
        "sample_shape": list(sample_shape),
        "num_conditions": len(conditions),
    }
    if not _missing(_manifest(folder, wanted), config):
        return load_pairs(folder)
    teacher = guided(config.guidance_scale, config.guidance_interval)
    with folder_lock(folder, "trajectories"):
        manifest = _manifest(folder, wanted)  # what another process has made meanwhile is kept
        for start in tqdm(
            _missing(manifest, config),
            desc=f"{config.num_pairs} trajectories",
            unit="shard",
            disable=not progress,
        ):
            indices = range(start, min(start + config.shard_size, config.num_pairs))
            labels = torch.tensor(indices, device=device) % max(len(conditions), 1)
            noise = sample_noise(indices, sample_shape, config.seed).to(device)
            states = follow(teacher, noise, conditions[labels], config).half()
            _check_finite(states, indices, source)
            write_tensors(folder / _shard(start), {"states": states.cpu(), "labels": labels.cpu()})
            manifest["shards"][_shard(start)] = sha256(folder / _shard(start))
            write_json(folder / MANIFEST, manifest)
    return load_pairs(folder)


def _manifest(folder: Path, wanted: dict) -> dict:
    """The folder's manifest, or an empty one. Raises ValueError if it is of another source or other settings."""
    if not (folder / MANIFEST).is_file():
        return {**wanted, "shards": {}}
    found = read_json(folder / MANIFEST, "delete the folder and make the trajectories anew")
    for key, value in wanted.items():
        if key == "source":
            if not same_source(found.get(key), wanted[key]):
                raise ValueError(
                    f"{folder} holds trajectories of the teacher {described(found.get(key))}, now it is "
                    f"{described(wanted[key])}; use another folder"
                )
        elif found.get(key) != value:
            raise ValueError(f"{folder} holds pairs with {key}={found.get(key)}, now {value}; use another folder")
    return found


def _missing(manifest: dict, config: PairConfig) -> list[int]:
    """Where the shards begin that are not there yet."""
    starts = range(0, config.num_pairs, config.shard_size)
    return [start for start in starts if _shard(start) not in manifest["shards"]]


def _shard(start: int) -> str:
    return f"pairs-{start:06d}.safetensors"


def _check_finite(states: Float[Tensor, "n rungs *s"], indices: range, source: Mapping[str, str]) -> None:
    """Raises FloatingPointError, naming teacher and sample, unless all states are finite (in half precision)."""
    bad = (~states.isfinite().flatten(1).all(1)).nonzero()[:, 0]
    if len(bad):
        raise FloatingPointError(
            f"the teacher ({source.get('name', 'of no name')}) makes no finite picture of sample "
            f"{indices[int(bad[0])]}: look for NaN in its weights, or a guidance scale that is too strong; this shard "
            "was not written"
        )


def load_pairs(folder: Path) -> OdePairs:
    """Read a store (states in float32). Raises CorruptFileError if it is missing, damaged or not finished."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptFileError(f"{folder} holds no trajectories ({MANIFEST} is missing); make them with generate_pairs")
    manifest = read_json(path, "delete the folder and make the trajectories anew")
    shards = []
    for name, digest in sorted(manifest["shards"].items()):
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CorruptFileError(f"{folder / name} is missing or damaged; delete the folder and make the pairs anew")
        shards.append(load_file(folder / name))
    labels = torch.cat([shard["labels"] for shard in shards])
    if len(labels) != manifest["config"]["num_pairs"]:
        raise CorruptFileError(f"{folder} is not finished: {len(labels)} of {manifest['config']['num_pairs']} pairs")
    # Each shard by itself: under bfloat16 autocast torch refuses to concatenate float16.
    states = torch.cat([shard["states"].float() for shard in shards])
    times = sampling_times(manifest["config"]["num_rungs"]).float()
    return OdePairs(states, labels, times, Classes(manifest["num_conditions"]))
