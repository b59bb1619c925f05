"""Publishing weights to the inference servers, and proving that they are served."""

from trainer.publish.engines.sglang import SglangRoutes
from trainer.publish.engines.vllm.delta_transport import DeltaTransport
from trainer.publish.engines.vllm.nccl_transport import VllmTransferTransport
from trainer.publish.engines.vllm.routes import VllmRoutes
from trainer.publish.errors import Phase, PhaseDeadlineExceeded, PublishError, ServerFailure, StagingFailed
from trainer.publish.interfaces import InferenceServer, WeightTransport
from trainer.publish.publisher import Publisher
from trainer.publish.report import PublishFailed, PublishReport
from trainer.publish.transports.disk import DiskTransport
from trainer.publish.transports.lora import LoraTransport
from trainer.publish.verification.compare_logprobs import Comparison, ProbeScores, Verdict
from trainer.publish.verification.compare_next_tokens import LogprobKind
from trainer.publish.verification.probes import Probes, make_probes
from trainer.publish.verification.trainer_scores import score_probes, score_with_model
from trainer.publish.verification.verifier import LogprobPolicy, VerificationFailed

__all__ = [
    "Comparison",
    "DeltaTransport",
    "DiskTransport",
    "InferenceServer",
    "LogprobKind",
    "LogprobPolicy",
    "LoraTransport",
    "Phase",
    "PhaseDeadlineExceeded",
    "ProbeScores",
    "Probes",
    "PublishError",
    "PublishFailed",
    "PublishReport",
    "Publisher",
    "ServerFailure",
    "SglangRoutes",
    "StagingFailed",
    "Verdict",
    "VerificationFailed",
    "VllmRoutes",
    "VllmTransferTransport",
    "WeightTransport",
    "make_probes",
    "score_probes",
    "score_with_model",
]
