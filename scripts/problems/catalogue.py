"""Twelve small problems that default values are chosen on, or checked on: what each is.

A problem is a command line of train.py, with `--config-dir scripts/configs` for what that has not. All of them take
seconds with a first-order method on one core, which is why images are small, nets are slim and texts are short.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
#: A loss must be below this share of the best constant output's, or nothing was learned.
LEARNED = 0.95
#: Loss a character of the text's, by the frequencies of the characters alone.
UNIGRAM = 3.16


@dataclass(frozen=True)
class Problem:
    """One model on one data set for some steps.

    Attributes:
        name: what the command line calls it.
        title: what the table calls it.
        overrides: of the default configuration: data set and model.
        steps: of the optimizer.
        tuning: whether default values may be chosen by it; otherwise it is held out.
        folder: of its data, in that of all data sets; None: nothing has to be there.
        metric: of the test set, what is compared.
        least: for an accuracy: below it, nothing was learned.
        constant: for a loss: that of the best output that is the same for every example, where the data set does not
            know it.
        rates: whether each optimizer is tried at several learning rates, too: six problems whose runs take seconds.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    steps: int
    tuning: bool
    folder: str | None = None
    metric: Literal["accuracy", "loss"] = "accuracy"
    least: float = 0.0
    constant: float | None = None
    rates: bool = False

    def learned(self, value: float, plateau: float | None = None) -> bool:
        """Whether a value of the metric shows that something was learned.

        Args:
            value: of the test set.
            plateau: the constant output's loss as the data set knows it.
        """
        if self.metric == "accuracy":
            return value >= self.least
        constant = self.constant if self.constant is not None else plateau
        return constant is None or value < LEARNED * constant


#: Why six are to choose by, and six are not.
SPLIT = (
    "Every kind is on both sides: fully connected classifiers, auto-encoders, convolutions with batch norm, attention, "
    "and one problem that is badly conditioned by design (the regression to choose by, the deep narrow net held out). "
    "So values are chosen with each kind in view, and checked on other nets and other data of the same kind."
)

#: Six to choose default values by, then six that no choice may look at. ``SPLIT`` says why it is these.
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "digits_mlp", "digits, MLP",
            ("dataset=digits", "dataset.augment=none", "model=mlp", "model.hidden=[128,64]"),
            steps=300, tuning=True, least=0.8, rates=True,
        ),
        Problem(
            "curves", "a third of CURVES, auto-encoder",
            ("dataset=curves", "dataset.limit_train=0.3", "dataset.batch_size=128", "model=autoencoder_curves"),
            steps=300, tuning=True, metric="loss", rates=True,
        ),
        Problem(
            "mnist_conv_autoencoder", "a tenth of MNIST, convolutional auto-encoder",
            (
                "dataset=mnist_autoencoder", "dataset.download=false", "dataset.limit_train=0.1",
                "dataset.limit_val=0.1", "dataset.batch_size=64", "model=conv_autoencoder",
            ),
            steps=200, tuning=True, folder="mnist", metric="loss", rates=True,
        ),
        Problem(
            "cifar10_resnet20", "CIFAR-10 subset at 16 × 16, ResNet-20",
            (
                "dataset=small_photos", "dataset.root=${paths.data}/cifar10-subset", "dataset.batch_size=32",
                "model=resnet20",
            ),
            steps=200, tuning=True, folder="cifar10-subset", least=0.2,
        ),
        Problem(
            "wikitext2_gpt_mini", "WikiText-2's slice by characters, GPT mini of half the width",
            (
                "dataset=text_file", "dataset.path=${paths.data}/wikitext-2/valid.txt", "dataset.level=character",
                "dataset.max_vocabulary=64", "dataset.sequence=32", "dataset.batch_size=8", "dataset.limit_val=0.2",
                "dataset.test_fraction=0.05", "model=gpt1_mini", "model.width=128", "model.dropout=0",
                # It normalises after each sum: without a warm-up AdamW, too, stays with the characters' frequencies.
                "scheduler.warmup=0.2",
            ),
            steps=300, tuning=True, folder="wikitext-2", metric="loss", constant=UNIGRAM,
        ),
        Problem(
            "ill_conditioned", "ill-conditioned linear regression",
            ("dataset=ill_conditioned", "model=deep_linear", "model.hidden=[]"),
            steps=1000, tuning=True, metric="loss", rates=True,
        ),
        Problem(
            "mnist_mlp", "a tenth of MNIST, MLP",
            (
                "dataset=mnist", "dataset.download=false", "dataset.augment=none", "dataset.limit_train=0.1",
                "dataset.limit_val=0.1", "model=mlp",
            ),
            steps=300, tuning=False, folder="mnist", least=0.8, rates=True,
        ),
        Problem(
            "deep_relu", "digits, deep narrow ReLU net",
            ("dataset=digits", "dataset.augment=none", "model=mlp", "model.hidden=[32,32,32,32,32,32]"),
            steps=500, tuning=False, least=0.5, rates=True,
        ),
        Problem(
            "mnist_autoencoder", "a tenth of MNIST, auto-encoder",
            (
                "dataset=mnist_autoencoder", "dataset.download=false", "dataset.limit_train=0.1",
                "dataset.limit_val=0.1", "dataset.batch_size=128", "model=autoencoder_mnist",
            ),
            steps=100, tuning=False, folder="mnist", metric="loss",
        ),
        Problem(
            "digits_resnet18", "digits, slim ResNet-18",
            ("dataset=digits", "model=slim_resnet18"),
            steps=150, tuning=False, least=0.8,
        ),
        Problem(
            "tiny_imagenet_mobilenetv3", "Tiny-ImageNet's slice, MobileNetV3 small of half the width",
            (
                "dataset=tiny_imagenet", "dataset.download=false", "dataset.batch_size=32", "model=timm",
                # torchvision's averages of batch norm need more steps than these to forget where they started.
                "model.name=mobilenetv3_small_050",
            ),
            steps=200, tuning=False, folder="tiny-imagenet-200", least=0.15,
        ),
        Problem(
            "cifar10_vit_tiny", "CIFAR-10 subset at 16 × 16, slim ViT-tiny",
            (
                "dataset=small_photos", "dataset.root=${paths.data}/cifar10-subset", "dataset.batch_size=32",
                "model=slim_vit",
            ),
            steps=200, tuning=False, folder="cifar10-subset", least=0.2,
        ),
    )
}  # fmt: skip
