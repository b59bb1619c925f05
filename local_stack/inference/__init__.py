"""A small CPU inference server that speaks vLLM's HTTP, for the demo and for tests.

Requests travel `app` -> `requests` (checks) -> `engine` -> `batch` (which sequences run) -> `model`
(forward) -> `sampling`, and come back through `replies`. Small models only, in float32; no streaming, no
penalties, no structured output, no tools, no prefix cache: what it cannot do, it refuses.
"""

from local_stack.inference.app import InferenceServer
from local_stack.inference.engine import Engine
from local_stack.inference.errors import InferenceError
from local_stack.inference.records import EngineSettings

__all__ = ["Engine", "EngineSettings", "InferenceError", "InferenceServer"]
