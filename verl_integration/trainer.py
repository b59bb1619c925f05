"""Verl's V1 trainer on Atropos batches: `trainer.v1.trainer_mode: atropos`.

Verl's loop, workers, checkpoints and loggers stay; its data loader, rollout and advantages are ours::

    journaled source ─> prepared batch ─> rows in TransferQueue ─> update_actor on all ranks ─> publish, proof
                              verl's checkpoint: weights, and in data.pt which batches they were trained on
"""

from __future__ import annotations

import logging
import math
from contextlib import closing, nullcontext
from dataclasses import replace
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
from verl_integration.batches import make_step
from verl_integration.losses import engine_loss
from verl_integration.publishing import LoadedByVerl, make_publisher
from verl_integration.settings import SERVERS_BESIDE, our_config
from verl_integration.source import AtroposBatches

logger = logging.getLogger(__name__)


class NoAgentLoop:
    """In the place of verl's agent loops: Atropos environments sample by themselves."""

    @classmethod
    def create(cls, **parts: Any) -> NoAgentLoop:
        """Make one; nothing of verl is needed."""
        return cls()


@register_trainer("atropos")
class AtroposTrainer(PPOTrainer):
    """Trains on the batches of an Atropos API, one optimizer step each; what is not here is verl's."""

    _enable_hybrid_replicas = False  # verl puts no inference engine on the training GPUs
    _publisher: Publisher | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trainer_mode = "sync"  # nothing of TransferQueue outlives a step, so nothing of it is saved
        self._ours = our_config(config)

    def _init_dataloader(self) -> None:
        """Put our source where verl has its data loader: its checkpoints save and load its state."""
        model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model).hf_config.get_text_config()
        longest = context_length(model, self._ours.data.max_sequence_length)
        self.train_dataloader = AtroposBatches(
            self._ours,
            limits=ModelLimits(vocabulary_size=model.vocab_size, max_sequence_length=longest),
            keep_all=self.config.atropos.objective == "verl",
            checkpoints=self.config.trainer.max_actor_ckpt_to_keep or None,
        )
        steps = self._ours.train.steps
        self.total_training_steps = self.steps_per_epoch = steps
        with open_dict(self.config):
            self.config.actor_rollout_ref.actor.optim.total_training_steps = steps

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.train_dataloader.state.step != self.global_steps:
            raise CheckpointError(
                f"global_step_{self.global_steps}/data.pt does not say which batches were trained on: going "
                "on from it could train them again. Take another checkpoint with trainer.resume_mode "
                "resume_path, or start in a new trainer.default_local_dir"
            )

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self.train_dataloader.note_checkpoint()

    def on_init_end(self) -> None:
        """Have the servers serve what the run goes on from, and begin to fetch."""
        workers = self.actor_rollout_wg
        if self.config.atropos.objective == "atropos":
            workers.set_loss_fn(engine_loss(self._ours.loss))
        self._ranks = max(workers._query_dispatch_info("actor")) + 1
        self._publisher = make_publisher(
            self._ours, workers, self.tokenizer, ranks=self._ranks, started=self._start_servers()
        )
        if self._publisher is not None:
            self._publisher.start(self.global_steps)
        self.train_dataloader.start(self._publisher)

    def fit(self, agent_loop_manager: Any = None) -> None:
        """Train until `trainer.total_training_steps`; see verl."""
        with self._publisher or nullcontext(), closing(self.train_dataloader):
            super().fit(agent_loop_manager)
            if self._publisher is not None:
                self._publisher.settle()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """Make one optimizer step of one batch."""
        while True:
            with marked_timer("gen", timing_raw, color="red"):
                incoming, batch = self.train_dataloader.next()
            rows = self._balance_batch(self._put(batch, incoming.served_version), metrics=metrics)
            if self.use_reference_policy:
                with marked_timer("ref", timing_raw, color="olive"):
                    self._compute_ref_log_prob(rows, metrics)
            with marked_timer("update_actor", timing_raw, color="red"):
                self._update_actor(rows, metrics)
            tracker = self.train_dataloader.tracker
            if math.isfinite(metrics["actor/grad_norm"]):
                tracker.note_trained(batch)
                metrics.update({f"atropos/{name}": value for name, value in tracker.all_counters().items()})
                return rows
            # Verl left the weights as they were.
            tracker.skip(incoming, batch, "its gradient is not finite", counter="batches_not_finite")
            tq.kv_clear(keys=rows.keys, partition_id=rows.partition_id)

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

    def _put(self, batch: PreparedBatch, served_version: int) -> KVBatchMeta:
        """Hand a batch to verl's workers, through TransferQueue."""
        newest = self.global_steps - 1
        version = served_version if served_version >= 0 else newest
        staleness = newest - served_version if served_version >= 0 else None
        rows, info = make_step(batch, self._ours.loss, multiple=self._ranks, staleness=staleness)
        shared = {"min_global_steps": version, "max_global_steps": version}
        tags = [
            {**shared, "seq_len": length, "is_padding": index >= len(batch.samples)}
            for index, length in enumerate(rows["input_ids"].offsets().diff().tolist())
        ]
        place: dict[str, Any] = {
            "partition_id": "train",
            "keys": [f"{self.train_dataloader.tracker.batch}_{index}_0" for index in range(len(rows))],
            "tags": tags,
        }
        tq.kv_batch_put(**place, fields=rows)
        return KVBatchMeta(**place, extra_info=info)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        """All rows are one mini-batch, and they are filled up already."""
        return dp_size

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Score the rows with verl's reference, each at its own temperature, which verl's own knows not."""
        asked = {**batch.extra_info, "compute_loss": False, "no_lora_adapter": self.ref_in_actor}
        workers = self.ref_policy_wg  # those of the actor itself, where it is one with adapters
        score = workers.compute_log_prob if self.ref_in_actor else workers.compute_ref_log_prob
        score(replace(batch, extra_info=asked))
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

    def _start_servers(self) -> LoadedByVerl | None:
        """Have verl start its servers, if it has some."""
        rollout = self.config.actor_rollout_ref.rollout
        if rollout.name == SERVERS_BESIDE:
            return None
        servers = LLMServerManager.create(config=self.config)
        manager = CheckpointEngineManager(
            config=omega_conf_to_dataclass(rollout.checkpoint_engine),
            actor_wg=self.actor_rollout_wg,
            replicas=servers.get_replicas(),
        )
        logger.warning("Environments sample from %s", ", ".join(servers.server_addresses))
        return LoadedByVerl(servers.server_addresses, manager.update_weights)
