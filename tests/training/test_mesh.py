"""Many devices and many processes train as one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_stage import Settings, build, toy_stage

from pikastream_jax.training import mesh as meshes
from pikastream_jax.training.checkpoint import Checkpoints
from pikastream_jax.training.loop import run
from pikastream_jax.training.metrics import read_rows
from pikastream_jax.training.processes import Processes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Sums over rows and over parts of matrices come in another order; twelve updates of Muon, which divides by small numbers, spread that.
TOLERANCE = 1e-4


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of twelve updates on one device."""
    folder = tmp_path_factory.mktemp("alone")
    run(toy_stage(12), folder, log_every=1)
    return losses(folder)


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}


def test_eight_devices_have_the_losses_of_one(alone, tmp_path):
    """Split by rows alone; and split by weights at first and then, from the checkpoint, along all three axes."""
    command = [sys.executable, HERE / "on_eight_devices.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for name, values in result["losses"].items():
        np.testing.assert_allclose(values, alone, rtol=TOLERANCE, err_msg=name)
    shares = result["shares"]
    assert shares["data"] == 1
    assert shares["fsdp"] < 0.35 < shares["all"] < 0.7, "two devices hold about half each; eight an eighth each, and the small leaves"
    assert result["frozen"] == {"data": 1, "fsdp": 1 / 8, "all": 1 / 2}, "so is what updates only read, in updates and in evaluations"


TOY = f"import sys; sys.path.insert(0, {str(HERE)!r}); import train; train.STAGES['toy'] = train.Entry('toy_stage'); sys.exit(train.main())"


def start_two(command):
    """Two processes that train as one, a device each.

    Args:
      command: (address of the first, number of the process) -> arguments of the interpreter.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command(address, index))],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for index in range(2)
    ]


def two_toys(*arguments):
    """Both train the toy stage, its weights split between them."""
    return start_two(lambda address, index: ["-c", TOY, "toy", *arguments, "--processes", 2, "--coordinator", address, "--fsdp", 2, "--process", index])


def ended(together):
    """What each of them says on standard error, once both have left."""
    try:
        errors = [process.communicate(timeout=300)[1] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], errors
    return errors


def test_two_processes_train_and_one_goes_on(alone, tmp_path):
    """They do seven updates and save; this one resumes: the losses of a run that was never stopped."""
    errors = ended(two_toys("--updates", "12", "--steps", "7", "--out", tmp_path))
    assert "resume with" in errors[0] and "resume with" not in errors[1], "the first process alone reports"
    run(build(None, 0, {}, Settings(updates=12)), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [(10, "train"), (10, "held_out"), (12, "train"), (12, "held_out")]
    means = [row["loss"] for row in rows if row["kind"] == "train"]
    np.testing.assert_allclose(means, [np.mean(alone[:10]), np.mean(alone[10:])], rtol=TOLERANCE)


def test_a_signal_to_one_process_stops_and_saves_both(tmp_path):
    together = two_toys("--updates", "10000000", "--out", tmp_path)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and together[0].poll() is None:
        time.sleep(0.1)
    together[1].send_signal(signal.SIGTERM)
    errors = ended(together)
    done = Checkpoints(tmp_path / "checkpoints", write=False).latest_step
    assert done and f"at step {done} of 10000000, saved" in errors[0]


@pytest.mark.slow
def test_stages_evaluate_and_draw_in_two_processes(tmp_path):
    """Where both compute together and where the first draws alone; with arguments the script does other stages too."""
    ended(start_two(lambda address, index: [HERE / "in_two_processes.py", tmp_path, address, index, "vae_low_res", "text_pretrain"]))
    assert (tmp_path / "vae_low_res" / "samples" / "step_00000000.png").is_file()


def test_what_lies_where():
    """The largest axis that fsdp divides, the last of equals; small leaves whole. No device is needed to plan."""
    mesh = meshes.make_mesh(fsdp=8, sequence=2, devices=64)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 8, "sequence": 2}
    shapes = {"wide": (512, 2048), "square": (512, 512), "odd": (4095, 64), "stack": (30, 512, 512), "small": (64, 64)}
    placed = meshes.placed(mesh, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    parts = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in placed.items()}
    assert parts == {"wide": (512, 256), "square": (512, 64), "odd": (4095, 8), "stack": (30, 512, 64), "small": (64, 64)}


def test_what_updates_read_is_split_too_where_it_can_be():
    """A frozen teacher as its student; what has no axis that fsdp divides is whole, for it is no part of a model."""
    mesh = meshes.make_mesh(fsdp=8, devices=64)
    data = {"teacher": np.zeros((512, 2048), np.float32), "speech": np.zeros((99_999, 3), np.uint8), "count": np.float32(1)}
    parts = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(np.shape(leaf)), data, meshes.data_shardings(mesh, data))
    assert parts == {"teacher": (512, 256), "speech": (99_999, 3), "count": ()}


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="fsdp 3 x sequence 1 does not divide 8 devices"):
        meshes.make_mesh(fsdp=3, devices=8)
    mesh = meshes.make_mesh(fsdp=7, devices=7)
    with pytest.raises(ValueError, match=r"fsdp 7 divides no axis of mlp.kernel \(512, 2048\): choose one that divides the model's width"):
        meshes.state_shardings(mesh, {"mlp": {"kernel": jax.ShapeDtypeStruct((512, 2048), jnp.float32)}})
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="a batch of 12 does not divide over data 1 x fsdp 7 = 7 devices"):
        jax.eval_shape(meshes.split_batch, jax.ShapeDtypeStruct((12, 2), jnp.float32))
    for arguments, message in (
        ((None, 2, 0), "--processes 2 needs --coordinator HOST:PORT and --process I"),
        (("host:1", 2, 2), "--process 2 must lie in 0-1"),
        (("host:1", 1, None), "say how many with --processes"),
        ((None, 0, None), "--processes 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Processes(*arguments)
