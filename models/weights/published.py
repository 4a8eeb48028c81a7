"""The option ``pretrained`` of a model: what a package publishes, or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from models.weights.files import read_weights
from models.weights.fitting import load
from models.weights.reach import torch_hub
from models.weights.wording import first_line

# Mean and std a channel, in units of 0..1, of the pixels that weights were trained on.
Statistics = tuple[Sequence[float], Sequence[float]]
# Downloads what a package publishes.
Published = Callable[[], tuple[Mapping[str, Tensor], Statistics]]


def load_pretrained(model: nn.Module, pretrained: bool | str, published: Published) -> None:
    """Do what the option ``pretrained`` of a model says; the account is kept as ``model.loaded``.

    Published weights expect pixels normalised as in their training: with which mean and std, ``model.statistics`` says.
    Of a file that is not known, and images stay normalised by their own.

    Args:
        model: changed in place.
        pretrained: false: nothing; true: the published weights; else a path, see ``read_weights``.
        published: downloads the published weights, and knows the statistics of the images they expect.

    Raises:
        ValueError: they cannot be had, or do not fit.
    """
    if pretrained is False:
        return
    if pretrained is True:
        try:
            weights, statistics = published()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"pretrained weights cannot be downloaded ({first_line(error)}): give pretrained=PATH of a file that "
                "holds them, or try again with a connection"
            ) from error
        model.loaded = load(model, weights, "the published weights")  # type: ignore[assignment]
        model.statistics = statistics  # type: ignore[assignment]
        return
    try:
        weights, file = read_weights(pretrained)
        model.loaded = load(model, weights, str(file))  # type: ignore[assignment]
    except ValueError as error:
        raise ValueError(f"pretrained={error}") from error


def published_by_torchvision(name: str) -> Published:
    """What downloads a torchvision model's newest weights."""

    def published() -> tuple[Mapping[str, Tensor], Statistics]:
        import torchvision  # takes seconds

        newest = torchvision.models.get_model_weights(name).DEFAULT
        expected = newest.transforms()
        with torch_hub(newest.url):
            weights = newest.get_state_dict(progress=False, check_hash=True)
        return weights, (expected.mean, expected.std)

    return published
