import importlib.util
import struct
import sys

import pytest
from PIL import Image
from toy_stage import toy_stage

from pikastream_jax.training.board import Board
from pikastream_jax.training.loop import run

needs_writer = pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs the extra `train`")


def events(folder):
    """Read without the writer's own code: every record is length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


@needs_writer
def test_scalars_and_pictures_can_be_read_back(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "picture.png")
    board = Board(tmp_path / "board", 7)
    board.scalars(10, "train", {"loss": 0.5, "gradient_norm/dit": 2.0})
    board.picture(10, "samples", tmp_path / "picture.png")
    version, start, scalars, picture = events(tmp_path / "board")  # before it is closed: a run can be watched
    board.close()
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (8, 1), "what older files hold from step 8 on is not shown"
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {"train/loss": 0.5, "train/gradient_norm/dit": 2.0}
    image = picture.summary.value[0].image
    assert (picture.step, image.width, image.height) == (10, 6, 4)
    assert image.encoded_image_string == (tmp_path / "picture.png").read_bytes()


@needs_writer
def test_a_run_can_be_watched(tmp_path):
    def sample(state, data, path):
        Image.new("RGB", (6, 4)).save(path)

    run(toy_stage(total_steps=20, sample=sample, sample_every=10), tmp_path)
    tags = [value.tag for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    for tag in ("train/loss", "train/gradient_norm/head", "held_out/loss", "speed/updates_per_second", "samples"):
        assert tags.count(tag) == 2


def test_without_the_writer_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert int(run(toy_stage(total_steps=10), tmp_path).step) == 10
    assert not (tmp_path / "tensorboard").exists()
