"""Random number generators of all kinds: seeded, saved and put back together; models looked at without a trace."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from training.loop import compiler


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's (CPU and GPU) generators. The same seed on every rank gives the same model."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator a training step may use, as tensors and primitives (what ``weights_only`` loads)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what ``get_state`` returned. A state from a CPU leaves a GPU's generator alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def part_ways(rank: int, step: int = 0) -> None:
    """Let this rank draw its own dropout masks: all ranks were seeded alike, so that they build the same model."""
    if rank > 0:
        seed_everything((torch.initial_seed() + 1_000_003 * rank + step) % 2**63)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Ask torch for kernels that repeat themselves bit for bit; an operation that has none warns and runs as it is."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic  # its one setting is made at run time, unseen by type checkers
    fill, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    _ask("warn")
    memory.fill_uninitialized_memory = False  # costs time, and nothing here reads unwritten memory
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        _ask(before)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def _ask(mode: str | int) -> None:
    """`torch.set_deterministic_debug_mode`, which the compiler's own setting follows if there is a compiler."""
    torch.set_deterministic_debug_mode(mode)
    if compiler.imported():
        torch.use_deterministic_algorithms(
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )


@contextmanager
def observed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In the block the model is in evaluation mode, without gradients; mode and generators are then as they were."""
    training, state = model.training, get_state(device)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        set_state(state, device)
        model.train(training)
