"""Writes values.json: loss and gradient of small batches as verl and TRL themselves compute them.

Runs in an environment of its own, see `make oracle`; the tests only read the file. verl's losses are called
as they are; TRL's stand in `GRPOTrainer._compute_loss`, which is called on a trainer without a model, whose
log-probs are those of the batch.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOTrainer
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, kl_penalty
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig, RolloutCorrectionConfig

ROWS, COLUMNS, CONSTANT = 5, 6, 10
COLUMN_NAMES = ("policy", "sampler", "reference", "advantages", "mask")


def make_batch(seed: int, spread: float, *, token_advantages: bool) -> dict[str, list[list[float]]]:
    """Ragged rows whose masks have holes, one of them wholly masked, with ratios around e^±spread."""
    draw = random.Random(seed)
    batch: dict[str, list[list[float]]] = {name: [] for name in COLUMN_NAMES}
    for row in range(ROWS):
        sampler = [round(-abs(draw.gauss(0, 1.5)) - 1e-3, 4) for _ in range(COLUMNS)]
        policy = [round(min(each + draw.gauss(0, spread), -1e-3), 4) for each in sampler]
        advantage = draw.choice([1, -1]) * abs(draw.gauss(0, 1))
        factors = [draw.uniform(0.5, 1.5) if token_advantages else 1.0 for _ in range(COLUMNS)]
        batch["policy"].append(policy)
        batch["sampler"].append(sampler)
        batch["reference"].append([round(each + draw.gauss(0, 0.7), 4) for each in policy])
        batch["advantages"].append([round(advantage * factor, 4) for factor in factors])
        batch["mask"].append([float(row != 3 and draw.random() < 0.7) for _ in range(COLUMNS)])
    return batch


BATCHES = [
    make_batch(1, 0.2, token_advantages=False),
    make_batch(2, 1.0, token_advantages=True),
    make_batch(3, 3.0, token_advantages=True),
]


AGGREGATIONS = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
    "token_sum": "token-sum",
}
"""verl's names of our reductions."""


class Verl:
    """Calls verl's policy losses."""

    def __init__(self, mode: str, *, kl: str | None = None, **settings: Any) -> None:
        self.mode = mode
        self.kl = kl
        names = PolicyLossConfig.__dataclass_fields__
        of_policy = {name: settings.pop(name) for name in list(settings) if name in names}
        correction = settings.pop("correction", None)
        if correction is not None:
            of_policy["rollout_correction"] = RolloutCorrectionConfig(loss_type="reinforce", **correction)
        settings.setdefault("clip_ratio_c", 1e9)
        self.settings = settings | {"policy_loss": PolicyLossConfig(**of_policy)}

    def __call__(self, columns: dict[str, torch.Tensor], reduction: str) -> torch.Tensor:
        mask = columns["mask"]
        totals = {"dp_size": 1, "batch_num_tokens": mask.sum(), "loss_scale_factor": CONSTANT}
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            global_batch_info=totals,
            **self.settings,
        )
        aggregation = AGGREGATIONS.get(reduction, "token-mean")
        loss, _ = POLICY_LOSS_REGISTRY[self.mode](
            old_log_prob=columns["sampler"],
            log_prob=columns["policy"],
            advantages=columns["advantages"],
            response_mask=mask,
            loss_agg_mode=aggregation,
            config=config,
        )
        if self.kl is not None:
            penalty = kl_penalty(columns["policy"], columns["reference"], self.kl)
            loss = loss + 0.3 * agg_loss(penalty, mask, aggregation)
        return loss


class Trl:
    """Calls TRL's loss on a trainer without a model."""

    def __init__(self, loss_type: str, *, level: str = "token", **settings: Any) -> None:
        self.attributes: dict[str, Any] = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon_low": settings.pop("epsilon_low", 0.2),
            "epsilon_high": settings.pop("epsilon_high", 0.2),
            "beta": settings.pop("beta", 0.0),
            "off_policy_mask_threshold": settings.pop("off_policy_mask_threshold", None),
        }
        self.arguments = {
            "delta": None,
            "use_bias_correction_kl": False,
            "steps_per_generation": 1,
            "vespo_k_pos": 2.0,
            "vespo_lambda_pos": 3.0,
            "vespo_k_neg": 3.0,
            "vespo_lambda_neg": 2.0,
            **settings,
        }

    def __call__(self, columns: dict[str, torch.Tensor], reduction: str) -> torch.Tensor:
        trainer = object.__new__(GRPOTrainer)
        policy, mask = columns["policy"], columns["mask"]
        vars(trainer).update(
            self.attributes,
            args=SimpleNamespace(**self.arguments),
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                num_processes=1,
                sync_gradients=True,
                gather=lambda values: values,
                reduce=lambda values, reduction: values,
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=CONSTANT,
            _metrics={"train": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros_like(policy), None),
        )
        nothing = torch.zeros((len(mask), 0), dtype=torch.int64)
        inputs = {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": mask.long(),
            "completion_mask": mask,
            "advantages": columns["advantages"],
            "old_per_token_logps": columns["sampler"],
            "ref_per_token_logps": columns["reference"],
            "num_items_in_batch": mask.sum(),
        }
        loss: torch.Tensor = trainer._compute_loss(None, inputs)
        return loss


CLIP = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.3}
EPSILONS = {"epsilon_low": 0.2, "epsilon_high": 0.3}
RATIO_OF_K1 = "0.8187307530779818_1.3498588075760032"
"""e^-0.2 and e^0.3: verl takes the bounds of k1 as ratios."""

Mode = tuple[str, Any, str, dict[str, Any], str]


def correction(**settings: Any) -> Verl:
    return Verl("bypass_mode", correction=settings)


MODES: list[Mode] = [
    # mode, library's call, our loss, its options, reduction
    *(
        (f"clip, {reduction}", Verl("vanilla", **CLIP), "ppo_clip", EPSILONS, reduction)
        for reduction in AGGREGATIONS
    ),
    (
        "dual clip",
        Verl("vanilla", **CLIP, clip_ratio_c=3.0),
        "ppo_clip",
        {**EPSILONS, "dual_clip": 3.0},
        "token",
    ),
    ("advantage-weighted", Verl("gpg"), "weighted_sft", {}, "token"),
    ("GSPO, token form", Verl("gspo", **CLIP), "gspo", {**EPSILONS, "form": "token"}, "sequence"),
    (
        *("CISPO", Verl("cispo", clip_ratio=0.2, clip_ratio_low=0.5, clip_ratio_high=0.5), "cispo"),
        *({"epsilon_low": 0.5, "epsilon_high": 0.5}, "token"),
    ),
    ("SAPO", Verl("sapo"), "sapo", {}, "sequence"),
    ("GMPO", Verl("geo_mean", **CLIP), "gmpo", EPSILONS, "rows"),
    (
        *("DPPO by total variation", Verl("dppo_tv", **CLIP, clip_ratio_c=20.0), "dppo_tv"),
        *({**EPSILONS, "ratio_cap": 20.0}, "token"),
    ),
    (
        *("DPPO by KL", Verl("dppo_kl", clip_ratio=0.05, clip_ratio_low=0.05, clip_ratio_high=0.05)),
        *("dppo_kl", {"ratio_cap": 1e9}, "token"),
    ),
    (
        *("Clip-Cov", Verl("clip_cov", **CLIP, clip_cov_ratio=1.0, clip_cov_lb=0.05, clip_cov_ub=1.0)),
        *("clip_cov", {**EPSILONS, "covariance_share": 1.0, "covariance_low": 0.05, "covariance_high": 1.0}),
        "token",
    ),
    (
        *("KL-Cov", Verl("kl_cov", kl_cov_ratio=0.2, ppo_kl_coef=0.5), "kl_cov"),
        *({"covariance_share": 0.2, "covariance_penalty": 0.5}, "token"),
    ),
    (
        *("token TIS", correction(rollout_is="token", rollout_is_threshold=2.0), "policy_gradient"),
        *({"ratio_cap": 2.0}, "token"),
    ),
    (
        *("token TIS as a correction", correction(rollout_is="token", rollout_is_threshold=1.7)),
        *("weighted_sft", {"correction": {"weight": "token_tis", "ratio_cap": 1.7}}, "token"),
    ),
    (
        *("sequence TIS", correction(rollout_is="sequence", rollout_is_threshold=1.7), "weighted_sft"),
        *({"correction": {"weight": "sequence_tis", "ratio_cap": 1.7}}, "token"),
    ),
    (
        *("IcePop", correction(rollout_is="token", rollout_is_threshold="0.5_2.0"), "weighted_sft"),
        *({"correction": {"weight": "icepop", "icepop_low": 0.5, "icepop_high": 2.0}}, "token"),
    ),
    *(
        (
            f"rejection, {level} {estimator}",
            correction(
                rollout_rs=f"{short}_{estimator}",
                rollout_rs_threshold=RATIO_OF_K1 if estimator == "k1" else 0.3,
                rollout_is=None,
            ),
            "weighted_sft",
            {
                "correction": {
                    "reject": level,
                    "reject_estimator": estimator,
                    "reject_above": 0.3,
                    **({"reject_below": -0.2} if estimator == "k1" else {}),
                }
            },
            "token",
        )
        for level, short in (
            ("token", "token"),
            ("sequence_sum", "seq_sum"),
            ("sequence_mean", "seq_mean"),
            ("sequence_max", "seq_max"),
        )
        for estimator in ("k1", "k2", "k3")
        if (level, estimator) != ("sequence_max", "k1")
    ),
    *(
        (
            f"KL penalty {name}",
            Verl("gpg", kl=name),
            "weighted_sft",
            {"kl_coefficient": 0.3, "kl_estimator": ours, **cap},
            "token",
        )
        for name, ours, cap in (
            ("k1", "k1", {}),
            ("k2", "k2", {}),
            ("k3", "k3", {"kl_cap": 10.0}),
            ("k3+", "k3_gradient_k2", {"kl_cap": 10.0}),
        )
    ),
    ("GRPO", Trl("grpo", epsilon_high=0.3), "ppo_clip", EPSILONS, "rows"),
    ("DAPO", Trl("dapo", epsilon_high=0.3), "ppo_clip", EPSILONS, "token"),
    ("Dr. GRPO", Trl("dr_grpo", epsilon_high=0.3), "ppo_clip", EPSILONS, "constant_rows"),
    (
        *("two-sided clip", Trl("dapo", epsilon_high=0.3, delta=4.0), "ppo_clip"),
        *({**EPSILONS, "two_sided": 4.0}, "token"),
    ),
    ("GSPO", Trl("grpo", level="sequence", epsilon_high=0.3), "gspo", EPSILONS, "rows"),
    (
        *("CISPO", Trl("cispo", epsilon_high=1.5), "cispo"),
        *({"epsilon_low": 1.0, "epsilon_high": 0.5}, "token"),
    ),
    ("VESPO", Trl("vespo"), "vespo", {}, "token"),
    ("LUSPO", Trl("luspo", level="sequence", epsilon_high=0.3), "luspo", EPSILONS, "rows"),
    (
        *("KL penalty k3", Trl("grpo", epsilon_high=0.3, beta=0.3), "ppo_clip"),
        *({**EPSILONS, "kl_coefficient": 0.3}, "rows"),
    ),
    (
        "KL penalty k3, unbiased",
        Trl("grpo", epsilon_high=0.3, beta=0.3, use_bias_correction_kl=True),
        "ppo_clip",
        {**EPSILONS, "kl_coefficient": 0.3, "kl_estimator": "k3_unbiased"},
        "rows",
    ),
    (
        "off-policy sequence mask",
        Trl("dapo", epsilon_high=0.3, off_policy_mask_threshold=0.1),
        "ppo_clip",
        {**EPSILONS, "correction": {"off_policy_limit": 0.1}},
        "token",
    ),
]


def compute(mode: Mode, number: int) -> dict[str, Any]:
    """One row of the file."""
    name, call, loss, options, reduction = mode
    columns = {key: torch.tensor(values, dtype=torch.float64) for key, values in BATCHES[number].items()}
    columns["policy"].requires_grad_()
    value = call(columns, reduction)
    (gradient,) = torch.autograd.grad(value, columns["policy"])
    assert not gradient[columns["mask"] == 0].any(), name
    return {
        "mode": name,
        "library": type(call).__name__.lower(),
        "batch": number,
        "loss": loss,
        "options": options,
        "reduction": reduction,
        "value": value.item(),
        "gradient": gradient[columns["mask"] != 0].tolist(),
    }


def main() -> None:
    rows = [compute(mode, number) for mode in MODES for number in range(len(BATCHES))]
    batches = [json.dumps(batch) for batch in BATCHES]
    lines = [
        "{",
        f'"versions": {json.dumps({name: version(name) for name in ("verl", "trl", "torch")})},',
        f'"constant_length": {CONSTANT},',
        '"batches": [\n' + ",\n".join(batches) + "\n],",
        '"values": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]",
        "}",
    ]
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("values.json")
    target.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{len(rows)} values of {len(MODES)} modes in {target}\n")


if __name__ == "__main__":
    main()
