"""What a worker's services take from a router's request before the engine hears of it."""

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvbaton.engine.constraint import Constraint
from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.request import Route
from kvbaton.engine.sampling import StructuredOutput, check_token_ids_in_vocabulary
from kvbaton.engine.tokens import check_token_ids, unpack_token_ids
from kvbaton.grammar.compiler import GrammarCompiler
from kvbaton.rpc.sampling import complete_sampling_from_proto
from kvbaton.text.tokenizer import Tokenizer
from kvbaton.v1 import decode_pb2, prefill_pb2
from kvbaton.v1 import types_pb2 as types

MAX_COMPILING = 64
"""Grammars that may wait for their compilation before more are refused."""

MAX_CACHE_SALT = 128
"""Most characters of a cache salt."""

LegRequest = prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest


class Admission:
    """Checks requests, and compiles their grammars on a thread of its own. One for all services of a worker."""

    def __init__(self, model: types.ModelInfo, tokenizer: Tokenizer | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._compiler = GrammarCompiler(tokenizer, model.vocab_size, frozenset(model.eos_token_ids))
        self._compiling = ThreadPoolExecutor(1, "grammar")
        self._num_compiling = 0
        # Request ids are the clients' and may repeat; the engine's may not.
        self._serial = itertools.count()

    async def read(self, request: LegRequest, route: Route) -> NewRequest:
        """The engine's request for a leg's.

        Raises InvalidArgumentError that names the field, and OverloadedError when too many grammars wait.
        """
        prompt = unpack_token_ids(request.prompt_token_ids, "prompt_token_ids")
        check_token_ids(prompt, self._model.vocab_size, "prompt_token_ids")
        output = unpack_token_ids(request.output_token_ids, "output_token_ids")
        if output:
            check_token_ids(output, self._model.vocab_size, "output_token_ids")
        if len(request.cache_salt) > MAX_CACHE_SALT:
            problem = f"{len(request.cache_salt)} characters are more than {MAX_CACHE_SALT}"
            raise InvalidArgumentError("cache_salt", problem)
        sampling = complete_sampling_from_proto(request.sampling)
        check_token_ids_in_vocabulary(sampling, self._model.vocab_size, frozenset(self._model.eos_token_ids))
        if sampling.stop and self._tokenizer is None:
            raise InvalidArgumentError("stop", "the model has no tokenizer, so that there is no text to stop at")
        constraint = None
        if sampling.structured_output is not None:
            constraint = await self._constraint(sampling.structured_output, output)
        return NewRequest(
            request_id=f"{request.request_id}/{next(self._serial)}",
            prompt=prompt,
            sampling=sampling,
            route=route,
            output=output,
            priority=request.priority,
            cache_salt=request.cache_salt,
            constraint=constraint,
        )

    def close(self) -> None:
        """Compile no more; requests that wait for it are cancelled."""
        self._compiling.shutdown(wait=False, cancel_futures=True)

    async def _constraint(self, spec: StructuredOutput, output: Sequence[int]) -> Constraint:
        if self._num_compiling >= MAX_COMPILING:
            raise OverloadedError(f"{self._num_compiling} grammars wait for their compilation already")
        self._num_compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, self._compile, spec, output)
        finally:
            self._num_compiling -= 1

    def _compile(self, spec: StructuredOutput, output: Sequence[int]) -> Constraint:
        return self._compiler.compile(spec).constraint(output)
