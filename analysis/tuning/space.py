"""Search spaces: what is tried of an optimizer's values, read from `configs/hparams_search/OPTIMIZER.yaml`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: The folder of `configs/` that holds a file an optimizer; it is data, and no group of a run.
SPACES = CONFIGS / "hparams_search"
SCALES = ("log", "linear", "log1m")
#: Significant digits of a value that is drawn, so that commands can be read.
DIGITS = 4
#: The key whose best value is to lie inside what was tried.
RATE = "lr"
#: No value of these kinds may be searched: an arm's seconds a step are measured once, and hold for all its trials.
COSTLY = ("_every", "_steps", "_frequency", "batch_fraction", "samples", "rank", "_dim", "solver", "product", "fisher")


@dataclass(frozen=True)
class Key:
    """One value of an optimizer, and where it is searched.

    Attributes:
        name: under `optimizer.`; with a `+` if the optimizer's file does not have it.
        default: what the optimizer is configured with.
        low: least value; of a range alone.
        high: largest value; of a range alone.
        scale: `log` | `linear` | `log1m`, by the logarithm of 1 - value, as momentum is tuned.
        values: in their order; in place of a range.
    """

    name: str
    default: Any
    low: float = math.nan
    high: float = math.nan
    scale: str = "linear"
    values: tuple[Any, ...] = ()

    @property
    def override(self) -> str:
        """What stands before the value on the command line: `optimizer.lr=`."""
        return f"{'+' * self.name.startswith('+')}optimizer.{self.name.lstrip('+')}="

    def at(self, u: float) -> Any:
        """The value at a place in [0, 1)."""
        if self.values:
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        first, last = (self._scaled(end) for end in (self.low, self.high))
        place = first + u * (last - first)
        value = place if self.scale == "linear" else math.exp(place) if self.scale == "log" else 1 - math.exp(place)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def place(self, value: Any) -> float:
        """Where a value lies in [0, 1); of one of a list, the middle of its part."""
        if self.values:
            index = next((i for i, one in enumerate(self.values) if one == value), 0)
            return (index + 0.5) / len(self.values)
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return 0.5
        first, last = (self._scaled(end) for end in (self.low, self.high))
        return min((self._scaled(value) - first) / (last - first), 1 - 1e-9)

    def _scaled(self, value: float) -> float:
        return value if self.scale == "linear" else math.log(value if self.scale == "log" else 1 - value)

    def edge(self, value: Any, tried: Iterable[Any]) -> str | None:
        """At which end of all that was tried a value lies: "low", "high", or None inside, or without an order.

        Nothing is below 0, nor beyond the end of a list that the default is at, and words and pairs have no order.

        Args:
            value: that was chosen.
            tried: the values of all trials.
        """
        numbers = [one for one in tried if isinstance(one, int | float) and not isinstance(one, bool)]
        if not isinstance(value, int | float) or isinstance(value, bool) or len(set(numbers)) < 2:
            return None
        if self.values and value == self.default and value in (self.values[0], self.values[-1]):
            return None
        if value >= max(numbers):
            return "high"
        return "low" if value <= min(numbers) and value != 0 else None


@dataclass(frozen=True)
class Space:
    """The values that are searched of an optimizer.

    Attributes:
        name: file of configs/optimizer.
        keys: in the order of the file: the first one of every optimizer, its rate, is drawn from the same numbers.
        file: that it was read from.
        requires: values that the ranges are made for: a package's class by its name.
    """

    name: str
    keys: tuple[Key, ...]
    file: Path
    requires: Mapping[str, Any]

    @classmethod
    def load(cls, name: str, folder: Path | None = None) -> Space:
        """The space of an optimizer.

        Args:
            name: file of configs/optimizer.
            folder: of spaces that take the place of those in configs/hparams_search, each of which may be missing.

        Raises:
            UserError: there is none, or it is no space.
        """
        if folder is not None and not folder.is_dir():
            raise UserError(f"spaces: there is no folder {folder}; give one with files like {name}.yaml")
        known = sorted(path.stem for path in SPACES.glob("*.yaml"))
        places = [place / f"{name}.yaml" for place in (folder, SPACES) if place is not None]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            raise UserError(
                f"there is no search space for {name!r}{did_you_mean(name, known)}: write configs/hparams_search/"
                f"{name}.yaml, which the files beside it show"
            )
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not isinstance(read, dict) or not read:
            raise UserError(f"{path} is no search space: give keys of the optimizer, each with low, high and scale")
        defaults = _defaults(name)
        requires = {key: value for key, value in read.items() if not isinstance(value, dict)}
        keys = tuple(_key(path, key, given, defaults) for key, given in read.items() if isinstance(given, dict))
        if not keys:
            raise UserError(f"{path} has no key to search")
        return cls(name, keys, path, requires)

    @property
    def defaults(self) -> dict[str, Any]:
        """What the optimizer is configured with, by key."""
        return {key.name: key.default for key in self.keys}

    def point(self, u: Sequence[float]) -> dict[str, Any]:
        """The values at a point of the unit cube, of which the first coordinates count.

        Args:
            u: at least as many numbers in [0, 1) as there are keys.
        """
        return {key.name: key.at(place) for key, place in zip(self.keys, u, strict=False)}

    def unit(self, values: Mapping[str, Any]) -> list[float]:
        """The point of values, as `point` takes it; the middle for what no range holds."""
        return [key.place(values.get(key.name, key.default)) for key in self.keys]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Values as a command has them: `optimizer.lr=0.03`."""
        return [f"{key.override}{written(values[key.name])}" for key in self.keys if key.name in values]


def written(value: Any) -> str:
    """A value as a command has it, without spaces."""
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _defaults(name: str) -> dict[str, Any]:
    path = CONFIGS / "optimizer" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _key(path: Path, name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Key:
    """One line of a space's file.

    Raises:
        UserError: it is no range and no list of values, or the optimizer has no such key.
    """
    where = f"{path}: {name}"
    if defaults and not name.startswith("+") and name not in defaults:
        raise UserError(f"{where} is no key of this optimizer{did_you_mean(name, defaults)}")
    if any(part in name for part in COSTLY):
        raise UserError(f"{where} changes what a step costs, which is measured once: it cannot be searched")
    default = given.get("default", defaults.get(name.lstrip("+")))
    if values := given.get("values"):
        if set(given) - {"values", "default"} or not isinstance(values, list) or len(values) < 2:
            raise UserError(f"{where} must have two values or more, or low, high and scale")
        return Key(name, default, values=tuple(values))
    scale, ends = given.get("scale"), [given.get("low"), given.get("high")]
    if set(given) - {"low", "high", "scale", "default"} or scale not in SCALES:
        raise UserError(f"{where} must have low, high and a scale of {', '.join(SCALES)}, or values")
    low, high = (float(e) if isinstance(e, int | float) and not isinstance(e, bool) else math.nan for e in ends)
    if not low < high or (scale == "log" and low <= 0) or (scale == "log1m" and high >= 1):
        raise UserError(f"{where} must have numbers, low below high, above 0 for log and below 1 for log1m")
    return Key(name, default, low, high, str(scale))
