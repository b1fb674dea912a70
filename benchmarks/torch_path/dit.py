"""The DiT, one chunk at a time: Wan's block plus frame-wise audio cross-attention."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.torch_path.cache import LayerCache, RollingCache
from benchmarks.torch_path.layers import MLP, LayerNorm, RMSNorm, attention
from benchmarks.torch_path.rope import Rope, Tables, patchify, rotate, unpatchify
from pikastream_jax.config import DiTConfig

KeysValues = tuple[Float[Tensor, "layers b s h e"], Float[Tensor, "layers b s h e"]]
FP8_LAYERS = ("self_attention.qkv", "self_attention.o", "text_attention.q", "text_attention.o") + (
    "audio_attention.q",
    "audio_attention.o",
    "mlp.up",
    "mlp.down",
)  # of a block: what every denoising step multiplies


def timestep_embedding(t: Float[Tensor, "*b"], dim: int) -> Float[Tensor, "*b d"]:
    """Cosines, then sines, of 1000 t at `dim` / 2 frequencies from 1 down to 1 / 10,000."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = 1000.0 * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x: Float[Tensor, "b f n d"], shift: Tensor, scale: Tensor, eps: float) -> Float[Tensor, "b f n d"]:
    """LayerNorm without parameters, then a shift and scale per frame [b, f, 1, d], in float32."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


class SelfAttention(nn.Module):
    """Projections of self-attention: one product for queries, keys and values, RMSNorm over the full width."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.qkv = nn.Linear(d, 3 * d)
        self.o = nn.Linear(d, d)
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)

    def project(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys before RoPE, and values, each [b, n, h, e]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in (self.norm_q(q), self.norm_k(k), v))


class CrossAttention(nn.Module):
    """Attention to text or sound whose keys and values were computed before."""

    def __init__(self, config: DiTConfig, context_dim: int):
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(context_dim, 2 * d), nn.Linear(d, d)
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)

    def keys_values(self, context: Float[Tensor, "b s c"]) -> tuple[Float[Tensor, "b s h e"], Float[Tensor, "b s h e"]]:
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.norm_k(k).unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Float[Tensor, "b n d"], k: Float[Tensor, "b s h e"], v: Float[Tensor, "b s h e"]) -> Float[Tensor, "b n d"]:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        return self.o(attention(q, k, v).flatten(-2))


class DiTBlock(nn.Module):
    """Self-attention, text cross-attention, audio cross-attention, MLP."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.dim
        self.modulation = nn.Parameter(torch.zeros(6, d))
        self.self_attention = SelfAttention(config)
        self.norm_text = LayerNorm(d, config.eps)
        self.text_attention = CrossAttention(config, d)
        self.norm_audio = LayerNorm(d, config.eps)
        self.audio_attention = CrossAttention(config, config.audio_dim)
        self.mlp = MLP(d, config.mlp_dim, d)
        self.eps = config.eps

    def _modulation(self, time: Float[Tensor, "b f 6 d"]) -> tuple[Tensor, ...]:
        return (time.float() + self.modulation.float())[:, :, :, None].unbind(2)

    def forward(
        self,
        x: Float[Tensor, "b f n d"],
        time: Float[Tensor, "b f 6 d"],
        here: Tables,
        cache: LayerCache,
        text: tuple[Float[Tensor, "b l h e"], Float[Tensor, "b l h e"]],
        audio: tuple[Float[Tensor, "bf a h e"], Float[Tensor, "bf a h e"]],
    ) -> Float[Tensor, "b f n d"]:
        """A chunk's tokens; `cache` takes their keys and values. Each frame attends to its own audio tokens."""
        frames = x.shape[1]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(time)
        q, k, v = self.self_attention.project(modulate(x, shift_a, scale_a, self.eps).flatten(1, 2))
        keys, values = cache.write(k, rotate(k, here), v)
        attended = self.self_attention.o(attention(rotate(q, here), keys, values).flatten(-2))
        x = (x + gate_a * attended.unflatten(1, (frames, -1))).to(x.dtype)
        x = x + self.text_attention(self.norm_text(x).flatten(1, 2), *text).unflatten(1, (frames, -1))
        x = x + self.audio_attention(self.norm_audio(x).flatten(0, 1), *audio).unflatten(0, (-1, frames))
        return (x + gate_m * self.mlp(modulate(x, shift_m, scale_m, self.eps))).to(x.dtype)

    def reference(self, x: Float[Tensor, "b 1 n d"], time: Float[Tensor, "b 1 6 d"], tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's tokens, which see only themselves -> their new values, keys before RoPE and values [b, n, h, e]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(time)
        q, k, v = self.self_attention.project(modulate(x, shift_a, scale_a, self.eps).flatten(1, 2))
        attended = self.self_attention.o(attention(rotate(q, tables), rotate(k, tables), v).flatten(-2))
        x = (x + gate_a * attended[:, None]).to(x.dtype)
        x = (x + gate_m * self.mlp(modulate(x, shift_m, scale_m, self.eps))).to(x.dtype)
        return x, k, v


class OutputHead(nn.Module):
    """LayerNorm modulated by the timestep through its own [2, d] table, then a projection to a token's latents."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(2, config.dim))
        self.projection = nn.Linear(config.dim, config.patch**2 * config.latent_channels)
        self.eps = config.eps

    def forward(self, x: Float[Tensor, "b f n d"], embedding: Float[Tensor, "b f d"]) -> Float[Tensor, "b f n p"]:
        shift, scale = (embedding.float()[:, :, None] + self.modulation.float())[:, :, :, None].unbind(2)
        return self.projection(modulate(x, shift, scale, self.eps))


class DiT(nn.Module):
    """Noisy latents and conditions -> velocity (noise - clean)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        d = config.dim
        self.patch_in = nn.Linear(config.patch**2 * config.latent_channels, d)
        self.text_embed = MLP(config.text_dim, d, d)
        self.time_embed_in = nn.Linear(config.frequency_dim, d)
        self.time_embed_out = nn.Linear(d, d)
        self.time_projection = nn.Linear(d, 6 * d)
        self.motion_embed = nn.Linear(config.motion, d, bias=False)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.blocks)])
        self.head = OutputHead(config)

    def text_keys_values(self, text: Float[Tensor, "b l c"]) -> KeysValues:
        """Every layer's keys and values of the prompt; once per prompt."""
        context = self.text_embed(text)
        return _stack([block.text_attention.keys_values(context) for block in self.blocks])

    def audio_keys_values(self, audio: Float[Tensor, "b f a c"]) -> KeysValues:
        """Every layer's keys and values of the audio tokens, frames as rows of the batch; once per chunk."""
        return _stack([block.audio_attention.keys_values(audio.flatten(0, 1)) for block in self.blocks])

    def reference_keys_values(self, reference: Float[Tensor, "b r c z"], rope: Rope) -> KeysValues:
        """Every layer's keys before RoPE and values of a reference's latents; once per reference.

        Reference tokens have timestep 0 and no motion, attend only to themselves and take neither text nor audio.
        """
        x = self.patch_in(patchify(reference, self.config.patch))[:, None]
        still = torch.zeros(*x.shape[:2], self.config.motion, dtype=x.dtype, device=x.device)
        _, time = self.time(torch.zeros(x.shape[:2], device=x.device), still)
        tables = rope.tables(torch.zeros(1, device=x.device))
        pairs = []
        for block in self.blocks:
            x, k, v = block.reference(x, time, tables)
            pairs.append((k, v))
        return _stack(pairs)

    def time(self, t: Float[Tensor, "*b"], motion: Float[Tensor, "*b m"]) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b 6 d"]]:
        """What the head and what the blocks are modulated by; for all denoising steps at once."""
        embedding = timestep_embedding(t, self.config.frequency_dim).to(self.time_embed_in.weight.dtype)
        embedding = self.time_embed_out(F.silu(self.time_embed_in(embedding))) + self.motion_embed(motion)
        return embedding, self.time_projection(F.silu(embedding)).unflatten(-1, (6, -1))

    def forward(
        self,
        latents: Float[Tensor, "b f r c z"],
        time: tuple[Float[Tensor, "b f d"], Float[Tensor, "b f 6 d"]],
        text: KeysValues,
        audio: KeysValues,
        cache: RollingCache,
    ) -> Float[Tensor, "b f r c z"]:
        """Velocity of one chunk, float32; the cache, whose keys are turned, takes the chunk's own keys and values."""
        rows, columns = (size // self.config.patch for size in latents.shape[2:4])
        embedding, modulation = time
        x = self.embed(latents)
        for index, block in enumerate(self.blocks):
            parts = (text[0][index], text[1][index]), (audio[0][index], audio[1][index])
            x = block(x, modulation, cache.here, cache.layer(index), *parts)
        return self.unembed(x, embedding, rows, columns)

    def embed(self, latents: Float[Tensor, "b f r c z"]) -> Float[Tensor, "b f n d"]:
        """Tokens of a chunk's latents."""
        return self.patch_in(patchify(latents.to(self.patch_in.weight.dtype), self.config.patch))

    def unembed(self, x: Float[Tensor, "b f n d"], embedding: Float[Tensor, "b f d"], rows: int, columns: int) -> Float[Tensor, "b f r c z"]:
        """The last tokens of a grid of rows x columns -> velocity, float32."""
        return unpatchify(self.head(x, embedding).float(), self.config.patch, rows, columns)


def _stack(pairs: list[tuple[Tensor, Tensor]]) -> KeysValues:
    keys, values = zip(*pairs, strict=True)
    return torch.stack(keys), torch.stack(values)
