"""The same rows by others: the PyTorch twin of `torch_path/`, and diffusers' decoder of Wan 2.2."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from benchmarks.presets import DECODERS, decoder_config, stream_config
from benchmarks.rows import Bench, Job, Measurement, NotRunError
from benchmarks.timing import Statistics, measure, repeat, summarise
from pikastream_jax.config import Config

STREAMS = (
    "9b/chunk3_steps4_bf16",
    "9b/chunk3_steps4_fp8",
    "base_1_3b/window18",
    "9b/chunk1_steps4_bf16",
    "base_1_3b/window6",
    "9b/chunk1_steps4_fp8",
)
LATENT_FRAMES_IN_FLIGHT = 8  # as in models.py
_DIFFUSERS_LATENT_FRAMES = 5


def _import_torch(smoke: bool) -> Any:
    try:
        import torch
    except ImportError as error:
        raise NotRunError(f"PyTorch is not installed ({error})") from error
    if not smoke and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU: a GPU build of torch is needed, or --smoke")
    torch.set_grad_enabled(False)
    return torch


@dataclasses.dataclass(frozen=True)
class Twin:
    """What the rows need of the PyTorch path, so that this file depends on it in one place."""

    step: Callable[[], Any]  # a chunk, inputs on the host -> uint8 frames on the device, in a buffer that the next step overwrites
    denoise: Callable[[], Any]  # the DiT alone


def build_stream(torch: Any, config: Config, fast: bool) -> Twin:
    """The twin's stream with random weights and full windows; compiled and captured if `fast`.

    Raises:
      NotRunError: the PyTorch path is not there.
    """
    path = _torch_path()
    stream = path.build(config, "cuda" if fast else "cpu", torch.bfloat16, fp8=config.stream.precision == "float8", seed=0)
    stream.fill()
    if fast:
        stream.compile()
        stream.capture()
    audio = stream.audio.cpu().clone()
    if not fast:
        return Twin(lambda: stream.step(audio), lambda: stream.denoise(audio))
    audio = audio.pin_memory()
    # A plain copy from the host would wait for all chunks in flight.
    return Twin(
        lambda: stream.step(audio.to("cuda", non_blocking=True)), lambda: stream.denoise(audio.to("cuda", non_blocking=True))
    )


def build_decoder(torch: Any, config: Config, fast: bool) -> Callable[[Any], Any]:
    """The twin's decoder alone: a latent frame to uint8 frames."""
    path = _torch_path()
    decoder = path.build_decoder(config, "cuda" if fast else "cpu", torch.bfloat16, seed=0)
    decoder.fill()
    if fast:
        from benchmarks.torch_path.stream import COMPILE_MODE

        decoder.compile(COMPILE_MODE)
        decoder.capture()
    return decoder.decode


def _torch_path() -> Any:
    try:
        from benchmarks import torch_path
    except ImportError as error:
        raise NotRunError(f"benchmarks/torch_path cannot be imported ({error})") from error
    return torch_path


def _synchronise(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak(torch: Any) -> None:
    """What compiling and tuning took does not count."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(torch: Any) -> dict[str, int | None]:
    """Reserved rather than allocated: the memory of CUDA graphs counts as allocated only while they are captured."""
    return {"peak_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None}


def _operations(name: str, smoke: bool, **changes: bool) -> dict[str, int]:
    """Counted from our own programs, which are not compiled; JAX stays on the CPU."""
    from benchmarks.models import operations

    return operations(name, smoke, **changes)


def measure_stream(name: str, smoke: bool) -> Measurement:
    """See `models.measure_stream`; the twin takes audio tokens, so what it leaves out is the audio encoder."""
    torch, config = _import_torch(smoke), stream_config(name, smoke)
    began = time.perf_counter()
    twin = build_stream(torch, config, fast=not smoke)
    _synchronise(torch)
    seconds = time.perf_counter() - began
    _forget_peak(torch)
    frames = twin.step()
    if frames.float().std() == 0:
        raise FloatingPointError("all pixels of the frames are the same")
    host = [torch.empty(frames.shape, dtype=frames.dtype, pin_memory=not smoke) for _ in range(2)]
    shown = [torch.empty_like(frames) for _ in range(2)]
    copies = None if smoke else torch.cuda.Stream()
    copied: list[Any] = [None, None]
    turn = 0

    def start() -> int:
        """Starts a chunk and the copy of its frames on a stream of its own, from a buffer that the next chunk leaves alone."""
        nonlocal turn
        turn = 1 - turn
        result = twin.step()
        if smoke:
            host[turn].copy_(result)
            return turn
        shown[turn].copy_(result)
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            host[turn].copy_(shown[turn], non_blocking=True)
            copied[turn] = torch.cuda.Event()
            copied[turn].record(copies)
        return turn

    def wait(index: int) -> None:
        if copied[index] is not None:
            copied[index].synchronize()

    def alone() -> float:
        began = time.perf_counter()
        wait(start())
        return (time.perf_counter() - began) * 1e3

    waiting: list[int] = []

    def overlapped() -> float:
        waiting.append(start())
        if len(waiting) > 1:
            wait(waiting.pop(0))
        return time.perf_counter() * 1e3

    def step() -> None:
        twin.step()
        _synchronise(torch)

    def denoise() -> None:
        twin.denoise()
        _synchronise(torch)

    denoising = measure(denoise)
    alone_ms, step_ms = summarise(repeat(alone)), measure(step)
    arrivals = repeat(overlapped, least=12, warm_up=3)
    _synchronise(torch)
    intervals = [later - earlier for earlier, later in zip(arrivals[:-1], arrivals[1:], strict=True)]
    dit_only = name.startswith("base_1_3b")
    ms: Statistics = denoising if dit_only else summarise(intervals, warm_up=3)
    fps = config.chunk_frames / denoising.median * 1e3 if dit_only else config.chunk_frames * len(intervals) / (arrivals[-1] - arrivals[0]) * 1e3
    figures = {
        "fps": fps,
        "first_frame_ms": alone_ms,
        "step_ms": step_ms,
        "denoise_ms": denoising,
        "denoise_flops": _operations(name, smoke, dit_only=True),
        "build_seconds": seconds,
    }
    what = "denoising alone, as in our row" if dit_only else "as in our row, but from audio tokens in host memory: no audio encoder"
    return Measurement(f"PyTorch, compiled, CUDA graphs: {what}", ms, _operations(name, smoke), figures=figures | _peak(torch))


def measure_decoder(name: str, smoke: bool) -> Measurement:
    """See `models.measure_decoder`."""
    torch, config = _import_torch(smoke), decoder_config(name, smoke)
    began = time.perf_counter()
    decode = build_decoder(torch, config, fast=not smoke)
    seconds = time.perf_counter() - began
    _forget_peak(torch)
    rows, columns = config.latent_grid
    shape = (1, rows, columns, config.flash_vae.latent_channels)
    latents = [torch.randn(shape, device="cpu" if smoke else "cuda") for _ in range(LATENT_FRAMES_IN_FLIGHT)]

    def run(count: int) -> None:
        for latent in latents[:count]:
            decode(latent)
        _synchronise(torch)

    ms, one = measure(lambda: run(LATENT_FRAMES_IN_FLIGHT), per=LATENT_FRAMES_IN_FLIGHT), measure(lambda: run(1))
    if decode(latents[0]).float().std() == 0:
        raise FloatingPointError("all pixels of the frames are the same")
    figures = {"fps": 4e3 / ms.median, "one_ms": one, "build_seconds": seconds}
    return Measurement("PyTorch, compiled, CUDA graphs: as in our row", ms, _operations(name, smoke), figures=figures | _peak(torch))


def measure_wan_decoder(name: str, smoke: bool) -> Measurement:
    """diffusers' `AutoencoderKLWan` with Wan 2.2's sizes (the config.json of Wan-AI/Wan2.2-TI2V-5B-Diffusers) and random weights."""
    torch = _import_torch(smoke)
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise NotRunError(f"diffusers cannot be imported ({error}); benchmarks/README.md says how to carry it") from error
    config = decoder_config(name, smoke)
    # 48 channels at a sixteenth of the size, whatever stands in for FlashVAE in a smoke test.
    rows, columns = (2, 3) if smoke else config.latent_grid
    sizes = dict(base_dim=8, decoder_base_dim=8) if smoke else dict(base_dim=160, decoder_base_dim=256)
    with torch.device("cpu" if smoke else "cuda"):
        vae = AutoencoderKLWan(
            **sizes,
            z_dim=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=16,
        )
        latents = torch.randn(1, 48, _DIFFUSERS_LATENT_FRAMES, rows, columns).bfloat16()
    vae = vae.to(torch.bfloat16).eval()
    del vae.encoder  # only the decoder is asked, and counted in memory
    vae.encoder = None
    began = time.perf_counter()
    if not smoke:
        torch.backends.cudnn.benchmark = True
        vae.decoder = torch.compile(vae.decoder, dynamic=False)
    out = vae.decode(latents, return_dict=False)[0]
    _synchronise(torch)
    seconds = time.perf_counter() - began
    _forget_peak(torch)

    def run(count: int) -> None:
        vae.decode(latents[:, :, :count], return_dict=False)
        _synchronise(torch)

    whole, first = measure(lambda: run(_DIFFUSERS_LATENT_FRAMES)), measure(lambda: run(1))
    # A clip's first latent frame is a single picture, quicker than the others: what is wanted is the time of the others.
    later = _DIFFUSERS_LATENT_FRAMES - 1
    per_latent = (whole.median - first.median) / later
    height, width = config.stream.height, config.stream.width
    figures = {
        "fps": 4e3 / per_latent,
        "per_latent_frame_ms": per_latent,
        "first_ms": first,
        "shape": list(out.shape),
        "build_seconds": seconds,
    }
    return Measurement(
        f"AutoencoderKLWan 2.2, bfloat16, torch.compile, random weights: decode of {_DIFFUSERS_LATENT_FRAMES} latent frames of {height}x{width}; "
        "fps: of the latent frames after the first (their time less that of the first alone)",
        whole,
        figures=figures | _peak(torch),
    )


def jobs(smoke: bool) -> dict[str, Job]:
    """One process to every row."""
    found = {}
    for name in STREAMS:
        run = functools.partial(measure_stream, name, smoke)
        found[f"torch/{name}"] = Bench(f"torch/{name}", run, seconds=90, limit_seconds=300)
    for name in DECODERS:
        found[f"torch/{name}"] = Bench(f"torch/{name}", functools.partial(measure_decoder, name, smoke), seconds=45, limit_seconds=240)
        row = name.replace("flash_vae", "diffusers/wan22_decoder")
        found[row] = Bench(row, functools.partial(measure_wan_decoder, name, smoke), seconds=60, limit_seconds=240)
    return {name: Job(name, (bench,), uses_torch=True) for name, bench in found.items()}
