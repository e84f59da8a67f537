"""Trained stages, compiled once a process for all of its trials."""

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_modules.backbones import run_stages
from lightning_modules.errors import InputError

Pass = Callable[[Sequence[nn.Module], Tensor], Tensor]

# Graphs a process may compile. Each backbone and depth takes two to seven: for training and for
# validation, for batches of 16 images and more, of 2 to 15, and of 1, and for each memory layout.
# torch's own limit is 8, after which it compiles no more and says so only in a log.
MAX_GRAPHS = 256


@functools.cache
def compiled_pass(cache_dir: Path) -> Pass:
    """Return ``run_stages`` for ``torch.compile`` to compile when it is first called.

    Weights are arguments of what is compiled, so that the stages of another trial of the same
    backbone and depth need no compiling.

    Args:
        cache_dir: Where compiled kernels are kept for other processes; not the folder in /tmp that
            torch would take, whose name others can know.
    """
    from torch._inductor import config

    # Importing torchvision has set the variable already.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir / "compiled")
    compiled = torch.compile(run_stages)

    def run(stages: Sequence[nn.Module], activations: Tensor) -> Tensor:
        # torch's settings are a thread's own, and each trial has another thread.
        torch.compiler.config.recompile_limit = MAX_GRAPHS
        # Compiled in this process: a pool of compilers would stay beside a worker.
        config.compile_threads = 1
        torch._dynamo.maybe_mark_dynamic(activations, 0)
        result: Tensor = compiled(list(stages), activations)
        return result

    return run


def num_compiled() -> int:
    """Return how many graphs this process has compiled."""
    if not compiled_pass.cache_info().currsize:
        return 0
    from torch._dynamo.utils import counters  # takes a second where nothing is compiled

    return int(counters["stats"]["unique_graphs"])


def check_compiler() -> None:
    """Refuse where nothing can be compiled.

    Raises:
        InputError: If there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"training.compile needs a C++ compiler; {compiler} is not found: install it (Debian: "
            "g++), or leave training.compile out"
        )
