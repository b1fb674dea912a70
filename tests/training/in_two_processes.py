"""Run by `test_mesh.py` in two processes that train as one, a device each, weights split between them.

Each of the stages makes one update, one evaluation and one picture, from random weights in small: what is computed by both must not meet what one of
them has alone. Prints the names of the stages that came to their end.
"""

import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import test_reward_stages as of_rewards  # noqa: E402
import test_reward_stages_of_the_dit as of_the_dit  # noqa: E402
import test_self_forcing as of_self_forcing  # noqa: E402
from coded_clips import write_coded  # noqa: E402
from small_corpus import small_corpus  # noqa: E402

from pikastream_jax.data.captions import caption_batch  # noqa: E402
from pikastream_jax.data.corpus import save_corpus  # noqa: E402
from pikastream_jax.rewards import Rewards  # noqa: E402
from pikastream_jax.text import Tokenizer  # noqa: E402
from pikastream_jax.training import (  # noqa: E402
    dit_causal,
    dit_pretrain,
    dit_reward,
    dit_self_forcing,
    dit_sft,
    dit_student_reward,
    latent_reader,
    reward_clips,
    text_pretrain,
    vae_low_res,
    vae_streaming,
)
from pikastream_jax.training import mesh as meshes  # noqa: E402
from pikastream_jax.training.latent_reader import reader_model  # noqa: E402
from pikastream_jax.training.loop import rehearse  # noqa: E402
from pikastream_jax.training.optimiser import OptimiserConfig  # noqa: E402
from pikastream_jax.training.processes import Processes, is_first  # noqa: E402
from pikastream_jax.weights import safetensors_io  # noqa: E402
from tests.small import randomised, small_config, small_models  # noqa: E402

meshes.SMALL = 64  # so that small matrices are split
CONFIG = small_config(chunk=2, window=4, steps=2)
FEW = {"updates": 10, "batch": 2, "optimiser": OptimiserConfig(1e-3, warmup_steps=1)}
STAGES = {
    "vae_low_res": (vae_low_res, vae_low_res.Settings(**FEW, latent_frames=1, crop=16)),
    "vae_streaming": (vae_streaming, vae_streaming.Settings(**FEW, latent_frames=2)),
    "latent_reader": (latent_reader, latent_reader.Settings(**FEW, latent_frames=6)),
    "text_pretrain": (text_pretrain, text_pretrain.Settings(**FEW, captions=20, held_out=20)),
    "dit_pretrain": (dit_pretrain, dit_pretrain.Settings(**FEW, latent_frames=6)),
    "dit_sft": (dit_sft, dit_sft.Settings(**FEW, latent_frames=6)),
    "dit_causal": (dit_causal, dit_causal.Settings(**FEW, latent_frames=6, objective="data")),
    "dit_causal_rolling": (dit_causal, dit_causal.Settings(**FEW, latent_frames=8, objective="data", schedule="rolling")),
    "dit_self_forcing": (dit_self_forcing, of_self_forcing.SETTINGS),
    "dit_reward": (dit_reward, of_the_dit.TEACHER),
    "dit_student_reward": (dit_student_reward, of_the_dit.STUDENT),
    **{f"reward_{name}": (of_rewards.STAGES[name], settings) for name, settings in of_rewards.SETTINGS.items()},
}


def everything(folder: Path) -> dict[str, Path]:
    """What any of the stages starts from."""
    params = small_models(CONFIG)[1]
    weights = {"denoiser": params.denoiser, "teacher": params.denoiser, "flash_vae": params.flash_vae}
    weights["reader"] = randomised(reader_model(CONFIG).abstract, 0)
    weights |= {f"reward_{name}": randomised(model.abstract, 3) for name, model in Rewards.of(CONFIG).models.items()}
    for name, tree in weights.items():
        safetensors_io.save(folder / f"{name}.safetensors", tree, dtype=jnp.float32)
    words = Tokenizer.learn(caption_batch(0, 500)[0], CONFIG.text.vocabulary, CONFIG.text.length).words
    save_corpus(folder / "speech.npz", small_corpus())
    reward_clips.SPEECH, reward_clips.draw = folder / "speech.npz", of_rewards.plain_pictures
    return {name: folder / f"{name}.safetensors" for name in weights} | {"clips": write_coded(folder / "clips", CONFIG, words=list(words))}


def main(out: Path, coordinator: str, index: int, names: list[str]) -> None:
    Processes(coordinator, 2, index).join()
    with tempfile.TemporaryDirectory() as folder:
        init = everything(Path(folder))
        for name in names or STAGES:
            module, settings = STAGES[name]
            rehearse(module.build(CONFIG, 0, init, settings), out / name, mesh=meshes.make_mesh(fsdp=2))
            if is_first():
                print(name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
