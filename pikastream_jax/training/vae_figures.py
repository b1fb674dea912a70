"""Held-out faces through an autoencoder: the figures and the picture that every stage of FlashVAE is judged by."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pikastream_jax.config import Config
from pikastream_jax.measuring.images import ssim
from pikastream_jax.measuring.sharpness import detail
from pikastream_jax.training.faces import FaceBatch, face_batch
from pikastream_jax.training.losses import psnr, region_weights
from pikastream_jax.training.pictures import save_rows, to_uint8
from pikastream_jax.training.processes import gather, on_one_device

HELD_OUT_SEED = (
    1_000_003  # identities and motions of the held-out batches; training keys are folded from the run's seed
)
_PEOPLE, _LATENT_FRAMES = 8, 2

Reconstruct = Callable[[PyTree[Array], Float[Array, "b t h w 3"]], Float[Array, "b t h w 3"]]


def _for_all(render: Callable[[Array], FaceBatch]) -> FaceBatch:
    """In the host's memory: all processes look at it together, and the first one draws it alone."""
    with on_one_device():
        return jax.device_get(jax.jit(render)(jax.random.key(HELD_OUT_SEED)))


class HeldOutFaces:
    """Eight people that no run was trained on, whole pictures, two latent frames each; rendered when first asked for."""

    def __init__(self, config: Config):
        size, frames = config.stream.height, _LATENT_FRAMES * config.flash_vae.temporal_stride

        def render(key: Array) -> FaceBatch:
            return face_batch(key, _PEOPLE, frames, size, size)

        self._batch = functools.cache(lambda: _for_all(render))

    def figures(self, reconstruct: Reconstruct, params: PyTree[Array]) -> dict[str, float]:
        """`loss`: root of the mean squared error; PSNR in dB (whole picture, boxes of mouth and eyes), SSIM; `mouth_motion_kept`: how much of the
        lips' true motion the output repeats, 1 is all of it, 0 a mouth that stands still; `detail_*`: see `measuring/sharpness.py`."""
        batch = self._batch()
        video, output = batch.video, np.asarray(gather(reconstruct(params, batch.video)))
        h, w = video.shape[2:4]
        error = (np.clip(output, -1, 1) - video) ** 2
        mouth, eyes = (np.asarray(region_weights(batch.boxes[..., i : i + 1, :], h, w, (1.0,))) > 1.5 for i in (0, 1))
        lips = mouth[:, 1:]
        moved, should = (np.diff(v, axis=1)[lips] for v in (output, video))
        shown, true = to_uint8(output), to_uint8(video)
        fine = detail(shown, true)
        return {
            "loss": float(np.sqrt(error.mean())),
            "psnr": float(psnr(jnp.asarray(error.mean()))),
            "psnr_mouth": float(psnr(jnp.asarray(error[mouth].mean()))),
            "psnr_eyes": float(psnr(jnp.asarray(error[eyes].mean()))),
            "ssim": ssim(shown, true),
            "mouth_motion_kept": float((moved * should).sum() / (should**2).sum()),
            "detail_agreement": fine.agreement,
            "detail_kept": fine.kept,
            "detail_invented": fine.invented,
        }

    def draw(self, path: Path, *reconstructions: Callable[[Float[Array, "b t h w 3"]], Float[Array, "b t h w 3"]]) -> None:
        """Writes the people's first and last frames, truth above the outputs."""
        video = self._batch().video
        clips = [video, *(reconstruct(video) for reconstruct in reconstructions)]
        save_rows(path, [clip[:, frame] for frame in (0, -1) for clip in clips])
