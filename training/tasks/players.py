"""Two optimizers that train the two players of one model, as one optimizer to the rest of the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer

from optimizers import consolidate


class Players(Optimizer):
    """A generator's and a critic's optimizer: groups and state of both, in this order; they step one by one.

    Args:
        generator: trains the one.
        critic: trains the other.
    """

    #: The critic's penalty is the norm of a gradient.
    needs_graph = True
    #: Schedulers look whether ``step`` was called, and here it is the players' own that is.
    _opt_called = True

    def __init__(self, generator: Optimizer, critic: Optimizer) -> None:
        # Without Optimizer's own: groups and state stay the players', who replace them when they load theirs.
        self.generator, self.critic = generator, critic

    @property
    def players(self) -> dict[str, Optimizer]:
        """Both, by name."""
        return {"generator": self.generator, "critic": self.critic}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The generator's groups, then the critic's."""
        return [*self.generator.param_groups, *self.critic.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """State by parameter."""
        return {**self.generator.state, **self.critic.state}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The hyper-parameters of groups that both players have."""
        return {name: value for name, value in self.generator.defaults.items() if name in self.critic.defaults}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer."""
        for player in self.players.values():
            player.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Both players' step."""
        for player in self.players.values():
            player.step(closure)

    def consolidate(self) -> None:
        """Bring what each process keeps of the players' state to all of them: every process must call it."""
        for player in self.players.values():
            consolidate(player)

    def state_dict(self) -> dict[str, Any]:
        """{"generator": ..., "critic": ...}."""
        return {name: player.state_dict() for name, player in self.players.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if it is of other optimizers.
        """
        if state_dict.keys() != self.players.keys():
            raise ValueError("the state is not that of two players.")
        for name, player in self.players.items():
            player.load_state_dict(state_dict[name])

    def coverage(self) -> str:
        """The tables of those that have one."""
        found = {name: table() for name, player in self.players.items() if (table := getattr(player, "coverage", None))}
        return "\n".join(f"{name}:\n{table}" for name, table in found.items()) or "none"

    def diagnostics(self) -> dict[str, float]:
        """Each player's, and its learning rate, under its name."""
        values: dict[str, float] = {}
        for name, player in self.players.items():
            own = getattr(player, "diagnostics", dict)() | {"lr": float(player.param_groups[0]["lr"])}
            values |= {f"{name}/{key}": value for key, value in own.items()}
        return values

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        for player in self.players.values():
            if close := getattr(player, "close", None):
                close()


def members(optimizer: Optimizer) -> dict[str, Optimizer]:
    """The players' optimizers by their names, or the only one under ""."""
    return optimizer.players if isinstance(optimizer, Players) else {"": optimizer}


def unobserved(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Passes within it are none that the optimizer gathers curvature from."""
    own = getattr(optimizer, "unobserved", None)
    return nullcontext() if own is None else own()


@contextmanager
def frozen(player: nn.Module) -> Iterator[None]:
    """Within it, gradients flow through a player and not to its parameters."""
    trained = [p for p in player.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
