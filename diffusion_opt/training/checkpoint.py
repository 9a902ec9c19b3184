"""What a run writes, and how it comes back: safetensors and JSON, one process or many, no pickles.

    checkpoint/state.json                          step, seconds, updates of the average, settings, SHA-256 of all files
    checkpoint/ema.safetensors                     the averaged weights of the first role
    checkpoint/<role>.safetensors                  the weights of each role
    checkpoint/<role>-optimizer.safetensors        AdamW's moments, "<number of the parameter>.<moment>"
    checkpoint/<name>.safetensors                  what the method keeps beside its roles (`Distiller.kept`)

With a sharded role each process writes its own slices, through torch's distributed checkpoint (DCP) with its Hugging
Face writer: `checkpoint/shards/*.safetensors`, where the header of each file says which slice it holds. (DCP's default
writer pickles its metadata; this one does not.) All tensors are in there under "<file>/<name>". Either form is read by
any number of processes, sharded or not.

A role's frozen parameters are not saved: they are as they were, like a teacher. Checkpoints are written beside the old
one, flushed to the disk, and then swapped in. `state.json` comes last, so a folder that has it is complete, and a crash
or a full disk while saving loses nothing. What is read back is what was written: `state.json` holds the SHA-256 of each
file and of its own content, and a byte that changed is an error. Processes must see the same folder.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion_opt.datasets.integrity import sha256
from diffusion_opt.datasets.writing import CorruptFileError, flush, read_json, write_json, write_tensors
from diffusion_opt.training.config import SAME_TO_RESUME, TrainConfig
from diffusion_opt.training.distributed import Processes, is_sharded
from diffusion_opt.training.settings import first_difference

CHECKPOINT = "checkpoint"
STATE = "state.json"
SHARDS = "shards"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TrainState:
    """All that changes during a run."""

    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: nn.Module  # average of the first network
    micro_batches: int
    kept: dict[str, nn.Module] = field(default_factory=dict)  # what the method keeps beside its networks
    step: int = 0
    seconds: float = 0.0
    ema_updates: int = 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file: the run's own tensors, not copies."""
        files = {"ema": _trained(self.ema)}
        for name, network in self.networks.items():
            files[name] = _trained(network)
            parameters = trained(self.optimizers[name])
            states = ((index, self.optimizers[name].state.get(p, {})) for index, p in enumerate(parameters))
            files[f"{name}-optimizer"] = {f"{i}.{part}": value for i, state in states for part, value in state.items()}
        return files | {name: dict(module.state_dict()) for name, module in self.kept.items()}


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer in the order of its groups, which numbers them in checkpoints."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _trained(network: nn.Module) -> dict[str, Tensor]:
    """State of a network without its frozen parameters. An average is frozen as a whole, and then all of it counts."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    if len(frozen) == sum(1 for _ in network.parameters()):
        frozen = set()
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def save(state: TrainState, config: TrainConfig, out: Path, processes: Processes, told: dict[str, Any]) -> None:
    """Write a checkpoint beside the last one, then put it in its place; all processes call it together.

    `told` is what the trainer adds to `state.json`. Raises OSError if the disk is full; the last checkpoint stays.
    """
    final, fresh, old = (out / f"{CHECKPOINT}{end}" for end in ("", ".new", ".old"))
    if processes.is_main:
        shutil.rmtree(fresh, ignore_errors=True)
        if final.is_dir():  # else the last checkpoint is `old`
            shutil.rmtree(old, ignore_errors=True)
        fresh.mkdir(parents=True)
    processes.wait()
    files = state.tensors()
    if any(is_sharded(network) for network in state.networks.values()):
        _write_shards(files, fresh / SHARDS)
    elif processes.is_main:
        for stem, tensors in files.items():
            write_tensors(fresh / f"{stem}.safetensors", tensors)
    processes.wait()
    if processes.is_main:
        numbers = {name: getattr(state, name) for name in ("step", "seconds", "ema_updates", "micro_batches")}
        sums = {path.relative_to(fresh).as_posix(): sha256(path) for path in sorted(fresh.rglob("*.safetensors"))}
        numbers |= told | {"config": asdict(config), "files": sums}
        write_json(fresh / STATE, numbers | {"digest": _digest(numbers)})
        if final.is_dir():
            os.replace(final, old)
        os.replace(fresh, final)
        flush(out)
        shutil.rmtree(old, ignore_errors=True)
    processes.wait()


def _write_shards(files: dict[str, dict[str, Tensor]], folder: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(_flat(files), storage_writer=writer)
    except CheckpointException as error:  # no `Exception`: nobody above would see what happened
        raise OSError(f"could not write {folder}: {error}") from error
    for path in folder.iterdir():
        flush(path)


def _digest(numbers: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def find(out: Path, processes: Processes) -> Path | None:
    """The folder of the last checkpoint, None if there is none; repairs a swap that was interrupted."""
    folder = out / CHECKPOINT
    if processes.is_main and not folder.is_dir():
        for end in (".new", ".old"):  # stopped between the moves of `save`
            if (out / f"{CHECKPOINT}{end}" / STATE).is_file():
                os.replace(out / f"{CHECKPOINT}{end}", folder)
                break
    processes.wait()
    return folder if folder.is_dir() else None


def read_numbers(
    folder: Path, config: TrainConfig, settings: Mapping[str, Any], processes: Processes
) -> dict[str, Any]:
    """`state.json` of a checkpoint; the first process checks all files. `settings`: the method's, see `settings_of`.

    Raises CorruptFileError for a file that is missing or damaged, ValueError if the settings make this another run.
    """
    numbers = read_json(folder / STATE, _remedy(folder))
    if processes.is_main:
        _check_files(folder, numbers)
    before = {part.name: part.default for part in fields(config)} | numbers["config"]
    now = json.loads(json.dumps(asdict(config)))  # as JSON keeps it: tuples are lists
    now["accumulate"] = now["accumulate"] or numbers.get("micro_batches", 1)
    before["accumulate"] = numbers.get("micro_batches", 1)
    names = (*SAME_TO_RESUME, "accumulate")
    different = first_difference({name: before[name] for name in names}, {name: now[name] for name in names})
    different = different or first_difference(numbers.get("method", settings), settings)
    if different is not None:
        name, then, today = different
        raise ValueError(
            f"{folder} was trained with {name}={then}, now {today}; "
            "use the same settings to resume, or another output folder to start anew"
        )
    return numbers


def _remedy(folder: Path) -> str:
    return f"restore it from a copy, or delete {folder} to start anew"


def _check_files(folder: Path, numbers: dict[str, Any]) -> None:
    """Compare the SHA-256 of each file with `state.json`, and that of its own content; older ones have none."""
    if "digest" not in numbers:
        return
    if _digest({name: value for name, value in numbers.items() if name != "digest"}) != numbers["digest"]:
        raise CorruptFileError(f"{folder / STATE} is damaged: its content has changed; {_remedy(folder)}")
    for name, expected in numbers["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptFileError(f"{path} is missing; {_remedy(folder)}")
        if sha256(path) != expected:
            size = path.stat().st_size
            raise CorruptFileError(f"{path} is damaged: its SHA-256 has changed ({size:,} bytes); {_remedy(folder)}")


def load(state: TrainState, folder: Path, numbers: dict) -> None:
    """Put a checkpoint into the run, whatever number of processes wrote it. All processes call it together."""
    shards = folder / SHARDS
    if shards.is_dir():
        reader = dcp.HuggingFaceStorageReader(str(shards))
        saved = reader.read_metadata().state_dict_metadata.keys()
        _make_moments(state, saved)
        _check_names(_flat(state.tensors()), saved, shards)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            dcp.load(_flat(state.tensors()), storage_reader=reader, no_dist=not dist.is_initialized())
    else:
        stems = ("ema", *state.networks, *(f"{name}-optimizer" for name in state.networks), *state.kept)
        files = {stem: load_file(folder / f"{stem}.safetensors") for stem in stems}
        _make_moments(state, _flat(files).keys())
        with torch.no_grad():
            for stem, tensors in state.tensors().items():
                _copy(tensors, files[stem], folder / f"{stem}.safetensors")
    state.step, state.seconds = numbers["step"], numbers["seconds"]
    state.ema_updates = numbers["ema_updates"]


def _flat(files: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{stem}/{name}": tensor for stem, tensors in files.items() for name, tensor in tensors.items()}


def _make_moments(state: TrainState, saved: Collection[str]) -> None:
    """Give each optimizer the moments that the checkpoint has, still empty: torch makes them at the first step only."""
    for name, optimizer in state.optimizers.items():
        for index, parameter in enumerate(trained(optimizer)):
            if f"{name}-optimizer/{index}.step" in saved:
                zero = torch.zeros((), device=parameter.device)
                empty = [torch.zeros_like(parameter), torch.zeros_like(parameter), zero]
                optimizer.state[parameter] = dict(zip(MOMENTS, empty, strict=True))


def _check_names(into: Collection[str], saved: Collection[str], path: Path) -> None:
    if missing := set(into) - set(saved):
        raise ValueError(f"{path} does not fit this network: it lacks {sorted(missing)[0]!r}")


def _copy(into: dict[str, Tensor], source: dict[str, Tensor], path: Path) -> None:
    _check_names(into, source, path)
    for name, tensor in into.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{path}: {name!r} is {tuple(source[name].shape)}, the network's {tuple(tensor.shape)}")
        value = source[name].to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)
