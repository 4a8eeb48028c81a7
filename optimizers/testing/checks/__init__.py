"""What a training script may rely on whatever the optimizer, as functions ``check_xxx(make_optimizer)``.

Each raises AssertionError with a sentence, or ``unittest.SkipTest`` (which pytest knows, too) where an optimizer does
not have what is asked about. ``make_optimizer`` is a class or a callable; see ``Maker``.

- ``moves``: what moves; ``state``: what is saved and copied; ``passes``: the training loop; ``parameters``: groups and
  frozen parameters; ``options``: learning rates, numbers and flags;
- ``common``: what the checks are made of; ``every``: all of them.
"""

from .common import Check, demand
from .every import optimizer_checks
from .moves import (
    check_every_trainable_tensor_moves,
    check_lr_zero_no_move,
    check_no_gradient_no_move,
    check_the_loss_goes_down,
    check_weight_decay_pulls_to_zero,
)
from .options import (
    check_float64,
    check_grad_scaler,
    check_learning_rate_schedulers,
    check_loss_reduction,
    check_maximize,
    check_nan_gradients_do_not_pass_silently,
    check_tensor_learning_rate,
    check_tied_weights,
)
from .parameters import (
    check_add_param_group_later,
    check_filtered_parameters,
    check_groups_have_their_own_learning_rate,
    check_model_without_a_trainable_layer,
    check_thawed_later,
)
from .passes import (
    check_close_removes_hooks,
    check_closures,
    check_determinism,
    check_dropped_optimizer_is_freed,
    check_empty_batch,
    check_in_place_activations,
    check_micro_batches_equal_one_batch,
    check_model_unharmed,
    check_zero_grad,
)
from .state import (
    check_copies_of_model_and_optimizer,
    check_deepcopy_of_state,
    check_state_crosses_wrappers,
    check_state_dict_hooks,
    check_state_round_trip,
)

__all__ = [
    "Check",
    "check_add_param_group_later",
    "check_close_removes_hooks",
    "check_closures",
    "check_copies_of_model_and_optimizer",
    "check_deepcopy_of_state",
    "check_determinism",
    "check_dropped_optimizer_is_freed",
    "check_empty_batch",
    "check_every_trainable_tensor_moves",
    "check_filtered_parameters",
    "check_float64",
    "check_grad_scaler",
    "check_groups_have_their_own_learning_rate",
    "check_in_place_activations",
    "check_learning_rate_schedulers",
    "check_loss_reduction",
    "check_lr_zero_no_move",
    "check_maximize",
    "check_micro_batches_equal_one_batch",
    "check_model_unharmed",
    "check_model_without_a_trainable_layer",
    "check_nan_gradients_do_not_pass_silently",
    "check_no_gradient_no_move",
    "check_state_crosses_wrappers",
    "check_state_dict_hooks",
    "check_state_round_trip",
    "check_tensor_learning_rate",
    "check_thawed_later",
    "check_the_loss_goes_down",
    "check_tied_weights",
    "check_weight_decay_pulls_to_zero",
    "check_zero_grad",
    "demand",
    "optimizer_checks",
]
