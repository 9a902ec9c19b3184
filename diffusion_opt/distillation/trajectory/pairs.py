"""A store of teacher trajectories: noise in, picture out, and the rungs in between.

Distilling along the teacher's ODE (Luhman & Luhman 2021, arXiv 2101.02388; multi-rung as in CausVid's initialization,
Yin et al. 2024, arXiv 2412.07772) needs its solutions and no data. They are made once: for sample i the noise comes
from a generator seeded by (seed, i) and the class is i mod classes, so the store does not depend on how the work is
split; the guided teacher is solved from t = 1 to 0 and its states at the rungs are kept in half precision.

The store is a folder of safetensors shards and a manifest with each shard's SHA-256. Interrupt it at any time: finished
shards are kept, and calling `generate_pairs` again makes the missing ones.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_opt.datasets.integrity import CorruptFileError, sha256
from diffusion_opt.flow import ALL_TIMES, SAMPLERS, ClassCondition, Guided, VelocityModel, sampling_times

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
    """Trajectories: `states` (N, rungs + 1, *image) from noise to picture, `labels` (N,), `times` (rungs + 1,)."""

    states: Float[Tensor, "n rungs *s"]
    labels: Int[Tensor, " n"]
    times: Float[Tensor, " rungs"]
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "OdePairs":
        """The same trajectories on a device."""
        return OdePairs(self.states.to(device), self.labels.to(device), self.times.to(device), self.num_classes)


def sample_noise(indices: range, shape: tuple[int, ...], seed: int) -> Float[Tensor, "n *s"]:
    """Noise (N, *shape) in which row i depends on (seed, i) only.

    torch's CPU generator keeps the low 32 bits of a seed. Ours lie in the upper half of them, away from the small
    seeds that people and evaluations use, so that no student is judged on noise it was trained on.
    """
    generator = torch.Generator()
    seeds = [2**31 + (seed * 10_000_019 + i) % 2**31 for i in indices]
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])


@torch.no_grad()
def solve(
    teacher: VelocityModel, noise: Float[Tensor, "b *s"], condition: ClassCondition, config: PairConfig
) -> Float[Tensor, "b r *s"]:
    """The guided teacher's states at the rungs, first the noise and last the picture."""
    stride, states = config.num_steps // config.num_rungs, []

    def keep(step: int, x: Tensor, _velocity: Tensor) -> None:
        if step % stride == 0:
            states.append(x)

    guided = Guided(teacher, config.guidance_scale, config.guidance_interval)
    states.append(SAMPLERS[config.solver](guided, noise, sampling_times(config.num_steps), condition, on_step=keep))
    return torch.stack(states, dim=1)


def generate_pairs(
    teacher: VelocityModel,
    image_shape: tuple[int, ...],
    num_classes: int,
    config: PairConfig,
    folder: Path,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> OdePairs:
    """Make (or finish making) the store in `folder` and return it.

    Raises ValueError if the folder holds trajectories made with other settings, CorruptFileError for a damaged shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest_path = folder / MANIFEST
    settings = json.loads(json.dumps(asdict(config)))
    manifest = {"config": settings, "image_shape": list(image_shape), "num_classes": num_classes, "shards": {}}
    if manifest_path.is_file():
        found = json.loads(manifest_path.read_text())
        for key in ("config", "image_shape", "num_classes"):
            if found[key] != manifest[key]:
                raise ValueError(
                    f"{folder} holds pairs with {key}={found[key]}, now {manifest[key]}; use another folder"
                )
        manifest = found
    starts = range(0, config.num_pairs, config.shard_size)
    for start in tqdm(starts, desc=f"{config.num_pairs} trajectories", unit="shard", disable=not progress):
        name = f"pairs-{start:06d}.safetensors"
        if name in manifest["shards"]:
            continue
        indices = range(start, min(start + config.shard_size, config.num_pairs))
        labels = torch.tensor(indices, device=device) % num_classes
        noise = sample_noise(indices, image_shape, config.seed).to(device)
        states = solve(teacher, noise, ClassCondition(labels, num_classes), config)
        save_file({"states": states.half().cpu().contiguous(), "labels": labels.cpu()}, folder / name)
        manifest["shards"][name] = sha256(folder / name)
        fresh = manifest_path.with_suffix(".new")
        fresh.write_text(json.dumps(manifest, indent=2))
        fresh.replace(manifest_path)
    return load_pairs(folder)


def load_pairs(folder: Path) -> OdePairs:
    """Read a store (states in float32). Raises CorruptFileError if it is missing, damaged or not finished."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptFileError(f"{folder} holds no trajectories ({MANIFEST} is missing); make them with generate_pairs")
    manifest = json.loads(path.read_text())
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
    return OdePairs(states, labels, times, manifest["num_classes"])
