"""One configuration: verl's own tree, and in it a section `atropos` with what verl has no place for.

The section holds the settings of our section `atropos` (`url`, `batch_size`, ...), and below it our sections
`data`, `loss`, `journal` and `publish`. What verl decides (model, optimizer, checkpoints, parallelism) stands
in verl's tree only; what nobody would read is refused, and so are secrets: verl prints its configuration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import validate_config

from trainer.config import ENVIRONMENT_PREFIX, TrainerConfig, leaves, load_config
from trainer.errors import ConfigurationError
from trainer.run.build import PUBLISHED_MODES
from trainer.run.places import publish_directory

SERVERS_BESIDE: Final = "atropos"
"""`rollout.name` where verl starts no servers, and the checkpoint engine that serves those beside it."""

_DEMANDED: Final = (
    "trainer.v1.trainer_mode=atropos",
    "trainer.val_before_train=false",
    "algorithm.adv_estimator=grpo",  # advantages come without a critic
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_integration.trainer.NoAgentLoop",
    "reward.num_workers=0",
)
"""What batches from elsewhere demand of verl."""

_NOT_READ: Final = (
    # Environments sample and score; advantages come with the groups, or by atropos.data.
    *("algorithm.", "critic.", "data.", "distillation.", "reward", "custom_reward", "sandbox_fusion"),
    *("rollout.n.", "rollout.temperature", "rollout.top_", "rollout.do_sample", "rollout.val_kwargs"),
    *("rollout.multi_turn", "rollout.agent.", "trainer.critic_warmup", "trainer.rollout_data_dir"),
    *("trainer.val", "trainer.test_freq"),
    # All rows of a batch make one optimizer step, dealt out by ppo_max_token_len_per_gpu.
    *("actor.ppo_epochs", "actor.ppo_mini_batch_size", "actor.ppo_micro_batch_size", "actor.shuffle"),
    *("actor.use_dynamic_bsz", "actor.data_loader_seed"),
    # A checkpoint that settles batches is whole; trainer.total_training_steps says when the run ends.
    *("actor.checkpoint.async_save", "trainer.v1", "trainer.use_v1", "trainer.total_epochs"),
)
"""Begin the names of what has no effect here, in verl's tree or below its `actor_rollout_ref`."""

_NOT_READ_WITH_OUR_LOSS: Final = (
    *("ref.", "actor.policy_loss", "actor.clip_ratio", "actor.tau_", "actor.loss_agg_mode"),
    *("actor.loss_scale_factor", "actor.entropy_coeff", "actor.calculate_entropy"),
    *("actor.use_kl_loss", "actor.kl_loss_"),
)
_READ_ALL_THE_SAME: Final = (
    *("data.max_prompt_length", "data.max_response_length", "rollout.log_prob_max_token_len_per_gpu"),
)


def read_config(path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Return verl's tree with our section: verl's defaults, the file over them, then `key=value` words.

    The file has the keys that differ from the defaults, perhaps `model_engine` (dp, megatron, ...), and the
    section `atropos`.

    Raises:
        ConfigurationError: A setting has no effect, or does not go with others.
        Exception: Of any kind, where the file system, YAML, hydra, omegaconf or verl refuse it: verl's checks
            are assertions, too.
    """
    given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    engine, section = given.pop("model_engine", "dp"), given.pop("atropos", None)
    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        default = compose("ppo_trainer", overrides=[f"model_engine={engine}", *_DEMANDED])
    _open_free_parts(default)
    config = OmegaConf.merge(default, given)
    rollout = config.actor_rollout_ref.rollout
    starts_servers = rollout.nnodes != 0
    with open_dict(config):
        config.atropos = OmegaConf.merge({"objective": "atropos"}, section or {})
        ours = our_config(config)
        of_loss = _NOT_READ_WITH_OUR_LOSS if config.atropos.objective == "atropos" else ()
        of_servers = () if starts_servers else ("rollout.",)
        _refuse_what_is_not_read(given, default, (*_NOT_READ, *of_loss, *of_servers))
        _refuse_what_does_not_fit(config, ours, starts_servers=starts_servers)
        if not starts_servers:
            rollout.nnodes = 1  # verl wants one, also where it starts no server
            rollout.name = rollout.checkpoint_engine.backend = SERVERS_BESIDE
            rollout.checkpoint_engine.engine_kwargs = {
                SERVERS_BESIDE: {
                    "directory": str(publish_directory(ours).absolute()),
                    "model_path": ours.model.path,
                    "dtype": ours.publish.dtype,
                    "mode": PUBLISHED_MODES[ours.publish.readable_by],
                }
            }
    get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    validate_config(config, use_reference_policy=False, use_critic=False)
    return config


def our_config(config: DictConfig) -> TrainerConfig:
    """Read the section `atropos` as our configuration; refuse what is wrong, secret, or without effect."""
    section: Any = OmegaConf.to_container(config.atropos, resolve=True)
    objective = section.pop("objective")
    if objective not in ("atropos", "verl"):
        raise ConfigurationError(f"atropos.objective {objective!r} is none of atropos, verl")
    below = {name: section.pop(name, None) or {} for name in ("data", "loss", "journal", "publish")}
    settings = dict(leaves({"atropos": section, **below}))
    for name in settings:
        if objective == "verl" and name.startswith("loss.") and name != "loss.max_staleness":
            raise ConfigurationError(
                f"atropos.{name} has no effect with atropos.objective verl, whose objective is "
                "actor_rollout_ref.actor.policy_loss"
            )
        secret = ".".join(name.split(".")[:2])
        if secret.endswith((".token", ".headers")):
            variable = ENVIRONMENT_PREFIX + secret.replace(".", "__").upper()
            raise ConfigurationError(f"{secret} would be printed by verl: give it by {variable}")
    if objective == "verl":
        settings["loss.name"] = "policy_gradient"  # wants the sampler's log-probs, as all of verl's do
    settings |= {
        "model.path": config.actor_rollout_ref.model.path,
        "train.output_dir": str(Path(config.trainer.default_local_dir).absolute()),
        "train.steps": config.trainer.total_training_steps or 0,
    }
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in settings.items()}
    return load_config(None, [f"--{name}={text}" for name, text in texts.items()])


def _open_free_parts(node: Any) -> None:
    """Let the file add keys where verl reads whatever stands there; everywhere else they are refused."""
    if not isinstance(node, DictConfig):
        return
    # A dataclass of verl's refuses unknown keys itself.
    OmegaConf.set_struct(node, not ("_target_" in node or not node or "num_cpus" in node))
    for name in node:
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            _open_free_parts(node[name])


def _refuse_what_is_not_read(given: DictConfig, default: DictConfig, places: tuple[str, ...]) -> None:
    """Refuse texts for numbers, and what begins like `places`, unless it stands there anyway."""
    tree, usual_tree = (OmegaConf.to_container(each) for each in (given, default))
    usual = dict(leaves(usual_tree))
    for name, value in leaves(tree):
        short = name.removeprefix("actor_rollout_ref.")
        if isinstance(usual.get(name), int | float) and isinstance(value, str) and "${" not in value:
            raise ConfigurationError(f"{name} has to be like {usual[name]}, not {value!r}")
        if f"{short}.".startswith(places) and short not in _READ_ALL_THE_SAME and value != usual.get(name):
            raise ConfigurationError(f"{name} has no effect here (docs/verl.md says why): leave it out")


def _refuse_what_does_not_fit(config: DictConfig, ours: TrainerConfig, *, starts_servers: bool) -> None:
    rollout, trainer, data, loss = config.actor_rollout_ref.rollout, config.trainer, ours.data, ours.loss
    publishes = ours.publish.transport != "none" or bool(ours.publish.servers)
    brings_none = OmegaConf.is_missing(rollout, "name") or rollout.checkpoint_engine.backend == "naive"
    packs = data.packing != "auto" or "tokens_per_micro_batch" in data.model_fields_set
    refused = {
        "trainer.save_freq and total_training_steps must be above 0: a batch is settled by the checkpoint "
        "that counts it": min(trainer.save_freq or 0, trainer.total_training_steps or 0) <= 0,
        "rollout.nnodes above 0 has verl start servers: set rollout.name, e.g. vllm, and to bring weights to "
        "them rollout.checkpoint_engine.backend, e.g. nccl": starts_servers and brings_none,
        "atropos.publish is for servers beside verl: it starts its own": starts_servers and publishes,
        "atropos.publish.transport has to be disk or none": ours.publish.transport not in ("none", "disk"),
        "atropos.loss.reference: its log-probs come with the groups": loss.reference != "batch",
        "atropos.loss.entropy_coefficient: verl has actor.entropy_coeff": loss.rewards_entropy,
        "atropos.loss.top_entropy_share is not computed": loss.top_entropy_share != 1,
        "atropos.journal.enabled: every batch is journaled": not ours.journal.enabled,
        "atropos.data.packing, tokens_per_micro_batch: verl packs, by ppo_max_token_len_per_gpu": packs,
    }
    if found := [what for what, is_refused in refused.items() if is_refused]:
        raise ConfigurationError(f"not possible in verl: {'; '.join(found)}")
