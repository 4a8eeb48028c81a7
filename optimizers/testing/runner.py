"""Running the checks: all of them over one optimizer with a table, or as pytest's parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

from torch.optim import Optimizer

from .checks import optimizer_checks
from .loop import Maker
from .tables import aligned

#: How a check ended.
PASSED, FAILED, EXPECTED, SKIPPED = "passed", "FAILED", "fails as expected", "skipped"


@dataclass
class OptimizerReport:
    """What became of the checks of an optimizer.

    Attributes:
        name: of the optimizer.
        rows: (check, outcome, sentence) a line.
    """

    name: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed, or were expected to fail and did not."""
        return [name for name, outcome, _ in self.rows if outcome == FAILED]

    @property
    def ok(self) -> bool:
        """Whether none failed."""
        return not self.failed

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the sentences of the checks that failed, if any did."""
        if not self.ok:
            told = "\n".join(f"{name}: {said}" for name, outcome, said in self.rows if outcome == FAILED)
            raise AssertionError(f"{self.name} fails {len(self.failed)} of {len(self.rows)} checks.\n{told}")

    def __str__(self) -> str:
        lines = aligned(("check", "outcome", ""), self.rows)
        good = sum(outcome == PASSED for _, outcome, _ in self.rows)
        return "\n".join([*lines, f"{self.name}: {good} of {len(self.rows)} checks passed, {len(self.failed)} failed"])


def check_optimizer(
    cls_or_factory: Callable[..., Optimizer],
    *,
    expected_failures: Mapping[str, str] | None = None,
    verbose: bool = True,
    **options: Any,
) -> OptimizerReport:
    """Run every check of ``optimizer_checks`` over an optimizer and print a table.

    For example ``check_optimizer(MyOptimizer, lr=0.01)``. Takes some seconds.

    Args:
        cls_or_factory: an optimizer class, a ``functools.partial`` of one, or a function
            ``(model, params=None, **overrides)`` that returns an optimizer.
        expected_failures: reasons by the names of checks that are known to fail. One that then passes counts as failed,
            as what is written about the optimizer is no longer true.
        verbose: print the table.
        options: hyper-parameters.

    Returns:
        The report, if nothing failed.

    Raises:
        AssertionError: at the end, if any check failed; the sentences of all that did.
        ValueError: ``expected_failures`` names a check that there is not.
    """
    make, expected = Maker(cls_or_factory, **options), dict(expected_failures or {})
    _refuse_unknown(expected)
    report = OptimizerReport(str(make))
    for name, check in optimizer_checks():
        report.rows.append((name, *_outcome(check, make, expected.get(name))))
    if verbose:
        sys.stdout.write(f"{report}\n")
    report.raise_if_failed()
    return report


def _outcome(check: Callable[..., None], make: Maker, expected: str | None) -> tuple[str, str]:
    try:
        check(make)
    except SkipTest as skip:
        return (SKIPPED, str(skip)) if expected is None else (FAILED, f"was expected to fail ({expected}): {skip}")
    except AssertionError as error:
        said = str(error)
    except Exception as error:  # noqa: BLE001 - whatever an optimizer raises here is a failed check
        first = (str(error).splitlines() or [""])[0]
        said = f"{type(error).__name__}: {first}"
    else:
        return (PASSED, "") if expected is None else (FAILED, f"passes, though it was expected to fail: {expected}")
    return (FAILED, said) if expected is None else (EXPECTED, expected)


def _refuse_unknown(names: Iterable[str]) -> None:
    known = [name for name, _ in optimizer_checks()]
    for name in names:
        if name not in known:
            raise ValueError(f"expected_failures must be among {', '.join(known)}, got {name!r}")


def parametrize_with_checks(
    optimizers: Iterable[Callable[..., Optimizer]] | Mapping[str, Callable[..., Optimizer]],
    *,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
) -> Any:
    """A decorator for pytest: the test below it runs once for each optimizer and check.

    For example::

        @parametrize_with_checks([MyOptimizer, partial(MyOptimizer, momentum=0.5)])
        def test_contract(make_optimizer, check):
            check(make_optimizer)

    Args:
        optimizers: classes, partials or functions (see ``check_optimizer``); by name where they are a mapping.
        expected_failures: by the optimizer's name, reasons by the names of checks that are known to fail; such a test
            is a strict ``xfail``.

    Raises:
        ValueError: ``expected_failures`` names an optimizer or a check that there is not.
    """
    import pytest  # which importing this package must not need

    if isinstance(optimizers, Mapping):
        makers = {name: Maker(target) for name, target in optimizers.items()}
    else:
        makers = {}
        for maker in map(Maker, optimizers):
            makers[str(maker) if str(maker) not in makers else f"{maker}-{len(makers)}"] = maker
    known: dict[str, dict[str, str]] = {name: dict(found) for name, found in (expected_failures or {}).items()}
    for name, reasons in known.items():
        if name not in makers:
            raise ValueError(f"expected_failures must be of {', '.join(makers)}, got {name!r}")
        _refuse_unknown(reasons)
    params = []
    for name, maker in makers.items():
        for label, check in optimizer_checks():
            reason = known.get(name, {}).get(label)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            params.append(pytest.param(maker, check, id=f"{name}-{label}", marks=marks))
    return pytest.mark.parametrize(("make_optimizer", "check"), params)
