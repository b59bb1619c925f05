"""Verl's V1 trainer on Atropos batches: `trainer.v1.trainer_mode: atropos`.

Verl's loop, workers, checkpoints and loggers stay; its data loader, rollout and advantages are ours::

    journaled source ─> prepared batch ─> rows in TransferQueue ─> update_actor on all ranks ─> publish, proof
                              verl's checkpoint: weights, and in data.pt which batches they were trained on
"""

from __future__ import annotations

import logging
import math
import uuid
from typing import Any

import transfer_queue as tq
from omegaconf import open_dict
from transfer_queue import KVBatchMeta
from verl.checkpoint_engine import CheckpointEngineManager
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.rollout.llm_server import LLMServerManager
from verl.workers.utils.padding import response_from_nested

from trainer.errors import CheckpointError
from trainer.model.load import context_length
from trainer.publish import Publisher
from trainer.samples.prepare import PreparedBatch
from trainer.samples.validation import ModelLimits
from verl_integration.batches import make_rows, update_info
from verl_integration.losses import engine_loss
from verl_integration.publishing import LoadedByVerl, make_publisher
from verl_integration.settings import SERVERS_BESIDE, is_own_objective, our_config
from verl_integration.source import AtroposBatches

logger = logging.getLogger(__name__)

_PARTITION = "train"


class NoAgentLoop:
    """In the place of verl's agent loops: Atropos environments sample by themselves."""

    @classmethod
    def create(cls, **parts: Any) -> NoAgentLoop:
        """Make one; nothing of verl is needed."""
        return cls()


@register_trainer("atropos")
class AtroposTrainer(PPOTrainer):
    """Trains on the batches of an Atropos API, one optimizer step each.

    Args:
        config: Verl's tree with the section `atropos`; see `verl_integration.settings`.
    """

    _enable_hybrid_replicas = False  # verl puts no inference engine on the training GPUs

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trainer_mode = "sync"  # nothing of TransferQueue outlives a step, so nothing of it is saved
        self._ours = our_config(config)
        self._publisher: Publisher | None = None

    # In place of verl's data loaders and rollout.

    def _init_dataloader(self) -> None:
        """Put our source where verl has its data loader: its checkpoints save and load its state."""
        model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        text = model.hf_config.get_text_config()
        longest = context_length(text, self._ours.data.max_sequence_length)
        self.train_dataloader = AtroposBatches(
            self._ours,
            limits=ModelLimits(vocabulary_size=text.vocab_size, max_sequence_length=longest),
            keep_all=not is_own_objective(self.config),
            served_version=self._served_version,
        )
        steps = int(self.config.trainer.total_training_steps)
        self.total_training_steps = self.steps_per_epoch = steps
        with open_dict(self.config):
            self.config.actor_rollout_ref.actor.optim.total_training_steps = steps

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.train_dataloader.step != self.global_steps:
            raise CheckpointError(
                f"the checkpoint of step {self.global_steps} does not say which batches it was trained on "
                "(its data.pt is missing, or not ours): going on from it could train them again. Take "
                "another with trainer.resume_mode resume_path, or start in a new trainer.default_local_dir"
            )

    def on_init_end(self) -> None:
        """Have the servers serve what the run goes on from, and begin to fetch."""
        if is_own_objective(self.config):
            self.actor_rollout_wg.set_loss_fn(engine_loss(self._ours.loss))
        self._ranks = max(self.actor_rollout_wg._query_dispatch_info("actor")) + 1
        self._publisher = self._build_publisher()
        if self._publisher is not None:
            self._publisher.start(self.global_steps)
        self.train_dataloader.start()

    def fit(self, agent_loop_manager: Any = None) -> None:
        """Train until `trainer.total_training_steps`; see verl."""
        try:
            super().fit(agent_loop_manager)
            if self._publisher is not None:
                self._publisher.settle()
        finally:
            self.train_dataloader.close()
            if self._publisher is not None:
                self._publisher.close()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """Make one optimizer step of one batch."""
        while True:
            with marked_timer("gen", timing_raw, color="red"):
                incoming, batch = self.train_dataloader.next(self._tend)
            rows = self._put(batch, incoming.served_version)
            rows = self._balance_batch(rows, metrics=metrics)
            if self.use_reference_policy:
                with marked_timer("ref", timing_raw, color="olive"):
                    self._compute_ref_log_prob(rows, metrics)
            with marked_timer("update_actor", timing_raw, color="red"):
                self._update_actor(rows, metrics)
            tracker = self.train_dataloader.tracker
            is_finite = math.isfinite(metrics["actor/grad_norm"])
            if is_finite:
                tracker.note_trained(batch)
            else:  # verl left the weights as they were
                tracker.skip(incoming, batch, "its gradient is not finite", counter="batches_not_finite")
                tq.kv_clear(keys=rows.keys, partition_id=rows.partition_id)
            metrics.update({f"atropos/{name}": value for name, value in tracker.all_counters().items()})
            if is_finite:
                return rows

    def on_step_end(self) -> None:
        """Publish the new weights, beside the next step where that is possible."""
        if self._publisher is None or self.global_steps % self._ours.publish.every:
            return
        with marked_timer("update_weights", self.timing_raw, color="red"):
            self._publisher.begin(self.global_steps)
        if reports := self._publisher.take_reports():
            self._pending_sync_metrics = reports[-1].metrics()

    def on_sample_end(self) -> None:
        """Nothing sleeps: no engine is on the training GPUs."""

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self.train_dataloader.prune(self._ours.train.output_dir)

    # A batch through TransferQueue.

    def _put(self, batch: PreparedBatch, served_version: int) -> KVBatchMeta:
        version = served_version if served_version >= 0 else self.global_steps - 1
        pad = self.tokenizer.eos_token_id or 0
        rows = make_rows(batch.samples, batch.denominators, multiple=self._ranks, pad_token=pad)
        prompts, lengths = (
            rows["prompts"].offsets().diff().tolist(),
            rows["input_ids"].offsets().diff().tolist(),
        )
        uid = uuid.uuid4().hex
        keys = [f"{uid}_{index}_0" for index in range(len(rows))]
        tags = [
            {
                "status": "finished",
                "prompt_len": prompt,
                "response_len": length - prompt,
                "seq_len": length,
                "global_steps": self.global_steps,
                "min_global_steps": version,
                "max_global_steps": version,
                "is_padding": index >= len(batch.samples),
            }
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        staleness = self.global_steps - 1 - served_version if served_version >= 0 else None
        info = update_info(batch, self._ours.loss, rows=len(rows), staleness=staleness)
        if "temperature" in info:
            del rows["temperature"]
        tq.kv_batch_put(keys=keys, partition_id=_PARTITION, fields=rows, tags=tags)
        return KVBatchMeta(partition_id=_PARTITION, keys=keys, tags=tags, extra_info=info)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        """All rows are one mini-batch, and they are filled up already."""
        return dp_size

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Score the rows with verl's reference, each at its own temperature, which verl's own knows not."""
        asked = {**batch.extra_info, "compute_loss": False, "no_lora_adapter": self.ref_in_actor}
        meta = KVBatchMeta(
            partition_id=batch.partition_id, keys=batch.keys, tags=batch.tags, extra_info=asked
        )
        if self.ref_in_actor:
            self.actor_rollout_wg.compute_log_prob(meta)
        else:
            self.ref_policy_wg.compute_ref_log_prob(meta)
        place = {"keys": batch.keys, "partition_id": batch.partition_id}
        scored = tq.kv_batch_get(**place, select_fields=["log_probs", "response_mask"])
        scored["ref_log_prob"] = response_from_nested(scored.pop("log_probs"), scored["response_mask"])
        tq.kv_batch_put(**place, fields=scored.select("ref_log_prob"))
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        actor = self.config.actor_rollout_ref.actor
        batch.extra_info["calculate_entropy"] = actor.calculate_entropy or actor.entropy_coeff != 0
        output = self.actor_rollout_wg.update_actor(batch)
        measured: dict[str, Any] = rename_dict(output["metrics"], "actor/")
        measured["perf/mfu/actor"] = measured.pop("actor/mfu")
        metrics.update(reduce_metrics(measured))
        return batch

    # Publishing.

    def _build_publisher(self) -> Publisher | None:
        rollout = self.config.actor_rollout_ref.rollout
        started = None
        if rollout.name != SERVERS_BESIDE:
            servers = LLMServerManager.create(config=self.config)
            manager = CheckpointEngineManager(
                config=omega_conf_to_dataclass(rollout.checkpoint_engine),
                actor_wg=self.actor_rollout_wg,
                replicas=servers.get_replicas(),
            )
            logger.warning("Environments sample from %s", ", ".join(servers.server_addresses))
            started = LoadedByVerl(
                servers.server_addresses, lambda: manager.update_weights(self.global_steps)
            )
        workers, ranks = self.actor_rollout_wg, self._ranks
        return make_publisher(self._ours, workers, self.tokenizer, ranks=ranks, started=started)

    def _served_version(self) -> int:
        return -1 if self._publisher is None else self._publisher.sampled_version

    def _tend(self) -> None:
        if self._publisher is not None:
            self._publisher.tend(self.global_steps - 1)
