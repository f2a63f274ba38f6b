"""InferenceService and AdminService: the router's face to clients and operators."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry import context as otel_context
from opentelemetry.trace import Span

from kvbaton.engine.errors import OverloadedError, UnavailableError
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.router.admission import (
    MAX_N,
    admit,
    check_model,
    check_prompt,
    check_prompt_size,
    prompt_token_ids,
)
from kvbaton.router.config import RouterConfig
from kvbaton.router.dispatch import Dispatch
from kvbaton.router.registry import Placement, Registry
from kvbaton.rpc import telemetry
from kvbaton.rpc.serving import Registration
from kvbaton.text.tokenizer import Tokenizer
from kvbaton.v1 import admin_pb2, types_pb2
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from kvbaton.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server

_FINISH_NAMES = {types_pb2.FINISH_REASON_STOP: "stop", types_pb2.FINISH_REASON_LENGTH: "length"}


class _Relay:
    """Writes one request's events to its client, and notes when the first answer's tokens left."""

    def __init__(self, write: Callable[[pb.GenerateResponse], Awaitable[None]], span: Span) -> None:
        self._write = write
        self._span = span
        self._arrived = time.monotonic()
        self._first_at: float | None = None
        # Answers to one prompt share the stream, and a stream takes one message at a time.
        self._writing = asyncio.Lock()
        self.timings = types_pb2.Timings()

    async def emit(self, response: pb.GenerateResponse) -> None:
        """Pass an event on."""
        async with self._writing:
            await self._write(response)
        if response.HasField("tokens") and response.tokens.sequence == 0:
            self._note(response.tokens)

    def _note(self, tokens: types_pb2.TokenEvent) -> None:
        if tokens.first_index == 0:
            self._first_at = time.monotonic()
            self.timings.time_to_first_token_seconds = self._first_at - self._arrived
            self._span.add_event(telemetry.EVENT_FIRST_TOKEN)
        if tokens.first_index <= 1 < tokens.first_index + len(tokens.token_ids) and self._first_at is not None:
            self.timings.second_token_gap_seconds = time.monotonic() - self._first_at
            self._span.add_event(telemetry.EVENT_SECOND_TOKEN)

    def end(self) -> None:
        """The last token has gone."""
        self.timings.total_seconds = time.monotonic() - self._arrived


class InferenceServicer(InferenceServiceServicer):
    """Checks, tokenises, routes and relays."""

    def __init__(self, config: RouterConfig, registry: Registry, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._registry = registry
        self._tokenizer = tokenizer
        self._num_in_flight = 0
        # One thread: tokenizers are quick but not instant, and not safe to share between threads.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")

    @property
    def registration(self) -> Registration:
        """What a server needs to offer this service."""
        return Registration(
            "kvbaton.v1.InferenceService", lambda server: add_InferenceServiceServicer_to_server(self, server)
        )

    async def Generate(  # type: ignore[override]
        self,
        request: pb.GenerateRequest,
        context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]",
    ) -> None:
        """See the proto."""
        # n is checked later; until then it must not do harm.
        with self._in_flight(min(max(request.sampling.n, 1), MAX_N)):
            span = telemetry.start_span(telemetry.SPAN_GENERATE)
            token = otel_context.attach(telemetry.context_with(span))
            try:
                await self._generate(request, context, span)
            finally:
                otel_context.detach(token)
                span.end()

    async def Tokenize(
        self,
        request: pb.TokenizeRequest,
        context: "grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse]",
    ) -> pb.TokenizeResponse:
        """See the proto."""
        with self._in_flight(1):
            model = self._model()
            check_model(request.model, model)
            prompt = await self._tokenize(request.prompt, model)
            check_prompt(prompt, model)
            return pb.TokenizeResponse(token_ids=pack_token_ids(prompt))

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: "grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse]",
    ) -> pb.ListModelsResponse:
        """See the proto."""
        return pb.ListModelsResponse(models=[self._model()] if self._registry.ready else [])

    async def _generate(
        self,
        request: pb.GenerateRequest,
        context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]",
        span: Span,
    ) -> None:
        relay = _Relay(context.write, span)
        model = self._model()
        check_model(request.model, model)
        prompt = await self._tokenize(request.prompt, model)
        admitted = admit(request, prompt, model, self._tokenizer, self._config.default_max_tokens)
        # A write that a failing leg cancels must not be the one that carries the headers: gRPC could then send no
        # status any more, and the client would wait for ever.
        await context.send_initial_metadata(())
        dispatch = Dispatch(admitted, self._choose, relay.emit)
        await dispatch.run(context.time_remaining())
        relay.end()
        _describe(span, model, dispatch)
        finished = _finished(dispatch, model, relay.timings)
        await context.write(pb.GenerateResponse(finished=finished))

    @contextmanager
    def _in_flight(self, weight: int) -> Iterator[None]:
        """Count that many requests for the length of the block. Raises OverloadedError when there are enough."""
        if self._num_in_flight >= self._config.max_in_flight:
            raise OverloadedError(f"{self._num_in_flight} requests are in flight already")
        self._num_in_flight += weight
        try:
            yield
        finally:
            self._num_in_flight -= weight

    def _choose(self) -> Placement:
        routing = telemetry.start_span(telemetry.SPAN_ROUTE)
        try:
            placement = self._registry.choose()
            routing.set_attribute("kvbaton.reason", placement.reason)
        finally:
            routing.end()
        return placement

    def _model(self) -> types_pb2.ModelInfo:
        if self._registry.model is None:
            raise UnavailableError("no worker has connected yet")
        return self._registry.model

    async def _tokenize(self, prompt: pb.Prompt, model: types_pb2.ModelInfo) -> Sequence[int]:
        check_prompt_size(prompt, self._tokenizer, model.max_model_len)
        if prompt.WhichOneof("kind") == "tokens":
            return prompt_token_ids(prompt, None)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, prompt_token_ids, prompt, self._tokenizer)


class AdminServicer(AdminServiceServicer):
    """Shows what the router knows."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @property
    def registration(self) -> Registration:
        """What a server needs to offer this service."""
        return Registration("kvbaton.v1.AdminService", lambda server: add_AdminServiceServicer_to_server(self, server))

    async def ListWorkers(
        self,
        request: admin_pb2.ListWorkersRequest,
        context: "grpc.aio.ServicerContext[admin_pb2.ListWorkersRequest, admin_pb2.ListWorkersResponse]",
    ) -> admin_pb2.ListWorkersResponse:
        """See the proto."""
        return admin_pb2.ListWorkersResponse(
            workers=[
                admin_pb2.WorkerEntry(
                    address=worker.address,
                    connected=worker.connected,
                    status=worker.status,
                    num_in_flight=worker.num_in_flight,
                    problem=worker.problem,
                )
                for worker in self._registry.workers
            ]
        )


def _finished(dispatch: Dispatch, model: types_pb2.ModelInfo, timings: types_pb2.Timings) -> pb.GenerateFinished:
    request, first = dispatch.request, dispatch.first
    timings.MergeFrom(first.timings)
    finished = pb.GenerateFinished(
        request_id=request.request_id,
        model=model.name,
        finish_reason=first.finish_reason,
        usage=types_pb2.Usage(
            prompt_tokens=len(request.prompt),
            completion_tokens=dispatch.num_tokens,
            cached_tokens=first.cached_tokens,
        ),
        timings=timings,
        seed=request.sampling.seed,
        num_resumes=sum(answer.num_resumes for answer in dispatch.answers),
    )
    if first.placement is not None:
        finished.prefill_worker = (first.placement.prefill or first.placement.decode).address
        finished.decode_worker = first.placement.decode.address
    return finished


def _describe(span: Span, model: types_pb2.ModelInfo, dispatch: Dispatch) -> None:
    span.set_attributes(
        {
            telemetry.ATTR_OPERATION_NAME: "text_completion",
            telemetry.ATTR_PROVIDER_NAME: telemetry.PROVIDER_NAME,
            telemetry.ATTR_REQUEST_MODEL: model.name,
            telemetry.ATTR_REQUEST_ID: dispatch.request.request_id,
            telemetry.ATTR_INPUT_TOKENS: len(dispatch.request.prompt),
            telemetry.ATTR_OUTPUT_TOKENS: dispatch.num_tokens,
            telemetry.ATTR_FINISH_REASONS: [
                _FINISH_NAMES.get(answer.finish_reason, "unknown") for answer in dispatch.answers
            ],
        }
    )
