"""What a run leaves for eyes and scripts: JSON lines, event files, the terminal, the log."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.conftest import ROOT
from tests.training.small_run import SignalAt, fit
from training import Interrupted, loggers
from training.callbacks import CurvePlots
from training.runs.run import Run


def test_json_lines_hold_every_event(tmp_path: Path) -> None:
    summary, _ = fit(tmp_path / "run", clip_norm=1.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in lines] == [
        ("train", 3), ("eval", 5), ("train", 6), ("train", 9), ("eval", 10), ("train", 12), ("train", 15), ("eval", 15),
        ("train", 18), ("eval", 20), ("train", 20), ("test", 20),
    ]  # fmt: skip
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] / 16, abs=1e-6)
        assert 0 < line["seconds"] < line["wall"]
    names = {
        "train": {"train/loss", "train/accuracy", "train/grad_norm", "lr", "time/data", "time/forward", "time/step"},
        "eval": {"val/loss", "val/accuracy"},
        "test": {"test/loss", "test/accuracy", "best/test/loss", "best/test/accuracy"},
    }
    assert all(names[line["event"]] <= line.keys() for line in lines)
    assert [e["seconds"] for e in lines] == sorted(e["seconds"] for e in lines)
    assert lines[9]["val/loss"] == summary["final"]["val/loss"]


def test_an_optimizers_diagnostics_and_coverage_are_logged(tmp_path: Path) -> None:
    fit(tmp_path / "run", optimizer="adafisher", max_steps=3)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert any(name.startswith("curvature/") for name in first)
    assert "of the trainable parameters under curvature" in (tmp_path / "run" / "train.log").read_text()


class Odd(loggers.Logger):
    """Puts a value into the stream that JSON does not have."""

    def start(self, run: Run) -> None:
        run.emit("warning", {"odd": float("nan"), "huge": float("inf")})


def test_json_lines_are_strict_json(tmp_path: Path) -> None:
    fit(tmp_path / "run", writers=[loggers.JSONLines(), Odd()], max_steps=1)
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first, parse_constant=pytest.fail)["odd"] is None


def test_one_event_file_holds_scalars_config_and_hyper_parameters(tmp_path: Path) -> None:
    summary, _ = fit(tmp_path / "run", writers=[loggers.TensorBoard(histograms=True)])
    folder = tmp_path / "run" / "tensorboard"
    assert len(list(folder.rglob("*"))) == 1
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    board.Reload()
    tags = board.Tags()
    assert [e.step for e in board.Scalars("val/loss")] == [5, 10, 15, 20]
    done = {name: board.Scalars(f"when done/{name}") for name in ("last/test/accuracy", "best/val/accuracy")}
    assert done["last/test/accuracy"][0].value == pytest.approx(summary["final"]["test/accuracy"], rel=1e-6)
    assert done["best/val/accuracy"][0].value == pytest.approx(summary["best"]["val/accuracy"], rel=1e-6)
    dots = [name for name in tags["scalars"] if len(board.Scalars(name)) == 1]
    assert dots and min(dots) > max(set(tags["scalars"]) - set(dots)), "a dot comes before a curve"
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "name: small" in text
    assert {"weights/1.weight", "gradients/1.weight"} <= set(tags["histograms"])
    plugin = board.PluginTagToContent(metadata.PLUGIN_NAME)
    start = HParamsPluginData.FromString(plugin[metadata.SESSION_START_INFO_TAG]).session_start_info
    assert start.hparams["optimizer.lr"].number_value == 0.05
    assert start.hparams["optimizer.name"].string_value == "sgd"
    assert start.hparams["optimizer.betas"].string_value == "[0.9, 0.99]"
    experiment = HParamsPluginData.FromString(plugin[metadata.EXPERIMENT_TAG]).experiment
    columns = [m.display_name for m in experiment.metric_infos]
    assert columns[:3] == ["best test/accuracy", "best val/accuracy", "best test/loss"]
    assert {m.name.tag for m in experiment.metric_infos} <= set(tags["scalars"])
    assert metadata.SESSION_END_INFO_TAG in plugin


def test_the_hyper_parameters_that_a_command_gives_come_first(tmp_path: Path) -> None:
    command = "# python train.py optimizer=sgd optimizer.betas=[0,1] trainer.max_steps=2 name=x\noptimizer: {}\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(command)
    fit(tmp_path / "run", writers=[loggers.TensorBoard()], max_steps=2)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    content = board.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.EXPERIMENT_TAG]
    infos = HParamsPluginData.FromString(content).experiment.hparam_infos
    assert {info.name: info.differs for info in infos} == {
        "optimizer.name": False, "optimizer.lr": True, "optimizer.betas": True, "seed": False,
    }  # fmt: skip


def test_a_resumed_board_shows_every_step_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", callbacks=[SignalAt(13)], checkpoint_every_steps=6, eval_every_steps=None)
    (tmp_path / "run" / "checkpoints" / "step_00000013.pt").unlink()  # as if it had been killed: back to step 12
    (tmp_path / "run" / "checkpoints" / "step_00000012.pt").unlink()
    fit(tmp_path / "run", resume=True, checkpoint_every_steps=6, eval_every_steps=None)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [e.step for e in board.Scalars("lr")] == [3, 6, 9, 12, 15, 18, 20]


def test_the_terminal_gets_a_line_an_evaluation_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary, _ = fit(tmp_path / "run", writers=[loggers.Console()])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in out if line.startswith("epoch ")] == ["5", "10", "15", "20"]
    assert any("test/accuracy" in line and f"{100 * summary['final']['test/accuracy']:.2f} %" in line for line in out)
    assert out[-2] == f"run folder:   {tmp_path / 'run'}"
    assert out[-1] == f"TensorBoard:  tensorboard --logdir {tmp_path / 'run'}"
    assert "\x1b" not in "".join(out)


def test_a_live_terminal_gets_a_bar(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.training.small_run import fit, Slow; from training import loggers\n"
        "fit(sys.argv[1], writers=[loggers.Console()], callbacks=[Slow()], max_steps=60)\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    for part in ("step 3", "/60", "train/loss", "val/accuracy", "ms/step", "left", "━", "TensorBoard:"):
        assert part in text


def test_the_log_tells_warnings_and_keeps_quiet_elsewhere(tmp_path: Path) -> None:
    with loggers.log_file(tmp_path / "train.log"):
        logging.getLogger("training.somewhere").info("a step was made")
        logging.getLogger("optimizers.base").warning("a factor is odd")
        logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("training.somewhere").warning("after the run")
    text = (tmp_path / "train.log").read_text()
    assert "INFO training.somewhere: a step was made" in text and "WARNING optimizers.base: a factor is odd" in text
    assert "chatter" not in text and "after the run" not in text


def test_curves_are_drawn_at_the_end(tmp_path: Path) -> None:
    fit(tmp_path / "run", callbacks=[CurvePlots(dpi=40)])
    assert {"loss.png", "accuracy.png"} <= {p.name for p in (tmp_path / "run").glob("*.png")}


def test_a_full_disk_is_not_swallowed(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: whatever cannot be written must end the run."""
    script = (
        "import logging, resource, sys; from tests.training.small_run import fit; from training import loggers\n"
        "from training.callbacks import Callback\n"
        "class Noise(Callback):\n"
        "    def on_step(self, run):\n"
        "        if not run.loggers: logging.getLogger('training').info('x' * 10_000)\n"
        "        run.emit('train', {f'value/{i}': 1.0 for i in range(200)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "for name in ('JSONLines', 'TensorBoard', 'log'):\n"
        "    writers = [] if name == 'log' else [getattr(loggers, name)()]\n"
        "    try: fit(f'{sys.argv[1]}/{name}', writers=writers, callbacks=[Noise()], max_steps=60,\n"
        "             checkpoint_every_steps=None, eval_every_steps=None, model={'batch_norm': False})\n"
        "    except OSError as error: print(name, error.errno)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["JSONLines 27", "TensorBoard 27", "log 27"], done.stderr
    for name in ("JSONLines", "TensorBoard", "log"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["status"] == "failed" and "File too large" in summary["error"]
