"""Figures of a run: what is on them, whatever the run logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.show.curves import log_axis, plot_run, read_metrics, series


def event(kind: str, step: int, **values: float | None) -> dict[str, object]:
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return {"event": kind, "step": step, "epoch": step / 10, "seconds": step * 0.5, "wall": step * 0.7, **named}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 10 epochs, with a resumed run's null and a killed run's half line."""
    events = []
    for step in range(5, 101, 5):
        loss = None if step == 50 else 2.0 / step
        events.append(event("train", step, train_loss=loss, train_accuracy=step / 100, lr=1e-3 * (1 - step / 100)))
        if step % 10 == 0:
            events.append(event("eval", step, val_loss=2.2 / step + 0.001 * step, val_accuracy=min(step, 80) / 100))
    events.append(event("test", 100, test_loss=0.15, test_accuracy=0.79))
    folder = tmp_path / "adam_mlp_digits" / "today_s0"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(e) + "\n" for e in events) + '{"event": "tra'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_what_is_drawn(run: Path) -> None:
    figures = plot_run(run / "metrics.jsonl")
    assert list(figures) == ["loss", "accuracy"]
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert {figure.get_suptitle() for figure in figures.values()} == {"adam_mlp_digits / today_s0"}

    by_epoch, by_time, *rates = figures["loss"].axes
    assert [axes.get_xlabel() for axes in rates] == ["epoch", "training seconds"]
    assert next(iter(lines(rates[0]).values()))[1][0] == pytest.approx(0.95e-3)
    assert by_epoch.get_ylim() == by_time.get_ylim()
    drawn = lines(by_epoch)
    assert drawn["training"][0] == [step / 10 for step in range(5, 101, 5) if step != 50], "null is left out"
    assert drawn["validation"][0] == list(range(1, 11))
    assert lines(by_time)["validation"][0] == [step * 0.5 for step in range(10, 101, 10)]
    assert drawn["test 0.15"] == ([10.0], [0.15])
    position, value = drawn["lowest validation 0.094"]
    assert (position, value) == ([5.0], [min(drawn["validation"][1])])

    (accuracy,) = figures["accuracy"].axes
    assert lines(accuracy)["highest validation 80.00 %"][0] == [8.0], "the first of equals"


def test_files_come_out(run: Path, tmp_path: Path) -> None:
    for name, figure in plot_run(run, name="a title").items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert figure.get_suptitle() == "a title"
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_run_that_logged_little(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert plot_run(path) == {}
    path.write_text(json.dumps(event("eval", 10, val_loss=0.0)) + "\n")
    (figure,) = plot_run(path).values()
    figure.savefig(tmp_path / "zero.png")
    path.write_text(json.dumps(event("train", 10, train_loss=None)) + "\n")
    assert plot_run(path) == {}


def test_the_perplexity_of_a_language_model(tmp_path: Path) -> None:
    """On a logarithmic axis, with the lowest validation marked."""
    path = tmp_path / "metrics.jsonl"
    lines = [event("train", 10 * k, train_perplexity=5000 / k) for k in (1, 2, 3)]
    lines += [event("eval", 20, val_perplexity=1800.0), event("eval", 30, val_perplexity=2100.0)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    figure = plot_run(path)["perplexity"]
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "perplexity"
    assert any("1800" in text.get_text() for text in axes.get_legend().get_texts())


def trained(path: Path, losses: list[float], lr: float | None = None) -> Figure:
    """The picture of a run that logged these training losses, and nothing else."""
    events = [event("train", s, train_loss=v) | ({"lr": lr} if lr else {}) for s, v in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return plot_run(path)["loss"]


def test_many_values_are_smoothed(tmp_path: Path) -> None:
    values = [1.0 if step % 2 else 3.0 for step in range(200)]
    drawn = trained(tmp_path, values).axes[0].get_lines()
    assert len(drawn) == 2 and list(drawn[0].get_ydata()) == values
    middle = list(drawn[1].get_ydata())[50:150]
    assert max(middle) - min(middle) < 0.3 and sum(middle) / 100 == pytest.approx(2, abs=0.1)


def test_a_rise_is_not_shown_before_it_happens(tmp_path: Path) -> None:
    drawn = trained(tmp_path, [1.0] * 100 + [2.0] * 100).axes[0].get_lines()[1]
    means = list(drawn.get_ydata())
    assert max(means[:100]) == 1.0 < means[100] < 1.5 and means[-1] == 2.0
    assert drawn.get_label() == "training (mean of 11)", "and the legend says what it is"


@pytest.mark.parametrize("low, high", [(3.2, 3.9), (0.9, 8.0), (0.02, 0.31), (1e-3, 5.0), (1e-7, 1e4)])
def test_a_logarithmic_axis_has_plain_numbers_whatever_its_span(low: float, high: float) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([low, high])
    log_axis(axes)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    texts = {tick: text.get_text() for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    shown = {tick: text for tick, text in texts.items() if bottom <= tick <= top}
    assert 2 <= len(shown) <= 9 and all(float(text) == pytest.approx(tick) for tick, text in shown.items())


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.3, 1.0, 0.2], "linear"),
        ([2.3, 0.3, 0.1], "log"),
        ([2.3, 900.0, 0.5, 2.0], "log"),
        ([1.0, 0.5, 0.0], "linear"),
        ([-1.0, 2.0, -1.5, -300.0], "symlog"),
        ([-1.0, 2.0, -5.0], "linear"),
    ],
)
def test_losses_that_swing_have_a_logarithmic_axis(tmp_path: Path, losses: list[float], scale: str) -> None:
    figure = trained(tmp_path, losses)
    assert figure.axes[0].get_yscale() == scale
    figure.savefig(tmp_path / "picture.png")


def test_one_window_is_seen(tmp_path: Path) -> None:
    figure = trained(tmp_path, [2.0], lr=0.1)
    assert all(axes.get_lines()[0].get_marker() == "o" for axes in figure.axes) and len(figure.axes) == 2


def test_a_rate_that_stays_is_said(tmp_path: Path) -> None:
    figure = trained(tmp_path, [2.0, 1.0], lr=0.1)
    assert len(figure.axes) == 2 and figure.get_suptitle().endswith(", learning rate 0.1")


def test_legends_cover_no_data(run: Path) -> None:
    for figure in plot_run(run).values():
        figure.draw_without_rendering()
        for axes in figure.axes:
            if (legend := axes.get_legend()) is not None:
                box = legend.get_window_extent()
                assert not any(box.overlaps(other.get_window_extent()) for other in figure.axes)
                title = figure._suptitle.get_window_extent()
                assert not box.overlaps(title) and box.x1 <= figure.bbox.x1


def test_reading(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = read_metrics(run)
    assert len(events) == 31 and events == read_metrics(run / "metrics.jsonl")
    assert series(events, "test/loss", "step") == ([100.0], [0.15])
    path = run / "metrics.jsonl"
    path.write_text("no json\n" + path.read_text())
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl is not a JSON object"):
        read_metrics(run)
    assert read_metrics(run, whole=False) == events
    assert "line 1 of" in caplog.text and "is left out" in caplog.text
