"""The speech that trains the models, as features: quantised log-mel and mouth tracks of recorded and synthetic voices.

The file is small enough to travel with the source, and reading it needs NumPy alone, so that training also runs on a bare
machine. Rebuild it with `python -m pikastream_jax.data.corpus` (see `corpus_build.py` for what that needs).

Grids: a latent frame is 2560 samples at 16 kHz and 25 FPS = 4 video frames = 16 mel frames. Mel frame k of a recording covers
samples [160 k - 160, 160 k + 160), so 16 (n + 1) mel frames end exactly where latent frame n ends.
"""

import dataclasses
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from pikastream_jax.audio import mel as mel_analysis
from pikastream_jax.config import AudioConfig
from pikastream_jax.data.motion import SpeechTrack

FPS = 25
VIDEO_FRAMES = 4  # per latent frame
MEL_FRAMES = 16  # per latent frame
SPLITS = ("train", "validation", "held_out")
TRACKS = ("mouth_open", "mouth_width", "tongue", "activity", "excitement")
MEL_STEP = 0.8  # dB between two quantised levels; level 0 is the floor, -80 dB
MEL_LOW = -80.0
FORMAT = 2
SHIPPED_AUDIO = AudioConfig()  # the analysis of the shipped features
_VOICED_BELOW = 4800.0  # Hz, up to where resonances are multiplied as they are; beyond, the rest of the axis is stretched to fit


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All recordings end to end. A recording is the files of one voice and one split with pauses between them."""

    mel: UInt8[np.ndarray, "frames 64"]  # `dequantise_mel`
    tracks: UInt8[np.ndarray, "video_frames 5"]  # `dequantise_tracks`
    start: Int[np.ndarray, " recordings"]  # first latent frame of each recording
    stop: Int[np.ndarray, " recordings"]  # latent frame after its last
    voice: np.ndarray  # name of each recording's voice
    split: np.ndarray  # and of its split, one of SPLITS
    file_name: np.ndarray  # where each stretch of speech came from
    file_start: Int[np.ndarray, " files"]  # its first video frame
    file_stop: Int[np.ndarray, " files"]  # video frame after its last

    def __post_init__(self):
        if len(self.mel) != MEL_FRAMES * self.latent_frames or len(self.tracks) != VIDEO_FRAMES * self.latent_frames:
            raise ValueError(
                f"corpus of {self.latent_frames} latent frames has {len(self.mel)} mel frames and {len(self.tracks)} video frames;"
                f" they must be {MEL_FRAMES} and {VIDEO_FRAMES} times as many: rebuild the file"
            )

    @property
    def latent_frames(self) -> int:
        return int(self.stop[-1])

    @property
    def minutes(self) -> float:
        return self.latent_frames * VIDEO_FRAMES / FPS / 60

    def starts(self, split: str, latent_frames: int, mel_frames: int) -> Int[np.ndarray, " n"]:
        """Latent frames at which a window of `latent_frames` may start so that its sound lies in one recording of `split`.

        Raises:
          ValueError: unknown split, or no recording of it is long enough.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {SPLITS}")
        # The first latent frame hears (mel_frames - 16) mel frames from before its own start.
        history = -(-max(0, mel_frames - MEL_FRAMES) // MEL_FRAMES)
        chosen = np.flatnonzero(self.split == split)
        found = [np.arange(self.start[r] + history, self.stop[r] - latent_frames + 1) for r in chosen]
        result = np.concatenate([*found, np.empty(0, int)]).astype(np.int32)
        if not len(result):
            raise ValueError(
                f"no {split} recording holds {latent_frames} latent frames and their history: ask for fewer"
            )
        return result


def save_corpus(path: Path, corpus: Corpus) -> None:
    """Write `corpus` as an npz; mel frames as differences in time modulo 256, by LZMA: together half of the size."""
    arrays = {f.name: getattr(corpus, f.name) for f in dataclasses.fields(corpus)}
    # uint8 arithmetic wraps, and the running sum of the differences wraps back.
    arrays["mel"] = np.diff(corpus.mel, axis=0, prepend=np.zeros_like(corpus.mel[:1]))
    # NumPy writes deflate only, but reads whatever the zip file was packed with.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in {"format": np.asarray(FORMAT), **arrays}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_corpus(path: str | Path) -> Corpus:
    """Read a file of `save_corpus`.

    Raises:
      FileNotFoundError: no such file; the message says how to build it.
      ValueError: another format, or arrays that do not fit each other.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no speech features at {path}: build them with `python -m pikastream_jax.data.corpus --out {path}`"
        )
    with np.load(path) as stored:
        if "format" not in stored or int(stored["format"]) != FORMAT:
            raise ValueError(
                f"{path} is not a speech corpus of format {FORMAT}: rebuild it with `python -m pikastream_jax.data.corpus`"
            )
        arrays = {f.name: stored[f.name] for f in dataclasses.fields(Corpus)}
    arrays["mel"] = np.cumsum(arrays["mel"], axis=0, dtype=np.uint8)
    return Corpus(**arrays)


def quantise_mel(mel: Float[np.ndarray, "*b mels"]) -> UInt8[np.ndarray, "*b mels"]:
    """Normalised log-mel to steps of 0.8 dB from -80 dB."""
    decibels = np.asarray(mel_analysis.to_decibels(mel))
    return np.clip(np.round((decibels - MEL_LOW) / MEL_STEP), 0, 255).astype(np.uint8)


def dequantise_mel(levels: UInt8[Array, "*b mels"]) -> Float[Array, "*b mels"]:
    """Inverse of `quantise_mel`, exact to 0.4 dB."""
    return mel_analysis.from_decibels(levels.astype(jnp.float32) * MEL_STEP + MEL_LOW)


def quantise_tracks(track: SpeechTrack) -> UInt8[np.ndarray, "t 5"]:
    """Tracks to 255 steps of their range, in the order of TRACKS."""
    unit = [np.asarray(getattr(track, name)) for name in TRACKS]
    unit[TRACKS.index("mouth_width")] = (unit[TRACKS.index("mouth_width")] + 1) / 2
    return np.round(np.clip(np.stack(unit, -1), 0, 1) * 255).astype(np.uint8)


def dequantise_tracks(levels: UInt8[Array, "*b t 5"]) -> SpeechTrack:
    """Inverse of `quantise_tracks`, exact to 1/510 of each range."""
    values = {name: levels[..., i].astype(jnp.float32) / 255 for i, name in enumerate(TRACKS)}
    values["mouth_width"] = values["mouth_width"] * 2 - 1
    return SpeechTrack(**values)


def window(
    mel: UInt8[Array, "frames mels"],
    tracks: UInt8[Array, "video_frames 5"],
    start: Int[Array, ""],
    latent_frames: int,
    mel_frames: int,
) -> tuple[Float[Array, "heard mels"], SpeechTrack]:
    """Sound and motion of `latent_frames` latent frames from latent frame `start` (traced; one of `Corpus.starts`).

    Returns:
      Normalised log-mel [16 * latent_frames + mel_frames - 16, mels] from the first frame heard to the end of the window
      (`audio_slices` cuts it per latent frame), and the tracks of the window's 4 * latent_frames video frames.
    """
    heard = MEL_FRAMES * latent_frames + mel_frames - MEL_FRAMES
    begin = MEL_FRAMES * (start + 1) - mel_frames
    sound = jax.lax.dynamic_slice_in_dim(mel, begin, heard)
    motion = jax.lax.dynamic_slice_in_dim(tracks, VIDEO_FRAMES * start, VIDEO_FRAMES * latent_frames)
    return dequantise_mel(sound), dequantise_tracks(motion)


def audio_slices(
    mel: Float[Array, "*b heard mels"], latent_frames: int, mel_frames: int
) -> Float[Array, "*b n frames mels"]:
    """What each latent frame hears: slice n holds the `mel_frames` mel frames that end with latent frame n."""
    index = MEL_FRAMES * np.arange(latent_frames)[:, None] + np.arange(mel_frames)
    return mel[..., index, :]


def band_gain(mels: int, low_hz: Float[Array, ""], high_hz: Float[Array, ""]) -> Float[Array, " mels"]:
    """Power gain of a telephone-like band in each mel filter: Butterworth, order 2 at `low_hz`, order 8 at `high_hz`."""
    centres = mel_analysis.mel_centres(mels).astype(np.float32)
    # A power of the quotient: as a quotient of powers, which a compiler may make of it, it would be inf / inf where there is no upper edge.
    return 1 / (1 + (low_hz / centres) ** 4) / (1 + jnp.exp(16.0 * jnp.log(centres / high_hz)))


def noise_power(slope: Float[Array, ""], cfg: AudioConfig) -> Float[Array, " mels"]:
    """Mean power in each mel filter of noise with mean square 1 whose density falls by `slope` dB per octave."""
    bank = mel_analysis.filter_bank(cfg.sample_rate, cfg.fft, cfg.mels)
    hertz = np.maximum(np.arange(cfg.fft // 2 + 1) * cfg.sample_rate / cfg.fft, mel_analysis.LOW_HZ).astype(np.float32)
    density = 10 ** (-slope / 10 * jnp.log2(hertz / 1000.0))
    density = density / density.mean()
    hann = np.hanning(cfg.window + 1)[:-1]
    return density @ bank * float(4 * np.sum(hann**2) / np.sum(hann) ** 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Channel:
    """What a microphone and a line do to speech. Scalars."""

    gain: Float[Array, ""]  # dB
    noise: Float[Array, ""]  # level of stationary noise, dBFS (0: mean square 1)
    slope: Float[Array, ""]  # dB per octave that the noise's density falls
    low_hz: Float[Array, ""]  # edges of the band, at -3 dB
    high_hz: Float[Array, ""]


def sample_channel(key: PRNGKeyArray) -> Channel:
    """Level +-6 dB; in 7 of 10 noise of -75 to -40 dBFS falling 0-6 dB per octave; in half a band within 50-400 Hz to 3-7 kHz."""
    keys = jax.random.split(key, 7)
    noisy, narrow = jax.random.bernoulli(keys[0], 0.7), jax.random.bernoulli(keys[1])
    return Channel(
        gain=jax.random.uniform(keys[2], minval=-6.0, maxval=6.0),
        noise=jnp.where(noisy, jax.random.uniform(keys[3], minval=-75.0, maxval=-40.0), -120.0),
        slope=jax.random.uniform(keys[4], maxval=6.0),
        low_hz=jnp.where(narrow, jax.random.uniform(keys[5], minval=50.0, maxval=400.0), 1.0),
        high_hz=jnp.where(narrow, jax.random.uniform(keys[6], minval=3000.0, maxval=7000.0), 1e5),
    )


def degrade(
    mel: Float[Array, "frames mels"], channel: Channel, key: PRNGKeyArray, cfg: AudioConfig = SHIPPED_AUDIO
) -> Float[Array, "frames mels"]:
    """Speech through `channel`: gain, noise, then the band, on mean powers of the log-mel domain.

    Powers of speech and noise are added, which is their mean; `key` draws the noise. On frames of speech this is within
    1 dB of the same done to samples, 2 dB beyond the band's edges (`tests/data/test_corpus.py`).
    """
    floor = mel_analysis.POWER_FLOOR
    speech = jnp.maximum(10 ** (mel_analysis.to_decibels(mel) / 10) - floor, 0) * 10 ** (channel.gain / 10)
    noise = noise_power(channel.slope, cfg) * 10 ** (channel.noise / 10)
    # One bin of noise is exponentially distributed (5.6 dB); a filter averages over its bins, fewer at low frequency. That
    # mean has a gamma distribution, here by Wilson and Hilferty (1931): a cubed normal is far cheaper than a gamma sampler.
    bank = mel_analysis.filter_bank(cfg.sample_rate, cfg.fft, cfg.mels)
    bins = np.maximum(1.0, bank.sum(0) ** 2 / (bank**2).sum(0) * cfg.window / cfg.fft).astype(np.float32)
    scatter = jax.random.normal(key, mel.shape) / (3 * np.sqrt(bins)) + (1 - 1 / (9 * bins))
    power = (speech + noise * jnp.maximum(scatter, 0.05) ** 3) * band_gain(cfg.mels, channel.low_hz, channel.high_hz)
    return mel_analysis.from_decibels(10 * jnp.log10(power + floor))


def sample_voice(key: PRNGKeyArray) -> Float[Array, ""]:
    """By what a voice's resonances are multiplied: nothing in 3 of 10, else 0.8 to 1.25, as many lower as higher."""
    k_other, k_factor = jax.random.split(key)
    factor = jnp.exp(jax.random.uniform(k_factor, minval=-1.0, maxval=1.0) * np.log(1.25))
    return jnp.where(jax.random.bernoulli(k_other, 0.7), factor, 1.0)


def warped_hertz(hertz: Float[Array, "*b"], factor: Float[Array, ""], nyquist: float) -> Float[Array, "*b"]:
    """Where a frequency goes when a vocal tract's resonances are multiplied by `factor`: piecewise linear, 0 and `nyquist` stay.

    Jaitly and Hinton 2013, "Vocal Tract Length Perturbation (VTLP) improves speech recognition", with their bend at 4.8 kHz.
    """
    bend = _VOICED_BELOW * jnp.minimum(factor, 1.0)
    above = nyquist - (nyquist - bend) / (nyquist - bend / factor) * (nyquist - hertz)
    return jnp.where(hertz <= bend / factor, hertz * factor, above)


def other_voice(
    mel: Float[Array, "frames mels"], factor: Float[Array, ""], cfg: AudioConfig = SHIPPED_AUDIO
) -> Float[Array, "frames mels"]:
    """The same words with a vocal tract of another length: the spectrum stretched along frequency, pitch with it.

    The lips' motion is the same, so a few voices do for many. Levels are interpolated between neighbouring filters.
    """
    centres = mel_analysis.mel_centres(cfg.mels).astype(np.float32)
    # Into a filter goes what stood where the inverse of the warp takes its centre.
    source = jnp.interp(warped_hertz(centres, 1 / factor, cfg.sample_rate / 2), centres, jnp.arange(cfg.mels, dtype=jnp.float32))
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(source[None, :] - jnp.arange(cfg.mels)[:, None]))
    return jnp.einsum("fm,mn->fn", mel, weights, precision="highest")


def augment(
    mel: Float[Array, "frames mels"], key: PRNGKeyArray, cfg: AudioConfig = SHIPPED_AUDIO
) -> Float[Array, "frames mels"]:
    """The same speech by a random voice over a random channel, so that telephone and studio both work; `jax.vmap` it over a batch."""
    voice_key, channel_key, noise_key = jax.random.split(key, 3)
    return degrade(other_voice(mel, sample_voice(voice_key), cfg), sample_channel(channel_key), noise_key, cfg)


if __name__ == "__main__":
    from pikastream_jax.data.corpus_build import main

    main()
