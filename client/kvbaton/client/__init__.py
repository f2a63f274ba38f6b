"""The kvbaton client SDK: ask a router, stream the answer.

async with AsyncClient("localhost:7000") as client:
    async for chunk in client.generate("The red lamp is with Ann. Who has the red lamp?"):
        print(chunk.text, end="")
"""

from kvbaton.client._answers import Chunk, GeneratedSequence, GenerationResult, TokenLogprobs, Usage
from kvbaton.client._async import AsyncClient, AsyncGeneration
from kvbaton.client._errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    KvbatonError,
    OverloadedError,
    RequestCancelledError,
    ServiceError,
    UnavailableError,
)
from kvbaton.client._requests import GenerateOptions, PromptLike
from kvbaton.client._sync import Client, Generation

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Chunk",
    "Client",
    "DeadlineExceededError",
    "GenerateOptions",
    "GeneratedSequence",
    "Generation",
    "GenerationResult",
    "InvalidArgumentError",
    "KvbatonError",
    "OverloadedError",
    "PromptLike",
    "RequestCancelledError",
    "ServiceError",
    "TokenLogprobs",
    "UnavailableError",
    "Usage",
]
