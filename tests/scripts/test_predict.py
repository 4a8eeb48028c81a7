"""A trained run predicts and is exported, from a copy of its folder alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import DataError
from data.kept import FILE
from scripts import export, predict
from tests.cli.conftest import QUICK, summary
from training import UserError, load_run

NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on images that are gone, in a folder that was moved; beside it, some of them."""
    work = tmp_path_factory.mktemp("predict")
    draw = torch.Generator().manual_seed(0)
    for name in NAMES:
        (work / "photos" / name).mkdir(parents=True)
    for number in range(150):
        pixels = torch.randint(40 + 60 * (number % 3), 100 + 60 * (number % 3), (9, 9, 3), generator=draw)
        Image.fromarray(pixels.byte().numpy()).save(work / "photos" / NAMES[number % 3] / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        given = ["dataset=image_folder", f"dataset.root={work}/photos", "optimizer=adam", "dataset.batch_size=16"]
        assert train.main([*QUICK, *given, "trainer.max_epochs=8", "dataset.augment=none", "optimizer.lr=0.01"]) == 0
        (found,) = (work / "runs").glob("*/*")
        shutil.copytree(found, work / "elsewhere")
    (work / "photos").rename(work / "some")
    yield work / "elsewhere"


def images(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder.parent / "some").glob("*/*.png"))]


def test_it_predicts_what_it_has_measured_without_its_data(folder: Path) -> None:
    run = load_run(folder)
    assert run.class_names == sorted(NAMES) and run.data.facts["image_size"] == 9
    paths = images(folder)
    probabilities = run.predict(paths)
    assert probabilities.shape == (150, 3) and torch.allclose(probabilities.sum(1), torch.ones(150))
    said = [run.class_names[number] for number in probabilities.argmax(1)]
    assert sum(name == Path(path).parent.name for name, path in zip(said, paths, strict=True)) > 135
    with pytest.raises(DataError, match=r"there is no folder .*photos"):
        next(iter(run.data.val.epoch(0)))
    (folder.parent / "some").rename(folder.parent / "photos")
    try:  # the same bytes, made inputs by the loaders
        here = load_run(folder)
        (inputs, targets), *_ = here.data.test.epoch(0)
        held = here.data.test.store.windows(here.data.test.store.offsets(here.data.test.rows, 0, 0))
        assert torch.equal(here.prepare(list(held[: len(inputs)])), inputs)
        accuracy = float((here.predict(inputs).argmax(1) == targets).float().mean())
        assert accuracy == pytest.approx(summary(folder)["best"]["test/accuracy"])
    finally:
        (folder.parent / "photos").rename(folder.parent / "some")


def test_the_command_says_classes_with_probabilities(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = images(folder)[:2]
    assert predict.main([str(folder), *paths, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(paths[0]) and lines[0].count("%") == 2
    assert predict.main([str(folder), *paths, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert set(answers[0]["classes"]) == set(NAMES)
    (tmp_path / "no.png").write_text("no picture")
    for argv, says in (
        ([str(folder), str(tmp_path / "no.png")], "no.png"),
        ([str(folder), str(tmp_path / "nowhere.png")], "nowhere.png"),
        ([str(tmp_path)], "it has no config.yaml"),
        ([str(folder), "--weights", "7"], "has no checkpoint step_00000007.pt"),
        ([str(folder), *paths, "--top", "-1"], "--top: must be a whole number of at least 1, got -1"),
        ([str(folder), *paths, "--temperature", "nan"], "--temperature: must be a number of at least 0, got nan"),
        ([str(folder), *paths, "--device", "foo"], "device must be auto, cpu, cuda or another name torch knows"),
    ):
        assert predict.main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_damaged_facts_and_those_of_earlier_versions(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / FILE).write_text("{")
    with pytest.raises(DataError, match=r"data.json is damaged"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(DataError, match=r"there is no folder .*photos"):
        load_run(tmp_path / "run")


def test_where_an_export_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for out, says in (("model.json", "a file of that name says what goes in"), ("file/model.st", "give another --out")):
        assert export.main([str(folder), "--to", "safetensors", "--out", str(tmp_path / out)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize("to", ["onnx", "torch.export", "safetensors"])
def test_what_is_exported_says_the_same(to: str, folder: Path, tmp_path: Path) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    run = load_run(folder)
    out = tmp_path / f"model{export.SUFFIXES[to]}"
    assert export.main([str(folder), "--to", to, "--out", str(out)]) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["class_names"] == sorted(NAMES)
    pixels = torch.stack([run.preparation.read(path) for path in images(folder)[:100]])
    expected = run.outputs(run.prepare(list(pixels)))
    if to == "safetensors":
        from safetensors.torch import load_file

        assert "scale" in about["preparation"]
        run.model.load_state_dict(load_file(out))
        assert torch.equal(run.outputs(run.prepare(list(pixels))), expected)
        return
    assert about["takes"] == "uint8 ['batch', 3, 9, 9]" and about["gives"] == "logits of the classes"
    assert about["preparation"].keys() == {"channels", "size", "resize"}, "it normalises itself"
    if to == "onnx":
        import onnxruntime

        (found,) = onnxruntime.InferenceSession(str(out)).run(None, {"inputs": pixels.numpy()})
        outputs = torch.from_numpy(found)
    else:
        outputs = torch.export.load(out).module()(pixels)
    assert torch.allclose(outputs, expected, rtol=0, atol=1e-5)


def test_a_text_goes_on_and_an_image_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 60)
    short = ["callbacks=none", "logger=quiet", "optimizer=adam", "trainer.max_epochs=null", "trainer.max_steps=3"]
    text = ["dataset=text_file", "dataset.path=novel.txt", "dataset.sequence=8", "model=gpt1_mini", "name=text"]
    assert train.main([*short, *text]) == 0
    assert train.main([*short, "dataset=digits_autoencoder", "model=autoencoder_mnist", "name=pictures"]) == 0
    capsys.readouterr()
    Path("novel.txt").unlink()
    (novel,) = Path("runs/text").iterdir()
    assert predict.main([str(novel), "the cat", "--tokens", "5"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("the cat") and len(written.split()) >= 5
    (pictures,) = Path("runs/pictures").iterdir()
    Image.new("L", (20, 16), 128).save("grey.png")
    assert predict.main([str(pictures), "grey.png", "--out", "made"]) == 0
    assert Image.open("made/grey_reconstruction.png").size == (8, 8)
    assert "mse" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not say how images become inputs"):
        load_run(novel).prepare(["grey.png"])
