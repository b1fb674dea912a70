"""The JAX DiT against diffusers' `WanTransformer3DModel`, code that nobody here wrote: random weights, small sizes, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pikastream_jax.config import DiTConfig
from pikastream_jax.dit.model import Conditions, DiT
from pikastream_jax.nn.layers import functional, initial_params
from pikastream_jax.weights.wan import load_wan
from tests.parity.compare import close, to_torch

pytestmark = pytest.mark.parity
BATCH, FRAMES, HEIGHT, WIDTH, LENGTH, CHANNELS = 2, 3, 4, 6, 5, 4


def wan(head_dim):
    """A Wan model in which no parameter is at rest."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(head_dim)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=16,
        freq_dim=32,
        ffn_dim=72,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "weight" in name:
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 1 or "table" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model.eval()


def ours(model):
    """Our DiT of the same sizes, audio and motion as they are initialised: off."""
    config = model.config
    sizes = DiTConfig(
        dim=config.num_attention_heads * config.attention_head_dim,
        heads=config.num_attention_heads,
        blocks=config.num_layers,
        mlp_dim=config.ffn_dim,
        latent_channels=config.in_channels,
        frequency_dim=config.freq_dim,
        text_dim=config.text_dim,
        audio_dim=12,
    )

    def build(rngs):
        return DiT(sizes, rngs=rngs)

    checkpoint = {name: value.numpy() for name, value in model.state_dict().items()}
    return sizes, functional(build), load_wan(checkpoint, initial_params(build, jax.random.key(0)))


@pytest.mark.parametrize("head_dim", [24, 48])
@pytest.mark.parametrize("per_frame", [False, True], ids=["one timestep", "a timestep per frame"])
def test_velocity(head_dim, per_frame):
    """Wan 2.1: one timestep to a video. Wan 2.2's TI2V model: one to a token, of which ours has one to a latent frame."""
    model = wan(head_dim)
    sizes, dit, params = ours(model)
    rng = np.random.default_rng(head_dim)
    latents = rng.normal(size=(BATCH, FRAMES, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
    text = rng.normal(size=(BATCH, LENGTH, 16)).astype(np.float32)
    t = rng.uniform(size=(BATCH, FRAMES if per_frame else 1)).astype(np.float32)
    if per_frame:
        t[0, 0] = 0.0  # the given first frame of image-to-video

    tokens = HEIGHT * WIDTH // 4
    timestep = to_torch(1000.0 * t).repeat_interleave(tokens, dim=1) if per_frame else to_torch(1000.0 * t[:, 0])
    with torch.no_grad():
        theirs = model(to_torch(latents).permute(0, 4, 1, 2, 3), timestep, to_torch(text)).sample.permute(0, 2, 3, 4, 1)

    @jax.jit
    def velocity(params, latents, t, text, sound):
        bound = dit.bind(params)
        conditions = Conditions(
            bound.text_keys_values(text[:, None]),
            jnp.full((BATCH, 1), LENGTH),
            bound.audio_keys_values(sound),
            jnp.ones((BATCH, FRAMES, sizes.motion)),
        )
        return bound.forward_sequence(
            latents,
            jnp.broadcast_to(t, (BATCH, FRAMES)),
            conditions,
            None,
            chunk_ids=jnp.zeros((BATCH, FRAMES), jnp.int32),
            window=FRAMES,
            reference_distance=jnp.zeros(BATCH),
        )

    sound = rng.normal(size=(BATCH, FRAMES, 3, sizes.audio_dim)).astype(np.float32)
    name = f"Wan velocity, {'timestep per frame' if per_frame else 'one timestep'}"
    close(name, theirs, velocity(params, latents, t, text, sound))


def test_what_does_not_fit_is_named():
    model = wan(24)
    _, _, params = ours(model)
    checkpoint = {name: value.numpy() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not of a Wan text-to-video model: blocks.0.attn2.add_k_proj.weight"):
        load_wan(checkpoint | {"blocks.0.attn2.add_k_proj.weight": np.zeros((2, 2))}, params)
    short = {name: value for name, value in checkpoint.items() if name != "proj_out.bias"}
    with pytest.raises(ValueError, match="missing head.projection.bias"):
        load_wan(short, params)
