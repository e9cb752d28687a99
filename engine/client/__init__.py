"""The clients, blocking and asyncio; usable without ONNX Runtime (docs/clients.md)."""

from engine.client.asynchronous import AsyncClient
from engine.client.blocking import Client
from engine.client.channel import ClientSecurity
from engine.client.errors import FieldViolation, ServerError
from engine.client.generation import Event, GenerationResult
from engine.client.jobs import JobResult
from engine.client.retries import RetryPolicy

__all__ = [
    "AsyncClient",
    "Client",
    "ClientSecurity",
    "Event",
    "FieldViolation",
    "GenerationResult",
    "JobResult",
    "RetryPolicy",
    "ServerError",
]
