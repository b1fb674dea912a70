"""Draws docs/talk.webp, the moving picture in the README: `python docs/talk.py`. Needs an installed pikastream-jax."""

import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT / "pikastream_jax/assets/speech/allison_en.flac"
SPEAKERS = (("maya", "a woman smiling warmly"), ("omar", "a man, serious"), ("grace", "an older woman, happy, nodding"))
SECONDS, EVERY = 6.5, 2  # every second frame keeps the file small


def frames(path: Path) -> list[np.ndarray]:
    """The pictures of a video file."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clips = []
        for name, prompt in SPEAKERS:
            out = Path(folder) / f"{name}.mp4"
            command = [sys.executable, ROOT / "serve.py", "--audio", SPEECH, "--avatar", name, "--prompt", prompt, "--output", out]
            subprocess.run(list(map(str, command)), check=True)
            clips.append(frames(out)[: int(SECONDS * 25) : EVERY])
    pictures = [Image.fromarray(np.concatenate(row, axis=1)) for row in zip(*clips, strict=True)]
    pictures[0].save(
        ROOT / "docs/talk.webp", save_all=True, append_images=pictures[1:], duration=40 * EVERY, loop=0, quality=30, method=4
    )


if __name__ == "__main__":
    main()
