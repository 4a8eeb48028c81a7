"""Language modelling: what is measured, runs with every kind of optimizer, resuming, and the text at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import data
import optimizers
from models import build_model
from models.transformers.gpt import gpt
from tests.training.small_run import differences
from training import RunFolder, Trainer, UserError, World, loggers, seed_everything, tasks
from training.callbacks import Callback
from training.runs import checkpoints
from training.show.sample_text import SampleText, continued

FACTS = {"vocabulary": 7}


def summed_nll(outputs: Tensor, targets: Tensor) -> tuple[float, int]:
    """The negative log-likelihood of all tokens that count, one after another, and their number."""
    total, count = 0.0, 0
    for logits, line in zip(outputs.tolist(), targets.tolist(), strict=True):
        for row, target in zip(logits, line, strict=True):
            if target != -100:
                total += math.log(sum(math.exp(logit) for logit in row)) - row[target]
                count += 1
    return total, count


def batches() -> list[tuple[Tensor, Tensor]]:
    """Three batches of windows of which the last one is almost empty."""
    found = [(2 * torch.randn(count, 5, 7), torch.randint(7, (count, 5))) for count in (3, 3, 2)]
    found[-1][1][-1, 1:] = -100
    return found


# -- the task ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_perplexity_is_that_of_all_tokens_together(float64: None, smoothing: float) -> None:
    task = tasks.build("language_modelling", FACTS, smoothing)
    totals = [summed_nll(*batch) for batch in batches()]
    torch.manual_seed(0)
    counted = batches()
    totals = [summed_nll(*batch) for batch in counted]
    expected = math.exp(sum(total for total, _ in totals) / sum(count for _, count in totals))
    mean_of_perplexities = sum(math.exp(total / count) for total, count in totals) / len(totals)
    assert abs(expected / mean_of_perplexities - 1) > 1e-3, "or this test could not tell them apart"
    for training in (False, True):
        meters = task.meters(torch.device("cpu"))
        for outputs, targets in counted:
            task.measure(meters, outputs, targets, task.loss(outputs, targets) if training else None)
        values = meters.compute()
        assert values["perplexity"] == pytest.approx(expected, rel=1e-12)
        if smoothing and training:
            assert values["loss"] > math.log(expected) + 1e-3, "the loss is the one that is trained on"
        else:
            assert values["loss"] == pytest.approx(math.log(expected), rel=1e-12)
    assert (task.main, task.metrics) == ("perplexity", {"loss": "min", "perplexity": "min"}) and meters.examples == 8


def test_the_loss_and_its_gradient_know_nothing_of_padding(float64: None) -> None:
    task = tasks.build("language_modelling", FACTS)
    outputs, targets = batches()[-1]
    outputs.requires_grad_()
    loss = task.loss(outputs, targets)
    total, count = summed_nll(outputs, targets)
    assert (float(loss.detach()), count) == (pytest.approx(total / count), 6)
    loss.backward()
    assert outputs.grad is not None
    assert (outputs.grad[targets == -100] == 0).all() and (outputs.grad[targets != -100] != 0).any(-1).all()
    assert (task.likelihood.score(outputs, targets)[targets == -100] == 0).all()


def test_curvature_knows_nothing_of_padding(float64: None) -> None:
    """The Fisher of a normalisation, which is kept as its exact diagonal, is that of the tokens that count."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    inputs, targets = torch.randn(3, 6, 3), torch.randint(5, (3, 6))
    targets[1, 3:] = targets[2, 1:] = -100
    fitted = optimizers.Categorical()
    optimizer = optimizers.EKFAC(model, lr=0.0, likelihood=fitted, fisher="exact")
    outputs = model(inputs)
    optimizer.backward(fitted.nll(outputs, targets), outputs)
    optimizer.step()
    parameters, outputs = list(model[1].parameters()), model(inputs)
    expected = torch.zeros(8)
    for example, position in (targets != -100).nonzero().tolist():
        logits = outputs[example, position]
        rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in logits]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p = logits.detach().softmax(-1)
        expected += (jacobian.T @ (p.diag() - p.outer(p)) @ jacobian).diagonal() / (targets != -100).sum()
    torch.testing.assert_close(optimizer.curvature_matrices()["1"].diagonal(), expected)


def test_sums_of_ranks_may_be_added(float64: None) -> None:
    task = tasks.build("language_modelling", FACTS)
    alone, parts = task.meters(torch.device("cpu")), [task.meters(torch.device("cpu")) for _ in range(2)]
    for index, (outputs, targets) in enumerate(batches()):
        task.measure(alone, outputs, targets)
        task.measure(parts[index % 2], outputs, targets)
    state = {key: value + parts[1].state_dict()[key] for key, value in parts[0].state_dict().items()}
    parts[0].load_state_dict(state)
    assert parts[0].compute() == pytest.approx(alone.compute(), rel=1e-12)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    task = tasks.build("language_modelling", FACTS)
    for outputs in (torch.zeros(2, 7), torch.zeros(2, 5, 6), torch.zeros(2, 4, 7)):
        with pytest.raises(UserError, match=r"needs outputs \[5, 7\] an example.*: choose a language model"):
            task.loss(outputs, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"gpt needs vocabulary, which this data set does not have"):
        build_model(gpt, data.digits().facts, layers=1, width=8, heads=2)
    with pytest.raises(ValueError, match=r"task must be one of .*language_modelling.*, got 'dreaming'"):
        tasks.build("dreaming", {})


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def verse(tmp_path: Path) -> Callable[..., data.DataModule]:
    """A text that can be learned by heart: counting in words."""
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    path = tmp_path / "verse.txt"
    path.write_text("".join(f"{a} and {b} are said\n" for _ in range(6) for a in names for b in names))

    def build(**options: Any) -> data.DataModule:
        return data.text_file(str(path), **{"sequence": 16, "batch_size": 8, "eval_batch_size": 8} | options)

    return build


def net(sets: data.DataModule, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "dropout": 0.1} | options
    return build_model(gpt, sets.facts, **settings)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fit(
    folder: Path,
    sets: data.DataModule,
    make: Callable[[nn.Module, Any], torch.optim.Optimizer] | None = None,
    resume: bool = False,
    callbacks: list[Callback] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    seed_everything(0)
    module, task = net(sets, **model or {}), tasks.build(sets.task, sets.facts)
    built = (make or (lambda m, _: torch.optim.AdamW(m.parameters(), lr=3e-3)))(module, task.likelihood)
    found = checkpoints.latest(folder / "checkpoints") if resume else None
    run_folder = RunFolder.open(folder) if resume else RunFolder.create(folder, "name: small\n")
    settings: dict[str, Any] = {"max_epochs": 1, "log_every_steps": 5, "deterministic": False}
    if "max_steps" in trainer:
        settings["max_epochs"] = None
    return Trainer(**settings | trainer).fit(
        module, built, sets, task, folder=run_folder, world=World(), callbacks=callbacks,
        loggers=[loggers.JSONLines(), loggers.TensorBoard()], resume=found[1] if found else None,
    )  # fmt: skip


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module, Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (lambda m, _: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9), {}),
    "adamw": (lambda m, _: torch.optim.AdamW(m.parameters(), lr=3e-3), {}),
    "adafisherw": (lambda m, _: optimizers.AdaFisherW(m, lr=3e-2, update_every=2), {}),
    "adafisherw, untied": (lambda m, _: optimizers.AdaFisherW(m, lr=3e-2, update_every=2), {"tie": False}),
    "kfac": (lambda m, fit: optimizers.KFAC(m, lr=0.1, likelihood=fit, update_every=2, refresh_every=4), {}),
    "kfac, untied, wide head": (
        lambda m, fit: optimizers.KFAC(m, lr=0.1, likelihood=fit, update_every=2, refresh_every=4, max_factor_dim=10),
        {"tie": False},
    ),
    "adahessian": (lambda m, _: optimizers.AdaHessian(m, lr=0.05, hessian_every=2), {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer_learns(tmp_path: Path, verse: Callable[..., data.DataModule], name: str) -> None:
    make, model = OPTIMIZERS[name]
    summary = fit(tmp_path / "run", verse(), make, model=model, max_steps=24, log_every_steps=1)
    losses = [event["train/loss"] for event in events(tmp_path / "run") if event["event"] == "train"]
    first, last = (sum(part) / 4 for part in (losses[:4], losses[-4:]))
    assert first == pytest.approx(math.log(17), abs=0.6) and last < first - 0.3, (first, last)
    assert summary["monitor"] == "val/perplexity"
    assert summary["final"]["val/perplexity"] == pytest.approx(math.exp(summary["final"]["val/loss"]))


def test_a_vocabulary_wide_factor_is_kept_as_its_diagonal(verse: Callable[..., data.DataModule]) -> None:
    sets = verse()
    fitted = optimizers.Categorical()
    tied = optimizers.KFAC(net(sets), likelihood=fitted, max_factor_dim=10)
    assert "head" not in tied.blocks and "tied to" in str(tied.coverage())
    untied = optimizers.KFAC(net(sets, tie=False), likelihood=fitted, max_factor_dim=sets.facts["vocabulary"] - 1)
    shapes = untied.blocks["head"].shapes()
    wide = [shape for shape in shapes.values() if sets.facts["vocabulary"] in shape]
    assert len(wide) == 1 and math.prod(wide[0]) == sets.facts["vocabulary"], shapes
    assert {"tokens", "positions", "blocks.0.attention.query", "blocks.1.norm2", "head"} <= set(untied.blocks)
    assert untied.coverage().fraction == 1.0


def test_validation_perplexity_of_a_run_is_that_of_its_tokens(
    tmp_path: Path, verse: Callable[..., data.DataModule]
) -> None:
    sets = verse(eval_batch_size=4)
    assert (list(sets.val.epoch(0))[-1][1] == -100).any() and sets.val.num_examples % 4
    summary = fit(tmp_path / "run", sets, max_steps=2, model={"dropout": 0.0})
    weights = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert weights is not None
    model = net(sets)
    model.load_state_dict(weights[1]["model"])
    totals = [summed_nll(model.eval()(inputs).detach(), targets) for inputs, targets in sets.val.epoch(0)]
    expected = math.exp(sum(total for total, _ in totals) / sum(count for _, count in totals))
    assert summary["final"]["val/perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_in_the_middle_of_an_epoch_bit_for_bit(
    tmp_path: Path, verse: Callable[..., data.DataModule]
) -> None:
    sets = verse()
    assert len(sets.train) > 8
    fit(tmp_path / "whole", sets, max_steps=11)
    fit(tmp_path / "parts", sets, max_steps=5)
    fit(tmp_path / "parts", verse(), resume=True, max_steps=11)
    states = [checkpoints.latest(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    assert states[0] is not None and states[1] is not None
    assert states[0][1]["ranks"][0]["rng"]
    for key in ("model", "optimizer", "ranks"):
        assert not list(differences(states[0][1][key], states[1][1][key], key))
    ends = [events(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert ends[0]["test/perplexity"] == ends[1]["test/perplexity"]


# -- the text at the end -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """The next token is most probably the last one plus one; it says how much it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens.shape[1])
        return 3 * nn.functional.one_hot((tokens + 1) % 5, 5).float()


def test_a_text_is_continued_from_what_can_be_seen() -> None:
    model = Counting()
    assert continued(model, torch.tensor([3]), 6, sequence=4, temperature=0).tolist() == [3, 4, 0, 1, 2, 3, 4]
    assert model.shown == [1, 2, 3, 4, 4, 4]
    draws = [continued(model, torch.tensor([3]), 2000, 4, temperature, seed=1) for temperature in (0.5, 1.0, 2.0)]
    for drawn, temperature in zip(draws, (0.5, 1.0, 2.0), strict=True):
        weight = math.exp(3 / temperature)
        counted = float(((drawn[1:] - drawn[:-1]) % 5 == 1).double().mean())
        assert counted == pytest.approx(weight / (weight + 4), abs=0.05)
    assert torch.equal(draws[1], continued(model, torch.tensor([3]), 2000, 4, seed=1))
    assert not torch.equal(draws[1], continued(model, torch.tensor([3]), 2000, 4, seed=2))


def test_a_run_ends_with_a_text(tmp_path: Path, verse: Callable[..., data.DataModule]) -> None:
    sets = verse()
    prompted = SampleText(prompt="two and", tokens=12, temperature=0.0)
    fit(tmp_path / "run", sets, callbacks=[prompted], max_epochs=3)
    words = (tmp_path / "run" / "sample.txt").read_text().split()
    assert words[:2] == ["two", "and"] and words[3:5] == ["are", "said"], words
    fit(tmp_path / "other", sets, callbacks=[SampleText(tokens=5)], max_steps=1)
    assert len((tmp_path / "other" / "sample.txt").read_text().replace("\n", " <eos> ").split()) >= 5


def test_the_text_leaves_training_as_it_is(tmp_path: Path, verse: Callable[..., data.DataModule]) -> None:
    sets, states = verse(), []
    for callbacks in ([SampleText(tokens=5)], []):
        fit(tmp_path / str(len(callbacks)), sets, callbacks=callbacks, max_steps=2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_other_tasks_write_nothing(tmp_path: Path) -> None:
    from tests.training.small_run import fit as classify

    classify(tmp_path / "run", callbacks=[SampleText()], max_steps=2)
    assert not (tmp_path / "run" / "sample.txt").exists()


@pytest.mark.parametrize("name, value", [("tokens", 0), ("temperature", -0.1), ("seed", -1)])
def test_options_of_the_text(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        SampleText(**{name: value})  # type: ignore[arg-type]
