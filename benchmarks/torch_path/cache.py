"""The rolling window of keys and values, laid out so that attention reads one buffer and nothing is moved.

Frames in a buffer: [sink, newest chunk first | reference | ring of `window` + `chunk` frames]. The ring has room for the current chunk
as well: its keys and values are written over the frames that just left the window, and there they stay. So what is valid is always
one range without a hole, a full cache is the whole buffer, and no chunk ends with a copy (but those that enter the sink).
Softmax does not mind the order of keys.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.torch_path.rope import Rope, Tables, rotate


class LayerCache(NamedTuple):
    """What one layer's attention writes and reads."""

    raw: Float[Tensor, "b slots g e"]  # keys before RoPE
    keys: Float[Tensor, "b slots g e"]  # keys turned to their places relative to the current chunk
    values: Float[Tensor, "b slots g e"]
    own: Int[Tensor, "t"]  # the slots of the current chunk
    start: int  # the valid slots are [start, stop)
    stop: int

    def write(
        self, raw: Float[Tensor, "b t g e"], turned: Float[Tensor, "b t g e"], values: Float[Tensor, "b t g e"]
    ) -> tuple[Float[Tensor, "b s g e"], Float[Tensor, "b s g e"]]:
        """Stores the chunk's keys and values in place and returns all that it may see."""
        self.raw.index_copy_(1, self.own, raw)
        self.keys.index_copy_(1, self.own, turned)
        self.values.index_copy_(1, self.own, values)
        return self.keys[:, self.start : self.stop], self.values[:, self.start : self.stop]


class RollingCache:
    """All layers' caches of streams that run in step.

    Counters are plain integers; what depends on them reaches the device through two small buffers at fixed addresses, so a
    captured graph can be replayed for ever.
    """

    def __init__(
        self,
        rope: Rope,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        chunk: int,
        window: int,
        sink: int = 0,
        reference_distance: int | None = None,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        """Args:
        rope: of the grid of one latent frame.
        heads: key heads.
        chunk, window, sink: latent frames.
        reference_distance: from the chunk's last latent frame to the reference's place; None for no reference.
        """
        self.chunk, self.window, self.sink = chunk, window, sink
        self.tokens = rope.place_angle.shape[0]
        self.reference_distance = reference_distance
        self.references = 0 if reference_distance is None else 1
        frames = sink + self.references + window + chunk
        shape = (layers, batch, frames * self.tokens, heads, head_dim)
        self.raw, self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(3))
        self.here = rope.tables(torch.arange(1.0 - chunk, 1.0, device=device))
        self.times = torch.zeros(frames, device=device)
        self.own = torch.zeros(chunk * self.tokens, device=device, dtype=torch.long)
        self.sink_count = self.ring_count = 0  # latent frames
        self._tables, self._turn = rope.tables, turn_keys

    @property
    def full(self) -> bool:
        """Whether every slot counts, so that from now on every step is the same program."""
        return self.sink_count == self.sink and self.ring_count >= self.window

    def frame_times(self) -> list[float]:
        """Place in time of every frame of the buffer, relative to the current chunk's last latent frame.

        Those of frames that hold nothing yet, or that the current chunk overwrites, mean nothing.
        """
        first, ring = 1 - self.chunk, self.window + self.chunk
        oldest_sink = first - self.window - self.sink
        sink_chunks = [range(start, start + self.chunk) for start in range(0, self.sink, self.chunk)]
        times = [oldest_sink + frame for frames in reversed(sink_chunks) for frame in frames]
        times += [self.reference_distance] * self.references
        times += [first - ((self.ring_count - 1 - slot) % ring + 1) for slot in range(ring)]
        return [float(time) for time in times]

    def place(self) -> None:
        """Tells the device where the current chunk goes and how far away every frame is; before each chunk, outside a graph."""
        first = (self.sink + self.references + self.ring_count % (self.window + self.chunk)) * self.tokens
        upload(self.times, torch.tensor(self.frame_times()))
        upload(self.own, torch.arange(first, first + self.own.shape[0]))

    def turn(self) -> None:
        """Turns all cached keys to their places; once per chunk, so that no denoising step has to."""
        self._turn(self.keys, self.raw, self._tables(self.times))

    def layer(self, index: int) -> LayerCache:
        """One layer's part, with the range of slots that the current chunk may see; its own are among them."""
        start = self.sink - self.sink_count
        stop = self.sink + self.references + min(self.ring_count, self.window) + self.chunk
        parts = self.raw[index], self.keys[index], self.values[index]
        return LayerCache(*parts, self.own, start * self.tokens, stop * self.tokens)

    def advance(self) -> None:
        """The current chunk becomes the past; the first ones are copied into the sink, and the next is written over them."""
        if self.sink_count == self.sink:
            self.ring_count += self.chunk
            return
        self.sink_count += self.chunk
        first = (self.sink - self.sink_count) * self.tokens
        for buffer in (self.raw, self.values):
            buffer[:, :, first : first + self.own.shape[0]] = buffer[:, :, self.own]

    def fill(self, generator: torch.Generator) -> None:
        """The state of a stream that has run for long, with random content, for timing.

        The counters are such that the next chunk goes to the ring's first frames.
        """
        for buffer in (self.raw, self.values):
            buffer.normal_(generator=generator)
        self.sink_count, self.ring_count = self.sink, self.window + self.chunk

    def compile(self, mode: str) -> None:
        """Compiles the turning of keys. The tables are a program of their own: merged, every element would compute its own sine."""
        self._tables = torch.compile(self._tables, mode=mode)
        self._turn = torch.compile(turn_keys, mode=mode)


def turn_keys(keys: Float[Tensor, "l b s g e"], raw: Float[Tensor, "l b s g e"], tables: Tables) -> None:
    """Writes `raw`, turned, into `keys`."""
    keys.copy_(rotate(raw, tables))


def upload(target: Tensor, source: Tensor) -> None:
    """Copies a small host tensor to its place on the device without waiting for the work queued there."""
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
