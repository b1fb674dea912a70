"""What each device holds of a stage that no single one could: `python -m pikastream_jax.training.shards --config pikastream_9b`.

Nothing is allocated. Shapes come from `jax.eval_shape`, their parts from the shardings of `mesh.py`, and the update is traced and lowered for
that many GPUs, so that what does not fit the mesh is found out here. What blocks keep for the backward pass is counted in the traced program
(its residuals for two rows less those for one); what one block needs while it is computed again, and XLA's own buffers, are not counted.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, PyTree

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.dit import Denoiser
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.nn.placement import DATA, FSDP, SEQUENCE
from pikastream_jax.training.loop import TrainState
from pikastream_jax.training.mesh import make_mesh, placed, split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.training_form import Form, in_precision, training_form

LARGE = Form("bfloat16", "scan", "full")  # how models of this size are computed
MUON = OptimiserConfig(1e-3)
ADAMW = OptimiserConfig(1e-5, muon=False, betas=(0.0, 0.999))
STAGES = ("dit_pretrain", "dit_self_forcing")
Shapes = PyTree[jax.ShapeDtypeStruct]


def large_model(config: Config) -> Functional:
    """The preset's denoiser as models of this size are trained."""
    return training_form(functional(lambda rngs: Denoiser(config, rngs=rngs)), LARGE)


def held_trees(config: Config, stage: str) -> dict[str, Shapes]:
    """What is in memory all through a run, and the gradients of one network at a time, by name.

    Raises:
      ValueError: an unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(f"no shapes for stage {stage!r}: choose one of {', '.join(STAGES)}")
    params = large_model(config).abstract
    optimiser = make_optimiser(params, MUON if stage == "dit_pretrain" else ADAMW, 10_000)
    state = jax.eval_shape(lambda params: TrainState.start(params, optimiser), params)
    held = {"parameters": state.params, "average": state.ema, "optimiser": state.opt_state, "gradients": params}
    if stage == "dit_self_forcing":
        teacher = jax.eval_shape(lambda params: in_precision(params, "bfloat16"), params)
        held |= {"critic": params, "critic's optimiser": state.opt_state, "teacher, bfloat16": teacher}
    return held


def device_bytes(mesh: AbstractMesh, tree: Shapes) -> int:
    """Bytes of the tree on each device of the mesh."""
    leaves = jax.tree.leaves(placed(mesh, tree))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def clip_shapes(config: Config, rows: int, frames: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of noisy clips with their conditions."""
    latents = (*config.latent_grid, config.dit.latent_channels)
    shapes = {
        "latents": (rows, frames, *latents),
        "velocity": (rows, frames, *latents),
        "t": (rows, frames),
        "reference": (rows, *latents),
        "mel": (rows, frames, config.audio.mel_frames, config.audio.mels),
        "motion": (rows, frames, config.dit.motion),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    tokens = {"tokens": (rows, 1, config.text.length), "valid": (rows, 1)}
    return batch | {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in tokens.items()}


def clip_loss(config: Config, model: Functional, params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
    """Flow matching over whole clips: pre-training, and the critic's loss."""
    denoiser = model.bind(params)
    text, valid = denoiser.text_conditions(batch["tokens"], batch["valid"])
    rows, frames = batch["t"].shape
    velocity = denoiser.dit.forward_sequence(
        batch["latents"],
        batch["t"],
        denoiser.conditions(text, valid, batch["mel"], batch["motion"]),
        denoiser.dit.reference_keys_values(batch["reference"]),
        chunk_ids=jnp.zeros((rows, frames), jnp.int32),
        window=frames,
        reference_distance=jnp.full(rows, float(config.stream.reference_distance)),
    )
    return jnp.mean((velocity - batch["velocity"]) ** 2)


def chunk_loss(config: Config, model: Functional, params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
    """The student's denoising step that carries the gradient in self-forcing: a chunk behind a full window, reference and sink aside."""
    denoiser = model.bind(params)
    chunk, n = config.stream.chunk, config.tokens_per_frame
    rows = batch["t"].shape[0]
    text, valid = denoiser.text_conditions(batch["tokens"], batch["valid"])
    conditions = denoiser.conditions(text, valid, batch["mel"][:, :chunk], batch["motion"][:, :chunk])
    shape = (config.dit.blocks, rows, config.stream.window * n, config.dit.heads, config.dit.head_dim)
    ring = KeysValues(jnp.zeros(shape, denoiser.dit.dtype), jnp.zeros(shape, denoiser.dit.dtype))
    reference = denoiser.dit.reference_keys_values(batch["reference"])
    cache = jax.tree.map(lambda fixed, past: jnp.concatenate([fixed, past], axis=2), reference, ring)
    velocity, _ = denoiser.dit.forward_chunk(
        batch["latents"][:, :chunk],
        batch["t"][:, :chunk],
        conditions,
        cache,
        fixed_slots=n,
        fixed_valid=jnp.full(rows, n),
        ring_valid=jnp.full(rows, config.stream.window * n),
        kept=chunk,
    )
    return jnp.mean((velocity - batch["velocity"][:, :chunk]) ** 2)


def kept_bytes_of_a_row(config: Config, loss: Callable, frames: int) -> int:
    """What a row of the batch adds to what lies in memory between forward and backward pass, all its latent frames together."""
    model = large_model(config)

    def kept(rows: int) -> int:
        batch = clip_shapes(config, rows, frames)
        residuals = jax.eval_shape(
            lambda params, batch: jax.vjp(lambda params: loss(config, model, params, batch), params)[1], model.abstract, batch
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    return kept(2) - kept(1)


def lower_update(config: Config, stage: str, mesh: AbstractMesh, frames: int) -> str:
    """The text of a whole update for the GPUs of `mesh`, one row to a device, as it goes into XLA.

    Of self-forcing it is the student's step with gradient, which takes the place of the roll-out, followed by its average and optimiser.

    Raises:
      ValueError: the mesh does not divide model or batch.
    """
    model = large_model(config)
    optimiser = make_optimiser(model.abstract, MUON if stage == "dit_pretrain" else ADAMW, 10_000)
    loss = clip_loss if stage == "dit_pretrain" else chunk_loss

    def update(state: TrainState, batch: dict[str, Array]) -> TrainState:
        gradient = jax.grad(lambda params: loss(config, model, params, split_batch(batch)))(state.params)
        return state.descend(gradient, optimiser, 0.99)

    state = placed(mesh, jax.eval_shape(lambda params: TrainState.start(params, optimiser), model.abstract))
    batch = clip_shapes(config, mesh.shape[DATA] * mesh.shape[FSDP], frames)
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(update, out_shardings=out).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Print what each device holds of the DiT's stages, and lower their updates, without allocating anything."""

    config: str = "pikastream_9b"
    """Preset in configs/."""
    devices: tuple[int, ...] = (8, 64, 512)
    """How many there would be."""
    fsdp: int = 64
    """Devices that the model is split over, or all of them where there are fewer."""
    sequence: int = 1
    """Devices that the latent frames of a clip are split over."""
    latent_frames: int = 21
    """Of a clip in pre-training."""
    lower: bool = True
    """Lower the updates too, which takes a while."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    config = preset(arguments.config)
    for stage in STAGES:
        trees = held_trees(config, stage)
        loss = clip_loss if stage == "dit_pretrain" else chunk_loss
        row = kept_bytes_of_a_row(config, loss, arguments.latent_frames)
        print(f"\n{stage}, GB (10^9 bytes) on each device\n")
        names = [*trees, "bfloat16 weights of the pass", "sum", "kept for the backward pass, a row"]
        print(f"| devices (data x fsdp x sequence) | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        for count in arguments.devices:
            mesh = make_mesh(min(arguments.fsdp, count // arguments.sequence), arguments.sequence, devices=count)
            figures = [device_bytes(mesh, tree) for tree in trees.values()]
            figures.append(device_bytes(mesh, trees["parameters"]) // 2)
            figures += [sum(figures), row // mesh.shape[SEQUENCE]]
            cells = " | ".join(f"{figure / 1e9:.2f}" for figure in figures)
            print(f"| {count} ({' x '.join(str(size) for size in mesh.shape.values())}) | {cells} |", flush=True)
            if arguments.lower:
                lower_update(config, stage, mesh, arguments.latent_frames)
    if arguments.lower:
        print("\nevery update was traced and lowered for its mesh")


if __name__ == "__main__":
    main()
