"""The asynchronous client."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from kvbaton.client import _core, _requests
from kvbaton.client._answers import Assembly, Chunk, GenerationResult
from kvbaton.client._errors import RequestCancelledError, from_status
from kvbaton.client._requests import GenerateOptions, PromptLike
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

T = TypeVar("T")


class AsyncGeneration:
    """A running answer: iterate over it for chunks, then ask for `result`. Closing it early frees everything."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall[Message, pb.GenerateResponse]", num_sequences: int = 1) -> None:
        self._call = call
        self._assembly = Assembly(num_sequences)
        self._ended = False

    def __aiter__(self) -> "AsyncGeneration":
        return self

    async def __anext__(self) -> Chunk:
        while not self._ended:
            response = await _translated(self._call.read())
            if not isinstance(response, pb.GenerateResponse):
                self._ended = True
                break
            chunk = self._assembly.add(response)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def result(self) -> GenerationResult:
        """Read what is left and return the whole answer. Raises what the call ended with."""
        async for _ in self:
            pass
        return self._assembly.result()

    async def aclose(self) -> None:
        """Stop the generation; harmless when it has ended."""
        self._ended = True
        self._assembly.close()
        self._call.cancel()

    def __del__(self) -> None:
        # grpc.aio keeps alive a call that nobody reads any more; leaving an `async for` early must stop it too.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()

    async def __aenter__(self) -> "AsyncGeneration":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """A connection to a router. Use as an async context manager, or call `close`."""

    def __init__(self, target: str = "localhost:7000") -> None:
        """`target` is the router's host:port."""
        self._channel = grpc.aio.insecure_channel(target, options=_core.CHANNEL_OPTIONS)

    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> AsyncGeneration:
        """Ask for an answer to `prompt`; the options are `GenerateOptions`.

        Raises TypeError or ValueError for arguments that cannot be sent; errors of the service, all KvbatonError, come
        out of the iteration and of `result`.
        """
        request = _requests.build_request(prompt, options)
        method = self._channel.unary_stream(
            _core.METHODS + "Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        metadata: Sequence[Any] = options.get("metadata", ())
        call = _begun(method, request, timeout=_requests.deadline(options), metadata=tuple(metadata))
        return AsyncGeneration(call, options.get("n", 1))

    async def tokenize(self, prompt: PromptLike, model: str = "") -> list[int]:
        """The token ids that `generate` would compute for `prompt`. Raises KvbatonError."""
        request = pb.TokenizeRequest(model=model, prompt=_requests.build_prompt(prompt))
        method = self._channel.unary_unary(
            _core.METHODS + "Tokenize",
            request_serializer=pb.TokenizeRequest.SerializeToString,
            response_deserializer=pb.TokenizeResponse.FromString,
        )
        return _requests.unpack_token_ids((await _translated(_begun(method, request))).token_ids)

    async def models(self) -> list[types.ModelInfo]:
        """The models that can be asked now. Raises KvbatonError."""
        method = self._channel.unary_unary(
            _core.METHODS + "ListModels",
            request_serializer=pb.ListModelsRequest.SerializeToString,
            response_deserializer=pb.ListModelsResponse.FromString,
        )
        return list((await _translated(_begun(method, pb.ListModelsRequest()))).models)

    async def close(self) -> None:
        """End the connection and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _begun(method: Callable[..., Any], request: Message, **settings: Any) -> Any:
    try:
        return method(request, **settings)
    except grpc.aio.UsageError as error:
        raise RequestCancelledError(str(error)) from error


async def _translated(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_status(error.code(), error.details()) from error
    except grpc.aio.UsageError as error:
        raise RequestCancelledError(str(error)) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not the reader was cancelled, but the call it reads from.
        raise RequestCancelledError("the call was closed while it was read") from error
