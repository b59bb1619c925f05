"""One optimizer step over one batch, under Accelerate.

Process 0 prepares and packs it, every process computes its share, and gradients are summed: each token's loss
is already divided by the whole step's denominator, so nothing is averaged afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from schemas import BatchReply
from trainer.config import OptimizerSettings, TrainerConfig
from trainer.losses import LossInputs
from trainer.model.token_logprobs import token_logprobs
from trainer.model.wrappers import unwrap
from trainer.packing import MicroBatch, PassCost, pack
from trainer.run.logprob_log import LogprobLog
from trainer.run.logprob_mismatch import Mismatch, drop_own_comparison, mismatch_sums, take_mismatch
from trainer.run.objective import Objective
from trainer.run.orders import Order, announce
from trainer.run.step_scores import StepScores
from trainer.run.step_share import StepShare, share_out
from trainer.run.train_state import PreparedRun
from trainer.samples.prepare import PreparedBatch, prepare_batch
from trainer.sources.incoming import PreparedStep


class StepAborted(Exception):  # noqa: N818 - an event, not a fault
    """A step was given up between two micro-batches; the weights are those before it."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Loss, gradient norm and counts of a step, over all processes."""

    loss: float
    """The step's loss; its unit depends on the loss function."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False if loss or gradient were not finite, or the batch was refused: the weights stayed the same."""
    refused: bool
    """The caller did not accept the batch's mismatch."""
    per_token: dict[str, float]
    """The loss function's metrics and the entropy, averaged over computed trained tokens."""
    mismatch: Mismatch | None
    """Trainer against sampler; None if no trained token came with the sampler's log-probs."""
    learning_rate: float
    staleness: int | None
    """Versions between the one that was served when the batch arrived and ours; None if that is not known."""
    idle: float | None
    """Seconds from the end of the step before, its publish and its checkpoint, to the first computation of
    this one; None: there is none before."""


class StepRunner:
    """Prepares the batches of a run and computes their optimizer steps.

    Args:
        config: The run's configuration.
        prepared: The model, its optimizer, and how both are used.
    """

    def __init__(self, config: TrainerConfig, prepared: PreparedRun) -> None:
        self._config = config
        self._prepared = prepared
        self._accelerator = prepared.accelerator
        self._model = prepared.model
        self._spread = prepared.spread
        self._optimizer = prepared.optimizer
        self._loss = config.loss.bound
        self._scores = StepScores(config.loss, prepared)
        self._entropy_bonus = prepared.entropy_bonus
        self._objective = Objective(config, prepared.entropy_bonus)
        self._cost = PassCost.of_config(unwrap(prepared.model).config.get_text_config())
        self.logprob_log = LogprobLog(config.train.output_dir, groups=config.logging.token_logprobs)
        """Collects the log-probs of a few groups of the step under way."""
        self._idle_since: float | None = None
        self.weights_whole = True
        """False while the optimizer changes the weights: what a failure leaves then belongs to no step."""
        self.under_way = False
        """Whether a step is being computed; stays true where one has failed."""

    def prepare(self, reply: BatchReply) -> PreparedStep:
        """Prepare a step; batches must be prepared in the order in which they are trained.

        A source may call it ahead, in a thread of its own: it changes nothing but the advantage normalizer,
        whose state checkpoints take from the batches that were trained.
        """
        started = time.monotonic()
        batch = prepare_batch(
            reply,
            limits=self._prepared.policy.limits,
            data=self._config.data,
            loss=self._config.loss,
            normalizer=self._prepared.normalizer,
            distillation=self._config.distillation,
        )
        micro_batches = self.pack(batch) if batch.samples else []
        return PreparedStep(batch=batch, micro_batches=micro_batches, seconds=time.monotonic() - started)

    def train_on(
        self,
        micro_batches: list[MicroBatch],
        *,
        step: int = 0,
        served_version: int = -1,
        accepts: Callable[[Mismatch | None, int | None], bool] = lambda mismatch, staleness: True,
        should_abort: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Run the optimizer step of a batch with all processes; on process 0.

        Args:
            micro_batches: What `pack` made of the batch, at least one.
            step: Steps done before this one.
            served_version: See `IncomingBatch`.
            accepts: Asked with the mismatch and the staleness before the weights change.
            should_abort: See `compute`.

        Raises:
            StepAborted: `should_abort` said so.
        """
        staleness = step - served_version if served_version >= 0 else None
        shares = self.share_out(micro_batches, step=step, staleness=staleness)
        announce(self._prepared.joined, Order.TRAIN, payloads=[share.to_bytes() for share in shares[1:]])
        return self.compute(shares[0], accepts=accepts, should_abort=should_abort)

    def share_out(
        self, micro_batches: list[MicroBatch], *, step: int = 0, staleness: int | None = None
    ) -> list[StepShare]:
        """Return what each process computes of a step; see `trainer.run.step_share.share_out`.

        The processes of a team compute the same micro-batches.
        """
        shares = share_out(
            micro_batches,
            self._spread.teams,
            step=step,
            staleness=staleness,
            with_columns=self._loss.step_statistics is not None,
        )
        return [shares[self._spread.team_of(rank)] for rank in range(self._spread.processes)]

    def compute(
        self,
        share: StepShare,
        *,
        accepts: Callable[[Mismatch | None, int | None], bool] = lambda mismatch, staleness: True,
        should_abort: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Compute the gradients of a step with all processes, and change the weights by them.

        Args:
            share: This process's share of the step.
            accepts: Asked with the mismatch and the staleness before the weights change; one process that
                does not accept them is enough.
            should_abort: Asked before each micro-batch; all processes have to answer the same.

        Raises:
            StepAborted: `should_abort` said so.
        """
        self.under_way = True
        try:
            result = self._compute(share, accepts, should_abort)
        except StepAborted:
            self.under_way = False
            raise
        self.under_way = False
        return result

    def _compute(
        self,
        share: StepShare,
        accepts: Callable[[Mismatch | None, int | None], bool],
        should_abort: Callable[[], bool],
    ) -> StepResult:
        rate = learning_rate(self._config.optimizer, share.step, self._config.train.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        seed_step(self._config.train.seed, share.step, self._accelerator.process_index)
        idle = time.monotonic() - self._idle_since if self._idle_since is not None else None
        sums = self.accumulate(share, should_abort=should_abort)
        totals = self._over_processes(sums)
        mismatch = take_mismatch(totals)
        loss = totals.pop("loss")
        tokens = totals.pop("tokens")
        max_norm = self._config.optimizer.max_grad_norm
        grad_norm = float(self._accelerator.clip_grad_norm_(self._model.parameters(), max_norm))
        refused = self._prepared.joined.any(not accepts(mismatch, share.staleness))
        applied = math.isfinite(loss) and math.isfinite(grad_norm) and not refused
        if applied:
            self.weights_whole = False
            # bfloat16 weights are rounded at random: all copies of a weight alike.
            seed_step(self._config.train.seed, share.step, f"part {self._spread.part}")
            self._optimizer.step()
            self.weights_whole = True
            self._entropy_bonus.observe(totals["entropy"] / tokens)
        self._optimizer.zero_grad(set_to_none=True)
        self.begin_idling()
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            applied=applied,
            refused=refused,
            per_token={name: value / tokens for name, value in totals.items()},
            mismatch=mismatch,
            learning_rate=rate,
            staleness=share.staleness,
            idle=idle,
        )

    def begin_idling(self) -> None:
        """Note that the time from now until the next step is computed is idle."""
        self._idle_since = time.monotonic()

    def pack(self, batch: PreparedBatch) -> list[MicroBatch]:
        """Pack what one step over `batch` computes on all processes, in passes that fit the budget.

        Touches neither the model nor this object, so that it may run ahead in another thread.
        """
        return pack(
            batch.samples,
            batch.denominators,
            packing=self._prepared.packing,
            tokens_per_micro_batch=self._config.data.tokens_per_micro_batch,
            processes=self._spread.teams,
            cost=self._cost,
            lock_step=self._spread.in_lock_step,
        )

    def accumulate(
        self,
        share: StepShare,
        *,
        should_abort: Callable[[], bool] = lambda: False,
    ) -> dict[str, Tensor]:
        """Compute the gradients of a step, replacing those that were there.

        Returns:
            This process's sums of loss, token count and metrics, 0-dim.

        Raises:
            StepAborted: `should_abort` said so; there are no gradients then.
        """
        device = self._accelerator.device
        own = [micro_batch.to(device) for micro_batch in share.micro_batches]
        micro_batches = self._scores.complete(own, should_abort=should_abort)
        if micro_batches is None:
            self._spread.settle(self._model)
            raise StepAborted
        if self._accelerator.is_main_process:
            self.logprob_log.begin(share.micro_batches)
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        statistics = self._step_statistics(share)
        sums: dict[str, Tensor] = {}
        if share.has_reference or any(each.ref_logprobs is not None for each in micro_batches):
            # Micro-batches without them do not report it, and all processes must add up the same names.
            sums["kl_ref"] = torch.zeros((), device=device)
        for index, micro_batch in enumerate(micro_batches):
            if should_abort():
                self._spread.settle(self._model)
                self._optimizer.zero_grad(set_to_none=True)
                raise StepAborted
            with self._exchanging_gradients(last=index == len(micro_batches) - 1):
                logprobs, terms = self._backward(micro_batch, statistics, share.staleness)
                self.logprob_log.add(index, logprobs)
                for name, value in terms.items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def _exchanging_gradients(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Between processes that hold whole weights once a step, with the last micro-batch."""
        if self._spread.sharded:
            return self._spread.micro_batch(self._model, last=last)
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self._model)

    def _step_statistics(self, share: StepShare) -> Any:
        """The loss's results from the whole step's tokens beforehand; None for most losses."""
        if self._loss.step_statistics is None:
            return None
        columns = share.columns
        tokens = LossInputs(
            logprobs=columns["inference_logprobs"],
            advantages=columns["advantages"],
            loss_mask=columns["loss_mask"],
            inference_logprobs=columns["inference_logprobs"],
        )
        return self._loss.step_statistics(tokens, self._loss.options)

    def _backward(
        self, batch: MicroBatch, statistics: Any, staleness: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward.

        Returns:
            The log-probs, [N], detached; and loss, token count and metrics as sums, 0-dim, detached.
        """
        with self._accelerator.autocast():
            scores = token_logprobs(
                self._model,
                batch,
                use_temperature=self._config.loss.uses_temperature,
                head=self._prepared.head,
                entropy_gradient=self._objective.differentiates_entropy,
                group=self._spread.sequence,
            )
        loss, inputs, metrics = self._objective(batch, scores, statistics=statistics, staleness=staleness)
        entropy, logprobs = scores.entropy.detach(), scores.logprobs.detach()
        # DistributedDataParallel averages gradients over processes; ours are shares of a sum.
        self._accelerator.backward(loss if self._spread.sharded else loss * self._accelerator.num_processes)
        return logprobs, {
            **drop_own_comparison(metrics),
            **mismatch_sums(logprobs, batch.known_inference_logprobs, batch.loss_mask, entropy),
            "entropy": inputs.weighted_sum(entropy),
            "tokens": inputs.mask.sum(),
            "loss": loss.detach(),
        }

    def _over_processes(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Add the sums of all processes, those of a team once."""
        names = sorted(sums)
        stacked = torch.stack([sums[name].to(torch.float64) for name in names])
        if not self._spread.leads_team:  # its sums are those of another
            stacked.zero_()
        reduced = self._accelerator.reduce(stacked, reduction="sum")
        return dict(zip(names, reduced.tolist(), strict=True))


def seed_step(seed: int, step: int, drawn_for: int | str) -> None:
    """Seed all random number generators for one step of one process, or of one part of the weights.

    What a step draws (dropout, rounding) depends on nothing before it, so a resumed run draws what it would
    have drawn, with any number of processes, and no checkpoint has to hold the states of other processes.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{drawn_for}".encode()).digest()
    set_seed(int.from_bytes(digest[:4]))  # NumPy takes 32 bits


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Learning rate of an optimizer step.

    Rises linearly over `warmup_steps`, from 1/warmup_steps of the full rate at step 0; then stays, or
    follows half a cosine to `minimum_learning_rate_ratio` at `total_steps` (Loshchilov and Hutter, 2017).

    Args:
        settings: The optimizer's settings.
        step: Optimizer steps done before this one, from 0.
        total_steps: Steps of the whole run.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.minimum_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
