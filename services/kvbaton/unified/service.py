"""A unified worker, from its options to its end: one engine behind PrefillService and DecodeService.

It takes part in a hand-off on either side, and where a router chooses it for both it computes the prompt where it
decodes.
"""

import asyncio

from kvbaton.decode.service import DecodeSide
from kvbaton.engine.scheduler import Limits
from kvbaton.prefill.service import PrefillSide
from kvbaton.rpc.serving import Server
from kvbaton.unified.config import UnifiedConfig
from kvbaton.v1 import worker_pb2
from kvbaton.worker.config import encoding_of
from kvbaton.worker.service import Offer, serve_worker


async def serve_unified(config: UnifiedConfig, stop: asyncio.Event, started: "asyncio.Future[Server]") -> None:
    """Serve until `stop` is set, as `serve_worker` does."""
    prefill, decode = PrefillSide(encoding_of(config.kv_encoding)), DecodeSide(config)
    await decode.check()
    offer = Offer(
        role=worker_pb2.WORKER_ROLE_UNIFIED,
        limits=Limits(
            max_prefill_tokens=config.max_prefill_tokens,
            max_decode_seqs=config.max_decode_seqs,
            max_waiting=config.max_waiting,
            target_itl=config.target_itl_ms / 1e3 or None,
        ),
        services=[prefill.open, decode.open],
        on_layer=prefill.transfers.layer_done,
        sent=prefill.counters,
        received=decode.counters,
        describe=[prefill.describe, decode.describe],
    )
    await serve_worker(config, offer, stop, started)
