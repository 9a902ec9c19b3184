"""What holds for every test: no network, one thread, a fixed seed, and shapes checked at run time.

jaxtyping's annotations cost nothing in use; here an import hook has beartype check each call of `diffusion_opt`, so a
test fails where a shape is wrong and not three calls later. torch.compile cannot trace through those checks, so tests
marked `compiled` run in their own call, `pytest -m compiled`, without the hook. A test that hands over wrong shapes on
purpose, to read the function's own error, is marked `wrong_shapes`. One thread makes sums come out the same on every
machine, and small tensors are no slower for it.

Tests marked `interpreted` run Triton kernels: in the interpreter, or compiled where there is a GPU. The hook leaves
kernels alone: they are source text for another compiler, not Python.
"""

import ast
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "agg")

import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import jaxtyping._import_hook as jaxtyping_hook
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def wants(marker: str, expression: str) -> bool:
    """Whether a pytest `-m` expression asks for the tests with this marker."""
    return marker in expression and f"not {marker}" not in expression


def check_all_functions_but_kernels() -> None:
    """Install the hook; to it a function under `@triton.jit` is one under `@no_type_check`."""
    opts_out = jaxtyping_hook._is_no_type_check
    jaxtyping_hook._is_no_type_check = lambda decorator: opts_out(decorator) or ast.unparse(decorator) == "triton.jit"
    install_import_hook("diffusion_opt", "shape_checks.check")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, which tests send
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # and one under nohup the closing of a terminal
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not wants("compiled", config.option.markexpr):
        check_all_functions_but_kernels()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    hooked = not wants("compiled", config.option.markexpr)
    for item in items:
        if hooked and item.get_closest_marker("compiled"):
            item.add_marker(pytest.mark.skip(reason="run-time shape checks are on; use `pytest -m compiled`"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Layers are initialized from torch's global generator: start each test from the same state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shape_checks_off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests marked `wrong_shapes`: let the function itself meet the wrong argument."""
    if request.node.get_closest_marker("wrong_shapes"):
        monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def shipped() -> "Callable[[str], DiffusionPipeline]":
    """Opens a shipped model by name; a missing one fails the test."""
    import diffusion_opt

    def open_quietly(name: str) -> "DiffusionPipeline":
        pipe = diffusion_opt.load(name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return open_quietly


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn any attempt to leave this machine into an error that names the address."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise RuntimeError(f"a test tried to connect to {address}: tests must not use the network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
