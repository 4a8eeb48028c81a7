"""Whatever is wrong with a command ends in one sentence and exit code 1, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import QUICK, Outcome, runs, summary
from tests.conftest import ROOT
from training.command.words import complain

# (name, arguments, what the sentence says)
REFUSED = [
    ("unknown key", ["optimizer.betas=[0.9,0.99]", "optimizer=sgd"], r"optimizer has no key 'betas'; it has lr"),
    ("mistyped key", ["optimizer.momentun=0.5"], r"no key 'momentun' \(did you mean 'momentum'\?\)"),
    ("mistyped group", ["optimzer=adam"], r"unknown key 'optimzer' \(did you mean 'optimizer'\?\)"),
    ("key without its group", ["lr=0.1"], r"unknown key 'lr' \(did you mean 'optimizer.lr'\?\)"),
    ("a part of a key", ["epochs=3"], r"unknown key 'epochs' \(did you mean 'trainer.max_epochs'\?\)"),
    ("added key", ["+optimizer.foo=1"], r"cannot be added with \+; optimizer has no key 'foo'"),
    ("added key that exists", ["+optimizer.lr=1"], r"cannot be added with \+: write optimizer.lr=1"),
    ("forced key", ["++optimizer.nestorov=true", "optimizer=sgd"], r"cannot be added with \+"),
    ("number for text", ["optimizer.lr=fast"], r"optimizer.lr must be a number, got 'fast'"),
    ("fraction for a count", ["dataset.batch_size=1.5"], r"dataset.batch_size must be a whole number, got 1.5"),
    ("number for a flag", ["trainer.deterministic=3"], r"trainer.deterministic must be true or false, got 3"),
    ("null for a number", ["optimizer.lr=null"], r"optimizer.lr must be a number, got null"),
    ("one of", ["dataset.augment=cutuot"], r"dataset.augment must be one of .* \(did you mean 'cutout'\?\)"),
    ("wrong length", ["optimizer=adam", "optimizer.betas=[0.9]"], r"optimizer.betas must be a list of 2 values"),
    ("learning rate", ["optimizer.lr=-1"], r"optimizer.lr must be .*, got -1"),
    ("learning rate of torch's", ["optimizer=sgd", "optimizer.lr=-1"], r"optimizer: Invalid learning rate: -1"),
    ("batch size", ["dataset.batch_size=0"], r"dataset.batch_size must be at least 1, got 0"),
    ("damping", ["optimizer.damping=0"], r"optimizer.damping must be .*, got 0"),
    ("held-out share", ["dataset.val_fraction=1.5"], r"dataset.val_fraction must be .*, got 1.5"),
    ("label smoothing", ["trainer.label_smoothing=1.5"], r"trainer.label_smoothing must be .*, got 1.5"),
    ("schedule", ["scheduler.warmup=2"], r"scheduler.warmup must be .*, got 2"),
    ("seed", ["seed=-1"], r"seed must be between 0 and \d+, got -1"),
    ("search space", ["hparams_search=kfac"], r"what scripts/tune.py tries.*: python .* optimizers=\[kfac\]"),
    ("unknown optimizer", ["optimizer=adan"], r"optimizer has no choice 'adan' \(did you mean 'adam'\?\)"),
    ("unknown model", ["model=resnet19"], r"model has no choice 'resnet19' \(did you mean 'resnet18'\?\)"),
    ("unknown data set", ["dataset=cifar"], r"dataset has no choice 'cifar' \(did you mean 'cifar10'\?\)"),
    ("unknown experiment", ["experiment=adafisher/cifar10"], r"experiment has no choice .*did you mean 'adafisher/"),
    ("no choice at all", ["optimizer=null"], r"optimizer must be one of adafisher, .*, got null"),
    ("removed group", ["~optimizer"], r"optimizer is missing from the configuration"),
    ("two budgets", ["trainer.max_steps=5", "trainer.max_epochs=2"], r"max_steps and max_epochs are both set.*=null"),
    ("steps and seconds", ["trainer.max_time=5", "trainer.max_steps=2"], r"max_time and max_\w+ are both set"),
    ("not a number", ["optimizer.lr=nan"], r"optimizer.lr must be a finite number, got nan"),
    ("without an end", ["optimizer=sgd", "optimizer.lr=inf"], r"optimizer.lr must be a finite number, got inf"),
    ("no number, in a sweep", ["-m", "optimizer.lr=0.1,nan"], r"optimizer.lr must be a finite number, got nan"),
    ("weight decay", ["optimizer=adamw", "optimizer.weight_decay=nan"], r"weight_decay must be a finite number"),
    ("budget of no number", ["trainer.max_epochs=nan"], r"trainer.max_epochs must be a finite number, got nan"),
    ("budget without an end", ["trainer.max_epochs=inf"], r"trainer.max_epochs must be a finite number, got inf"),
    ("name elsewhere", ["name=../../evil"], r"name must be that of a folder in paths.runs, got '../../evil'"),
    ("name at the root", ["name=/evil"], r"name must be that of a folder in paths.runs.*set paths.runs"),
    ("name of a sweep", ["-m", "name=a/../../b", "seed=0,1"], r"name must be that of a folder in paths.runs"),
    ("Hydra's folder", ["hydra.run.dir=out"], r"hydra.run.dir=out is Hydra's.*runs go to paths.runs=FOLDER"),
    ("Hydra's chdir", ["hydra.job.chdir=true"], r"hydra.job.chdir=true is Hydra's.*: leave it out"),
    ("launcher of one run", ["hydra/launcher=joblib"], r"is Hydra's, and nothing a single run goes by: add -m"),
    ("sweeper that is not there", ["-m", "hydra/sweeper=optuna", "seed=0,1"], r"pip install hydra-optuna-sweeper"),
    ("launcher that is not there", ["-m", "hydra/launcher=ray", "seed=0,1"], r"pip install hydra-ray-launcher"),
    ("no such sweeper", ["-m", "hydra/sweeper=optunna", "seed=0,1"], r"'optunna' \(did you mean 'optuna'\?\)"),
    ("no such launcher", ["-m", "hydra/launcher=cloud", "seed=0,1"], r"no choice 'cloud'; known are basic, joblib"),
    ("interval of a sweep", ["-m", "optimizer.lr=interval(0.1,1)"], r"for sweepers that draw.*optimizer.lr=0.1,0.3,1"),
    ("interval of a run", ["optimizer.lr=interval(0.1,1)"], r"holds several values: add -m"),
    ("letters of a path", ["dataset=image_folder", "dataset.root=Fotos/Österreich"], r"no folder .*Fotos/Österreich"),
    ("letters of a name", ["init_from=/höhe/güte.pt"], r"init_from=/höhe/güte.pt: there is no such file"),
    ("a net too large", ["model.hidden=[2000000000000]"], r"memory does not suffice for 5.12e\+05 GB at once"),
    ("metric of a callback", ["callbacks=early_stopping", "callbacks.early_stopping.metric=val/f1"],
     r"^callbacks.early_stopping.metric must be one of val/loss, val/accuracy, got 'val/f1'"),
    ("a good guess alone", ["optimizer=adan"], r"optimizer has no choice 'adan' \(did you mean 'adam'\?\)$"),
    ("no guess at all", ["optimizer=xyzzy"], r"optimizer has no choice 'xyzzy'; it has adafisher, "),
    ("share of the test set", ["dataset.limit_test=0"], r"dataset.limit_test must be above 0 and at most 1, got 0"),
    ("less than an example", ["dataset.limit_test=0.0001"], r"dataset.limit_test must leave at least one of the"),
    ("no dotted name", ["model._target_=MyNet"], r"model._target_ must be a dotted path such as"),
    ("no such module", ["dataset._target_=mydata.make"], r"dataset._target_: 'mydata' cannot be imported"),
    ("no such logger", ["logger.mine._target_=mylog.CSV"], r"logger.mine._target_: 'mylog' cannot be imported"),
    ("named node of another place", ["extra.mine._target_=mylog.CSV"], r"unknown key 'extra.mine._target_'"),
    ("half a target", ["callbacks.mine.every=3"], r"callbacks has no key 'mine'"),
    ("no budget", ["trainer.max_epochs=null"], r"trainer.max_epochs, max_steps or max_time must be set"),
    ("mandatory value", ["dataset=image_folder"], r"dataset.root is required: give dataset.root="),
    ("no such folder", ["dataset=image_folder", "dataset.root=photos"], r"there is no folder .*photos: set"),
    ("more than there is", ["dataset.batch_size=5000"], r"dataset.batch_size must be at most the \d+ examples"),
    ("name too long", ["dataset=image_folder", f"dataset.root={'x' * 300}"], r"dataset: xx.* is too long for the name"),
    ("start too long", [f"init_from={'x' * 300}"], r"init_from=xx.*: there is no such file"),
    ("list too long", [f"seed={','.join(map(str, range(150)))}"], r"holds several values: add -m"),
    ("broken interpolation", ["paths.data=${paths.dat}"], r"paths.data cannot be resolved: .*mean 'paths.data'"),
    ("malformed", ["optimizer.lr"], r"malformed override 'optimizer.lr': write key=value"),
    ("unbalanced", ["optimizer.betas=[0.9,0.99"], r"malformed override 'optimizer.betas=\[0.9,0.99'"),
    ("flag", ["--optimizer=adam"], r"unknown flag '--optimizer=adam': values are given as key=value"),
    ("sweep without -m", ["optimizer=sgd,adam"], r"'optimizer=sgd,adam' holds several values: add -m"),
    ("wrong key in a sweep", ["-m", "optimizer=sgd,adam", "optimizer.lrr=1"], r"no key 'lrr' \(did you mean 'lr'\?\)"),
    ("bad value in a sweep", ["-m", "optimizer.lr=0.1,-1"], r"optimizer.lr must be .*, got -1"),
    ("the same run twice", ["-m", "optimizer.lr=0.1,0.10"], r"two jobs of this sweep are the same run"),
    ("nothing to resume", ["resume=runs/none"], r"resume=runs/none: there is no such file or folder; give a run f"),
    ("resume as a flag", ["resume=true"], r"resume=True: there is no such .*; did you mean auto, the newest run of"),
    ("resume as a flag that is off", ["resume=false"], r"resume=False: .*; leave it out, and a new run begins"),
    ("nothing to start from", ["init_from=weights.pt"], r"init_from=weights.pt: there is no such file"),
    ("unknown device", ["trainer.device=tpu9"], r"trainer.device must be auto, cpu, cuda"),
    ("half precision", ["trainer.device=cpu", "trainer.precision=fp16"], r"precision=fp16 needs a CUDA GPU"),
    ("unknown metric", ["trainer.monitor=val/f1"], r"trainer.monitor must be one of val/loss, .*, got 'val/f1'"),
    ("Fisher matrix", ["optimizer=kfac", "optimizer.fisher=true"], r"fisher must be one of sampled, .*, got True"),
    ("KL clip", ["optimizer=kfac", "optimizer.kl_clip=0"], r"optimizer.kl_clip must be in \(0, inf\), got 0"),
    ("damping mode", ["optimizer=kfac", "optimizer.damping_mode=both"], r"one of factored, tikhonov, got 'both'"),
    ("two products", ["optimizer=deflation", "optimizer.damping_mode=tikhonov"], r"mode must be 'factored' for a sum"),
    ("key of another", ["optimizer=ekfac", "optimizer.damping_mode=tikhonov"], r"optimizer has no key 'damping_mode'"),
    ("solver", ["optimizer=deflation", "optimizer.solver=qr"], r"one of gram, power, lanczos or null, got 'qr'"),
    ("radius", ["optimizer=kpsvd", "optimizer.radius=-1"], r"optimizer.radius must be in \[0, inf\), got -1"),
    ("pattern", ["optimizer=lanczos", "optimizer.skip='('"], r"optimizer.skip must be a regular expression, got '\('"),
    ("share of the batch", ["optimizer=kfac", "optimizer.batch_fraction=0"], r"fraction must be in \(0, 1\], got 0"),
    ("interval", ["optimizer=ekfac", "optimizer.refresh_every=0"], r"refresh_every must be in \[1, inf\), got 0"),
    ("half an interval", ["optimizer=ekfac", "optimizer.refresh_every=0.5"], r"must be a whole number, got 0.5"),
    ("widest factor", ["optimizer=kfac_corrected", "optimizer.max_factor_dim=0"], r"factor_dim must be in \[1, inf\)"),
    ("curvature of Adam", ["-m", "optimizer=kfac,adam", "optimizer.damping=0.1"], r"optimizer has no key 'damping'"),
    ("capital letters", ["optimizer=SGD"], r"optimizer has no choice 'SGD' \(did you mean 'sgd'\?\)"),
    ("a device by its kind", ["trainer.device=gpu"], r"trainer.device must be auto, cpu, cuda or .*, got 'gpu'"),
    ("bits for a precision", ["trainer.precision=16"], r"precision must be one of fp32, bf16, fp16, got 16"),
    ("comma for a point", ["optimizer.lr=1,0"], r"'optimizer.lr=1,0' holds several values: add -m"),
    ("words for a seed", ["seed=abc"], r"seed must be a whole number, got 'abc'"),
    ("width for widths", ["model.hidden=128"], r"model.hidden must be a list \(each a whole number\), got 128"),
    ("negative width", ["model.hidden=[128,-1]"], r"model.hidden must hold widths of at least 1, got \[128, -1\]"),
    ("dropout of more than all", ["model.dropout=1.5"], r"model.dropout must be at least 0 and below 1, got 1.5"),
    ("schedule of torch's", ["scheduler=linear"], r"scheduler has no choice 'linear'; it has cosine, multistep, "),
    ("flag for a group", ["averaging=true"], r"averaging must be one of ema, none, schedule_free, got True"),
    ("yes for true", ["trainer.compile=yes"], r"trainer.compile must be true or false, got 'yes'"),
    ("power for a count", ["trainer.max_steps=1e3"], r"max_steps must be a whole number or null, got 1000.0"),
    ("no accumulation", ["trainer.accumulate=0"], r"trainer.accumulate must be at least 1, got 0"),
    ("depth of no net", ["model=resnet18", "model.depth=19"], r"model.depth must be one of 18, .*, got 19"),
    ("weights that are not there", ["model=resnet18", "model.pretrained=w.pt"], r"pretrained=w.pt: there is no such"),
    ("patch that does not fit", ["model=vit_tiny", "model.patch_size=3"], r"patch_size must be a divisor of .* \(8\)"),
    ("net for another task", ["model=gpt1_mini"], r"model: gpt needs vocabulary, which this data set does not have"),
    ("nothing to freeze", ["finetune.freeze=head"], r"freeze 'head' is found in no name of a trained parameter"),
    ("schedule of no scalar", ["schedules={dampin: {end: 1}}"], r"dampin is no scalar .*\(did you mean 'damping'\?\)"),
    ("class in small letters", ["optimizer=torch", "optimizer.name=adam"], r"got 'adam' \(did you mean 'Adam'\?\)"),
    ("closures", ["optimizer=torch", "optimizer.name=LBFGS"], r"must not be LBFGS, which calls the model itself"),
    ("player of one", ["optimizer@generator=kfac"], r"optimizer@generator is for a model of two players"),
    ("no patience", ["callbacks=early_stopping", "callbacks.early_stopping.patience=0"], r"patience must be at least"),
    ("no worker", ["-m", "seed=0,1", "workers=0"], r"workers must be a whole number of at least 1, got 0"),
    ("negative mixture", ["dataset.mixup=-1"], r"dataset.mixup must be at least 0, got -1.0"),
    ("distortion beyond", ["dataset.randaugment=99"], r"dataset.randaugment must be from 0 to 30, or null, got 99"),
    ("blocks of none", ["trainer.recompute=true"], r"trainer.recompute: the model has no blocks in a Sequential"),
    ("compiled twice", ["trainer.recompute=true", "trainer.compile=true"], r"recompute must be false where compile"),
    ("spaces", ["optimizer", "=", "sgd"], r"malformed override 'optimizer': write key=value, without spaces"),
    ("no key", ["=3"], r"malformed override '=3': it names no key"),
    ("two signs", ["optimizer.lr==0.1"], r"malformed override 'optimizer.lr==0.1': write key=value, with one ="),
    ("round brackets", ["optimizer.betas=(0.9,0.99)"], r"a list has brackets, optimizer.betas=\[0.9,0.99\]"),
    ("comma at the end", ["seed=1,"], r"malformed override 'seed=1,': a value is missing beside a comma"),
    ("a quote alone", ["name='mine"], r"a quote has no other"),
    ("quoted keys", ['finetune.lr_mult={"0": 2}'], r"the keys of a group have no quotes"),
    ("folder of configurations", ["--config-dir", "nowhere"], r"--config-dir nowhere: there is no such folder"),
    ("nothing to show", ["--cfg", "yaml"], r"invalid choice: 'yaml' \(choose from"),
    ("no such information", ["--info", "all_of_it"], r"invalid choice: 'all_of_it'"),
    ("no classes", ["dataset=digits_autoencoder"], r"model: mlp needs num_classes, which this .*choose another model"),
    ("infinite mixture", ["dataset.mixup=inf"], r"dataset.mixup must be a finite number, got inf"),
    ("infinite factor", ["finetune.lr_mult={weight: inf}"], r"lr_mult of 'weight' must be above 0 .*, got inf"),
    ("dots an inch", ["callbacks=default", "callbacks.curve_plots.dpi=9999"], r"dpi must be from 1 to 1200, got 9999"),
    ("shapes alone", ["trainer.device=meta"], r"device=meta holds shapes and no numbers"),
    ("key of another choice", ["averaging.decay=0.9"], r"averaging has no key 'decay' .*: averaging=ema has$"),
    ("callback that is off", ["callbacks.early_stopping.patience=3"], r"no key .*: callbacks=early_stopping has$"),
    ("a module", ["optimizer._target_=torch.optim"], r"'optim': it is a module, give .* torch.optim.NAME"),
    ("a path for a name", ["optimizer._target_=./mine.Sgd"], r"must be a dotted path such as .*got './mine.Sgd'"),
    ("home", ["dataset=image_folder", "dataset.root=~/no such"], r"there is no folder /.*/no such: set"),
    ("pattern of no choice", ["-m", "optimizer=glob(zz*)"], r"glob\(zz\*\) is like no choice of optimizer; it has"),
    ("bytes", ["name=\udcff"], r"'name=\\udcff' is not in UTF-8"),
    ("dots", ["optimizer..lr=1"], r"malformed override 'optimizer..lr=1': 'optimizer..lr' is no key such as optimizer"),
    ("an index", ["optimizer[lr]=1"], r"'optimizer\[lr\]' is no key such as optimizer.lr"),
    ("pattern of no group", ["-m", "seed=glob(*)"], r"glob is for the choices of a group, and seed is none"),
    ("several by a pattern", ["optimizer=glob(sg*)", "seed=0,1"], r"'seed=0,1' holds several values: add -m"),
    ("empty range", ["-m", "seed=range(0,0)"], r"seed=range\(0,0\) holds no value: give some, as in seed=0,1,2"),
    ("search path", ["hydra.searchpath=[nowhere]"], r"hydra.searchpath: there is no folder nowhere"),
    ("rerun", ["--experimental-rerun=x"], r"--experimental-rerun is for folders of Hydra.*: resume=RUN_FOLDER"),
    ("resolve nothing", ["--resolve"], r"--resolve and --package say what --cfg is to print: add --cfg job"),
    ("completion of no shell", ["--shell-completion"], r"--shell-completion needs install=SHELL"),
    ("unknown callable", ["optimizer._target_=torch.optim.Sdg"], r"torch.optim has no callable 'Sdg' .*mean 'SGD'"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "says"), [pytest.param(argv, says, id=name) for name, argv, says in REFUSED])
def test_one_sentence_and_no_folder(argv: list[str], says: str, command: Callable[..., Outcome], work: Path) -> None:
    outcome = command("model=mlp", *argv)
    sentence = outcome.sentence()
    assert re.search(says, sentence), sentence
    assert outcome.code == 1
    assert list(work.iterdir()) == []


def test_help_whatever_else_is_said(command: Callable[..., Outcome], work: Path) -> None:
    assert len(REFUSED) >= 125
    for argv in (["-h", "optimizer"], ["--help", "optimizer=nix"], ["--version"]):
        outcome = command(*argv)
        assert outcome.code == 0 and "Traceback" not in outcome.err and list(work.iterdir()) == [], outcome.err


@pytest.mark.parametrize("model", ["autoencoder_mnist", "conv_autoencoder"])
def test_an_auto_encoder_is_no_classifier(model: str, command: Callable[..., Outcome], work: Path) -> None:
    outcome = command(f"model={model}", "optimizer=kfac", "logger=quiet", "callbacks=none")
    assert re.search(r"needs an output a class, and (conv_)?autoencoder does not ask .*: choose", outcome.sentence())
    assert outcome.code == 1
    assert list(work.iterdir()) == [], "found out before the run folder was made"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(quick: Callable[..., Outcome], work: Path) -> None:
    outcome = quick("trainer.device=cuda")
    assert re.search(r"device=cuda, but torch sees no GPU", outcome.sentence())
    assert outcome.code == 1 and list(work.iterdir()) == []


def test_offline(quick: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    # urllib reads the proxies once, into an opener that it keeps: begin without one, and put the old one back.
    monkeypatch.setattr(urllib.request, "_opener", None)
    outcome = quick("dataset=cifar10")
    assert re.search(r"cifar10 .*cannot be downloaded .*dataset=digits", outcome.sentence())
    assert outcome.code == 1 and runs(work) == []
    assert list(work.iterdir()) == [], "no lock, no empty folder"


def test_damaged_files(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick().code == 0
    (run,) = runs(work)
    good = run / "checkpoints" / "best.pt"
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged = run / "checkpoints" / "damaged.pt"
    damaged.write_bytes(content)
    stray = work / "stray.pt"
    stray.write_bytes(good.read_bytes())
    text = work / "weights.pt"
    text.write_text("no weights")

    for argv, says in (
        (f"resume={damaged}", r"The checkpoint .*damaged.pt is damaged \(checksum"),
        (f"init_from={damaged}", r"init_from=.*damaged.pt is damaged \(checksum"),
        (f"resume={stray}", r"stray.pt lies in no run folder of train.py: .* use init_from"),
        (f"resume={work}", r"lies in no run folder of train.py: it has no config.yaml"),
        (f"init_from={text}", r"init_from=.*weights.pt cannot be read: it is damaged, or no file of tensors"),
    ):
        outcome = quick(argv)
        assert re.search(says, outcome.sentence())
        assert outcome.code == 1
        assert runs(work) == [run]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["dataset=curves", "model=resnet18"], r"model: resnet needs num_classes, which .* or another data set$"),
        (["dataset=curves", "model=dcgan"], r"two players is for images to be imitated, and .* is for reconstruction"),
        (["dataset=curves", "model=autoencoder_curves", "optimizer@critic=sgd"], r"this one has no critic: leave it"),
        (["dataset=curves", "model=autoencoder_curves", "trainer.label_smoothing=0.1"], r"label_smoothing must be 0"),
        (["dataset=cifar10", "model=autoencoder_curves"], r"autoencoder does not ask how many there are: choose a"),
        (["dataset=mnist_generation", "model=resnet18"], r"imitated by a model of two players, .* choose model=dcgan"),
        (["dataset=wikitext2", "model=mlp"], r"mlp needs in_channels, which this data set does not have \(it has voca"),
        (["dataset=tiny_imagenet", "model=gpt1"], r"gpt needs vocabulary, which this data set does not have"),
    ],
)
def test_what_is_not_for_each_other_is_refused_before_data_are_made_or_fetched(
    argv: list[str], says: str, command: Callable[..., Outcome], work: Path
) -> None:
    outcome = command(*argv)
    assert outcome.code == 1 and re.search(says, outcome.sentence()), outcome.err
    assert list(work.iterdir()) == []


def test_divergence_keeps_the_last_good_checkpoint(quick: Callable[..., Outcome], work: Path) -> None:
    """The one bad input that keeps its folder: it was only found out by training."""
    frequent = ("trainer.log_every_steps=1", "trainer.checkpoint_every_steps=1")
    outcome = quick("optimizer=sgd", "optimizer.lr=1e30", *frequent)
    assert re.search(r"loss is nan .*lower the learning rate", outcome.sentence())
    assert outcome.code == 1
    (run,) = runs(work)
    assert summary(run)["status"] == "diverged"
    saved = torch.load(sorted((run / "checkpoints").glob("step_*.pt"))[-1], weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_python_without_packages_is_told_of_them(work: Path) -> None:
    """Whatever command it is."""
    scripts = [path for path in sorted((ROOT / "scripts").rglob("*.py")) if "sys.path.insert" in path.read_text()]
    scripts.remove(ROOT / "scripts" / "benchmarks" / "sweep.py")  # which imports while its clock runs
    scripts.remove(ROOT / "scripts" / "pages" / "options.py")  # which needs none
    files = [[str(path), "--help"] for path in (ROOT / "train.py", *scripts)]
    modules = [["-m", *words] for words in (["models"], ["data.fetch"], ["optimizers"], ["examples", "peft_lora"])]
    assert len(files) > 25
    started = [
        (words, subprocess.Popen([sys.executable, "-S", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True))
        for words in (*files, *modules)
    ]
    for words, process in started:
        _, said = process.communicate(timeout=60)
        needed = "requirements-examples.txt" if "examples" in words else "requirements.txt"
        assert re.fullmatch(rf"error: \w+ is not installed.*: .*pip install -r {needed}\n", said), f"{words}: {said}"
        assert process.returncode == 1


def test_a_terminal_without_such_letters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import training.missing; print('Österreich 1 ± 2')"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "\\xd6sterreich 1 \\xb1 2\n", done


def test_a_full_disk_where_output_goes(capsys: pytest.CaptureFixture[str]) -> None:
    complain(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err.startswith("error: what is printed cannot be written (No space left on device): ")


def test_a_folder_that_is_gone(command: Callable[..., Outcome], work: Path) -> None:
    gone = work / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    outcome = command("model=mlp")
    os.chdir(work)
    assert outcome.code == 1 and "the folder in which this command is given is gone" in outcome.sentence()


def test_what_a_user_s_module_lacks_is_no_package_of_ours(work: Path) -> None:
    (work / "lacking.py").write_text("import nowhere_to_be_found\n")
    command = "import sys; sys.path.append('.'); import training.missing, lacking"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" in done.stderr and "lacking.py" in done.stderr
    assert "is not installed" not in done.stderr


def test_a_bug_keeps_its_trace(quick: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug in the loop")

    monkeypatch.setattr(torch.optim.SGD, "step", fault)
    outcome = quick("optimizer=sgd")
    assert outcome.code == 1
    assert "Traceback" in outcome.err and "a bug in the loop" in outcome.err
    (run,) = runs(work)
    assert summary(run)["status"] == "failed" and "a bug in the loop" in summary(run)["error"]


def test_debug_variable_shows_the_trace(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_DEBUG", "1")
    outcome = command("optimizer.lr=-1")
    assert "Traceback" in outcome.err and outcome.err.splitlines()[-1].startswith("error: optimizer.lr must be")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["optimizer.lrr=1"], r"error: optimizer has no key 'lrr' \(did you mean 'lr'\?\)"),
        (["-m", "seed=0,-1"], r"error: seed must be between 0 and"),
    ],
)
def test_as_a_program(argv: list[str], says: str, work: Path) -> None:
    program = [sys.executable, str(ROOT / "train.py"), *QUICK]
    done = subprocess.run([*program, *argv], capture_output=True, text=True, cwd=work, env={**os.environ}, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(says + ".*\n", done.stderr), done.stderr
    assert list(work.iterdir()) == []
