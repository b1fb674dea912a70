import dataclasses

import av
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data.face import mouth_box, neutral_state
from pikastream_jax.measuring.autoencoder import face_fidelity, read_video, video_fidelity
from pikastream_jax.measuring.subjects import film, person


def subject(seed, frames=4):
    return person(seed), dataclasses.replace(neutral_state(frames), mouth_open=jnp.linspace(0, 1, frames))


@pytest.mark.parametrize("size", [128, 256])
def test_a_constant_error_has_its_psnr_everywhere(size):
    figures = face_fidelity(lambda v: np.where(v > 127, v - 4, v + 4).astype(np.uint8), film, [subject(0), subject(1)], size)
    expected = 20 * np.log10(255 / 4)
    assert figures["psnr"] == pytest.approx(expected, abs=1e-3)
    assert figures["psnr_mouth"] == pytest.approx(expected, abs=1e-3)
    assert figures["people"] == 2 and figures["frames"] == 8


@pytest.mark.parametrize("size", [128, 256])
def test_errors_in_the_mouth_lower_the_mouths_figures_most(size):
    identity, states = subject(2)
    y0, x0, y1, x1 = np.asarray(mouth_box(identity, neutral_state(), size)).round().astype(int)

    def spoil(video):
        video = video.copy()
        video[:, y0:y1, x0:x1] ^= 31
        return video

    figures = face_fidelity(spoil, film, [(identity, states)], size)
    assert figures["psnr_mouth"] < figures["psnr"] - 8
    assert figures["ssim_mouth"] < figures["ssim"] - 0.05


def test_a_video_file_is_cut_square_and_measured(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for i in range(10):
            picture = np.full((144, 176, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    video = read_video(path, 256, frames=9)
    assert video.shape == (8, 256, 256, 3)
    assert video[6].mean() == pytest.approx(120, abs=4)
    assert video_fidelity(lambda v: v, video) == {"psnr": 99.0, "ssim": pytest.approx(1.0), "frames": 8}


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="not a video"):
        read_video(tmp_path / "text.mp4", 256)
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        read_video(tmp_path / "gone.mp4", 256)
