"""How well FlashVAE reproduces video: held-out rendered faces, and any real video file."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8

from pikastream_jax.data.face import FaceState, Identity, mouth_box
from pikastream_jax.measuring.images import luma, psnr_of_error, squared_error, ssim, ssim_map

Video = UInt8[np.ndarray, "t h w 3"]
_SSIM_MARGIN = 5  # pixels that the 11x11 window takes from each side


def face_fidelity(
    reconstruct: Callable[[Video], Video],
    film: Callable[[Identity, FaceState, int], Video],
    subjects: Sequence[tuple[Identity, FaceState]],
    size: int,
) -> dict[str, float]:
    """PSNR (dB, of the error pooled over clips) and SSIM, over the whole picture and over the mouth's box.

    Args:
      reconstruct: video -> video, encoded and decoded.
      film: draws a clip of `size` pixels each way.
      subjects: people and their motion, leaves ``[t]``, t a multiple of the temporal stride.
    """
    whole, inside, similar, similar_inside, worst = [], [], [], [], 99.0
    for identity, states in subjects:
        video = film(identity, states, size)
        output = reconstruct(video)
        error = squared_error(video, output).mean(axis=-1)
        similarity = np.pad(ssim_map(luma(video), luma(output)), ((0, 0), *2 * ((_SSIM_MARGIN, _SSIM_MARGIN),)))
        mask = _mouth_mask(identity, states, video.shape[1])
        m = _SSIM_MARGIN
        whole.append(error.mean())
        inside.append(error[mask].mean())
        similar.append(similarity[:, m:-m, m:-m].mean())
        similar_inside.append(similarity[mask].mean())
        worst = min(worst, psnr_of_error(whole[-1]))
    return {
        "psnr": psnr_of_error(np.mean(whole)),
        "psnr_mouth": psnr_of_error(np.mean(inside)),
        "ssim": float(np.mean(similar)),
        "ssim_mouth": float(np.mean(similar_inside)),
        "psnr_worst_clip": worst,
        "people": len(subjects),
        "frames": int(sum(len(states.yaw) for _, states in subjects)),
    }


def video_fidelity(reconstruct: Callable[[Video], Video], video: Video) -> dict[str, float]:
    """PSNR and SSIM of one video of any content."""
    output = reconstruct(video)
    error = squared_error(video, output).mean()
    return {"psnr": psnr_of_error(error), "ssim": ssim(video, output), "frames": len(video)}


def read_video(path: Path, size: int, frames: int = 48) -> Video:
    """The first frames of a video file, its middle square brought to `size` x `size`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a video, or shorter than 4 frames; a video of 4 to `frames` gives a multiple of 4.
    """
    import av  # here, so that the measures themselves need no codec
    from PIL import Image

    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    pictures = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                side = min(frame.height, frame.width)
                left, top = (frame.width - side) // 2, (frame.height - side) // 2
                square = frame.to_image().crop((left, top, left + side, top + side))
                pictures.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))
                if len(pictures) == frames:
                    break
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a video that can be read ({error})") from error
    whole = len(pictures) // 4 * 4
    if not whole:
        raise ValueError(f"{path} has {len(pictures)} frames: give a video of at least 4")
    return np.stack(pictures[:whole])


def _mouth_mask(identity: Identity, states: FaceState, size: int) -> Float[np.ndarray, "t h w"]:
    boxes = np.asarray(_boxes(identity, states, size))
    at = np.arange(size)
    y0, x0, y1, x1 = (boxes[:, i, None] for i in range(4))
    return ((at >= y0) & (at < y1))[:, :, None] & ((at >= x0) & (at < x1))[:, None, :]


@functools.partial(jax.jit, static_argnums=2)
def _boxes(identity, states, size):
    return jax.vmap(lambda state: mouth_box(identity, state, size))(states)
