"""What devices would hold, against sums by hand; updates of the full-size DiT traced for many devices without allocating them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import preset
from pikastream_jax.nn.layers import parameter_count
from pikastream_jax.training import shards
from pikastream_jax.training.mesh import make_mesh
from tests.small import small_config


def test_bytes_of_a_device_by_hand():
    """Over fsdp 4: a quarter of the large leaf, the small leaf whole."""
    tree = {"large": jax.ShapeDtypeStruct((512, 2048), jnp.float32), "small": jax.ShapeDtypeStruct((512,), jnp.bfloat16)}
    assert shards.device_bytes(make_mesh(fsdp=4, devices=8), tree) == 512 * 2048 * 4 // 4 + 512 * 2


def test_the_full_size_stages_are_split():
    """9.3 billion parameters in float32 over 8 and 64 devices, and what each optimiser keeps of them: AdamW two moments; Muon one of its matrices,
    and two of the rest, among them the attention to prompts (4 x 4096^2 x 30, 22%).
    """
    config = preset("pikastream_9b")
    params = parameter_count(shards.large_model(config).abstract)
    whole = 4 * params
    for stage, moments, others in (("dit_pretrain", (1.22, 1.3), 0), ("dit_self_forcing", (2.0, 2.06), 1 + 2 + 0.5)):
        trees = shards.held_trees(config, stage)
        for devices, fsdp in ((8, 8), (512, 64)):
            mesh = make_mesh(fsdp=fsdp, devices=devices)
            held = {name: shards.device_bytes(mesh, tree) / (whole / fsdp) for name, tree in trees.items()}
            # A percent or two are small leaves, which every device holds whole.
            assert all(held[name] == pytest.approx(1, rel=0.03) for name in ("parameters", "average", "gradients"))
            assert moments[0] <= held["optimiser"] <= moments[1]
            rest = sum(value for name, value in held.items() if name not in ("parameters", "average", "gradients", "optimiser"))
            assert rest == pytest.approx(others, rel=0.03)
    with pytest.raises(ValueError, match="no shapes for stage 'dit_sft'"):
        shards.held_trees(config, "dit_sft")


@pytest.mark.parametrize("stage", shards.STAGES)
def test_an_update_is_lowered_for_many_devices(stage):
    """On the small preset: rows and latent frames are split where it says so, and the program is one for 512 devices."""
    text = shards.lower_update(small_config(), stage, make_mesh(fsdp=64, sequence=2, devices=512), frames=4)
    assert "num_partitions = 512" in text
    assert '{"data", "fsdp"}, {"sequence"}' in text, "activations"


@pytest.mark.slow
def test_the_full_size_update_is_lowered_for_512_devices():
    text = shards.lower_update(preset("pikastream_9b"), "dit_pretrain", make_mesh(fsdp=64, devices=512), frames=21)
    assert "num_partitions = 512" in text and '"fsdp"' in text


def test_a_row_keeps_the_inputs_of_the_blocks():
    """What one block more adds, by hand: bfloat16 inputs of video and reference tokens, keys and values of text, sound and reference."""
    config, frames = small_config(), 4

    def kept(blocks):
        deeper = dataclasses.replace(config, dit=dataclasses.replace(config.dit, blocks=blocks))
        return shards.kept_bytes_of_a_row(deeper, shards.clip_loss, frames)

    n = config.tokens_per_frame
    inputs = frames * n + n
    keys_and_values = 2 * (config.text.length + frames * config.audio.tokens + n)
    assert kept(3) - kept(2) == 2 * config.dit.dim * (inputs + keys_and_values)
