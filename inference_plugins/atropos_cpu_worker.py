"""vLLM's worker for the CPU, with two repairs.

    PYTHONPATH=inference_plugins vllm serve MODEL --worker-cls atropos_cpu_worker.AtroposCPUWorker

Reloaded weights reach a tied output layer too: on the CPU, vLLM computes linear layers from a copy of their
weights, packed for oneDNN. `reload_weights` packs anew only those layers that the checkpoint names. An output
layer that shares the embedding's weights is not named in it, so vLLM 0.32 goes on with the output layer of
the weights that it was started with, and with the new weights everywhere else. On GPUs nothing is packed and
nothing is wrong.

Linux is asked for AMX before it is used: a process that has not asked dies of SIGILL at its first tile
instruction. vLLM 0.32 leaves the asking to oneDNN, which it does not call where no weight is above 1 MiB: a
small model in bfloat16 on a CPU with AMX ends at its first token.

Loaded into vLLM's worker process, and only there: vLLM is always at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker  # type: ignore[import-not-found] # in vLLM's environment


class AtroposCPUWorker(CPUWorker):  # type: ignore[misc] # as above
    """Asks for AMX at the start, and packs embeddings and output layers anew after every reload."""

    def init_device(self) -> None:
        """Set the worker up as vLLM does, with the kernel's leave to use AMX where the CPU has it."""
        torch.cpu._init_amx()
        super().init_device()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload as vLLM does, then pack what it left out."""
        super().reload_weights(*args, **kwargs)
        for layer in self.get_model().modules():
            weight = getattr(layer, "weight", None)
            # Linear layers have given their weights away to the packed copy; they were packed anew by vLLM.
            if hasattr(layer, "cpu_linear") and weight is not None and weight.dim() == 2:
                layer.quant_method.process_weights_after_loading(layer)
