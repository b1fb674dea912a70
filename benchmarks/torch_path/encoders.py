"""Sound and prompt to tokens, and the denoiser that owns both encoders and the DiT."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.torch_path.dit import DiT
from benchmarks.torch_path.layers import Block, RMSNorm
from pikastream_jax.config import AudioConfig, Config, TextConfig


class AudioEncoder(nn.Module):
    """A slice of sound, as log-mel, -> its tokens."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.patch_in = nn.Linear(config.mel_frames // config.tokens * config.mels, config.dim)
        self.position_table = nn.Parameter(torch.zeros(config.tokens, config.dim))
        self.blocks = nn.ModuleList([Block(config.dim, config.heads, config.heads, 3.0) for _ in range(config.blocks)])
        self.norm_out = RMSNorm(config.dim)

    def forward(self, mel: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b a d"]:
        """Args: mel: normalised log-mel of whole slices; equal numbers of mel frames make each token."""
        x = mel.flatten(0, -3).unflatten(1, (self.position_table.shape[0], -1)).flatten(2)
        x = self.patch_in(x) + self.position_table
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x).unflatten(0, mel.shape[:-2])


class TextEncoder(nn.Module):
    """A small bidirectional Transformer over a prompt."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embedding_table = nn.Parameter(torch.zeros(config.vocabulary, config.dim))
        self.position_table = nn.Parameter(torch.zeros(config.length, config.dim))
        self.blocks = nn.ModuleList([Block(config.dim, config.heads, config.heads, 3.0) for _ in range(config.blocks)])
        self.norm_out = RMSNorm(config.dim)

    def forward(self, tokens: Int[Tensor, "b l"], valid: Int[Tensor, "b"]) -> Float[Tensor, "b l d"]:
        """Args: tokens: padded token numbers, of which the first `valid` count."""
        x = self.embedding_table[tokens] + self.position_table
        for block in self.blocks:
            x = block(x, valid=valid)
        return self.norm_out(x)


class Denoiser(nn.Module):
    """Everything between (noise, sound, prompt, reference) and latents that has parameters."""

    def __init__(self, config: Config):
        super().__init__()
        self.dit = DiT(config.dit)
        self.audio = AudioEncoder(config.audio)
        self.text = TextEncoder(config.text)
        # Stands for "no sound given" in training; a stream always hears.
        self.null_audio_table = nn.Parameter(torch.zeros(config.audio.tokens, config.audio.dim))
