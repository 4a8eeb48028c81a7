"""A text that a trained language model writes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from data.text import END, Vocabulary, tokenise
from optimizers.likelihoods import Categorical
from training.loop import rng
from training.runs.folder import atomic_file
from training.runs.run import Callback, Run


class SampleText(Callback):
    """Lets the model write when training has ended, with the last weights; only where it models language.

    The text goes into the run folder, ``sample.txt``, and to TensorBoard.

    Args:
        prompt: what the text begins with; "": the beginning of a line.
        tokens: how many are written.
        temperature: logits are divided by it: below 1 for the probable, above 1 for the unusual; 0: always the most
            probable token.
        seed: of the draws, which come from a generator of their own.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, prompt: str = "", tokens: int = 100, temperature: float = 0.8, seed: int = 0) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.prompt, self.tokens, self.temperature, self.seed = prompt, tokens, temperature, seed

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        # A model that diverged has nothing to say.
        if not run.world.is_main or run.task.name != "language_modelling" or summary["status"] == "diverged":
            return
        text = self.write(run)
        with atomic_file(run.folder.path / "sample.txt") as file:
            file.write(f"{text}\n".encode())
        for logger in run.loggers:
            logger.text("sample", text, run.step)

    def write(self, run: Run) -> str:
        """The text: prompt and what the model adds to it."""
        facts = run.data.facts
        vocabulary = Vocabulary(facts["words"], facts["level"])
        # A line begins where one has ended; unlike a prompt, that end is not shown.
        start = tokenise(self.prompt, facts["level"]) or [END if facts["level"] == "word" else "\n"]
        seen = vocabulary.encode(start).long().to(run.world.device)
        with rng.observed(run.model, run.world.device), run.precision.autocast():
            written = continued(run.model, seen, self.tokens, facts["sequence"], self.temperature, self.seed)
        return vocabulary.decode(written[0 if self.prompt else 1 :].tolist())


def continued(
    model: nn.Module, tokens: Tensor, count: int, sequence: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """A text with tokens added to it, one at a time, each drawn from what the model says of the next.

    Args:
        model: from int64 ``[1, n]`` to logits ``[1, n, vocabulary]``, for ``n`` up to ``sequence``.
        tokens: int64 ``[n]``, at least one.
        count: how many to add.
        sequence: how many of the last tokens the model is shown.
        temperature: the logits are divided by it; 0: the most probable token.
        seed: of the draws.

    Returns:
        int64 ``[n + count]``.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(tokens[None, -sequence:])[:, -1].float()
        drawn = Categorical().sample(logits / temperature, generator) if temperature else logits.argmax(-1)
        tokens = torch.cat([tokens, drawn])
    return tokens
