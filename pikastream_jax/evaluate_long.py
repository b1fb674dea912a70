"""Long streams of several weights, compared: `python -m pikastream_jax.evaluate_long --weights A.safetensors B.safetensors --seconds 10 60`.

Everybody streams the same held-out people, the same speech and the same seeds, so differences are taken person by person
(`pikastream_jax/measuring/paired.py`). Also measured: how many frames pass until a new reference and a new prompt show. One file of weights may
be given twice and run in two ways: `--weights A A --clean-pass False True`, or `--weights A B --schedule sequential rolling`.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from pikastream_jax.measuring.calibration import calibrate
from pikastream_jax.measuring.estimator import Estimator
from pikastream_jax.measuring.long_streams import MEASURES, Cast, LongRun, make_cast, run_long
from pikastream_jax.measuring.paired import mean_and_error, table
from pikastream_jax.measuring.subjects import (
    FPS,
    HELD_OUT_IDENTITIES,
    SPEECH,
    draw,
    person,
    portrait_state,
    read_speech,
)
from pikastream_jax.measuring.swaps import AFTER, BEFORE, Swaps, swapped_prompts, swapped_references
from pikastream_jax.streaming.generator import Generator, load_generator

_CALIBRATION_PEOPLE = 24  # for the identity metric
_TIMED_CHUNKS = 12  # of one stream, in turn with the other contestants
_SPARE_SECONDS = 8.0  # of sound after the last mark: chunks end on their own grid, and a rolling stream is late
_WAYS = ("schedule", "steps", "clean_pass")  # to run the same weights


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare weights, or ways to run them, on long streams."""

    weights: tuple[Path, ...]
    """Files of `training.export`; each is compared with the first."""
    seconds: tuple[int, ...] = (10, 60)
    """Marks, ascending: the 10 seconds before each are measured."""
    people: int = 8
    """Streams side by side; held-out people."""
    schedule: tuple[str, ...] = ()
    """sequential or rolling, one for all or one for each of the weights; by default their own."""
    steps: tuple[int, ...] = ()
    """Denoising steps of a chunk, one for all or one for each; by default the weights' own."""
    clean_pass: tuple[bool, ...] = ()
    """Whether a chunk's keys and values are computed anew from the clean chunk, one for all or one for each; the preset's by default."""
    audio: Path = SPEECH
    """Speech, 2 seconds at least; by default a voice held out of training."""
    out: Path = Path("evaluation_long.json")
    """File for all figures."""

    def __post_init__(self):
        if not self.weights:
            raise ValueError("--weights names no file: give at least one")
        if self.people < 2:
            raise ValueError(f"--people {self.people} must be at least 2: differences are taken person by person")
        for name in _WAYS:
            if len(getattr(self, name)) not in (0, 1, len(self.weights)):
                raise ValueError(f"--{name.replace('_', '-')} has {len(getattr(self, name))} values for {len(self.weights)} weights: give one for all or one for each")

    def stream(self, index: int) -> dict[str, Any]:
        """What differs from the way that the weights of that index stream by themselves."""
        given = {name: getattr(self, name) for name in _WAYS}
        return {name: values[index if len(values) > 1 else 0] for name, values in given.items() if values}

    @property
    def names(self) -> list[str]:
        """What the contestants are called: file and way, numbered where that is not enough."""
        names = [" ".join([path.stem, *(f"{key}={value}" for key, value in self.stream(i).items())]) for i, path in enumerate(self.weights)]
        return [name if names.count(name) == 1 else f"{name} #{i}" for i, name in enumerate(names)]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one contestant."""

    run: LongRun
    reference: Swaps
    prompt: Swaps
    chunk_seconds: float  # median time of a step of one stream, sound to frames
    delay_frames: int  # by which video follows its sound, besides the time of a step: a rolling stream's chunks in flight

    def report(self) -> dict[str, Any]:
        """Plain numbers."""
        marks = {str(mark): {name: _with_error(values) for name, values in row.items()} for mark, row in self.run.marks.items()}
        first, last = (self.run.marks[mark] for mark in (min(self.run.marks), max(self.run.marks)))
        return {
            "marks": marks,
            "people": {str(mark): {name: values.tolist() for name, values in row.items()} for mark, row in self.run.marks.items()},
            "change_from_first_to_last_mark": {name: _with_error(last[name] - first[name]) for name in MEASURES},
            "reference_shows": self.reference.report(FPS),
            "prompt_shows": self.prompt.report(FPS),
            "step_ms_all_streams": 1e3 * self.run.step_seconds,
            "step_ms_one_stream": 1e3 * self.chunk_seconds,
            "delay_frames": self.delay_frames,
        }


def _with_error(values: np.ndarray) -> dict[str, float]:
    mean, error = mean_and_error(values)
    return {"mean": mean, "standard_error": error}


def measure(generators: dict[str, Generator], cast: Cast, marks: tuple[int, ...]) -> dict[str, Measured]:
    """All figures of every contestant.

    Raises:
      ValueError: generators of different sizes of picture, which make no pairs; marks that make no sense.
    """
    sizes = {name: (generator.height, generator.width) for name, generator in generators.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"pictures of different sizes cannot be compared: {', '.join(f'{name} makes {h}x{w}' for name, (h, w) in sizes.items())}")
    size = next(iter(generators.values())).height
    estimator = Estimator()
    _, metric = calibrate(estimator, _CALIBRATION_PEOPLE, size)
    seconds = step_times(list(generators.values()), cast)
    found = {}
    for index, (name, generator) in enumerate(generators.items()):
        found[name] = Measured(
            run_long(generator, estimator, metric, cast, marks, name),
            swapped_references(generator, estimator, metric, cast.people, cast.audio),
            swapped_prompts(generator, estimator, cast.people, cast.audio),
            seconds[index],
            generator.config.stream.delay * generator.chunk_frames,
        )
    return found


def step_times(generators: list[Generator], cast: Cast) -> list[float]:
    """Median seconds of a step of one stream. The generators take turns, so that whatever else the machine does slows all alike."""
    seed = cast.people[0]
    sessions = [generator.session(draw(person(seed), portrait_state(seed), generator.height), "", seed) for generator in generators]
    times: list[list[float]] = [[] for _ in generators]
    for chunk in range(_TIMED_CHUNKS):
        for generator, session, some in zip(generators, sessions, times, strict=True):
            audio = cast.audio[0, : generator.chunk_samples(chunk)]
            begin = time.perf_counter()
            np.asarray(session.step(audio))
            some.append(time.perf_counter() - begin)
    return [float(np.median(some[1:])) for some in times]


def summary(found: dict[str, Measured]) -> str:
    """Tables of the first contestant against each of the others, or its own figures where it is alone."""
    (first, base), *others = found.items()
    lines = []
    for name, measured in found.items():
        marks = sorted(measured.run.marks)
        reference, prompt = measured.reference.report(FPS), measured.prompt.report(FPS)
        lines.append(f"{name}: a step of one stream {1e3 * measured.chunk_seconds:.0f} ms, {measured.delay_frames} frames in flight")
        for what, swap in (("reference", reference), ("prompt", prompt)):
            shown = "never in half of the streams" if swap["frames"] is None else f"after {swap['frames']:.0f} frames ({swap['seconds']:.2f} s)"
            lines.append(f"  a new {what} shows {shown}; it does in {swap['share_that_shows']:.0%} within {swap['observed_frames']} frames")
        if len(marks) > 1:
            lines.append(f"  {marks[0]} s against {marks[-1]} s")
            lines.append(table((f"{marks[0]} s", f"{marks[-1]} s"), measured.run.marks[marks[0]], measured.run.marks[marks[-1]], MEASURES))
    for name, measured in others:
        for mark in sorted(base.run.marks):
            lines.append(f"at {mark} s: {first} against {name}")
            lines.append(table((first, name), base.run.marks[mark], measured.run.marks[mark], MEASURES))
        swaps = ({"frames_to_reference": m.reference.censored, "frames_to_prompt": m.prompt.censored} for m in (base, measured))
        lines.append(table((first, name), *swaps, {"frames_to_reference": -1, "frames_to_prompt": -1}))
    if not others and len(base.run.marks) == 1:
        (mark, row), = base.run.marks.items()
        lines += [f"at {mark} s", *(f"  {name:20} {mean_and_error(values)[0]:.4f} +- {mean_and_error(values)[1]:.4f}" for name, values in row.items())]
    return "\n".join(lines)


def main() -> int:
    try:
        arguments = tyro.cli(Arguments)
        people = tuple(HELD_OUT_IDENTITIES + i for i in range(arguments.people))
        speech = read_speech(arguments.audio)
        generators = {
            name: load_generator(path, **arguments.stream(i)) for i, (name, path) in enumerate(zip(arguments.names, arguments.weights, strict=True))
        }
        # A chunk of sound is a fifth to a half of a second; the swaps take 14 of them.
        cast = make_cast(people, speech, max(max(arguments.seconds, default=0), (BEFORE + AFTER) * 0.5) + _SPARE_SECONDS)
        found = measure(generators, cast, arguments.seconds)
        from pikastream_jax.evaluate import plain

        result = {
            "contestants": {name: measured.report() | {"stream": dataclasses.asdict(generators[name].config.stream)} for name, measured in found.items()},
            "people": list(people),
        }
        result["run"] = {"weights": [path.name for path in arguments.weights], "audio": arguments.audio.name, "seconds": list(arguments.seconds), "jax": jax.__version__}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(plain(result), indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"evaluate_long: {error}", file=sys.stderr)
        return 1
    print(summary(found))
    print(f"all figures in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
