"""A corpus whose sound and motion say where they lie, in place of recordings."""

import numpy as np

from pikastream_jax.data.corpus import MEL_FRAMES, VIDEO_FRAMES, Corpus


def small_corpus(mels: int = 16) -> Corpus:
    """60 latent frames in three recordings, one of each split. Every mel frame of latent frame n has the level n."""
    start, stop = np.array([0, 30, 45]), np.array([30, 45, 60])
    latent = np.arange(60, dtype=np.uint8)
    rng = np.random.default_rng(0)
    return Corpus(
        mel=np.repeat(latent, MEL_FRAMES)[:, None].repeat(mels, axis=1),
        tracks=rng.integers(0, 256, (60 * VIDEO_FRAMES, 5), np.uint8),
        start=start,
        stop=stop,
        voice=np.array(["anna", "anna", "ben"]),
        split=np.array(["train", "validation", "held_out"]),
        file_name=np.array(["a", "b", "c"]),
        file_start=start * VIDEO_FRAMES,
        file_stop=stop * VIDEO_FRAMES,
    )
