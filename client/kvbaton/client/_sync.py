"""The synchronous client: the same calls, without an event loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import grpc

from kvbaton.client import _core, _requests
from kvbaton.client._answers import Assembly, Chunk, GenerationResult
from kvbaton.client._errors import RequestCancelledError, from_status
from kvbaton.client._requests import GenerateOptions, PromptLike
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types


class Generation:
    """A running answer: iterate over it for chunks, then ask for `result`. Closing it early frees everything."""

    def __init__(self, call: Any, num_sequences: int = 1) -> None:
        self._call = call
        self._assembly = Assembly(num_sequences)
        self._ended = False

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> Chunk:
        while not self._ended:
            with _translated():
                response = next(self._call, None)
            if response is None:
                self._ended = True
                break
            chunk = self._assembly.add(response)
            if chunk is not None:
                return chunk
        raise StopIteration

    def result(self) -> GenerationResult:
        """Read what is left and return the whole answer. Raises what the call ended with."""
        for _ in self:
            pass
        return self._assembly.result()

    def close(self) -> None:
        """Stop the generation; harmless when it has ended."""
        self._ended = True
        self._assembly.close()
        self._call.cancel()

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """A connection to a router. Use as a context manager, or call `close`."""

    def __init__(self, target: str = "localhost:7000") -> None:
        """`target` is the router's host:port."""
        self._channel = grpc.insecure_channel(target, options=_core.CHANNEL_OPTIONS)

    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Generation:
        """See `AsyncClient.generate`."""
        request = _requests.build_request(prompt, options)
        method = self._channel.unary_stream(
            _core.METHODS + "Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        metadata: Sequence[Any] = options.get("metadata", ())
        with _translated():
            call = method(request, timeout=_requests.deadline(options), metadata=tuple(metadata))
        return Generation(call, options.get("n", 1))

    def tokenize(self, prompt: PromptLike, model: str = "") -> list[int]:
        """See `AsyncClient.tokenize`."""
        request = pb.TokenizeRequest(model=model, prompt=_requests.build_prompt(prompt))
        method = self._channel.unary_unary(
            _core.METHODS + "Tokenize",
            request_serializer=pb.TokenizeRequest.SerializeToString,
            response_deserializer=pb.TokenizeResponse.FromString,
        )
        with _translated():
            response = method(request)
        return _requests.unpack_token_ids(response.token_ids)

    def models(self) -> list[types.ModelInfo]:
        """See `AsyncClient.models`."""
        method = self._channel.unary_unary(
            _core.METHODS + "ListModels",
            request_serializer=pb.ListModelsRequest.SerializeToString,
            response_deserializer=pb.ListModelsResponse.FromString,
        )
        with _translated():
            return list(method(pb.ListModelsRequest()).models)

    def close(self) -> None:
        """End the connection and every call on it."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        # The synchronous library raises the call itself, which has the status.
        raise from_status(error.code(), error.details()) from error
    except ValueError as error:
        # What the synchronous library says of a closed channel.
        raise RequestCancelledError(str(error)) from error
