"""Settings by paper: what `loss.preset` stands for, laid under what is set by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "rloo",
    "reinforce++",
    "opo",
    "gpg",
    "lite_ppo",
    "opd",
]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings that make up a paper's objective."""

    paper: str
    """Where it is defined."""
    loss: str
    """loss.name"""
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that loss by dotted name; they stand in the section `loss`."""
    reduction: Literal["token", "sequence", "constant"]
    """loss.reduction"""
    estimator: str
    """data.advantage_estimator"""
    estimator_options: Mapping[str, Any] = field(default_factory=dict)
    """data.advantage_options"""
    distillation: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the section `distillation`."""

    @property
    def settings(self) -> dict[str, Any]:
        """All of them by their dotted names."""
        return {
            "loss.name": self.loss,
            **{f"loss.{name}": value for name, value in self.loss_options.items()},
            "loss.reduction": self.reduction,
            "data.advantage_estimator": self.estimator,
            **{f"data.advantage_options.{name}": value for name, value in self.estimator_options.items()},
            **{f"distillation.{name}": value for name, value in self.distillation.items()},
        }

    def lay_under(self, loss: dict[str, Any], data: dict[str, Any], distillation: dict[str, Any]) -> None:
        """Set what is not set by hand in three sections; no options where another function was named."""
        for name, value in self.distillation.items():
            distillation.setdefault(name, value)
        if loss.setdefault("name", self.loss) == self.loss:
            for name, value in self.loss_options.items():
                _set_if_absent(loss, name.split("."), value)
        loss.setdefault("reduction", self.reduction)
        if data.setdefault("advantage_estimator", self.estimator) == self.estimator:
            by_hand = data.get("advantage_options", {})
            if isinstance(by_hand, Mapping):  # anything else is refused where it is read
                data["advantage_options"] = {**self.estimator_options, **by_hand}


_CLIP: Final[dict[str, Any]] = {"epsilon_low": 0.2, "epsilon_high": 0.2}
_SAMPLE_STD: Final = {"std": "n-1"}  # what TRL and verl divide by

PRESETS: Final[Mapping[PresetName, Preset]] = MappingProxyType(
    {
        "grpo": Preset(
            paper="DeepSeekMath, arXiv 2402.03300",
            loss="ppo_clip",
            loss_options=_CLIP,
            reduction="sequence",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "dr_grpo": Preset(
            paper="arXiv 2503.20783",
            loss="ppo_clip",
            loss_options=_CLIP,
            reduction="constant",
            estimator="group_center",
        ),
        "dapo": Preset(
            paper="arXiv 2503.14476",
            loss="ppo_clip",
            loss_options={"epsilon_low": 0.2, "epsilon_high": 0.28},
            reduction="token",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "intellect2": Preset(
            paper="arXiv 2505.07291",
            loss="ppo_clip",
            loss_options=_CLIP | {"two_sided": 4.0},
            reduction="token",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "gspo": Preset(
            paper="arXiv 2507.18071",
            loss="gspo",
            loss_options={"epsilon_low": 3e-4, "epsilon_high": 4e-4},
            reduction="sequence",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "luspo": Preset(
            paper="arXiv 2602.05261",
            loss="luspo",
            loss_options={"epsilon_low": 3e-4, "epsilon_high": 4e-4},
            reduction="sequence",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "gmpo": Preset(
            paper="arXiv 2507.20673",
            loss="gmpo",
            loss_options={"epsilon_low": 0.4, "epsilon_high": 0.4},
            reduction="sequence",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "cispo": Preset(
            paper="MiniMax-M1, arXiv 2506.13585",
            loss="cispo",
            loss_options={"epsilon_low": 1.0, "epsilon_high": 4.0},
            reduction="token",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "sapo": Preset(
            paper="arXiv 2511.20347",
            loss="sapo",
            loss_options={"temperature_positive": 1.0, "temperature_negative": 1.05},
            reduction="sequence",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "vespo": Preset(
            paper="arXiv 2602.10693",
            loss="vespo",
            loss_options={
                "power_positive": 2.0,
                "rate_positive": 3.0,
                "power_negative": 3.0,
                "rate_negative": 2.0,
            },
            reduction="token",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "dppo": Preset(
            paper="arXiv 2602.04879",
            loss="dppo_tv",
            loss_options=_CLIP | {"ratio_cap": 20.0},
            reduction="token",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "icepop": Preset(
            paper="Ring-1T, arXiv 2510.18855",
            loss="weighted_sft",
            loss_options={
                "correction.weight": "icepop",
                "correction.icepop_low": 0.5,
                "correction.icepop_high": 5.0,
            },
            reduction="token",
            estimator="group_norm",
            estimator_options=_SAMPLE_STD,
        ),
        "prime_rl": Preset(
            paper="prime-rl's default; arXiv 2602.04879",
            loss="prime",
            loss_options=_CLIP | {"mismatch_penalty": 1e-3},
            reduction="token",
            estimator="group_center",
        ),
        "rloo": Preset(
            paper="arXiv 2402.14740",
            loss="policy_gradient",
            loss_options={"ratio_cap": 2.0},
            reduction="constant",  # a sequence is one action: its tokens are summed
            estimator="leave_one_out",
        ),
        "reinforce++": Preset(
            paper="arXiv 2501.03262",
            loss="ppo_clip",
            loss_options=_CLIP,
            reduction="token",
            estimator="reinforce_plus_plus_baseline",
        ),
        "opo": Preset(
            paper="arXiv 2505.23585",
            loss="policy_gradient",
            loss_options={"ratio_cap": 2.0},
            reduction="token",
            estimator="opo",
        ),
        "gpg": Preset(paper="arXiv 2504.02546", loss="weighted_sft", reduction="token", estimator="gpg"),
        "lite_ppo": Preset(
            paper="arXiv 2508.08221",
            loss="ppo_clip",
            loss_options=_CLIP,
            reduction="token",
            estimator="batch_std",
            estimator_options=_SAMPLE_STD,
        ),
        "opd": Preset(
            paper="on-policy distillation, arXiv 2306.13649",
            loss="policy_gradient",
            loss_options={"ratio_cap": 2.0},
            reduction="token",
            estimator="raw",
            distillation={"mode": "sampled_token", "reward_coefficient": 0.0},
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
    PRESETS[preset].lay_under(loss, data, distillation)  # type: ignore[index]
    return {**values, "loss": loss, "data": data, "distillation": distillation}


def _set_by_hand(section: Any) -> dict[str, Any] | None:
    """What is set in a section, to be changed; None if it is no section."""
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
