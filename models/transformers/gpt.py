"""GPT-1 (Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018), of any size."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.parts.checks import check_rates
from models.weights.pickles import read_pickled

log = logging.getLogger(__name__)

STD = 0.02  # of every weight at the start

# What a file raises that is of another format, or damaged.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention. Queries, keys and values have a layer each, so that each has curvature of its own.

    Args:
        width: of the signal; divisible by ``heads``.
        heads: that attend side by side.
        dropout: probability that a position does not see another one.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, width]`` to the same."""
        # [batch, heads, sequence, width / heads]
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two layers at each position; each added to its input and normalised after.

    Args:
        width: of the signal.
        heads: of the attention.
        dropout: of the attention and of what is added.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, width]`` to the same."""
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.contract(functional.gelu(self.expand(x)))))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions.

    Args:
        vocabulary: how many tokens there are.
        sequence: the most positions it can look at.
        layers: blocks.
        width: of the signal.
        heads: of each attention.
        dropout: of embeddings, attention and what blocks add.
        tie: whether the output layer's weight is the embedding's.
    """

    def __init__(
        self, vocabulary: int, sequence: int, layers: int, width: int, heads: int, dropout: float, tie: bool
    ) -> None:
        super().__init__()
        self.sequence = sequence
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if tie:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 ``[batch, n]``, ``n`` at most ``sequence``, to logits ``[batch, n, vocabulary]`` of the next."""
        # Positions are looked up for each example, so that curvature sees whose gradient is whose.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.blocks(self.dropout(self.tokens(tokens) + self.positions(places))))


def gpt(
    layers: int,
    width: int,
    heads: int,
    dropout: float = 0.1,
    tie: bool = True,
    embeddings: str | None = None,
    freeze: bool = False,
    *,
    vocabulary: int,
    sequence: int,
    words: Sequence[str],
) -> nn.Module:
    """GPT-1: learned positions, causal self-attention, GELU, and normalisation after each sum.

    With 12 layers of width 768, the published vocabulary of 40,478 and 512 positions it has the published 117 million
    parameters. It starts at N(0, 0.02²), as published.

    Args:
        layers: blocks.
        width: of the signal.
        heads: of each attention; the width must be divisible by it.
        dropout: of embeddings, attention and what each block adds.
        tie: the output layer's weight is the embedding's, as published.
        embeddings: file of pretrained embeddings of this width: ``.npz`` (arrays ``words`` and ``vectors``), ``.pt``
            (a dictionary of the two, ``words`` a list), or the text of word2vec and GloVe, a word a line with its
            numbers behind it. Words that it lacks start at random. None: all do.
        freeze: do not train the embeddings (nor the output layer, where it is tied to them).
        vocabulary: how many tokens there are.
        sequence: tokens that are seen at once.
        words: the tokens, for ``embeddings``.

    Returns:
        A module from int64 ``[b, n]`` to logits ``[b, n, vocabulary]``, for ``n`` up to ``sequence``.

    Raises:
        ValueError: for a number out of its range, or embeddings that cannot be read or do not fit.
    """
    for name, value in {"layers": layers, "width": width, "heads": heads}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % heads:
        raise ValueError(f"heads must divide the width of {width}, got {heads}")
    check_rates(dropout=dropout)
    model = GPT(vocabulary, sequence, layers, width, heads, dropout, tie)
    if embeddings is not None:
        _load_embeddings(model.tokens.weight, words, Path(embeddings).expanduser())
    model.tokens.weight.requires_grad_(not freeze)
    return model


@torch.no_grad()
def _load_embeddings(weight: Tensor, words: Sequence[str], path: Path) -> None:
    """Set the rows of the words that a file has, and say how many these were."""
    rows = {word: row for row, word in enumerate(words)}
    try:
        found = _read_embeddings(path, rows)
        vectors = torch.from_numpy(np.stack(list(found.values()))) if found else weight[:0]
    except UNREADABLE as error:
        reason = shorten(str(error), 300)
        raise ValueError(
            f"embeddings must be a .npz, .pt or word2vec text file, and {path} is none ({reason})"
        ) from error
    if not found:
        raise ValueError(f"embeddings must have words in common with the data set, and {path} has none")
    if vectors.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embeddings must be vectors of the model's width, and those of {path} have {vectors.shape[1]} numbers: "
            f"set model.width={vectors.shape[1]} in place of {weight.shape[1]}"
        )
    weight[[rows[word] for word in found]] = vectors.to(weight)
    # A warning, so that it is seen on the terminal, unless there is nothing to be warned of.
    level = logging.INFO if len(found) == len(words) else logging.WARNING
    log.log(level, "embeddings: %d of %d tokens are in %s; the others start at random", len(found), len(words), path)


def _read_embeddings(path: Path, wanted: dict[str, int]) -> dict[str, np.ndarray]:
    """The vectors of those words that are wanted."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as content:
            pairs = zip(content["words"].tolist(), np.asarray(content["vectors"], np.float32), strict=True)
            return {word: vector for word, vector in pairs if word in wanted}
    if path.suffix in (".pt", ".pth"):
        content = read_pickled(path)
        pairs = zip(content["words"], content["vectors"].float().numpy(), strict=True)
        return {word: vector for word, vector in pairs if word in wanted}
    from data.sources.reading import read_lines  # the one thing that a model takes from there: how texts are read

    found = {}
    for line in read_lines(path):
        word, _, numbers = line.rstrip().partition(" ")
        if word in wanted and " " in numbers:  # word2vec begins with a line of two numbers
            found[word] = np.array(numbers.split(), np.float32)
    return found
