"""A program for torchrun: runs named trainings of a tiny two-network method, each in a folder of its own.

    torchrun --standalone --nproc-per-node 2 tests/torchrun_program.py <out> <scenario> …

Many scenarios share one launch, because most of a launch is the import of torch. Tests import the method and
`run` from here to do the same work in one process.
"""

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import small_pipelines
import torch
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition, clean_from_velocity, interpolate, randn, velocity_target
from diffusion_opt.models import PointVelocity, velocity_model
from diffusion_opt.training import Role, TrainConfig, TrainResult, process_group, processes, shard, train
from diffusion_opt.training.lora import LoraSettings, adapters

SETTINGS = {"batch_size": 12, "accumulate": 2, "learning_rate": 1e-2, "warmup_steps": 2, "log_every": 1}
SETTINGS |= {"checkpoint_seconds": 1e9, "decay_fraction": 0.0}


class Scaled(PointVelocity):
    """With a parameter of one row, as Wan's modulation tables have: no part of it falls to the second process."""

    def __init__(self, seed: int) -> None:
        super().__init__(2, 3, width=9, depth=2, seed=seed)
        self.scale = nn.Parameter(torch.ones(1, 2))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.scale * super().forward(*args, **kwargs)


class Chase:
    """A student fits data that lie on a line; every third step is its turn. A fake score fits the student."""

    def __init__(self, seed: int = 0) -> None:
        self.student, self.fake_score = (Scaled(seed + i) for i in range(2))
        for network in (self.student, self.fake_score):
            small_pipelines.fill(network, seed=seed)
        self.at_step: Callable[[int], object] = lambda step: None
        self.calls = 0

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Role(self.student), "fake_score": Role(self.fake_score, rate=2.0)}

    def turn(self, step: int) -> str:
        return "student" if step % 3 == 0 else "fake_score"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        self.at_step(self.calls)
        self.calls += 1
        condition = ClassCondition(torch.randint(3, (batch_size,), generator=generator), 3)
        x = torch.rand(batch_size, 1, generator=generator) * torch.tensor([[1.0, -2.0]])
        noise, t = randn((batch_size, 2), generator), torch.rand(batch_size, generator=generator)
        if turn == "fake_score":
            with torch.no_grad():
                x = clean_from_velocity(noise, self.student(noise, torch.ones(batch_size), condition), t * 0 + 1)
        velocity = getattr(self, turn)(interpolate(x, noise, t), t, condition)
        error = velocity - velocity_target(x, noise)
        return {"loss": error.square().mean(), "largest": error.detach().abs().max()}


class Pictures:
    """A small FLUX.2 fits random pictures: a network with blocks, each of which is sharded by itself."""

    def __init__(self) -> None:
        self.model = velocity_model(small_pipelines.small_pipeline())

    @property
    def roles(self) -> dict[str, Role]:
        return {"model": Role(self.model)}

    def turn(self, step: int) -> str:
        return "model"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        condition = ClassCondition(torch.randint(10, (batch_size,), generator=generator), 10)
        x, t = randn((batch_size, 1, 16, 16), generator), torch.rand(batch_size, generator=generator)
        with torch.no_grad():
            self.model(x, t, condition)  # more than one pass before backward, as distillation losses have
        return {"loss": (self.model(x, t, condition) - x).square().mean()}


class Adapters:
    """Student and fake score are adapters of one FLUX.2, which is the teacher and may be sharded."""

    def __init__(self, sharded: bool = False) -> None:
        self.teacher = velocity_model(small_pipelines.small_pipeline())
        if sharded:
            shard(self.teacher.requires_grad_(False))
        self.networks = adapters(self.teacher, ("student", "fake_score"), LoraSettings(rank=2))

    @property
    def roles(self) -> dict[str, Role]:
        return {name: Role(network) for name, network in self.networks.items()}

    def turn(self, step: int) -> str:
        return ("student", "fake_score")[step % 2]

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        condition = ClassCondition(torch.randint(10, (batch_size,), generator=generator), 10)
        x, t = randn((batch_size, 1, 16, 16), generator), torch.rand(batch_size, generator=generator)
        with torch.no_grad():
            target = 1 - self.teacher(x, t, condition)
        return {"loss": (self.networks[turn](x, t, condition) - target).square().mean()}


def run(out: Path, method: object, **settings: object) -> TrainResult:
    return train(method, TrainConfig(**SETTINGS | {"steps": 7} | settings), out, progress=False)


def _interrupted(out: Path) -> TrainResult:
    """Ctrl-C reaches the second process alone, in the middle of step 4."""
    method = Chase()
    method.at_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 and processes().rank == 1 else None
    return run(out, method, sharded=("student",))


def _slow(out: Path) -> TrainResult:
    """The second process is slower than the first: whose minutes count?"""
    method = Chase()
    method.at_step = lambda step: time.sleep(0.05 * processes().rank)
    return run(out, method, steps=None, minutes=0.2 / 60)


def _torch_ddp(out: Path) -> TrainResult:
    """One step by hand with torch's DistributedDataParallel; the gradients go to a file beside those of the loop."""
    ours, theirs = Pictures(), Pictures()
    among = processes()
    wrapped = nn.parallel.DistributedDataParallel(theirs.model)
    for method in (ours, theirs):
        generator = torch.Generator().manual_seed(among.rank)
        x, t = randn((4, 1, 16, 16), generator), torch.rand(4, generator=generator)
        condition = ClassCondition(torch.randint(10, (4,), generator=generator), 10)
        (wrapped if method is theirs else ours.model)(x, t, condition).square().mean().backward()
    parameters = list(ours.model.parameters())
    before = [copy.deepcopy(p.grad) for p in parameters]
    among.average_gradients(parameters)
    moved = max(float((p.grad - b).abs().max()) for p, b in zip(parameters, before, strict=True))
    apart = max(
        float((p.grad - q.grad).abs().max()) for p, q in zip(parameters, theirs.model.parameters(), strict=True)
    )
    (out / f"gradients-{among.rank}.json").write_text(json.dumps({"moved": moved, "apart": apart}))
    return run(out, Chase(), steps=1)


BOTH = ("student", "fake_score")
SCENARIOS: dict[str, Callable[[Path], TrainResult]] = {
    "replicated": lambda out: run(out, Chase()),
    "sharded": lambda out: run(out, Chase(), sharded=BOTH),
    "mixed": lambda out: run(out, Chase(), sharded=("fake_score",)),
    "pictures": lambda out: run(out, Pictures(), steps=2, sharded=("model",)),
    "adapters": lambda out: run(out, Adapters(sharded=True), steps=3),
    "begun_by_two": lambda out: run(out, Chase(), steps=4, sharded=BOTH),
    "finished_by_two": lambda out: run(out, Chase(seed=5), sharded=BOTH),
    "finished_by_two_replicated": lambda out: run(out, Chase(seed=5)),
    "interrupted": _interrupted,
    "slow": _slow,
    "torch_ddp": _torch_ddp,
}


def main(out: Path, names: list[str]) -> None:
    with process_group() as among:
        for name in names:
            (out / name).mkdir(parents=True, exist_ok=True)
            result = SCENARIOS[name](out / name)
            on_meta = any(p.is_meta for p in result.ema.parameters())
            told = {"step": result.step, "seconds": result.seconds, "finished": result.finished, "meta": on_meta}
            told |= {"history": result.history, "rank": among.rank, "world_size": among.world_size}
            if not on_meta:
                told["average"] = {n: p.flatten().tolist() for n, p in result.ema.named_parameters()}
            (out / name / f"result-{among.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
