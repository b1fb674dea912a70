import numpy as np
import pytest
from coded_clips import write_coded
from toy_stage import toy_stage

from pikastream_jax.training.loop import run
from pikastream_jax.training.origins import origins
from tests.small import small_config


def test_a_run_is_known_by_its_settings_and_how_far_it_went(tmp_path):
    def of(folder):
        return origins({"denoiser": tmp_path / folder})["denoiser"]

    run(toy_stage(20), tmp_path / "one", steps=10)
    early = of("one")
    assert early.startswith("one, 10 updates (")
    run(toy_stage(20), tmp_path / "one")
    assert of("one").startswith("one, 20 updates (") and of("one") != early
    run(toy_stage(20, seed=1), tmp_path / "other" / "one")
    assert of("other/one") != of("one"), "another seed, as far"
    run(toy_stage(10), tmp_path / "one")
    assert of("one").startswith("one, 20 updates (") and of("one") == of("one"), "nothing was trained"
    (tmp_path / "one").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "other" / "two")
    assert of("other/two").removeprefix("two") == f", 20 updates ({early.split('(')[1]}", "a run may be moved"


def test_records_and_files_are_known_by_what_they_hold(tmp_path):
    config = small_config()
    first, again = (write_coded(tmp_path / name, config) for name in ("first", "again"))
    other = write_coded(tmp_path / "other", config, flash_vae="another")
    more = write_coded(tmp_path / "more", config, count=5)
    names = [origins({"clips": folder})["clips"] for folder in (first, again, other, more)]
    assert names[0] == names[1] and len(set(names)) == 3
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"one")
    one = origins({"flash_vae": file})["flash_vae"]
    file.write_bytes(b"two")
    assert one.startswith("weights.safetensors (") and origins({"flash_vae": file})["flash_vae"] != one


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder: it has no checkpoints/"):
        origins({"denoiser": tmp_path})
    assert np.size(list(tmp_path.iterdir())) == 0
