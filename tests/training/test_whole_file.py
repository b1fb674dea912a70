import pytest
from toy_stage import full_disk

from pikastream_jax.training.whole_file import write_whole


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    write_whole(path, "before")
    with full_disk(100), pytest.raises(OSError):
        write_whole(path, b"x" * 1000)
    assert path.read_text() == "before"
    write_whole(path, "after")
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"] and path.read_text() == "after"
