"""Reads what a launcher (torchrun, accelerate launch, srun, mpirun) set in the environment.

Launchers may start one process where several were asked for, and settings of Accelerate may come from
anywhere: its configuration file, a shell's profile. Both are decided here, by kind, before anything runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Final

from trainer.errors import ConfigurationError

logger = logging.getLogger(__name__)

_RANKS: Final = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_NUMBERS: Final = (
    *(*_RANKS, *_SIZES, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("SLURM_STEP_NUM_TASKS", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)

_OTHER_WAYS: Final = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
"""Ways to spread a model that this trainer does not take."""

_OF_THE_START: Final = {
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_DEBUG_RDV_FILE",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_USE_CPU",
}
"""Variables of Accelerate that change nothing that is computed; they keep their effect."""

_NEUTRAL: Final = {"", "0", "1", "no", "none", "false", "default"}
"""Values that `accelerate launch` sets where nothing was asked for."""

_COMMAND: Final = "torchrun --nnodes NODES --nproc_per_node PROCESSES -m trainer.cli run ..."


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's number among those of the run, before they have found each other."""
    return _first_of(_RANKS, environment)[1] or 0


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes a launcher has started for the run; 1 without one."""
    return _first_of(_SIZES, environment)[1] or 1


def _first_of(names: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int | None]:
    """Return the first of some variables that is a number, and its value."""
    numbers = ((name, environment.get(name, "")) for name in names)
    return next(((name, int(value)) for name, value in numbers if value.isdecimal()), ("", None))


def require_whole_launch(environment: Mapping[str, str] = os.environ) -> None:
    """See that what a launcher set is whole, before other processes are looked for by it.

    Raises:
        ConfigurationError: A number is none, or does not go with another, or is missing; the message names
            the variable.
    """
    for name in _NUMBERS:
        if environment.get(name) and not environment[name].isdecimal():
            raise _not_one_run(f"{name}={environment[name]} is no number; launchers set it")
    (rank_name, rank), (size_name, size) = _first_of(_RANKS, environment), _first_of(_SIZES, environment)
    if rank and size is None:
        raise _not_one_run(f"this is process {rank} ({rank_name}), but WORLD_SIZE does not say of how many")
    if rank and size is not None and rank >= size:
        raise _not_one_run(f"this is process {rank} ({rank_name}, from 0 on) of {size} ({size_name})")
    if (size or 1) > 1 and not environment.get("MASTER_ADDR"):
        raise _not_one_run(
            f"{size} processes were started ({size_name}), but MASTER_ADDR says not where they meet"
        )


def _not_one_run(found: str) -> ConfigurationError:
    return ConfigurationError(
        f"{found}. Several runs would take each other's batches: start them together with `{_COMMAND}`, "
        "with --rdzv_backend c10d --rdzv_endpoint HOST:PORT where there are several nodes; or unset the "
        "variable if this is meant to be a run by itself"
    )


def launched_on_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher was told to use no accelerator."""
    return _is_on(environment.get("ACCELERATE_USE_CPU", ""))


def _is_on(value: str) -> bool:
    return value.lower() in ("true", "1", "yes", "y", "on", "t")


def take_settings_of_accelerate(environment: MutableMapping[str, str] = os.environ) -> None:
    """Refuse other ways to spread a model, and drop every variable that would change what is computed.

    Raises:
        ConfigurationError: Accelerate was told to use FSDP, DeepSpeed, or the like.
    """
    for name, way in _OTHER_WAYS.items():
        if _is_on(environment.get(name, "")):
            raise ConfigurationError(
                f"Accelerate was told to use {way} ({name}={environment[name]}, by `accelerate launch` or "
                "its configuration file), but this trainer spreads weights itself: start it with "
                f"`{_COMMAND}`, or set distributed_type to MULTI_GPU, and set parallel.mode to sharded where "
                "the weights are to be spread over the processes"
            )
    for name in sorted(environment):
        if not name.startswith("ACCELERATE_") or name in _OF_THE_START:
            continue
        value = environment.pop(name)
        if value.lower() not in _NEUTRAL:
            logger.warning("%s=%s has no effect: the run's own settings decide what is computed", name, value)


def started_by_accelerate_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was asked for several processes and started one.

    For a CPU, and for one GPU a node, it starts the program itself, without ranks, and only says where the
    others could be met. To be asked before `take_settings_of_accelerate`.
    """
    return (
        "ACCELERATE_MIXED_PRECISION" in environment
        and "MASTER_ADDR" in environment
        and not any(environment.get(name) for name in _RANKS)
    )


def refuse_separate_runs(processes: int, *, alone: bool, environment: Mapping[str, str] = os.environ) -> None:
    """See that as many processes train together as were started; else each would be a run of its own.

    Args:
        processes: How many train together.
        alone: See `started_by_accelerate_alone`.
        environment: What the launcher set.

    Raises:
        ConfigurationError: Others were started beside these; the message says how to start them together.
    """
    found = None
    sizes = {name: int(environment[name]) for name in _SIZES if environment.get(name)}
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    launchers = int(environment.get("GROUP_WORLD_SIZE") or processes)
    if alone and processes == 1:
        found = "`accelerate launch` was asked for several processes (MASTER_ADDR is set) and started one"
    elif processes == 1 and max(sizes.values(), default=1) > 1:
        name = max(sizes, key=lambda each: sizes[each])
        found = f"{sizes[name]} processes were started ({name}), but this one trains alone"
    elif sizes.get("WORLD_SIZE", processes) != processes:
        found = f"{sizes['WORLD_SIZE']} processes were started (WORLD_SIZE), but {processes} train together"
    elif tasks > 1 and launchers == 1:
        found = f"srun started {tasks} tasks (SLURM_STEP_NUM_TASKS), but each would be a run of its own"
    if found is not None:
        raise _not_one_run(found)


def nodes(processes: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many machines the processes are spread over, as the launcher says."""
    return max(1, processes // int(environment.get("LOCAL_WORLD_SIZE") or processes))
