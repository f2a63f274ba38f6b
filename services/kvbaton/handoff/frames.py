"""Which rectangles of KV travel in which frames, and whether all of it has arrived. Pure bookkeeping on both sides.

KV of a layer grows token by token, so for each layer one number says how far it is ready, and one how far it was sent.
A layer with a sliding window may begin later than the others (`engine.windows`).

    tokens   0 ........ sent ........ ready ........ stop
             [ on its way ][   pending  ][ not computed ]
"""

from dataclasses import dataclass

from kvbaton.engine.geometry import KvGeometry

FRAME_BYTES = 4 << 20
"""Most payload bytes a frame carries: small ones cost per message, large ones hold up the loop that carries them."""

WORTH_BYTES = 512 << 10
"""So much leaves while more is to come; less waits for company."""

REFERENCE_FRAME_BYTES = 4 << 20
"""The same where a frame names blocks: its message is small, and what it names is copied in one go."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Tokens of some consecutive layers."""

    layers: range
    tokens: range


def first_tokens(geometry: KvGeometry, token_start: int, window_start: int) -> list[int]:
    """By layer, the first token that travels."""
    return [token_start if layer.window is None else window_start for layer in geometry.layers]


class FramePlanner:
    """Cuts the KV of tokens `[token_start, token_stop)` into frames, as the layers get ready.

    Consecutive layers share a frame while they fit; a layer that does not fit is cut by tokens. Small frames wait for
    company until nothing more is to come.
    """

    def __init__(self, geometry: KvGeometry, token_start: int, token_stop: int, frame_bytes: int = FRAME_BYTES) -> None:
        """A token of one layer must fit a frame by itself or it makes a larger one."""
        self._geometry = geometry
        self._layer_bytes = geometry.layer_token_bytes
        self._start = token_start
        self._stop = token_stop
        self._frame_bytes = frame_bytes
        self._ready = [token_start] * geometry.num_layers
        self._sent = [token_start] * geometry.num_layers

    def begin(self, window_start: int, frame_bytes: int | None = None) -> None:
        """Layers with a sliding window leave out the tokens before `window_start`. Call it before the first `next`.

        Frames hold `frame_bytes` at the most, if that is given. Raises ValueError when the start is not within the
        tokens to send.
        """
        self._frame_bytes = frame_bytes or self._frame_bytes
        if self._geometry.window is None:
            return
        if not self._start <= window_start <= self._stop:
            raise ValueError(f"window start {window_start} of tokens [{self._start}, {self._stop})")
        self._sent = first_tokens(self._geometry, self._start, window_start)
        self._ready = [max(pair) for pair in zip(self._ready, self._sent, strict=True)]

    def advance(self, layer: int, stop: int) -> None:
        """Tokens below `stop` are computed in `layer`."""
        self._ready[layer] = min(max(stop, self._ready[layer]), self._stop)

    @property
    def all_ready(self) -> bool:
        """Whether every layer of every token is computed."""
        return all(ready == self._stop for ready in self._ready)

    @property
    def all_sent(self) -> bool:
        """Whether every layer of every token was handed out."""
        return all(sent == self._stop for sent in self._sent)

    def next(self) -> Rectangle | None:
        """Hand out the next frame's rectangle; None when nothing is worth a frame yet."""
        flush, worth = self.all_ready, min(WORTH_BYTES, self._frame_bytes // 2)
        layer = 0
        while layer < len(self._sent):
            stop_layer, size = self._run(layer)
            if size and (flush or size >= worth):
                return self._take(layer, stop_layer)
            layer = stop_layer
        return None

    def _run(self, layer: int) -> tuple[int, int]:
        """The end of the run of layers that begins at `layer` and fits a frame, and its pending bytes."""
        sent, ready = self._sent[layer], self._ready[layer]
        size = self._layer_bytes[layer] * (ready - sent)
        stop = layer + 1
        while stop < len(self._sent) and self._sent[stop] == sent and self._ready[stop] == ready:
            more = self._layer_bytes[stop] * (ready - sent)
            if size + more > self._frame_bytes:
                break
            size += more
            stop += 1
        return stop, size

    def _take(self, layer: int, stop_layer: int) -> Rectangle:
        start, stop = self._sent[layer], self._ready[layer]
        token_bytes = sum(self._layer_bytes[layer:stop_layer])
        stop = min(stop, start + max(1, self._frame_bytes // token_bytes))
        for index in range(layer, stop_layer):
            self._sent[index] = stop
        return Rectangle(range(layer, stop_layer), range(start, stop))


class Coverage:
    """What of a transfer's tokens has arrived: each layer in token order, each token once."""

    def __init__(self, geometry: KvGeometry, tokens: range, window_start: int) -> None:
        """Of `tokens`, layers with a sliding window need those from `window_start` on."""
        self._geometry = geometry
        self._stop = tokens.stop
        self._received = first_tokens(geometry, tokens.start, window_start)

    def problem(self, rectangle: Rectangle) -> str | None:
        """Why a frame with this rectangle must not come next; None when it may. Changes nothing."""
        layers, tokens = rectangle.layers, rectangle.tokens
        if not layers or layers.stop > self._geometry.num_layers:
            return f"layers [{layers.start}, {layers.stop}) of a model with {self._geometry.num_layers}"
        if not tokens or tokens.stop > self._stop:
            return f"tokens [{tokens.start}, {tokens.stop}) of a transfer that ends at {self._stop}"
        for layer in layers:
            if self._received[layer] != tokens.start:
                return f"layer {layer} continues at token {self._received[layer]}, the frame begins at {tokens.start}"
        return None

    def add(self, rectangle: Rectangle) -> None:
        """Count a frame that `problem` had nothing against."""
        for layer in rectangle.layers:
            self._received[layer] = rectangle.tokens.stop

    @property
    def complete(self) -> bool:
        """Whether every layer of every token has arrived."""
        return all(received == self._stop for received in self._received)
