"""GPT-1: its mathematics against plain loops, causality, counts, tied and pretrained embeddings."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.transformers.gpt import gpt
from tests.conftest import ROOT
from training.settings.composition import compose

WORDS = ["the", "cat", "sat", "on", "a", "mat", "<unk>"]


def small(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"layers": 2, "width": 8, "heads": 2, "dropout": 0.0}
    facts: dict[str, Any] = {"vocabulary": len(WORDS), "sequence": 5, "words": WORDS}
    return gpt(**settings | options, **facts)


def loud(model: nn.Module) -> nn.Module:
    """Larger weights than those at the start, so that every term of the formula matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def by_hand(state: dict[str, Tensor], tokens: list[int], layers: int, heads: int) -> Tensor:
    """The logits of one text, position by position and head by head."""

    def linear(name: str, x: Tensor) -> Tensor:
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        return state[f"{name}.weight"] * centred / (centred.square().mean() + 1e-5).sqrt() + state[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    xs = [state["tokens.weight"][token] + state["positions.weight"][t] for t, token in enumerate(tokens)]
    size = len(xs[0]) // heads
    for layer in range(layers):
        at = f"blocks.{layer}.attention"
        q, k, v = ([linear(f"{at}.{name}", x) for x in xs] for name in ("query", "key", "value"))
        after = []
        for t, x in enumerate(xs):
            mixed = []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = torch.stack([q[t][part] @ k[s][part] / math.sqrt(size) for s in range(t + 1)])
                mixed.append(sum(p * v[s][part] for s, p in enumerate(scores.softmax(0))))
            y = norm(f"blocks.{layer}.norm1", x + linear(f"{at}.out", torch.cat(mixed)))
            inner = gelu(linear(f"blocks.{layer}.expand", y))
            after.append(norm(f"blocks.{layer}.norm2", y + linear(f"blocks.{layer}.contract", inner)))
        xs = after
    return torch.stack([state["head.weight"] @ x for x in xs])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tie", [True, False])
def test_outputs_are_those_of_the_formula(tie: bool) -> None:
    model = loud(small(tie=tie)).eval()
    tokens = torch.tensor([[3, 1, 4, 1, 5], [6, 2, 2, 0, 1]])
    expected = torch.stack([by_hand(model.state_dict(), line.tolist(), 2, 2) for line in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(tokens[:, :3]), expected[:, :3], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tie", [True, False])
def test_gradients_are_finite_differences(tie: bool) -> None:
    model = loud(small(layers=1, width=4, tie=tie))
    tokens, targets = torch.tensor([[3, 1, 4, 0], [6, 2, 2, 5]]), torch.tensor([[1, 4, 0, 2], [2, 2, 5, -100]])

    def loss() -> Tensor:
        return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    step = 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 7)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[index] += sign * step
                    values.append(float(loss()))
                    parameter.view(-1)[index] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            assert difference == pytest.approx(float(gradient.flatten()[index]), rel=1e-5, abs=1e-8)


@pytest.mark.usefixtures("float64")
def test_no_token_changes_what_came_before_it() -> None:
    model = loud(small()).eval()
    tokens = torch.randint(7, (3, 5))
    logits = model(tokens)
    for position in range(5):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 7
        difference = (model(changed) - logits).abs().amax((0, 2))
        assert (difference[:position] == 0).all() and (difference[position:] > 1e-6).all()


def test_counts_are_the_published_ones() -> None:
    """117 million with the published vocabulary and 512 positions; on the meta device, which keeps no numbers."""
    options = compose(["model=gpt1", "dataset=wikitext2"]).values["model"]
    del options["_target_"]
    with torch.device("meta"):
        published = gpt(**options, vocabulary=40_478, sequence=512, words=[])
        untied = gpt(**options | {"tie": False}, vocabulary=40_478, sequence=512, words=[])
    count, more = (sum(p.numel() for p in model.parameters()) for model in (published, untied))
    assert count == 116_534_784 and more == count + 40_478 * 768
    assert sum(p.numel() for p in published.blocks.parameters()) == 12 * 7_087_872


def test_the_small_one_is_what_its_file_says() -> None:
    options = compose(["model=gpt1_mini", "dataset=wikitext2"]).values["model"]
    title = (ROOT / "configs" / "model" / "gpt1_mini.yaml").read_text().splitlines()[0]
    del options["_target_"]
    with torch.device("meta"):
        model = gpt(**options, vocabulary=10, sequence=256, words=[])
    assert f"{(sum(p.numel() for p in model.parameters()) - 10 * 256) / 1e6:.1f} million" in title


def test_it_starts_at_a_uniform_prediction() -> None:
    model = gpt(4, 64, 4, dropout=0.0, vocabulary=100, sequence=16, words=[])
    logits = model(torch.randint(100, (4, 16))).detach()
    assert float(logits.logsumexp(-1).mean()) == pytest.approx(math.log(100), abs=0.1)
    assert float(model.tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_tied_weights_are_one_tensor_that_is_trained_by_both_roles() -> None:
    model = small()
    assert model.head.weight is model.tokens.weight
    assert "head.weight" not in dict(model.named_parameters())
    before = model.tokens.weight.detach().clone()
    model(torch.tensor([[0, 1]])).log_softmax(-1)[..., 2].sum().backward()
    gradient = model.tokens.weight.grad
    assert gradient is not None and (gradient[[3, 4]] != 0).any(), "as an output, a token is trained that was no input"
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(model.head.weight, before - gradient) and model.head.weight is model.tokens.weight


def test_dropout_is_for_training_alone() -> None:
    model, tokens = small(dropout=0.5), torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


# ------------------------------------------------------------------------------------------- pretrained embeddings


def write_embeddings(folder: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """Vectors of three words of ours and one other in a file."""
    draw = np.random.default_rng(0)
    vectors = {word: draw.standard_normal(8).astype(np.float32) for word in ("mat", "cat", "dog", "the")}
    path = folder / f"vectors.{kind}"
    if kind == "npz":
        np.savez(path, words=np.array(list(vectors)), vectors=np.stack(list(vectors.values())))
    elif kind == "pt":
        torch.save({"words": list(vectors), "vectors": torch.from_numpy(np.stack(list(vectors.values())))}, path)
    else:
        lines = [f"{word} {' '.join(f'{number:.9g}' for number in vector)}" for word, vector in vectors.items()]
        path.write_text("\n".join((["4 8"] if kind == "vec" else []) + lines) + "\n", encoding="utf-8")
    return path, vectors


@pytest.mark.parametrize("kind", ["npz", "pt", "vec", "txt"])
def test_pretrained_embeddings_are_found_by_their_words(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, vectors = write_embeddings(tmp_path, kind)
    torch.manual_seed(1)
    fresh = small().tokens.weight
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO):
        model = small(embeddings=str(path), freeze=True)
    assert "embeddings: 3 of 7 tokens are in" in caplog.text and caplog.records[0].levelno == logging.WARNING
    for row, word in enumerate(WORDS):
        expected = torch.from_numpy(vectors[word]) if word in vectors else fresh[row]
        torch.testing.assert_close(model.tokens.weight[row], expected, rtol=1e-6, atol=1e-7)
    assert not model.head.weight.requires_grad and model.positions.weight.requires_grad
    assert small(embeddings=str(path)).tokens.weight.requires_grad
    assert small(embeddings=str(path), freeze=True, tie=False).head.weight.requires_grad


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_embeddings_in_text_may_come_from_any_system(tmp_path: Path, mark: bytes, end: bytes) -> None:
    path, _ = write_embeddings(tmp_path, "txt")
    plain = small(embeddings=str(path)).tokens.weight
    content = b"".join(line + b"\n" for line in path.read_bytes().splitlines()[::-1] if line.count(b" ") > 1)
    path.write_bytes(mark + content.replace(b"\n", end))
    found = small(embeddings=str(path)).tokens.weight
    same = (found == plain).all(1).sum()
    assert same == 3
    path.write_bytes(content + b"caf\xe9 1 2\n")
    with pytest.raises(ValueError, match=rf"byte {len(content) + 3}, in line \d+, is 0xe9 and no UTF-8"):
        small(embeddings=str(path))


def test_embeddings_beside_other_objects_are_told_from_damage(tmp_path: Path) -> None:
    torch.save({"words": ["a"], "vectors": torch.ones(1, 8), "at": np.float64(1)}, tmp_path / "words.pt")
    with pytest.raises(ValueError, match=r"holds other objects than tensors \(numpy.*scalar"):
        small(embeddings=str(tmp_path / "words.pt"))


def test_embeddings_that_do_not_fit_end_in_a_sentence(tmp_path: Path) -> None:
    path, _ = write_embeddings(tmp_path, "npz")
    with pytest.raises(ValueError, match=r"^embeddings must be vectors of the model's width.* set model.width=8"):
        small(embeddings=str(path), width=6)
    (tmp_path / "foreign.txt").write_text("chien 1 2\nchat 1 2\n")
    with pytest.raises(ValueError, match=r"^embeddings must have words in common with the data set"):
        small(embeddings=str(tmp_path / "foreign.txt"))
    np.savez(tmp_path / "pickled.npz", words=np.array(["the", None], dtype=object), vectors=np.zeros((2, 8)))
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("absent.npz", "absent", "list.pt", "pickled.npz"):
        with pytest.raises(ValueError, match=r"^embeddings must be a .npz, .pt or word2vec text file, and .* is none"):
            small(embeddings=str(tmp_path / name))
    for name, content in {"broken.pt": "x", "broken.npz": "x", "broken.txt": "the 1 2\ncat 1\nsat 1 2 3\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=r"^embeddings must be"):
            small(embeddings=str(tmp_path / name))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide the width of 8, got 3"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        small(**options)
