"""Any image classifier of torchvision and timm, made for the images and classes at hand.

The named families (densenet.py, mobilenet.py, transformers.py, focalnet.py) are built through the same functions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.parts.plain import plain_layers
from models.parts.stems import LARGEST_SMALL_IMAGE, set_first
from models.weights.published import Published, Statistics, load_pretrained, published_by_torchvision
from models.weights.reach import hugging_face, torch_hub


def timm_model(
    name: str,
    pretrained: bool | str = False,
    dropout: float | None = None,
    drop_path: float | None = None,
    *,
    in_channels: int,
    image_size: int,
    num_classes: int,
) -> nn.Module:
    """A model of timm under its name there.

    Args:
        name: as ``timm.list_models()`` has it; a tag may follow (``resnet18.a1_in1k``).
        pretrained: true: the published weights, downloaded; or a path (see ``models.weights.files.read_weights``).
        dropout: probability of dropping a unit before the head; None: the model's own.
        drop_path: probability of dropping a residual branch; None: the model's own.
        in_channels: of the images.
        image_size: side of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``, of plain layers (see
        ``models.parts.plain``).

    Raises:
        ValueError: there is no such model, it does not take such images or has no such option, or ``pretrained`` ends
            in nothing.
    """
    options = {"drop_rate": ("dropout", dropout), "drop_path_rate": ("drop_path", drop_path)}
    for option, value in options.values():
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{option} must be at least 0 and below 1, got {value}")
    timm = need_timm()
    if not timm.is_model(name):
        raise ValueError(_unknown(name, "timm", timm.list_models()))
    chosen = {theirs: value for theirs, (_, value) in options.items() if value is not None}
    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=True)  # None for a name that timm has given up
        sized = {"img_size": image_size} if settings is not None and settings.fixed_input_size else {}
        net = create_timm(name, in_channels, num_classes, **sized, **chosen)
    except TypeError as error:
        ours = next((option for theirs, (option, _) in options.items() if f"'{theirs}'" in str(error)), None)
        if ours is None:
            raise ValueError(f"name {name} cannot be built for these images ({error}): choose another model") from error
        raise ValueError(f"{ours} is no option of {name}: leave it at null") from error
    except (RuntimeError, AssertionError) as error:  # an unknown tag, a size that does not divide
        raise ValueError(f"name {name} cannot be built for these images ({error}): choose another model") from error
    return finish(net, name, in_channels, image_size, num_classes, pretrained, published_by_timm(name))


def torchvision_model(
    name: str, pretrained: bool | str = False, *, in_channels: int, image_size: int, num_classes: int
) -> nn.Module:
    """A classifier of torchvision under its name there.

    Args:
        name: as ``torchvision.models.list_models(module=torchvision.models)`` has it.
        pretrained: true: the published weights, downloaded; or a path (see ``models.weights.files.read_weights``).
        in_channels: of the images.
        image_size: side of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``, of plain layers (see
        ``models.parts.plain``) and without auxiliary heads.

    Raises:
        ValueError: there is no such model, it does not take such images, or ``pretrained`` ends in nothing.
    """
    import torchvision  # takes seconds

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(_unknown(name, "torchvision", known))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    try:
        net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"name {name} cannot be built for these images ({error}): choose another model") from error
    widen(net, in_channels)
    return finish(net, name, in_channels, image_size, num_classes, pretrained, published_by_torchvision(name))


def finish(
    net: nn.Module,
    name: str,
    in_channels: int,
    image_size: int,
    num_classes: int,
    pretrained: bool | str,
    published: Published,
) -> nn.Module:
    """Make the layers plain, try the model out on an empty image, and give it its pretrained weights.

    Args:
        net: changed in place.
        name: what to call it.
        in_channels: of the images.
        image_size: side of the images.
        num_classes: what the model must return for each.
        pretrained: see ``models.weights.published.load_pretrained``.
        published: downloads the published weights.

    Returns:
        The model.

    Raises:
        ValueError: it does not take such images, or ``pretrained`` ends in nothing.
    """
    plain_layers(net)
    image = torch.zeros(1, in_channels, image_size, image_size, device=next(net.parameters()).device)
    try:
        with torch.no_grad():
            outputs = net.eval()(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = (str(error).splitlines() or ["they are too small"])[0].rstrip(".")
        raise ValueError(
            f"name {name} takes no images of {in_channels} × {image_size} × {image_size} ({why}): choose another model "
            "or another image size"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (1, num_classes):
        raise ValueError(f"name {name} is no classifier of images: choose another model")
    load_pretrained(net.train(), pretrained, published)
    return net


def create_timm(name: str, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
    """``timm.create_model`` without weights."""
    return need_timm().create_model(name, in_chans=in_channels, num_classes=num_classes, **options)


def published_by_timm(name: str) -> Published:
    """What downloads a timm model's weights."""

    def published() -> tuple[Mapping[str, Tensor], Statistics]:
        timm = need_timm()
        cfg = timm.models.get_pretrained_cfg(name)
        with hugging_face() if cfg is None or cfg.hf_hub_id else torch_hub(cfg.url):
            net = timm.create_model(name, pretrained=True)
        return net.state_dict(), (net.pretrained_cfg["mean"], net.pretrained_cfg["std"])

    return published


def widen(net: nn.Module, in_channels: int) -> None:
    """Replace a model's first convolution, unless it takes so many channels already, by a fresh one that does."""
    name, conv = next((name, part) for name, part in net.named_modules() if isinstance(part, nn.Conv2d))
    if conv.in_channels != in_channels:
        set_first(net, name, in_channels)


def patch_side(patch_size: int | None, image_size: int, published: int, patches: int) -> int:
    """The side of a patch.

    Args:
        patch_size: given, or None: what is published; of small images the largest divisor of their side that leaves
            enough patches, or 1.
        image_size: side of the images.
        published: for large images.
        patches: how many a side are enough.

    Raises:
        ValueError: for a side that does not divide the image's.
    """
    if patch_size is None and image_size <= LARGEST_SMALL_IMAGE:
        enough = [n for n in range(1, image_size + 1) if image_size % n == 0 and image_size // n >= patches]
        return max(enough, default=1)
    side = published if patch_size is None else patch_size
    if side < 1 or image_size % side:
        raise ValueError(
            f"patch_size must be a divisor of the image's side ({image_size}), got {side}: choose another one, or "
            "another image size"
        )
    return side


def need_timm() -> Any:
    """The package, imported when it is needed.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            "this model's parts come from timm, which is not installed: pip install -r requirements.txt"
        ) from error
    return timm


def _unknown(name: str, package: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"name {name!r} is no model of {package}" + (f" (did you mean {close[0]!r}?)" if close else "")
