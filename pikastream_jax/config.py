"""Configuration of every model and of the stream: frozen, validated on construction.

Presets are functions in `configs/` that return a `Config`. Nothing here touches a device.
"""

import dataclasses
import math

SCHEDULES = ("sequential", "rolling")
PRECISIONS = ("float32", "bfloat16", "float8")
ATTENTIONS = ("auto", "xla", "mosaic")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_attention(name: str, dim: int, heads: int, kv_heads: int | None = None) -> None:
    _require(heads >= 1, f"{name}: heads {heads} must be at least 1")
    _require(dim % heads == 0, f"{name}: dim {dim} is not a multiple of heads {heads}; choose heads that divide it")
    head_dim = dim // heads
    _require(
        head_dim % 2 == 0 and head_dim >= 12,
        f"{name}: head dim {head_dim} (dim {dim} / heads {heads}) must be even and >= 12 to hold 3D RoPE; use fewer heads",
    )
    if kv_heads is not None:
        _require(
            kv_heads >= 1 and heads % kv_heads == 0,
            f"{name}: heads {heads} is not a multiple of kv_heads {kv_heads}; choose kv_heads that divide it",
        )


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Speech to tokens: one independent slice of sound per latent frame, so streaming and offline agree exactly."""

    sample_rate: int = 16_000  # Hz, mono
    hop: int = 160  # samples between mel frames
    window: int = 320  # samples in a mel frame
    fft: int = 512  # points of the transform
    mels: int = 64  # bands
    mel_frames: int = 96  # mel frames in a slice
    tokens: int = 24  # audio tokens a latent frame attends to
    dim: int = 128  # width of an audio token
    blocks: int = 2
    heads: int = 4
    look_ahead: int = 0  # samples later than the latent frame's end that it may hear

    def __post_init__(self):
        _require_attention("audio", self.dim, self.heads)
        _require(
            self.mel_frames == 4 * self.tokens,
            f"audio: mel_frames {self.mel_frames} must be 4 x tokens ({4 * self.tokens}): the encoder halves time twice",
        )
        _require(
            self.context_samples <= self.sample_rate,
            f"audio: a slice of {self.context_samples} samples is longer than one second ({self.sample_rate}); lower mel_frames or hop",
        )
        _require(self.window <= self.fft, f"audio: window {self.window} does not fit the {self.fft}-point transform")
        _require(
            0 <= self.look_ahead < self.context_samples,
            f"audio: look_ahead {self.look_ahead} samples must lie in [0, {self.context_samples})",
        )

    @property
    def context_samples(self) -> int:
        """Samples in the slice that one latent frame hears."""
        return (self.mel_frames - 1) * self.hop + self.window


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Prompt to tokens."""

    length: int = 24  # tokens; longer prompts are cut
    vocabulary: int = 512  # rows of the embedding; the tokenizer says how many are used
    dim: int = 128
    blocks: int = 1
    heads: int = 4

    def __post_init__(self):
        _require_attention("text", self.dim, self.heads)
        _require(self.length >= 1, f"text: length {self.length} must be at least 1 token")


@dataclasses.dataclass(frozen=True)
class FlashVAEConfig:
    """Video <-> latents. A latent frame is `temporal_stride` video frames at 1 / `spatial_stride` of the size."""

    latent_channels: int = 16
    temporal_stride: int = 4  # video frames in a latent frame
    spatial_stride: int = 16  # pixels per latent, each way
    window: int = 2  # past latent frames that encoder and decoder attend to
    encoder_dim: int = 192
    encoder_blocks: int = 4
    encoder_heads: int = 3
    encoder_kv_heads: int = 1
    decoder_dim: int = 256
    decoder_blocks: int = 4
    decoder_heads: int = 4
    decoder_kv_heads: int = 1
    refine_dim: int = 128
    refine_blocks: int = 2
    refine_heads: int = 4
    refine_window: int = 4  # tokens each way that a refinement window spans; 0 attends to the whole latent frame
    mlp_ratio: float = 3.0
    head_hidden: int = 256  # hidden width of the pixel head

    def __post_init__(self):
        _require_attention("flash_vae encoder", self.encoder_dim, self.encoder_heads, self.encoder_kv_heads)
        _require_attention("flash_vae decoder", self.decoder_dim, self.decoder_heads, self.decoder_kv_heads)
        _require_attention("flash_vae refinement", self.refine_dim, self.refine_heads)
        for name in ("latent_channels", "temporal_stride", "spatial_stride", "window"):
            _require(getattr(self, name) >= 1, f"flash_vae: {name} {getattr(self, name)} must be at least 1")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latents each way for a picture of `height` x `width` pixels."""
        stride = self.spatial_stride
        _require(
            height % stride == 0 and width % stride == 0,
            f"flash_vae: a picture of {height}x{width} pixels is not a multiple of {stride} each way; resize or pad it",
        )
        return height // stride, width // stride


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The diffusion Transformer, bidirectional teacher and causal student alike."""

    dim: int = 256
    heads: int = 4
    blocks: int = 7
    mlp_dim: int = 768
    patch: int = 2  # latents each way in a token
    latent_channels: int = 16
    frequency_dim: int = 256  # width of the sinusoidal timestep embedding
    text_dim: int = 128
    audio_dim: int = 128
    motion: int = 6  # numbers per latent frame that say what is new in its motion; standard normal, random in a stream
    eps: float = 1e-6

    def __post_init__(self):
        _require_attention("dit", self.dim, self.heads)
        _require(self.patch >= 1, f"dit: patch {self.patch} must be at least 1")
        _require(self.frequency_dim % 2 == 0, f"dit: frequency_dim {self.frequency_dim} must be even")
        _require(self.motion >= 1, f"dit: motion {self.motion} must be at least 1")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How a stream is generated: chunk, window, solver."""

    fps: int = 25
    height: int = 256  # pixels
    width: int = 256
    chunk: int = 3  # latent frames generated together
    window: int = 6  # past latent frames whose keys and values are kept
    sink: int = 0  # first latent frames kept for ever
    steps: int = 4  # denoising steps of a chunk
    shift: float = 2.0  # moves the uniform timesteps towards noise
    reference_distance: int = 8  # latent frames between the chunk's last frame and the reference's place
    clean_pass: bool = False  # one more forward pass to cache keys of the clean chunk, instead of the last step's
    schedule: str = "sequential"  # a chunk's steps one after another; or "rolling": `steps` chunks in flight, one pass for each that leaves
    precision: str = "float32"  # of weights, activations and caches: "float32", "bfloat16", "float8" (bfloat16 with e4m3 products in the DiT)
    attention: str = "auto"  # implementation of the attention kernels, see `pallas_kernels`: "auto", "xla" or "mosaic"
    unroll_steps: bool = False  # steps as one straight program, which a GPU can replay as a graph; compiling takes longer

    def __post_init__(self):
        for name in ("fps", "height", "width", "chunk"):
            _require(getattr(self, name) >= 1, f"stream: {name} {getattr(self, name)} must be at least 1")
        _require(
            self.window % self.chunk == 0 and self.window >= self.chunk,
            f"stream: window {self.window} must be a positive multiple of chunk {self.chunk}, so that a chunk never straddles the ring's end",
        )
        _require(
            self.sink % self.chunk == 0 and self.sink >= 0,
            f"stream: sink {self.sink} must be 0 or a positive multiple of chunk {self.chunk}: it keeps whole chunks",
        )
        _require(1 <= self.steps <= 64, f"stream: steps {self.steps} must lie in 1-64")
        _require(self.shift > 0 and math.isfinite(self.shift), f"stream: shift {self.shift} must be positive and finite")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("attention", ATTENTIONS)):
            _require(getattr(self, name) in known, f"stream: {name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        _require(
            not (self.rolling and self.clean_pass),
            "stream: clean_pass True needs schedule 'sequential': a rolling buffer is never clean as a whole",
        )
        _require(
            self.in_flight - self.chunk <= 26,
            f"stream: {self.in_flight} latent frames in flight (steps {self.steps} x chunk {self.chunk}) are more than {26 + self.chunk}, "
            "the farthest from the reference that was seen in training; use fewer steps or a smaller chunk",
        )
        _require(
            4 <= self.reference_distance <= 30 - (self.in_flight - self.chunk),
            f"stream: reference_distance {self.reference_distance} must lie in 4-{30 - (self.in_flight - self.chunk)}, so that the oldest chunk "
            "in flight, too, sees the reference at a distance of 4-30, as in training",
        )

    @property
    def rolling(self) -> bool:
        return self.schedule == "rolling"

    @property
    def in_flight(self) -> int:
        """Latent frames that are denoised together."""
        return self.chunk * (self.steps if self.rolling else 1)

    @property
    def delay(self) -> int:
        """Chunks of sound that come before a chunk's frames leave."""
        return self.in_flight // self.chunk - 1

    @property
    def dtype(self) -> str:
        """Of weights, activations and caches, quantised weights aside."""
        return "float32" if self.precision == "float32" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Config:
    """A preset: every size of every model, and how the stream runs."""

    name: str
    audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    flash_vae: FlashVAEConfig = dataclasses.field(default_factory=FlashVAEConfig)
    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)

    def __post_init__(self):
        _require(
            self.dit.latent_channels == self.flash_vae.latent_channels,
            f"dit.latent_channels {self.dit.latent_channels} differs from flash_vae.latent_channels {self.flash_vae.latent_channels}",
        )
        _require(self.dit.text_dim == self.text.dim, f"dit.text_dim {self.dit.text_dim} differs from text.dim {self.text.dim}")
        _require(self.dit.audio_dim == self.audio.dim, f"dit.audio_dim {self.dit.audio_dim} differs from audio.dim {self.audio.dim}")
        rows, columns = self.latent_grid
        patch = self.dit.patch
        _require(
            rows % patch == 0 and columns % patch == 0,
            f"{rows}x{columns} latents are not a multiple of the DiT's patch {patch}; change stream.height or stream.width",
        )

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Latents each way in a latent frame."""
        return self.flash_vae.grid(self.stream.height, self.stream.width)

    @property
    def token_grid(self) -> tuple[int, int]:
        """DiT tokens each way in a latent frame."""
        rows, columns = self.latent_grid
        return rows // self.dit.patch, columns // self.dit.patch

    @property
    def tokens_per_frame(self) -> int:
        """DiT tokens in a latent frame."""
        rows, columns = self.token_grid
        return rows * columns

    @property
    def chunk_frames(self) -> int:
        """Video frames in a chunk."""
        return self.stream.chunk * self.flash_vae.temporal_stride

    def latent_end_sample(self, latent_frame: int) -> int:
        """The sample at which a latent frame (counted from 0) ends; computed from the count, so it never drifts."""
        return round(self.flash_vae.temporal_stride * (latent_frame + 1) * self.audio.sample_rate / self.stream.fps)
