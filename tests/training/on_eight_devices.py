"""Run by `test_mesh.py` in a process of its own, with eight devices on a CPU: trains the toy stage on several meshes.

Prints a JSON object: the losses of every update on each mesh, and what shares of the state and of a frozen model the first device holds.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from toy_stage import toy_stage  # noqa: E402

from pikastream_jax.training import mesh as meshes  # noqa: E402
from pikastream_jax.training.loop import run  # noqa: E402
from pikastream_jax.training.metrics import read_rows  # noqa: E402

meshes.SMALL = 64  # so that the toy's matrices are split


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]


def first_device_share(state) -> float:
    leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
    return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)


def train(folder: Path, steps: int, **sizes) -> tuple[float, float]:
    """Goes on in the folder for so many updates on a mesh; the shares of the state, and of what updates only read, that one device holds."""
    frozen = []
    stage = toy_stage(12, data=lambda: {"frozen": np.ones((64, 32), np.float32)}, evaluate_every=1)

    def evaluate(state, data):
        frozen.append(data["frozen"].addressable_shards[0].data.size / data["frozen"].size)
        return stage.evaluate(state, data)

    state = run(dataclasses.replace(stage, evaluate=evaluate), folder, steps=steps, log_every=1, mesh=meshes.make_mesh(**sizes))
    return first_device_share(state), frozen[-1]


def main(folder: Path) -> None:
    trained = {
        "data": train(folder / "data", 12),
        "fsdp": train(folder / "moved", 6, fsdp=8),
        "all": train(folder / "moved", 6, fsdp=2, sequence=2),
    }
    shares, frozen = ({name: pair[n] for name, pair in trained.items()} for n in range(2))
    print(json.dumps({"shares": shares, "frozen": frozen, "losses": {name: losses(folder / name) for name in ("data", "moved")}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
