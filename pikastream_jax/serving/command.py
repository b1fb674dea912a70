"""The command line of `serve.py`."""

import contextlib
import dataclasses
import io
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import tyro

from pikastream_jax.serving.audio_in import MAX_RATE, MIN_RATE, SILENCE, check_stdin, open_audio, scan
from pikastream_jax.serving.chunks import output_channels
from pikastream_jax.serving.encode import MediaFormat
from pikastream_jax.serving.errors import ServeError
from pikastream_jax.serving.image import avatar_path, load_image, reference_pixels
from pikastream_jax.serving.metrics import Meter, Progress
from pikastream_jax.serving.outputs import (
    FileOutput,
    Output,
    PipeOutput,
    check_file,
    check_stdout,
    check_writable,
    stdout_writer,
)
from pikastream_jax.serving.pipeline import Generator, Pipeline
from pikastream_jax.serving.rtp import RtpOutput, parse_destination
from pikastream_jax.serving.timeline import frame_count

DEFAULT = "127.0.0.1:8080"  # of --listen
MIN_SIZE, MAX_SIZE = 32, 2160  # pixels
MAX_FPS = 120
INTERRUPTED = 130  # the shell's number for Ctrl-C


@dataclasses.dataclass(frozen=True)
class Options:
    """Speech and one picture in, a talking face out.

    Example: serve.py --audio speech.wav --image face.png --prompt "a woman smiling" | ffplay -
    Live, for browsers: serve.py --listen
    """

    audio: str | None = None
    """speech: WAV, FLAC, OGG, MP3, M4A, ...; - is standard input as it arrives (WAV, or raw 16-bit mono PCM)"""
    listen: str | None = None
    """instead of --audio: serve live sessions at HOST:PORT (127.0.0.1:8080 where none is named; any other host needs a token in PIKASTREAM_TOKEN)"""
    sessions: int | None = None
    """most live sessions (default: as many as this machine serves in real time; with --ray: of each replica, 1)"""
    rows: int = 1
    """live sessions made together in one step; more than 1 pays on a GPU"""
    ray: str | None = None
    """live sessions on replicas of Ray Serve, a process and an accelerator each: how many, or least:most to follow the sessions; on the cluster
    that RAY_ADDRESS names, else on this machine"""
    origin: tuple[str, ...] = ()
    """other sites whose pages may use the live service, such as https://example.org"""
    label: bool = True
    """whether live pictures say that they are generated"""
    record: Path | None = None
    """folder in which every live session is kept as MP4, with a manifest that says it is generated (default: nothing is kept)"""
    numbers: bool = False
    """whether live pictures carry their number in their upper edge, to measure latency"""
    image: Path | None = None
    """picture of the face to show; the largest middle part of the model's shape is used (a square for the shipped model)"""
    avatar: str | None = None
    """a face of the shipped gallery instead of --image (default: the first)"""
    prompt: str = "a person talking"
    """expression, gaze and movement, in words"""
    seed: int = 0
    """another seed: other head movement and blinks, the same lips"""
    output: str | None = None
    """- (MPEG-TS on standard output, the default of --audio), FILE.mp4, FILE.ts, or rtp://HOST:PORT (sound at PORT + 2; implies --realtime);
    with --listen: - or rtp://HOST:PORT, for a session that begins with the server"""
    fps: float | None = None
    """frames per second put out, by repeating or dropping (default: the model's)"""
    size: int | None = None
    """width and height put out, in pixels; for a model that is not square, the shorter side: the longer one follows its shape, both are
    even (default: the model's)"""
    realtime: bool = False
    """pace everything as a live source, instead of as fast as possible"""
    metrics: Path | None = None
    """write the figures of the run to this file, as JSON"""
    audio_rate: int = 16_000
    """Hz of raw PCM on standard input (a WAV header says its own)"""
    sdp: Path = Path("stream.sdp")
    """where to describe an RTP stream for players"""
    weights: Path | None = None
    """model weights (default: the shipped ones)"""
    chunk: int | None = None
    """latent frames (of 4 frames) made together: 1 answers soonest, 3 is fastest (default: the model's; --listen: 2)"""
    steps: int | None = None
    """denoising steps of a chunk: fewer are faster (default: those in which the weights are best, 2 for what ships)"""
    schedule: str | None = None
    """sequential, or rolling: chunks denoised together at rising noise levels, shown steps - 1 chunks later (default: the weights' own)"""
    precision: str | None = None
    """of weights and products: float32, bfloat16 or float8; the lower ones are for GPUs (default: the model's)"""

    def __post_init__(self):
        if (self.audio is None) == (self.listen is None):
            raise ServeError("give --audio FILE for one stream, or --listen for live sessions" + ("" if self.audio is None else ", not both"))
        if self.sessions is not None and self.sessions < 1 or self.rows < 1:
            raise ServeError(f"--sessions {self.sessions} and --rows {self.rows} must be at least 1")
        if self.listen is not None:
            for name in ("fps", "size", "realtime", "metrics"):
                if getattr(self, name):
                    raise ServeError(f"--{name} goes with --audio: a live session has the model's size and pace, and its figures at /metrics")
            if self.ray is not None and self.output is not None:
                raise ServeError("--output goes with one engine, not with --ray: watch a session by RTP or stream.ts")
            for name in ("image", "avatar"):
                if self.output is None and getattr(self, name) is not None:
                    raise ServeError(f"--{name} goes with --audio or with --listen --output: live sessions choose their faces themselves")
        if self.image is not None and self.avatar is not None:
            raise ServeError("give --image or --avatar, not both")
        if not 0 <= self.seed < 2**32:
            raise ServeError(f"--seed {self.seed} is out of range; use 0 to {2**32 - 1}")
        if self.fps is not None and not (math.isfinite(self.fps) and 1 <= self.fps <= MAX_FPS):
            raise ServeError(f"--fps {self.fps:g} is out of range; use 1 to {MAX_FPS}")
        if self.size is not None and not (MIN_SIZE <= self.size <= MAX_SIZE and self.size % 2 == 0):
            raise ServeError(f"--size {self.size} must be an even number of pixels from {MIN_SIZE} to {MAX_SIZE}")
        if not MIN_RATE <= self.audio_rate <= MAX_RATE:
            raise ServeError(f"--audio-rate {self.audio_rate} is out of range; use {MIN_RATE} to {MAX_RATE} Hz")

    @property
    def stream(self) -> dict[str, int | str]:
        """What differs from the way that the weights stream by themselves."""
        fields = {name: getattr(self, name) for name in ("chunk", "steps", "schedule", "precision")}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def over_rtp(self) -> bool:
        """Whether the output is a network stream."""
        return self.target.startswith("rtp:")

    @property
    def target(self) -> str:
        """Where the stream of --audio goes."""
        return "-" if self.output is None else self.output


def main(argv: Sequence[str] | None = None, load_generator: Callable[..., Generator] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments; None: those of the process.
      load_generator: takes the place of `pikastream_jax.streaming.generator.load_generator`.
    Returns:
      The exit status: 0, also after Ctrl-C or a closed pipe in mid-stream; 1 where the input or output will not do;
      2 for wrong arguments; 130 for Ctrl-C before there was a frame.
    """
    with _sigterm_as_interrupt():
        try:
            options = parse(argv)
        except ServeError as error:
            return _say_error(error, 2)
        try:
            if options.listen is not None:
                return _listen(options)
            return serve(options, load_generator)
        except ServeError as error:
            return _say_error(error, 1)
        except KeyboardInterrupt:
            return _say_error("interrupted before the stream was complete; nothing was written", INTERRUPTED)


def parse(argv: Sequence[str] | None) -> Options:
    """Arguments -> options.

    Raises:
      ServeError: they make no sense.
      SystemExit: help was asked for and given.
    """
    complaint = io.StringIO()
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--listen" in argv and (argv[(after := argv.index("--listen") + 1) :] or ["--"])[0].startswith("--"):
        argv.insert(after, DEFAULT)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Options, args=argv, prog="serve.py", config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as exit_:
        if not exit_.code:
            raise
        # tyro draws a box of many lines, help included; the rule here is one line.
        text = " ".join("".join(" " if ch in "╭╮╰╯─│├┤" else ch for ch in complaint.getvalue()).split())
        text = re.split(r" Argument helptext| For full helptext| \(required\)", text)[0]
        for title in ("Parsing error ", "Value error ", "Required options ", "Unrecognized options "):
            text = text.removeprefix(title)
        raise ServeError(f"{text}; see serve.py --help") from None


def serve(options: Options, load_generator: Callable[..., Generator] | None = None) -> int:
    """Checks everything that can be checked, loads the model, streams.

    Raises:
      ServeError: the input or output will not do.
      KeyboardInterrupt: asked to stop before the first frame.
    """
    destination = _check_output(options)
    picture = options.image if options.image is not None else avatar_path(options.avatar)
    image = load_image(picture)  # complain now rather than after loading the model
    source = total = None
    if options.audio == "-":
        check_stdin()
    else:
        source = open_audio(options.audio, options.audio_rate)
    if source is not None and not source.live:
        found = scan(source)
        total = found.samples
        if found.peak < SILENCE:
            _say(f"warning: {source.name} is silent: the face will only listen")

    meter = Meter()
    began = time.perf_counter()
    if load_generator is None:
        from pikastream_jax.streaming.generator import load_generator  # here: JAX takes a second
    try:
        generator = load_generator(weights=options.weights, **options.stream)
    except (OSError, ValueError) as error:
        raise ServeError(f"cannot load the model: {' '.join(str(error).split())}") from error
    session = generator.session(reference_pixels(image, generator.height, generator.width), options.prompt, options.seed)
    meter.startup_seconds = time.perf_counter() - began
    meter.reconstruction_psnr = session.reconstruction_psnr
    if session.reconstruction_psnr < generator.psnr_warning:
        _say(
            f"warning: the model reproduces {picture} at {session.reconstruction_psnr:.1f} dB, below "
            f"{generator.psnr_warning:.1f} dB: it is unlike the faces of its training, so expect a poor likeness"
        )

    if source is None:
        source = open_audio(options.audio, options.audio_rate)
    fps = Fraction(generator.fps) if options.fps is None else Fraction(options.fps).limit_denominator(1001)
    height, width = output_size(generator.height, generator.width, options.size)
    media = MediaFormat(height, width, fps, output_channels(source))
    progress = Progress(meter, None if total is None else frame_count(total, source.rate, fps))
    realtime = options.realtime or options.over_rtp  # a network would lose what comes faster than it plays
    output = _open_output(options, destination, media)
    try:
        Pipeline(source, generator, session, output, media, meter, progress, realtime).run()
        if meter.end == "finished" and not meter.frames:
            raise ServeError(f"{source.name} ended before there was sound for a frame; nothing was written")
    finally:
        output.discard()
    return _conclude(options, meter)


def _listen(options: Options) -> int:
    """Serves live sessions."""
    from pikastream_jax.live.listen import ListenOptions, listen

    asked = ListenOptions(
        address=options.listen,
        weights=options.weights,
        stream=options.stream,
        sessions=options.sessions,
        rows=options.rows,
        origins=options.origin,
        label=options.label,
        numbers=options.numbers,
        recordings=options.record,
        ray=options.ray,
        output=options.output,
        sdp=options.sdp,
        image=options.image,
        avatar=options.avatar,
        prompt=options.prompt,
        seed=options.seed,
    )
    return listen(asked, _say)


def output_size(height: int, width: int, shorter: int | None) -> tuple[int, int]:
    """Height and width put out by a model of `height` x `width` pixels.

    Args:
      shorter: length of the shorter side, even; the longer one is the even number nearest to the model's aspect. None: the model's own size.
    """
    if shorter is None:
        return height, width
    scale = Fraction(shorter, min(height, width))
    return 2 * round(height * scale / 2), 2 * round(width * scale / 2)


def _check_output(options: Options):
    """Complains early; returns the destination of an RTP stream."""
    written = [options.metrics, options.sdp if options.over_rtp else None if options.target == "-" else Path(options.target)]
    for path in filter(None, written):
        for name in ("audio", "image", "weights"):
            with contextlib.suppress(OSError):
                if (read := getattr(options, name)) not in (None, "-") and path.samefile(read):
                    raise ServeError(f"{path} would replace the {name} that the stream is made from; give another name")
    if options.metrics is not None:
        check_writable(options.metrics)
    if options.over_rtp:
        check_writable(options.sdp)
        return parse_destination(options.target)
    if options.target == "-":
        check_stdout()
    else:
        check_file(Path(options.target))
    return None


def _open_output(options: Options, destination, media: MediaFormat) -> Output:
    if destination is not None:
        output = RtpOutput(destination, options.sdp, media)
        _say(f"sending; watch with: ffplay -protocol_whitelist file,udp,rtp {options.sdp}")
        return output
    if options.target == "-":
        return PipeOutput(media, stdout_writer())
    return FileOutput(Path(options.target), media)


def _conclude(options: Options, meter: Meter) -> int:
    if options.metrics is not None:
        try:
            meter.write(options.metrics)
        except OSError as error:
            raise ServeError(f"cannot write {options.metrics}: {error.strerror}") from error
    if meter.end == "interrupted" and not meter.frames:
        return _say_error("interrupted before the first frame; nothing was written", INTERRUPTED)
    note = "" if meter.end == "finished" else f" ({meter.end})"
    where = "" if options.target == "-" else f" -> {options.target}"
    _say(
        f"{meter.video_seconds:.2f} s of video in {meter.elapsed:.2f} s: {meter.frames / meter.elapsed:.1f} FPS, "
        f"real-time factor {meter.real_time_factor:.2f}{where}{note}"
    )
    return 0


@contextlib.contextmanager
def _sigterm_as_interrupt():
    """SIGTERM ends a stream as Ctrl-C does. Only the main thread may say so."""
    try:
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_error(text, status: int) -> int:
    _say(f"error: {text}")
    return status
