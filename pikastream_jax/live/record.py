"""Sessions kept as MP4 files, only where the server was told to, each saying of itself that it is generated.

The packets are those that viewers get. Fragmented, so that a file that was cut off plays to where it ends. What it says of itself stands in the file
(`comment`) and, with the file's SHA-256, beside it as `NAME.json`: assertions as C2PA names them, unsigned, for there is no certificate to sign with.
"""

import asyncio
import datetime
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import av

from pikastream_jax.live.media import Broadcast
from pikastream_jax.live.mux import mux_streams, timed

_log = logging.getLogger(__name__)


def manifest(about: dict[str, Any]) -> dict[str, Any]:
    """What a recording says of itself."""
    return {
        "claim_generator": "pikastream-jax",
        "assertions": [
            {
                "label": "c2pa.actions",
                "data": {
                    "actions": [
                        {
                            "action": "c2pa.created",
                            "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
                            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                        }
                    ]
                },
            },
            {"label": "pikastream.session", "data": about},
        ],
    }


async def record(broadcast: Broadcast, path: Path, about: dict[str, Any]) -> None:
    """Writes a session to `path` until it ends. A disk that is full ends the recording and not the session."""
    said = manifest(about)
    container, start = None, 0.0
    loop = asyncio.get_running_loop()
    try:
        async for packet in broadcast.watch():
            if container is None:
                start = float(packet.pts * packet.time_base)
                options = {"movflags": "empty_moov+default_base_moof+frag_keyframe"}
                container = av.open(str(path), "w", format="mp4", options=options)
                container.metadata["comment"] = json.dumps(said)
                streams = mux_streams(container, ("video", "audio"), *packet.frame.picture.shape[:2], broadcast.fps)
            await loop.run_in_executor(None, container.mux, timed(packet, streams[packet.kind], start, broadcast.fps))
    except (OSError, av.FFmpegError) as error:
        _log.warning("recording %s ended: %s", path, error)
    finally:
        if container is not None:
            try:
                container.close()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                path.with_suffix(".json").write_text(json.dumps(said | {"sha256": digest}, indent=1) + "\n")
            except (OSError, av.FFmpegError) as error:
                _log.warning("recording %s was not closed: %s", path, error)
