"""Measures the generator: `python -m pikastream_jax.evaluate` writes result.json and sheet.png.

By default on people and a voice that no stage of the training has met. What each figure means is said in
`pikastream_jax/measuring/`, one file to a measure; `docs/quality.md` holds the figures of the shipped weights.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from pikastream_jax.measuring import autoencoder, subjects
from pikastream_jax.measuring.calibration import IdentityMetric, calibrate
from pikastream_jax.measuring.drift import drawn_drift, drift
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.measuring.identity import identity_wins
from pikastream_jax.measuring.lipsync import compare
from pikastream_jax.measuring.listening import listening
from pikastream_jax.measuring.prompts import OTHERS, SMILE, adherence
from pikastream_jax.measuring.sheet import save_sheet
from pikastream_jax.measuring.streams import (
    Clip,
    Filmer,
    TalkingFace,
    generated,
    make_clip,
    make_scene,
    samples_of,
    true,
)

VAE_SEED = 9_500_000  # first of the people that FlashVAE is measured on


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the generator: lip sync, identity, flicker, drift, prompts, listening, and FlashVAE."""

    audio: tuple[Path, ...] = (subjects.SPEECH,)
    """Speech files, 2 seconds at least; by default a voice held out of training."""
    identities: tuple[int, ...] = ()
    """Seeds of the people; by default 24 (4 with --quick) held out of training."""
    weights: Path | None = None
    """Weights to measure; the shipped ones by default."""
    out: Path = Path("evaluation")
    """Folder for result.json and sheet.png."""
    minutes_of_drift: float = 10.0
    """Length of the long stream; 0 leaves it out. It takes this long over the real-time factor."""
    video: tuple[Path, ...] = ()
    """Real videos for FlashVAE, reported separately."""
    precision: str | None = None
    """Of weights and products: float32, bfloat16 or float8; the preset's by default."""
    schedule: str | None = None
    """sequential or rolling; by default the weights' own."""
    steps: int | None = None
    """Denoising steps of a chunk; by default the weights' own."""
    chunk: int | None = None
    """Latent frames generated together; the preset's by default."""
    quick: bool = False
    """A minute's look with few clips and no long stream; its figures are rough."""

    def __post_init__(self):
        if self.minutes_of_drift != 0 and self.minutes_of_drift < 1:
            raise ValueError(f"--minutes-of-drift {self.minutes_of_drift} must be 0 or at least 1")

    @property
    def stream(self) -> dict[str, str | int]:
        """What differs from the way that the weights stream by themselves."""
        return {name: value for name in ("precision", "schedule", "steps", "chunk") if (value := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured. Chunks are 12 frames."""

    people: int  # by default
    chunks: int  # of a neutral clip, which lip sync and identity are measured on
    smiling_chunks: int
    others: int  # clips of each further prompt
    other_chunks: int
    true_clips: int  # drawn clips passed through FlashVAE
    vae_people: int
    vae_frames: int
    calibration_people: int
    listeners: int
    silent_chunks: int  # that their streams begin with

    def in_chunks_of(self, frames: int) -> "Plan":
        """The same seconds in chunks of so many video frames."""
        lengths = ("chunks", "smiling_chunks", "other_chunks", "silent_chunks")
        return dataclasses.replace(self, **{name: round(getattr(self, name) * 12 / frames) for name in lengths})


FULL = Plan(24, 10, 5, 4, 3, 8, 32, 24, 64, 6, 25)
QUICK = Plan(4, 6, 3, 0, 0, 2, 6, 12, 24, 1, 5)


def evaluate(face: TalkingFace, arguments: Arguments) -> tuple[dict[str, Any], list[Clip]]:
    """All figures as a JSON-able tree, and the clips for the contact sheet.

    Raises:
      FileNotFoundError, ValueError: speech or video that cannot be read.
    """
    started = time.perf_counter()
    plan = (QUICK if arguments.quick else FULL).in_chunks_of(face.chunk_frames)
    people = arguments.identities or tuple(subjects.HELD_OUT_IDENTITIES + i for i in range(plan.people))
    speech = [subjects.read_speech(path) for path in arguments.audio]
    videos = {path.name: autoencoder.read_video(path, face.height) for path in arguments.video}
    estimator = Estimator()
    seconds: dict[str, float] = {}

    def timed(name: str, work):
        begin = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - begin, 1)
        return result

    errors, metric = timed("estimator", lambda: calibrate(estimator, plan.calibration_people, face.height))
    result: dict[str, Any] = {"estimator": errors}
    result["flash_vae"] = timed("flash_vae", lambda: _flash_vae(face, plan, speech))
    result["flash_vae"] |= {
        f"video {name}": autoencoder.video_fidelity(face.reconstruct, v) for name, v in videos.items()
    }

    def clips(filmer: Filmer, prompt: str, seeds: Sequence[int], chunks: int, label: str) -> list[Clip]:
        samples = samples_of(face, chunks)
        made = []
        for index, seed in enumerate(tqdm(seeds, desc=label, unit="clip", leave=False, file=sys.stderr)):
            scene = make_scene(seed, prompt, speech, index, samples, face.height)
            made.append(make_clip(scene, filmer, estimator))
        return made

    def both(filmer: Filmer, seeds: Sequence[int], label: str) -> tuple[list[Clip], list[Clip]]:
        neutral = clips(filmer, subjects.NEUTRAL, seeds, plan.chunks, f"{label}, neutral")
        return neutral, clips(filmer, subjects.SMILING, seeds, plan.smiling_chunks, f"{label}, smiling")

    drawn = timed("true_clips", lambda: both(true(face), people[: plan.true_clips], "drawn"))
    neutral, smiling = timed("generated_clips", lambda: both(generated(face), people, "generated"))
    result["generated"] = timed("measures", lambda: _clip_figures(neutral, smiling, estimator, metric))
    result["truth_through_flash_vae"] = timed("true_measures", lambda: _clip_figures(*drawn, estimator, metric))
    result["prompts"] = [adherence(SMILE, smiling, neutral)]
    for expectation in OTHERS if plan.others else ():
        some = people[: plan.others]
        made = clips(generated(face), expectation.prompt, some, plan.other_chunks, expectation.prompt)
        result["prompts"].append(adherence(expectation, made, neutral))
    result["listening"] = timed(
        "listening", lambda: listening(face, estimator, people[: plan.listeners], speech, plan.silent_chunks, plan.smiling_chunks)
    )
    if arguments.minutes_of_drift and not arguments.quick:
        result["drift"] = timed(
            "drift", lambda: drift(face, estimator, metric, speech[0], people[0], arguments.minutes_of_drift)
        )
        minutes = round(arguments.minutes_of_drift)
        result["drift"]["drawn"] = timed(
            "drawn_drift", lambda: drawn_drift(face, estimator, metric, speech[0], people[0], minutes)
        )
    seconds["total"] = round(time.perf_counter() - started, 1)
    result["run"] = {
        "audio": [path.name for path in arguments.audio],
        "identities": list(people),
        "weights": "shipped" if arguments.weights is None else arguments.weights.name,
        "quick": arguments.quick,
        "jax": jax.__version__,
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "seconds": seconds,
    }
    return result, neutral[:2] + smiling[:2]


def _flash_vae(face: TalkingFace, plan: Plan, speech: list[np.ndarray]) -> dict[str, Any]:
    """FlashVAE on held-out people who talk, in every manner that has a prompt."""
    prompts = list(subjects.CANONICAL)
    motions = []
    for index in range(plan.vae_people):
        seed = VAE_SEED + index
        audio = subjects.excerpt(speech, index, plan.vae_frames * subjects.SAMPLE_RATE // subjects.FPS)
        track = subjects.true_curves(subjects.person(seed), audio).track
        motions.append((subjects.person(seed), subjects.true_motion(seed, prompts[index % len(prompts)], track)))
    return {"held_out_faces": autoencoder.face_fidelity(face.reconstruct, subjects.film, motions, face.height)}


def _clip_figures(
    neutral: list[Clip], smiling: list[Clip], estimator: Estimator, metric: IdentityMetric
) -> dict[str, Any]:
    return {
        "lip_sync": _lip_sync(neutral),
        "lip_sync_smiling": _lip_sync(smiling),
        "identity": identity_wins(neutral, estimator, metric),
        "flicker": float(np.mean([clip.background_change for clip in neutral])),
        "smiling_against_neutral": adherence(SMILE, smiling, neutral)["told_apart"],
    }


def _lip_sync(clips: list[Clip]) -> dict[str, Any]:
    truths, readings = [clip.scene.truth for clip in clips], [clip.reading for clip in clips]
    return compare(
        [truth.opening for truth in truths],
        [reading.opening for reading in readings],
        [truth.width for truth in truths],
        [reading.width for reading in readings],
    )


def summary(result: dict[str, Any]) -> str:
    """The figures that matter most, a line each."""
    vae, made = result["flash_vae"]["held_out_faces"], result["generated"]
    sync, quiet = made["lip_sync"], result["listening"]
    lines = [
        f"FlashVAE {vae['psnr']:.1f} dB, mouth {vae['psnr_mouth']:.1f} dB, SSIM {vae['ssim']:.3f}",
        f"mouth opening r {sync['opening']['r']:.2f} at lag {sync['opening']['lag_frames']}, "
        f"width r {sync['width']['r']:.2f} at lag {sync['width']['lag_frames']}, closures F1 {sync['closures']['f1']:.2f}",
        f"identity wins {made['identity']['wins']:.0%} of clips against {made['identity']['distractors']} distractors",
        f"smiling told from neutral in {made['smiling_against_neutral']:.0%}",
        f"in silence {quiet['generated']['blinks_per_minute']:.0f} blinks a minute (drawn {quiet['drawn']['blinks_per_minute']:.0f}), lips open "
        f"{quiet['generated']['opening']:.2f} at most in 95%; two seeds: lips r {quiet['seeds']['lips']:.2f}, yaw r {quiet['seeds']['yaw']:.2f}",
    ]
    if "drift" in result:
        far = result["drift"]
        lines.append(
            f"drift: background {far['colour_background']:.2f}, skin {far['colour_skin']:.2f} (Lab), identity "
            f"{far['identity_change']:+.2f} (drawn {far['drawn']['identity_change']:+.2f}), memory {far['rss_growth_mb']:+.0f} MB, chunk time x{far['chunk_time_ratio']:.2f}"
        )
    return "\n".join(lines)


def plain(tree: Any) -> Any:
    """The same with figures rounded to 4 places, and None for NaN, which JSON does not have."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, float):
        return round(tree, 4) if np.isfinite(tree) else None
    return tree


def main() -> int:
    try:
        arguments = tyro.cli(Arguments)
        from pikastream_jax.streaming.generator import load_generator

        generator = load_generator(arguments.weights, **arguments.stream)
        result, clips = evaluate(generator, arguments)
        result["run"]["stream"] = dataclasses.asdict(generator.config.stream)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "result.json").write_text(json.dumps(plain(result), indent=2) + "\n")
        save_sheet(arguments.out / "sheet.png", clips)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    print(summary(result))
    print(f"all figures in {arguments.out / 'result.json'}, pictures in {arguments.out / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
