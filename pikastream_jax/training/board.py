"""The same figures and pictures for TensorBoard: `tensorboard --logdir runs` shows every run below that folder.

Written with tensorboardX (the extra `train`), which needs no TensorFlow. The metrics file stays the record of a run: this one is for looking at
while it trains, and a run without tensorboardX lacks nothing else.
"""

import importlib.util
import time
from pathlib import Path


class Board:
    """An event file, written at once and not from a thread: a full disk is then an OSError here, not a queue that is never emptied."""

    def __init__(self, folder: Path, step: int):
        """A new file in `folder`, made if missing; what older files there hold of updates after `step` is no longer shown."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._writer = EventsWriter(str(folder / "events"), f".{step}")
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One point for each value, as `kind/name`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def picture(self, step: int, name: str, path: Path) -> None:
        """The PNG at `path`."""
        from PIL import Image
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event) -> None:
        event.wall_time = time.time()
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise OSError(f"{self._folder} cannot be written ({error.strerror}): make room and run the same command again") from error


def open_board(folder: Path, step: int) -> Board | None:
    """None where tensorboardX is not installed."""
    return Board(folder, step) if importlib.util.find_spec("tensorboardX") else None
