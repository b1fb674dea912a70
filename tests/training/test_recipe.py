"""The recipe: order, hand-over, going on where it was stopped, and what it says when a step fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from pikastream_jax.training.recipe import RECIPE, Step, run_recipe
from pikastream_jax.training.stages import STAGES, Entry

ROOT = Path(train.__file__).resolve().parent
STEPS = (Step("first", "toy"), Step("pairs", "some.module"), Step("second", "toy", ("--nan-loss-at", "99")))


class Machine:
    """Plays the processes: a stage does `reach` of its 60 updates, another command makes its folder."""

    def __init__(self, reach=60, fails=None):
        self.reach, self.fails, self.asked = reach, fails, []

    def __call__(self, command):
        self.asked.append(command)
        out = Path(command[command.index("--out") + 1])
        if out.name == self.fails:
            return 3
        (out / "checkpoints" / str(self.reach)).mkdir(parents=True)
        return 0


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(STAGES, "toy", Entry("toy_stage"))


def test_steps_run_in_order_and_complete_ones_are_passed_over(tmp_path, capsys):
    machine = Machine()
    run_recipe("tiny", tmp_path, 5, None, STEPS, machine)
    common = ["--config", "tiny", "--runs", str(tmp_path), "--seed", "5", "--out"]
    assert machine.asked == [
        [sys.executable, "train.py", "toy", *common, str(tmp_path / "first")],
        [sys.executable, "-m", "some.module", *common, str(tmp_path / "pairs")],
        [sys.executable, "train.py", "toy", *common, str(tmp_path / "second"), "--nan-loss-at", "99"],
    ]
    assert "recipe: complete" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "recipe.json").read_text())) == {"first", "pairs", "second"}
    again = Machine()
    run_recipe("tiny", tmp_path, 5, None, STEPS, again)
    assert not again.asked


def test_a_step_cut_short_ends_the_stretch_and_is_continued(tmp_path, capsys):
    machine = Machine(reach=30)
    run_recipe("tiny", tmp_path, 0, 8.0, STEPS, machine)
    assert len(machine.asked) == 1 and float(machine.asked[0][-1]) == pytest.approx(8.0, abs=0.1)
    assert "recipe: left: first, pairs, second" in capsys.readouterr().err
    machine.reach = 60
    run_recipe("tiny", tmp_path, 0, 8.0, STEPS, machine)
    assert len(machine.asked) == 4 and "--minutes" not in machine.asked[2], "a command that is no stage runs to its end"


def test_no_time_no_step(tmp_path):
    machine = Machine()
    run_recipe("tiny", tmp_path, 0, 0.5, STEPS, machine)
    assert not machine.asked


def test_a_failure_names_the_step_and_what_is_done_stays(tmp_path):
    with pytest.raises(ValueError, match="stopped at pairs .exit status 3.; the same command goes on"):
        run_recipe("tiny", tmp_path, 0, None, STEPS, Machine(fails="pairs"))
    machine = Machine()
    run_recipe("tiny", tmp_path, 0, None, STEPS, machine)
    assert len(machine.asked) == 2


def test_every_step_is_a_stage_or_a_module_and_finds_what_it_needs():
    """In the order of the recipe each need is met by a run before it."""
    made = set()
    for step in RECIPE:
        if step.is_stage:
            for name, runs in STAGES[step.stage].needs.items():
                assert made & set(runs), (step.run, name)
        else:
            assert (ROOT / (step.stage.replace(".", "/") + ".py")).is_file()
        made.add(step.run)
    assert len(made) == len(RECIPE)


def test_sigterm_reaches_the_step(tmp_path):
    """The process under the recipe is asked to stop, and the recipe waits until it has left."""
    step = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True); time.sleep(60)"
    code = f"from pikastream_jax.training.recipe import _call; import sys; print('left', _call([sys.executable, '-c', {step!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().strip() == "up"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0].strip() == "left 0"
    finally:
        process.kill()


def test_the_recipe_refuses_an_unknown_preset(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe", "--config", "huge"])
    assert train.main() == 1
    assert "train.py: no preset is called 'huge'" in capsys.readouterr().err
