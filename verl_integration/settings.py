"""One configuration: verl's own tree, and in it a section `atropos` with what verl has no place for.

The section holds the settings of our section `atropos` (`url`, `batch_size`, ...), and below it our sections
`data`, `loss`, `journal` and `publish`, under their names and with their checks. What verl decides (model,
optimizer, checkpoints, parallelism) stands in verl's tree only; what nobody would read there is refused.
Secrets come by environment variables, as with the trainer: verl prints its whole configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import validate_config

from trainer.config import TrainerConfig, leaves, load_config
from trainer.errors import ConfigurationError
from trainer.run.build import PUBLISHED_MODES
from trainer.run.places import publish_directory

OWN_OBJECTIVE: Final = "atropos"
OBJECTIVES: Final = (OWN_OBJECTIVE, "verl")
"""`atropos.objective`: our loss by its engine, or verl's by `actor.policy_loss`."""

SERVERS_BESIDE: Final = "atropos"
"""`rollout.name` where verl starts no servers, and the checkpoint engine that serves those beside it."""

_SECTIONS: Final = ("data", "loss", "journal", "publish")
_SECRETS: Final = ("token", "headers")

_DEMANDED: Final[Mapping[str, Any]] = {
    "trainer.v1.trainer_mode": "atropos",
    "trainer.val_before_train": False,
    "algorithm.adv_estimator": "grpo",  # advantages come without a critic
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class": "verl_integration.trainer.NoAgentLoop",
    "reward.num_workers": 0,
}
"""What batches from elsewhere demand of verl."""

_NOT_READ: Final[Mapping[str, str]] = {
    "advantages come with the groups or by atropos.data, corrections by atropos.loss": (
        "algorithm critic trainer.critic_warmup"
    ),
    "batches come from the Atropos API, and lie in the journal": (
        "data trainer.rollout_data_dir trainer.validation_data_dir"
    ),
    "Atropos environments sample by themselves, and score": (
        "distillation reward reward_model custom_reward_function sandbox_fusion rollout.n "
        "rollout.temperature rollout.top_k rollout.top_p rollout.do_sample rollout.val_kwargs "
        "rollout.multi_turn rollout.agent trainer.val_before_train trainer.val_only trainer.test_freq"
    ),
    "all rows of a batch make one optimizer step, dealt out by ppo_max_token_len_per_gpu": (
        "actor.ppo_epochs actor.ppo_mini_batch_size actor.ppo_micro_batch_size actor.use_dynamic_bsz "
        "actor.ppo_micro_batch_size_per_gpu actor.shuffle actor.data_loader_seed"
    ),
    "a batch is settled by a checkpoint that is whole": "actor.checkpoint.async_save",
    "the trainer is atropos, one of V1": "trainer.v1 trainer.use_v1",
    "there are no epochs; set trainer.total_training_steps": "trainer.total_epochs",
}
"""Why places of verl's tree have no effect here; `actor_rollout_ref.` is left out."""

_NOT_READ_WITH_OUR_LOSS: Final[Mapping[str, str]] = {
    "the objective is atropos.loss (or verl's, by atropos.objective)": (
        "ref actor.policy_loss actor.clip_ratio actor.clip_ratio_low actor.clip_ratio_high "
        "actor.clip_ratio_c actor.tau_pos actor.tau_neg actor.loss_agg_mode actor.loss_scale_factor "
        "actor.entropy_coeff actor.calculate_entropy actor.use_kl_loss actor.kl_loss_coef actor.kl_loss_type"
    ),
}
_NOT_READ_WITHOUT_SERVERS: Final = {"verl starts no servers where rollout.nnodes is 0": "rollout"}
_READ_ALL_THE_SAME: Final = (
    *("data.max_prompt_length", "data.max_response_length"),  # of the servers that verl starts
    "rollout.log_prob_max_token_len_per_gpu",
)


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, TrainerConfig]:
    """Read a run's configuration: verl's defaults, the file over them, then `key=value` words.

    Args:
        path: YAML with the keys of verl's tree that differ from its defaults, perhaps `model_engine` (dp,
            megatron, ...), and the section `atropos`.
        overrides: E.g. `trainer.nnodes=2`, `atropos.loss.name=gspo`.

    Returns:
        Verl's tree, ready for its trainer, and what its section `atropos` says as our own configuration.

    Raises:
        ConfigurationError: It cannot be read, a key is unknown or has no effect, verl refuses it, or it asks
            for what does not go together.
    """
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        engine = given.pop("model_engine", None)
        section = given.pop("atropos", None)
        with initialize_config_module(config_module="verl.trainer.config", version_base=None):
            default = compose("ppo_trainer", overrides=[f"model_engine={engine}"] if engine else [])
        _open_free_parts(default)
        config = OmegaConf.merge(default, given)
    except Exception as error:  # of the file system, of YAML, of hydra and of omegaconf
        raise ConfigurationError(f"{path} cannot be used with verl: {error}") from error
    with open_dict(config):
        config.atropos = section or {}
    ours = our_config(config)
    _refuse_what_is_not_read(given, default, config)
    _prepare(config, ours)
    try:
        get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
        validate_config(config, use_reference_policy=False, use_critic=False)
    except Exception as error:  # its checks are assertions, ValueErrors and whatever its classes raise
        raise ConfigurationError(f"verl refuses the configuration: {error}") from error
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
        *(
            word
            for name, value in leaves(tree)
            for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
        ),
    ]
    ours = load_config(None, words)
    _refuse_what_verl_does(ours, starts_servers=_starts_servers(config))
    return ours


def is_own_objective(config: DictConfig) -> bool:
    """Return whether our loss is trained, and not verl's."""
    return bool(config.atropos.get("objective", OWN_OBJECTIVE) == OWN_OBJECTIVE)


def _starts_servers(config: DictConfig) -> bool:
    rollout = config.actor_rollout_ref.rollout
    if not isinstance(rollout.nnodes, int) or rollout.nnodes <= 0:
        return False
    return bool(OmegaConf.is_missing(rollout, "name") or rollout.name != SERVERS_BESIDE)


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
    OmegaConf.set_struct(node, not ("_target_" in node or not node or "num_cpus" in node))
    for name in node:
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            _open_free_parts(node[name])


def _refuse_what_is_not_read(given: DictConfig, default: DictConfig, config: DictConfig) -> None:
    """Refuse texts for numbers, and what nothing would read, unless it stands there anyway."""
    not_read = {
        **_NOT_READ,
        **(_NOT_READ_WITH_OUR_LOSS if is_own_objective(config) else {}),
        **({} if _starts_servers(config) else _NOT_READ_WITHOUT_SERVERS),
    }
    usual = {**dict(_leaves_of(default)), **_DEMANDED}
    for name, value in _leaves_of(given):
        short = name.removeprefix("actor_rollout_ref.")
        if isinstance(usual.get(name), int | float) and isinstance(value, str) and "${" not in value:
            raise ConfigurationError(f"{name} has to be like {usual[name]}, not {value!r}")
        if short in _READ_ALL_THE_SAME or value == usual.get(name):
            continue
        for reason, places in not_read.items():
            if any(f"{short}.".startswith(f"{place}.") for place in places.split()):
                raise ConfigurationError(f"{name} has no effect on Atropos batches: {reason}. Leave it out")


def _leaves_of(config: DictConfig) -> Iterator[tuple[str, Any]]:
    tree: Any = OmegaConf.to_container(config)
    return leaves(tree)


def _refuse_what_verl_does(ours: TrainerConfig, *, starts_servers: bool) -> None:
    refused = {
        "publish.transport": ours.publish.transport not in ("none", "disk"),
        "loss.reference": ours.loss.reference != "batch",
        "loss.entropy_coefficient": ours.loss.rewards_entropy,
        "loss.top_entropy_share": ours.loss.top_entropy_share != 1,
        "journal.enabled": not ours.journal.enabled,
        "data.packing": ours.data.packing != "auto",
        "data.tokens_per_micro_batch": "tokens_per_micro_batch" in ours.data.model_fields_set,
    }
    found = [name for name, is_refused in refused.items() if is_refused]
    if found:
        raise ConfigurationError(
            f"atropos.{', atropos.'.join(found)}: not available inside verl. Weights travel by disk, a "
            "reference's log-probs come with the groups, every batch is journaled, verl packs by "
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu; for an entropy bonus set atropos.objective "
            "verl and actor_rollout_ref.actor.entropy_coeff"
        )
    if starts_servers and (ours.publish.transport != "none" or ours.publish.servers):
        raise ConfigurationError(
            "atropos.publish.transport and servers are for servers beside verl, and rollout.nnodes above 0 "
            "has verl start some and bring them the weights: leave one of them out"
        )


def _prepare(config: DictConfig, ours: TrainerConfig) -> None:
    """Set what batches from elsewhere demand, and refuse what would lose them."""
    if (config.trainer.save_freq or 0) <= 0 or not config.trainer.total_training_steps:
        raise ConfigurationError(
            "trainer.save_freq and trainer.total_training_steps must be above 0: a batch is settled by the "
            "checkpoint that counts it"
        )
    rollout = config.actor_rollout_ref.rollout
    if _starts_servers(config) and (
        OmegaConf.is_missing(rollout, "name")
        or rollout.checkpoint_engine.backend in ("naive", SERVERS_BESIDE)
    ):
        raise ConfigurationError(
            "for servers that verl starts (rollout.nnodes above 0) set rollout.name, e.g. vllm, and "
            "rollout.checkpoint_engine.backend to what brings weights to other GPUs, e.g. nccl"
        )
    with open_dict(config):
        for name, value in _DEMANDED.items():
            OmegaConf.update(config, name, value)
        if "address" not in config.ray_kwargs.ray_init:  # of a cluster that runs
            config.ray_kwargs.ray_init.setdefault("include_dashboard", False)
        if rollout.nnodes == 0:
            rollout.name = SERVERS_BESIDE
            rollout.nnodes = 1  # verl wants one, also where it starts no server
            rollout.checkpoint_engine.backend = SERVERS_BESIDE
            rollout.checkpoint_engine.engine_kwargs = {
                SERVERS_BESIDE: {
                    "directory": str(publish_directory(ours).absolute()),
                    "model_path": ours.model.path,
                    "dtype": ours.publish.dtype,
                    "mode": PUBLISHED_MODES[ours.publish.readable_by],
                }
            }
