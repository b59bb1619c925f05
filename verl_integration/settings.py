"""One configuration: verl's own tree, and in it a section `atropos` with what verl has no place for.

The section holds the settings of our section `atropos` (`url`, `batch_size`, ...), and below it our sections
`data`, `loss`, `journal` and `publish`, under their names and with their checks. What verl decides (model,
optimizer, checkpoints, parallelism) stands in verl's tree only. Secrets come by environment variables, as
with the trainer: verl prints its whole configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config import TrainerConfig, leaves, load_config
from trainer.errors import ConfigurationError
from trainer.run.build import PUBLISHED_MODES
from trainer.run.places import publish_directory

OWN_OBJECTIVE: Final = "atropos"
OBJECTIVES: Final = (OWN_OBJECTIVE, "verl")
"""`atropos.objective`: our loss by its engine, or verl's by `actor.policy_loss`."""

SERVERS_BESIDE: Final = "atropos"
"""`rollout.name` where verl starts no servers."""

_SECTIONS: Final = ("data", "loss", "journal", "publish")
_SECRETS: Final = ("token", "headers")

# What batches from elsewhere demand of verl; nothing else of its tree is changed.
_DEMANDED: Final[Mapping[str, Any]] = {
    "trainer.use_v1": True,
    "trainer.v1.trainer_mode": "atropos",
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    # The groups' advantages are computed before verl sees them, and need no critic.
    "algorithm.adv_estimator": "grpo",
    "algorithm.rollout_correction.bypass_mode": True,
    "actor_rollout_ref.hybrid_engine": False,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class": "verl_integration.trainer.NoAgentLoop",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module": "verl_integration.plugin",
    "reward.num_workers": 0,
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, TrainerConfig]:
    """Read a run's configuration: verl's defaults, the file over them, then `key=value` words.

    Args:
        path: YAML with the keys of verl's tree that differ from its defaults, perhaps `model_engine` (dp,
            megatron, ...), and the section `atropos`.
        overrides: E.g. `trainer.nnodes=2`, `atropos.loss.name=gspo`.

    Returns:
        Verl's tree, ready for its trainer, and what its section `atropos` says as our own configuration.

    Raises:
        ConfigurationError: It cannot be read, a key is unknown, or it asks for what does not go together.
    """
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        engine = given.pop("model_engine", None)
        section = given.pop("atropos", None)
        with initialize_config_module(config_module="verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=[f"model_engine={engine}"] if engine else [])
        _open_free_parts(config)
        config = OmegaConf.merge(config, given)
    except Exception as error:  # of the file system, of YAML, of hydra and of omegaconf
        raise ConfigurationError(f"{path} cannot be used with verl: {error}") from error
    with open_dict(config):
        config.atropos = section or {}
    ours = our_config(config)
    _prepare(config, ours)
    return config, ours


def our_config(config: DictConfig) -> TrainerConfig:
    """Read the section `atropos` of verl's tree as our configuration.

    Raises:
        ConfigurationError: A setting is wrong, or means something that verl does otherwise.
    """
    section = OmegaConf.to_container(config.atropos, resolve=True)
    if not isinstance(section, dict):
        raise ConfigurationError("atropos must hold settings below it")
    objective = section.pop("objective", OWN_OBJECTIVE)
    if objective not in OBJECTIVES:
        raise ConfigurationError(f"atropos.objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    tree = {name: section.pop(name) or {} for name in _SECTIONS if name in section}
    tree["atropos"] = section
    if objective != OWN_OBJECTIVE:
        tree["loss"] = _loss_for_verl(tree.get("loss", {}))
    for name, values in tree.items():
        for secret in set(_SECRETS) & set(values):
            raise ConfigurationError(
                f"{name}.{secret} stands in the configuration, which verl prints: give it as the environment "
                f"variable ATROPOS_TRAINER_{name.upper()}__{secret.upper()}"
            )
    words = [
        *("--model.path", str(config.actor_rollout_ref.model.path)),
        *("--train.output_dir", str(Path(config.trainer.default_local_dir).absolute())),
        *("--train.steps", str(config.trainer.total_training_steps or 0)),
        *(word for name, value in leaves(tree) for word in (f"--{name}", _text(value))),
    ]
    ours = load_config(None, words)
    _refuse_what_verl_does(ours)
    return ours


def is_own_objective(config: DictConfig) -> bool:
    """Return whether our loss is trained, and not verl's."""
    return bool(config.atropos.get("objective", OWN_OBJECTIVE) == OWN_OBJECTIVE)


def _loss_for_verl(given: Mapping[str, Any]) -> dict[str, Any]:
    """What preparing a batch has to know of verl's objectives: all use the sampler's log-probs."""
    if decided := sorted(set(given) - {"max_staleness"}):
        raise ConfigurationError(
            f"atropos.loss.{decided[0]} has no effect with atropos.objective verl, whose objective is "
            "actor_rollout_ref.actor.policy_loss"
        )
    return {"name": "policy_gradient", **given}


def _open_free_parts(node: Any) -> None:
    """Let the file add keys where verl reads whatever stands there; everywhere else they are refused."""
    if not isinstance(node, DictConfig):
        return
    # A dataclass of verl's refuses unknown keys itself.
    if "_target_" in node or not node or set(node) >= {"num_cpus"}:
        OmegaConf.set_struct(node, False)
    else:
        OmegaConf.set_struct(node, True)
    for name in node:
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            _open_free_parts(node[name])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_what_verl_does(ours: TrainerConfig) -> None:
    refused = {
        "publish.transport": ours.publish.transport not in ("none", "disk"),
        "loss.reference": ours.loss.reference != "batch",
        "loss.entropy_coefficient": ours.loss.rewards_entropy,
        "loss.top_entropy_share": ours.loss.top_entropy_share != 1,
        "journal.enabled": not ours.journal.enabled,
    }
    found = [name for name, is_refused in refused.items() if is_refused]
    if found:
        raise ConfigurationError(
            f"atropos.{', atropos.'.join(found)}: not available inside verl. Weights travel by disk, a "
            "reference's log-probs come with the groups, every batch is journaled; for an entropy bonus set "
            "atropos.objective to verl and actor_rollout_ref.actor.entropy_coeff"
        )


def _prepare(config: DictConfig, ours: TrainerConfig) -> None:
    """Set what batches from elsewhere demand, and refuse what would lose them."""
    if config.trainer.save_freq <= 0 or not config.trainer.total_training_steps:
        raise ConfigurationError(
            "trainer.save_freq and trainer.total_training_steps must be above 0: a batch is settled by the "
            "checkpoint that counts it"
        )
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        for name, value in _DEMANDED.items():
            OmegaConf.update(config, name, value, force_add=True)
        if "address" not in config.ray_kwargs.ray_init:  # of a cluster that runs
            config.ray_kwargs.ray_init.setdefault("include_dashboard", False)
        if rollout.nnodes == 0:
            rollout.name = SERVERS_BESIDE
            rollout.nnodes = 1  # verl wants one, also where it starts no server
            rollout.checkpoint_engine.backend = "atropos"
            rollout.checkpoint_engine.engine_kwargs = {"atropos": _engine_arguments(ours)}


def _engine_arguments(ours: TrainerConfig) -> dict[str, Any]:
    return {
        "directory": str(publish_directory(ours).absolute()),
        "model_path": ours.model.path,
        "dtype": ours.publish.dtype,
        "mode": PUBLISHED_MODES[ours.publish.readable_by],
    }
