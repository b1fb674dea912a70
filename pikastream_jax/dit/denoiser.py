"""The DiT with the encoders of sound and prompt that belong to it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pikastream_jax.audio.encoder import AudioEncoder
from pikastream_jax.config import Config
from pikastream_jax.dit.model import Conditions, DiT, KeysValues
from pikastream_jax.text.encoder import TextEncoder


class Denoiser(nnx.Module):
    """Everything between (noise, sound, prompt, reference) and latents that has parameters."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.dit = DiT(config.dit, impl=config.stream.attention, rngs=rngs)
        self.audio = AudioEncoder(config.audio, impl=config.stream.attention, rngs=rngs)
        self.text = TextEncoder(config.text, impl=config.stream.attention, rngs=rngs)
        self.null_audio_table = nnx.Param(0.1 * rngs.params.normal((config.audio.tokens, config.audio.dim)))

    def text_conditions(
        self, tokens: Int[Array, "b s l"], valid: Int[Array, "b s"], frame_prompt: Int[Array, "b f"] | None = None
    ) -> tuple[KeysValues, Int[Array, "b s"]]:
        """Keys and values of prompts.

        Args:
          tokens, valid: s prompts per row.
          frame_prompt: which of them each latent frame follows; None for a single prompt.
        """
        b, s, length = tokens.shape
        text = self.text(tokens.reshape(b * s, length), valid.reshape(b * s)).reshape(b, s, length, -1)
        kv = self.dit.text_keys_values(text)
        if frame_prompt is None:
            return kv, valid
        index = frame_prompt[None, :, :, None, None, None]
        kv = KeysValues(jnp.take_along_axis(kv.k, index, axis=2), jnp.take_along_axis(kv.v, index, axis=2))
        return kv, jnp.take_along_axis(valid, frame_prompt, axis=1)

    def conditions(
        self,
        text: KeysValues,
        text_valid: Int[Array, "b s"],
        mel: Float[Array, "b f m k"],
        motion: Float[Array, "b f n"],
        keep_audio: Bool[Array, "b"] | None = None,
    ) -> Conditions:
        """Conditions from prompts, and from the log-mel slice and the motion's news of every latent frame.

        Args:
          motion: see `Conditions`.
          keep_audio: rows that hear; the others get the learned "no sound given" tokens, for guidance.
        """
        audio = self.audio(mel)
        if keep_audio is not None:
            audio = jnp.where(keep_audio[:, None, None, None], audio, self.null_audio_table[...])
        return Conditions(text, text_valid, self.dit.audio_keys_values(audio), motion)
