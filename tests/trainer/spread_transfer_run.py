"""Processes over which weights are spread send them into a server: `... MODEL OUTPUT PORT FAULT`, launched.

The first transfer of version 1 fails: with "refused" the server takes no weight of the second layer, with
"hung" the sender waits in the middle until the next transfer is under way. In the end the server has to have
what was trained.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

from tests.trainer.batches import make_bodies
from tests.trainer.inference_stand_in import Answer
from tests.trainer.runs import assert_equal_tensors, rows, run, weights
from tests.trainer.transfer_stand_in import NCCLEngine, Receiver, served_by_process_0


def spoil_second_transfer(server: Receiver, fault: str) -> None:
    """Let the transfer after that of version 0 fail."""
    transfers, released = 0, threading.Event()
    answer = server.answer

    def spoiled(path: str, body: bytes) -> Answer:
        nonlocal transfers
        if path == "/start_weight_update":
            transfers += 1
            second = transfers == 2
            server.refuse_weight = lambda name: second and fault == "refused" and ".layers.1." in name
            if second and fault == "hung":
                NCCLEngine.built[-1].hang = released
        elif path == "/update_weights" and transfers > 2:
            released.set()
        return answer(path, body)

    server.answer = spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, output, port, fault = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    with served_by_process_0(model, output.with_suffix(".url")) as (url, server):
        if server is not None:
            spoil_second_transfer(server, fault)
        options = ["--parallel.mode", "sharded", "--publish.transport", "nccl", "--publish.servers", url]
        options += ["--publish.verify", "false", "--publish.group_port", port, "--publish.load_timeout", "2"]
        run(model, output, make_bodies(2), *options, steps=2)
        if server is not None:
            trained, received = weights(output / "final"), server.model.state_dict()
            assert_equal_tensors({name: received[name] for name in trained}, trained)
            assert [row["publish_attempts"] for row in rows(output, "publish")] == [1, 2, 1]
