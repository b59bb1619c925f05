"""What verl loads by its entry point `verl.plugins`: importing it registers everything.

Verl says nothing where a plugin cannot be imported (a line at level DEBUG), and then trains with its own
objective, or does not know ours. `require_loaded` turns that into an error.
"""

from __future__ import annotations

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from trainer.errors import ConfigurationError
from verl_integration.losses import POLICY_LOSS_PREFIX, POLICY_LOSSES, register_policy_losses

register_policy_losses()


def require_loaded() -> None:
    """See that verl knows all of ours, by its own discovery or by this import.

    Raises:
        ConfigurationError: It does not.
    """
    missing = [name for name in POLICY_LOSSES if POLICY_LOSS_PREFIX + name not in POLICY_LOSS_REGISTRY]
    if missing:
        raise ConfigurationError(
            f"verl does not know {', '.join(missing)} of atropos-trainer; see what `python -c 'import "
            "verl_integration.plugin'` says in this environment"
        )
