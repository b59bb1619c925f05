"""Settings by paper: what `loss.preset` stands for, laid under what is set by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import BaseModel

PresetName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "intellect2",
    "gspo",
    "luspo",
    "gmpo",
    "cispo",
    "sapo",
    "vespo",
    "dppo",
    "icepop",
    "prime_rl",
    "ipo",
    "rloo",
    "reinforce++",
    "opo",
    "gpg",
    "lite_ppo",
    "opd",
]


CHOICES: Final = (
    "loss.name",
    "loss.reduction",
    "data.advantage_estimator",
    "data.advantage_normalization",
)
"""Settings of every preset; the others are options of what they choose, or of distillation."""


@dataclass(frozen=True)
class Preset:
    """The settings that make up a paper's objective."""

    paper: str
    """Where it is defined."""
    settings: Mapping[str, Any]
    """All of them by their dotted names: CHOICES, and options of what they choose."""

    def dropped(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that go, by dotted name, because another function or mode was chosen by hand.

        Args:
            chosen: Settings by dotted name; one that is absent is the preset's.
        """
        dropped: dict[str, Any] = {}
        for choice, options in _OPTIONS_OF.items():
            ours = self.settings.get(choice)
            if chosen.get(choice, ours) != ours and ours is not None:
                dropped |= {
                    name: value
                    for name, value in self.settings.items()
                    if name.startswith(options) and name not in (choice, *CHOICES)
                }
        return dropped

    def lay_under(self, sections: dict[str, Any]) -> None:
        """Set what is not set by hand; no options where another function or mode was named."""
        dropped = self.dropped(dict(leaves(sections)))
        for name, value in self.settings.items():
            if name not in dropped:
                _set_if_absent(sections, name.split("."), value)


_OPTIONS_OF: Final = {
    "loss.name": "loss.",
    "loss.correction.weight": "loss.correction.",
    "data.advantage_estimator": "data.",
    "distillation.mode": "distillation.",
}
"""From what chooses a function or a mode to the beginning of the names of its options."""


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting in nested sections."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings(
    loss: str, reduction: str, estimator: str, *, std: str | None = None, **options: Any
) -> dict[str, Any]:
    """The settings of a preset; `std` is the estimator's, `correction__weight` is correction.weight."""
    of_loss = {f"loss.{name.replace('__', '.')}": value for name, value in options.items()}
    of_estimator = {} if std is None else {"data.advantage_options.std": std}
    choices = {"loss.reduction": reduction, "data.advantage_estimator": estimator}
    # None normalises once more: where a paper does so over the batch, its estimator does.
    normalization = {"data.advantage_normalization": "none"}
    return {"loss.name": loss, **of_loss, **choices, **of_estimator, **normalization}


# Above each preset stands where its values are from: a section of the paper, or a file of its authors' or of
# another trainer's code. Standard deviations are over n - 1, as in TRL (trl/trainer/grpo_trainer.py) and verl
# (verl/trainer/ppo/core_algos.py, below: core_algos.py); the papers do not tell. None has the KL penalty of
# its paper, because that needs a reference: docs/advantages.md names those which have one.
PRESETS: Final[Mapping[PresetName, Preset]] = MappingProxyType(
    {
        # Equation 3: mean over each output, then over the group. The paper has no epsilon: 0.2 is PPO's, the
        # default of TRL's trl/trainer/grpo_config.py.
        "grpo": Preset(
            "DeepSeekMath, arXiv 2402.03300",
            _settings("ppo_clip", "sequence", "group_norm", std="n-1", epsilon_low=0.2, epsilon_high=0.2),
        ),
        # sail-sg/understand-r1-zero train_zero_math.py: a sum over a constant length, reward minus mean.
        "dr_grpo": Preset(
            "arXiv 2503.20783",
            _settings("ppo_clip", "constant", "group_center", epsilon_low=0.2, epsilon_high=0.2),
        ),
        # Section 4.1: 0.2 and 0.28; section 2.3: no KL; verl docs/algo/dapo.md: over tokens.
        "dapo": Preset(
            "arXiv 2503.14476",
            _settings("ppo_clip", "token", "group_norm", std="n-1", epsilon_low=0.2, epsilon_high=0.28),
        ),
        # Section 4.1: epsilon 0.2, delta 4; PrimeIntellect-ai/prime-rl src/zeroband/training/loss.py of that
        # time, grpo_loss_clip: over the step's tokens.
        "intellect2": Preset(
            "arXiv 2505.07291",
            _settings(
                *("ppo_clip", "token", "group_norm"),
                std="n-1",
                epsilon_low=0.2,
                epsilon_high=0.2,
                two_sided=4.0,
            ),
        ),
        # Section 5.1: 3e-4 and 4e-4; TRL docs/source/paper_index.md: mean over each sequence.
        "gspo": Preset(
            "arXiv 2507.18071",
            _settings("gspo", "sequence", "group_norm", std="n-1", epsilon_low=3e-4, epsilon_high=4e-4),
        ),
        # Section 5.1: 2e-3 and 2.5e-3 (TRL docs/source/paper_index.md).
        "luspo": Preset(
            "arXiv 2602.05261",
            _settings("luspo", "sequence", "group_norm", std="n-1", epsilon_low=2e-3, epsilon_high=2.5e-3),
        ),
        # e^-0.4 and e^0.4: verl examples/gmpo_trainer, TRL trl/experimental/gmpo/gmpo_config.py.
        "gmpo": Preset(
            "arXiv 2507.20673",
            _settings("gmpo", "sequence", "group_norm", std="n-1", epsilon_low=0.4, epsilon_high=0.4),
        ),
        # Section 3.1: over all tokens, no lower bound. The paper does not tell its upper one: weights up to 5
        # are ScaleRL's, arXiv 2510.13786 (TRL docs/source/paper_index.md).
        "cispo": Preset(
            "MiniMax-M1, arXiv 2506.13585",
            _settings("cispo", "token", "group_norm", std="n-1", epsilon_low=1.0, epsilon_high=4.0),
        ),
        # TRL docs/source/paper_index.md: 1.0, 1.05, scaled by group; grpo_trainer.py: by sequence.
        "sapo": Preset(
            "arXiv 2511.20347",
            _settings(
                *("sapo", "sequence", "group_norm"),
                std="n-1",
                temperature_positive=1.0,
                temperature_negative=1.05,
            ),
        ),
        # TRL grpo_config.py: (2, 3) and (3, 2); grpo_trainer.py: over tokens.
        "vespo": Preset(
            "arXiv 2602.10693",
            _settings(
                *("vespo", "token", "group_norm"),
                std="n-1",
                power_positive=2.0,
                rate_positive=3.0,
                power_negative=3.0,
                rate_negative=2.0,
            ),
        ),
        # verl examples/dppo_trainer/run_qwen30b_dppo.sh: 0.15, reward minus mean, over a constant length;
        # core_algos.py and TRL trl/experimental/dppo/dppo_config.py: weights up to 20.
        "dppo": Preset(
            "arXiv 2602.04879",
            _settings(
                *("dppo_tv", "constant", "group_center"), epsilon_low=0.15, epsilon_high=0.15, ratio_cap=20.0
            ),
        ),
        # Equations 1 to 3: mean over each sequence; section 2.3.4: 0.5 and 5. What its clip bounds, the ratio
        # to the policy before the step, is 1 in the only update of a batch.
        "icepop": Preset(
            "Ring-1T, arXiv 2510.18855",
            _settings(
                *("weighted_sft", "sequence", "group_norm"),
                std="n-1",
                correction__weight="icepop",
                correction__icepop_low=0.5,
                correction__icepop_high=5.0,
            ),
        ),
        # prime-rl src/prime_rl/trainer/rl/loss.py, default_loss_fn, from pull request 2187 to 3418;
        # docs/algorithms.md: 0.2, 0.2, 1e-3, over tokens, reward minus mean.
        "prime_rl": Preset(
            "prime-rl's default until August 2026; arXiv 2602.04879",
            _settings(
                *("prime", "token", "group_center"), epsilon_low=0.2, epsilon_high=0.2, mismatch_penalty=1e-3
            ),
        ),
        # prime-rl packages/prime-rl-configs/src/prime_rl/configs/trainer.py, IPOLossConfig, from pull request
        # 3586: eps 0.3, no penalty; max_importance_ratio 1e4.
        "ipo": Preset(
            "prime-rl's default since September 2026",
            _settings(
                *("ipo", "token", "group_center"), epsilon=0.3, mismatch_penalty=0.0, ratio_cap=10000.0
            ),
        ),
        # A sequence is one action, so its tokens are summed; core_algos.py, compute_rloo_outcome_advantage.
        # The cap is ours, as in opo and opd: their papers are on policy.
        "rloo": Preset(
            "arXiv 2402.14740",
            _settings("policy_gradient", "constant", "leave_one_out", ratio_cap=2.0),
        ),
        # The variant with a baseline, because Atropos sends groups: core_algos.py,
        # compute_reinforce_plus_plus_baseline_outcome_advantage.
        "reinforce++": Preset(
            "arXiv 2501.03262",
            _settings("ppo_clip", "token", "reinforce_plus_plus_baseline", epsilon_low=0.2, epsilon_high=0.2),
        ),
        # core_algos.py, compute_opo_outcome_advantage: lengths weigh the baseline; no KL, no entropy bonus.
        "opo": Preset("arXiv 2505.23585", _settings("policy_gradient", "token", "opo", ratio_cap=2.0)),
        # verl examples/gpg_trainer; core_algos.py, compute_policy_loss_gpg: no ratio, no KL, over tokens.
        "gpg": Preset("arXiv 2504.02546", _settings("weighted_sft", "token", "gpg")),
        # TRL docs/source/paper_index.md: scaled by batch, over tokens, PPO's clip, no KL.
        "lite_ppo": Preset(
            "arXiv 2508.08221",
            _settings("ppo_clip", "token", "batch_std", std="n-1", epsilon_low=0.2, epsilon_high=0.2),
        ),
        # verl docs/algo/opd.md, PG OPD: the negative reverse KL of the sampled token is its advantage, and
        # there is no other.
        "opd": Preset(
            "on-policy distillation, Lu et al. 2025; arXiv 2306.13649",
            _settings("policy_gradient", "token", "raw", ratio_cap=2.0)
            | {"distillation.mode": "sampled_token", "distillation.reward_coefficient": 0.0},
        ),
    }
)


def with_preset(values: Any) -> Any:
    """Lay a preset's settings under those given, where `loss.preset` names one.

    Args:
        values: The configuration as given: sections by name, as mappings or models. Not changed.
    """
    if not isinstance(values, Mapping):
        return values
    loss, data, distillation = (
        _set_by_hand(values.get(section, {})) for section in ("loss", "data", "distillation")
    )
    preset = loss.get("preset") if loss else None
    if not isinstance(preset, str) or preset not in PRESETS:
        return values
    if loss is None or data is None or distillation is None:
        return values  # what is refused where it is read
    sections = {"loss": loss, "data": data, "distillation": distillation}
    PRESETS[preset].lay_under(sections)  # type: ignore[index]
    return {**values, **sections}


def _set_by_hand(section: Any) -> dict[str, Any] | None:
    """The settings of a section, to be changed; None if it is no section."""
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else None


def _set_if_absent(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a value under nested keys; what is in the way of a key is refused where it is read."""
    for key in keys[:-1]:
        found = tree.get(key, {})
        if not isinstance(found, Mapping):
            return
        tree[key] = dict(found)  # those given are not changed
        tree = tree[key]
    tree.setdefault(keys[-1], value)
