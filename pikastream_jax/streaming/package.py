"""The one file that a stream needs: weights of all models, latent statistics, vocabulary, the preset they belong to, and how they stream best."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.streaming.step import ModelParams, Models
from pikastream_jax.text import Tokenizer
from pikastream_jax.weights import safetensors_io

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = ASSETS / "tiny.safetensors"
# Fields of `StreamConfig` that come from the file: a student is trained for one schedule, and may be best in other steps than it was trained in.
OWN = ("schedule", "steps")


@dataclasses.dataclass(frozen=True)
class Package:
    """What `load_package` reads."""

    models: Models
    params: ModelParams
    tokenizer: Tokenizer
    metadata: dict[str, Any]  # how the weights were made: commands, seeds, updates

    @property
    def config(self) -> Config:
        return self.models.config


def save_package(path: Path, config: Config, params: ModelParams, tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Writes the file, weights in bfloat16. Of `config.stream` the fields `OWN` are kept; the rest is the preset's when it is loaded."""
    tree = {
        "denoiser": params.denoiser,
        "flash_vae": params.flash_vae,
        "statistics": {"mean": params.statistics.mean, "std": params.statistics.std},
    }
    record = {"config": dataclasses.asdict(config), "words": list(tokenizer.words), "made": metadata}
    safetensors_io.save(path, tree, {"pikastream": json.dumps(record)})


def load_package(path: Path | None = None, **stream: Any) -> Package:
    """Reads a file written by `save_package`; the shipped one when `path` is None.

    Args:
      path: the file.
      stream: fields of `StreamConfig` that shall differ from the file's (`OWN`) or the preset's (all others); weights are read in the precision's dtype.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no package, its sizes are not those of its preset, or `stream` makes no sense.
    """
    path = SHIPPED if path is None else Path(path)
    loaded, header = safetensors_io.load(path)
    if "pikastream" not in header:
        raise ValueError(f"{path} holds no pikastream-jax model: make one with `python -m pikastream_jax.training.export`")
    record = json.loads(header["pikastream"])
    stored = record["config"]
    own = {name: stored["stream"][name] for name in OWN if name in stored["stream"]}  # the first releases name no schedule
    config = preset(stored["name"], **(own | stream))
    present = dataclasses.asdict(config)
    for part in ("audio", "text", "flash_vae", "dit"):
        if stored[part] != present[part]:
            raise ValueError(f"{path} was made for {part} {stored[part]}, but the preset {config.name!r} has {present[part]}")
    models = Models.of(config)
    statistics = safetensors_io.restore_into(
        {"mean": jnp.zeros(config.dit.latent_channels), "std": jnp.zeros(config.dit.latent_channels)},
        loaded.get("statistics", {}),
    )

    def restored(name):
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.stream.dtype), getattr(models, name).abstract)
        return safetensors_io.restore_into(wanted, loaded.get(name, {}))

    params = ModelParams(
        restored("denoiser"),
        restored("flash_vae"),
        LatentStatistics(**statistics),
    )
    tokenizer = Tokenizer(record["words"], config.text.length)
    if tokenizer.size > config.text.vocabulary:
        raise ValueError(f"{path} has {tokenizer.size} text pieces, the preset {config.name!r} holds {config.text.vocabulary}")
    return Package(models, params, tokenizer, record["made"])
