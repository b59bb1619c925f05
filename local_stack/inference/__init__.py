"""A small CPU inference server that speaks vLLM's HTTP, for the demo and for tests.

Requests travel `app` (routes) -> `reading` (checks) -> `engine` (one thread) -> `scheduler` (which sequences
run) -> `packed_model` (forward without padding) -> `sampling`, and come back through `replying`. Small models
only; no streaming, no penalties, no structured output, no prefix cache: what it cannot do, it refuses.
"""

from local_stack.inference.app import create_app
from local_stack.inference.engine import Engine
from local_stack.inference.errors import InferenceError
from local_stack.inference.server import InferenceServer
from local_stack.inference.settings import EngineSettings

__all__ = ["Engine", "EngineSettings", "InferenceError", "InferenceServer", "create_app"]
