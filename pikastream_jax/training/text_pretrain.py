"""Pre-training of the text encoder: what a prompt asks the face to do, read off its words alone.

As `audio_pretrain` does for the sound. A smile moves a handful of pixels at the corners of the mouth, so the diffusion loss hardly
tells the words for it from the others; captions and the styles that they describe cost nothing to make in any number. The readout is
linear in the mean of a prompt's tokens, for the reason given there.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.data.captions import CANONICAL, attributes_of, caption_batch
from pikastream_jax.data.face import sample_identity
from pikastream_jax.data.motion import Style
from pikastream_jax.nn.layers import Params, functional, initial_params
from pikastream_jax.text import TextEncoder
from pikastream_jax.training.clips import load_clip_record
from pikastream_jax.training.loop import Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.processes import gather
from pikastream_jax.training.settings import Optimiser, StageSettings

STYLE = tuple(field.name for field in dataclasses.fields(Style))
HELD_OUT_SEED = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """Settings of the stage; a row of a batch is a caption."""

    updates: int = 400
    batch: int = 256
    captions: int = 20_000
    held_out: int = 1_000
    drop: float = 0.1
    """Share of captions replaced by the empty prompt, as the DiT's stages do."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=3e-3, warmup_steps=50, decay="linear")


class StyleReadout(nnx.Module):
    """The text encoder and the linear readout that only this stage has."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.text = TextEncoder(config.text, rngs=rngs)
        self.head = nnx.Linear(config.text.dim, len(STYLE), rngs=rngs)

    def __call__(self, tokens: Int[Array, "b l"], valid: Int[Array, "b"]) -> Float[Array, "b s"]:
        """The style that a prompt describes, in the order of `STYLE`; what it leaves open comes out at its mean."""
        counts = (jnp.arange(tokens.shape[1]) < valid[:, None])[..., None]
        return self.head(jnp.sum(self.text(tokens, valid) * counts, axis=1) / valid[:, None])


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage `text_pretrain`. `init` names `clips`, whose tokenizer the DiT's stages use."""

    def build_model(rngs):
        return StyleReadout(config, rngs=rngs)

    model = functional(build_model)
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)
    tokenizer, _ = load_clip_record(init["clips"], config.text.length)

    @functools.cache
    def captions(seed: int, count: int) -> dict[str, np.ndarray]:
        people = jax.jit(jax.vmap(sample_identity))(jax.random.split(jax.random.key(seed), count))
        texts, styles = caption_batch(seed, count, people)
        tokens, valid = tokenizer.encode_batch(texts)
        return {"tokens": tokens, "valid": valid, "style": np.stack([np.asarray(getattr(styles, name)) for name in STYLE], axis=-1)}

    def initial_state() -> TrainState:
        return TrainState.start(initial_params(build_model, jax.random.key(seed)), optimiser)

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, dict]:
        k_row, k_drop = jax.random.split(key)
        row = jax.random.randint(k_row, (settings.batch,), 0, settings.captions)
        dropped = jax.random.uniform(k_drop, (settings.batch,)) < settings.drop
        valid = jnp.where(dropped, 1, data["valid"][row])
        tokens, valid, style = split_batch((data["tokens"][row], valid, data["style"][row]))

        def loss(params: Params) -> Float[Array, ""]:
            return jnp.mean((model.bind(params)(tokens, valid) - style) ** 2)

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.descend(gradient, optimiser, settings.ema), {"loss": value}

    @jax.jit
    def read(params, tokens, valid):
        return model.bind(params)(tokens, valid)

    def evaluate(state: TrainState, data: dict) -> dict[str, float]:
        """Error over unseen captions, and the share of the canonical prompts' attributes that are understood."""
        unseen = captions(HELD_OUT_SEED + seed, settings.held_out)
        error = np.asarray(gather(read(state.ema, unseen["tokens"], unseen["valid"]))) - unseen["style"]
        said = np.asarray(gather(read(state.ema, *tokenizer.encode_batch(list(CANONICAL)))))
        understood = []
        for row, asked in zip(said, CANONICAL.values(), strict=True):
            heard = attributes_of(Style(**dict(zip(STYLE, row, strict=True))))
            understood += [heard[name] == value for name, value in asked.items()]
        return {"loss": float(np.mean(error**2)), "understood": float(np.mean(understood))}

    return Stage(
        name="text_pretrain",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=lambda: captions(seed, settings.captions),
        config={"preset": config.name, "text": dataclasses.asdict(config.text), "stage": settings.record()},
        evaluate=evaluate,
        evaluate_every=settings.every(100),
    )
