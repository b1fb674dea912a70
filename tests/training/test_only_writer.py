import os
import subprocess
import sys
import textwrap

import pytest
from test_records import PLAN, make
from toy_stage import toy_stage

from pikastream_jax.training.loop import run
from pikastream_jax.training.only_writer import only_writer
from pikastream_jax.training.recipe import run_recipe
from pikastream_jax.training.records import write_records


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    code = textwrap.dedent("""
        import sys
        from pikastream_jax.training.only_writer import only_writer
        with only_writer(sys.argv[1]):
            print("held", flush=True)
            sys.stdin.read()
    """)
    folder = tmp_path / "made.partial"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield folder, process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: run(toy_stage(), folder),
        lambda folder: run_recipe("nano", folder, 0, None),
        lambda folder: write_records(folder.with_name("made"), PLAN, make),
    ],
    ids=["stage", "recipe", "records"],
)
def test_who_comes_second_is_refused_and_writes_nothing(held, write):
    folder, _ = held
    with pytest.raises(ValueError, match="another process is writing into .*made.partial: wait"):
        write(folder)
    assert os.listdir(folder) == []


def test_who_was_killed_holds_nothing(held):
    folder, process = held
    process.kill()
    process.wait()
    with only_writer(folder):
        pass
