"""Several processes, one run: torch's own process group, gradients averaged or networks sharded, steps taken together.

    torchrun --nproc-per-node 8 …            every process runs the same program
    with process_group() as processes:       joins them (NCCL on GPUs, gloo on CPUs); without torchrun it is one alone

A network in training is held in one of two ways, chosen for each role (`TrainConfig.sharded`):

    replicated    each process has all of it; gradients are averaged in one all-reduce after the last micro-batch
    sharded       FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277): each holds a slice of every parameter,
                  gradient, moment and average, and gathers a block's weights only while it computes with them

The first is what `DistributedDataParallel` computes (a test compares them). The class itself is not used: it finds out
about gradients by hooks in `forward`, and a distillation loss calls a network several times, through `torch.func.jvp`
or without gradient; under `jvp` it skips the averaging in silence. Both ways work on the module in place, so a method
holds its networks as ever and knows nothing of processes.

A sharded network must be called equally often on every process, since each call is a message to the others: a loss that
draws how many passes it makes needs a form that makes all of them.

What could differ between processes is agreed on once per step: the time used, a wish to stop, logged values. So a
budget that ends, or a Ctrl-C that reaches one process alone, ends the run for all after the same step.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Processes:
    """Who this process is among those of the run, and the few things they say to one another."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"  # on which messages travel

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(message, dist.ReduceOp.MAX)
        return message.tolist()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each named value over the processes, which must all give the same names."""
        if self.world_size == 1:
            return values
        names = sorted(values)
        message = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(message)
        means = dict(zip(names, (message / self.world_size).tolist(), strict=True))
        return {name: means[name] for name in values}

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes; the tensor itself for one."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient of a replicated network by its mean over the processes, all in one message."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world_size == 1 or not gradients:
            return
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        message /= self.world_size
        for gradient, mean in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def same_start(self, network: nn.Module) -> None:
        """Give a replicated network the weights of the first process."""
        if self.world_size > 1:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the first process runs before the others, which then find its files."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def processes() -> Processes:
    """The processes of this run. Raises RuntimeError if torchrun started several and they have not joined."""
    if dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), "cuda" if dist.get_backend() == "nccl" else "cpu")
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise RuntimeError(
            "torchrun started several processes, but they have not joined and would all do the same work; "
            "put the program into `with diffusion_opt.training.process_group():`"
        )
    return Processes()


@contextmanager
def process_group(device: str = "cpu") -> Iterator[Processes]:
    """Join the processes that torchrun started, for this block; alone without torchrun.

    On `device` "cuda" each takes the GPU of its local rank. A group that exists already is used and left as it is.
    """
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        yield processes()
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield processes()
    finally:
        dist.destroy_process_group()


def shard(network: nn.Module) -> nn.Module:
    """Shard a network over the processes in place (FSDP2), block by block; for one process it stays as it is.

    Blocks are the members of its outermost module lists, as in every diffusers transformer; the rest is one more unit.
    For frozen networks, such as a large teacher, call it yourself; the trainer does it for its roles.
    """
    among = processes()
    if among.world_size == 1 or is_sharded(network):
        return network
    if isinstance(network, nn.ModuleDict):  # several networks as one role: nobody calls the dictionary itself
        for part in network.values():
            shard(part)
        return network
    mesh = dist.device_mesh.init_device_mesh(among.device, (among.world_size,))
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` (or `fully_shard`) has been at work."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every process must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists that have parameters."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)
