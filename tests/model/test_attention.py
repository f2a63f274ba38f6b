"""Each attention backend is the textbook's, in every variant that models ask for and for every make-up of a batch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.engine.request import Milestones, Phase, Request, Route
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Slice
from kvbaton.model import ragged
from kvbaton.model.attention import AttentionBackend, LayerShape, PagedAttention
from kvbaton.model.cpu.attention import CpuAttention
from kvbaton.model.cuda.attention import CudaAttention
from kvbaton.model.reference import ReferenceAttention, attend
from kvbaton.model.store import TorchKvStore
from support.varlen import LenientKernel, varlen_attn

HEADS, KV_HEADS, K_DIM, V_DIM, BLOCK = 6, 2, 8, 5, 4
WINDOW = 7

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "reference": ReferenceAttention,
    "cpu": CpuAttention,
    "cuda": lambda: CudaAttention(LenientKernel(varlen_attn)),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaling": {"scaling": 0.07},
    "window": {"sliding_window": WINDOW},
    "softcap": {"softcap": 3.0},
    "sinks": {"s_aux": torch.linspace(-2, 2, HEADS)},
    "all": {"sliding_window": WINDOW, "softcap": 3.0, "s_aux": torch.linspace(-2, 2, HEADS), "scaling": 0.3},
}


def tensors_of(num_tokens: int, seed: int = 0) -> Tensors:
    """Q [heads, tokens, d], K and V [kv_heads, tokens, d] of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, num_tokens, K_DIM), (KV_HEADS, num_tokens, K_DIM), (KV_HEADS, num_tokens, V_DIM)]
    query, key, value = (torch.randn(shape, generator=generator) * 2 for shape in shapes)
    return query, key, value


def naive(tensors: Tensors, variant: dict[str, Any]) -> torch.Tensor:
    """Causal attention of a whole sequence, number by number in float64: [tokens, heads, v_dim]."""
    query, key, value = (tensor.double() for tensor in tensors)
    window, softcap, sinks = variant.get("sliding_window"), variant.get("softcap"), variant.get("s_aux")
    scale = variant.get("scaling", K_DIM**-0.5)
    num_tokens = query.shape[1]
    output = torch.zeros(num_tokens, HEADS, V_DIM, dtype=torch.float64)
    for at in range(num_tokens):
        first = 0 if window is None else max(0, at - window + 1)
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            scores = [float(query[head, at] @ key[group, other]) * scale for other in range(first, at + 1)]
            if softcap is not None:
                scores = [math.tanh(score / softcap) * softcap for score in scores]
            total = sum(math.exp(score) for score in scores)
            if sinks is not None:
                total += math.exp(float(sinks[head]))
            for other, score in zip(range(first, at + 1), scores, strict=True):
                output[at, head] += math.exp(score) / total * value[group, other]
    return output


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)


def shape_of(variant: dict[str, Any]) -> LayerShape:
    names = ("scaling", "sliding_window", "softcap", "s_aux")
    return LayerShape(*(variant.get(name) for name in names))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("window", "all")])
def test_attend_is_causal_attention(name: str) -> None:
    query, key, value = tensors_of(9)
    result = attend(query[None], key[None], value[None], None, shape_of(VARIANTS[name]))
    close(result[0].transpose(0, 1), naive((query, key, value), VARIANTS[name]))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_attend_with_a_mask(name: str) -> None:
    query, key, value = tensors_of(12)
    at = torch.arange(12)
    mask = at[None, :] <= at[:, None]
    if "sliding_window" in VARIANTS[name]:
        mask &= at[None, :] > at[:, None] - WINDOW
    result = attend(query[None], key[None], value[None], mask[None, None], shape_of(VARIANTS[name]))
    close(result[0].transpose(0, 1), naive((query, key, value), VARIANTS[name]))


class Layer:
    """What a model passes as itself."""

    layer_idx = 0


class Sequence:
    """One request whose tensors are known from end to end, computed piece by piece."""

    def __init__(self, name: int, blocks: list[int], num_prompt: int, num_output: int) -> None:
        milestones = Milestones(0.0)
        sampling = SamplingParams(max_tokens=50, seed=0)
        self.request = Request(str(name), [5] * num_prompt, sampling, Route.LOCAL, milestones)
        self.request.blocks = blocks
        self.request.phase = Phase.PREFILLING
        self.tensors = tensors_of(num_prompt + num_output, seed=name)
        self.total = num_prompt + num_output

    def piece(self, num_tokens: int) -> Slice:
        """The next tokens."""
        start = self.request.num_computed
        if start >= self.request.num_prompt:
            self.request.phase = Phase.DECODING
            self.request.output.append(5)
        return Slice(self.request, start, num_tokens, samples=False)

    def part(self, kind: int, piece: Slice) -> torch.Tensor:
        """A piece of Q, K or V."""
        return self.tensors[kind][:, piece.start : piece.start + piece.num_tokens]


def compute(attention: PagedAttention, work: list[tuple[Sequence, int]], variant: dict[str, Any]) -> list[torch.Tensor]:
    """One step's attention; the output of each sequence's piece."""
    slices = [sequence.piece(num_tokens) for sequence, num_tokens in work]
    attention.batch = ragged.build(Batch(slices), BLOCK, torch.device("cpu"))
    query, key, value = (
        torch.cat([sequence.part(kind, piece) for (sequence, _), piece in zip(work, slices, strict=True)], 1)
        for kind in range(3)
    )
    output, _ = attention(Layer(), query[None], key[None], value[None], None, **variant)
    for sequence, num_tokens in work:
        sequence.request.num_computed += num_tokens
    return list(torch.split(output[0], [num_tokens for _, num_tokens in work]))


def paged(backend: str) -> PagedAttention:
    geometry = KvGeometry((LayerGeometry(KV_HEADS, K_DIM, V_DIM),), "float32")
    store = TorchKvStore(geometry, 30, BLOCK, torch.device("cpu"))
    for tensor in (store.keys[0], store.values[0]):
        tensor.fill_(float("nan"))
    return PagedAttention(BACKENDS[backend](), store)


def sequences() -> list[Sequence]:
    return [
        Sequence(1, [29, 3, 7, 11], 3, 10),
        Sequence(2, [0, 28], 1, 6),
        Sequence(3, [5, 4, 2, 1], 13, 2),
        Sequence(4, [20, 10, 21, 12, 22], 18, 1),
    ]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("name", list(VARIANTS))
def test_any_mixture_of_decodes_and_chunks_is_each_sequence_alone(name: str, backend: str) -> None:
    variant, attention = VARIANTS[name], paged(backend)
    a, b, c, d = sequences()
    outputs: dict[Sequence, list[torch.Tensor]] = {sequence: [] for sequence in (a, b, c, d)}
    steps: list[list[tuple[Sequence, int]]] = [
        [(a, 3), (b, 1), (c, 2)],
        *[[(a, 1), (b, 1), (c, 3), (d, 5)]] * 3,
        [(a, 1), (b, 1), (c, 2), (d, 2)],
        *[[(a, 1), (b, 1), (c, 1), (d, 1)]] * 2,
        *[[(a, 1)]] * 4,
    ]
    for work in steps:
        for (sequence, _), output in zip(work, compute(attention, work, variant), strict=True):
            outputs[sequence].append(output)
    for sequence, pieces in outputs.items():
        whole = torch.cat(pieces)
        assert len(whole) == sequence.total
        close(whole, naive(sequence.tensors, variant))


def test_a_listener_hears_of_a_layer_when_its_kv_is_there() -> None:
    attention, (a, *_) = paged("reference"), sequences()
    heard: list[torch.Tensor] = []
    assert attention.store is not None
    store = attention.store
    attention.on_layer = lambda layer: heard.append(store.keys[layer][29, :3].clone())
    compute(attention, [(a, 3)], {})
    assert len(heard) == 1
    assert torch.equal(heard[0], a.tensors[1][:, :3].transpose(0, 1))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_the_trial_notes_geometry_and_arguments_that_are_not_understood(backend: str) -> None:
    attention = PagedAttention(BACKENDS[backend]())
    query, key, value = (tensor[None] for tensor in tensors_of(4))
    output, _ = attention(Layer(), query, key, value, None, dropout=0.0, position_bias=1, other=None, use_cache=True)
    close(output[0], naive(tensors_of(4), {}))
    assert attention.seen == {0: LayerGeometry(KV_HEADS, K_DIM, V_DIM)}
    assert attention.unknown_arguments == {"position_bias"}


@pytest.mark.parametrize("chunk", [3, 18])
def test_a_token_that_is_no_number_is_not_heard_of_by_those_before_it(chunk: int) -> None:
    # They may be a prefix that others share.
    clean, poisoned = sequences()[3], sequences()[3]
    for tensor in poisoned.tensors[1:]:
        tensor[:, 10] = float("nan")
    outputs = []
    for sequence in (clean, poisoned):
        attention = paged("cpu")
        pieces = [compute(attention, [(sequence, chunk)], {})[0] for _ in range(18 // chunk)]
        outputs.append(torch.cat(pieces))
    torch.testing.assert_close(outputs[1][:10], outputs[0][:10])
    assert outputs[1][10:].isnan().all()
