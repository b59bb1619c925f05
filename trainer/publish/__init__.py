"""Publishing weights to the inference servers, and proving that they are served."""

from trainer.publish._disk import DiskTransport
from trainer.publish._lora import LoraTransport
from trainer.publish._procedure import ServerOutcome
from trainer.publish._protocol import InferenceServer, NextToken, StagedWeights, WeightTransport
from trainer.publish._report import PublishReport
from trainer.publish._sglang import SglangRoutes
from trainer.publish._sglang_group import SglangGroupTransport
from trainer.publish._verification import LogprobPolicy
from trainer.publish._vllm import VllmRoutes
from trainer.publish._vllm_transfer import VllmTransferTransport
from trainer.publish._weight_stream import WeightStream
from trainer.publish.comparison import TOLERANCES, Baseline, Comparison, ProbeScores, Verdict, compare
from trainer.publish.errors import (
    ActivationFailed,
    CacheResetFailed,
    ConnectFailed,
    LoadFailed,
    PauseFailed,
    Phase,
    PhaseDeadlineExceeded,
    PublishError,
    PublishFailed,
    ResumeFailed,
    ScoringFailed,
    ServerFailure,
    ServerNotReady,
    StagingFailed,
    TagFailed,
    VerificationFailed,
)
from trainer.publish.generation import LogprobKind
from trainer.publish.probes import Probes, make_probes
from trainer.publish.publisher import Publisher
from trainer.publish.scoring import score_probes, score_with_model

__all__ = [
    "TOLERANCES",
    "ActivationFailed",
    "Baseline",
    "CacheResetFailed",
    "Comparison",
    "ConnectFailed",
    "DiskTransport",
    "InferenceServer",
    "LoadFailed",
    "LogprobKind",
    "LogprobPolicy",
    "LoraTransport",
    "NextToken",
    "PauseFailed",
    "Phase",
    "PhaseDeadlineExceeded",
    "ProbeScores",
    "Probes",
    "PublishError",
    "PublishFailed",
    "PublishReport",
    "Publisher",
    "ResumeFailed",
    "ScoringFailed",
    "ServerFailure",
    "ServerNotReady",
    "ServerOutcome",
    "SglangGroupTransport",
    "SglangRoutes",
    "StagedWeights",
    "StagingFailed",
    "TagFailed",
    "Verdict",
    "VerificationFailed",
    "VllmRoutes",
    "VllmTransferTransport",
    "WeightStream",
    "WeightTransport",
    "compare",
    "make_probes",
    "score_probes",
    "score_with_model",
]
