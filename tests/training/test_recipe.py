"""The recipe: order, hand-over, steps side by side, going on where it was stopped, and what it says when a step fails."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

import train
from configs import preset
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.nn.layers import functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.recipe import run_recipe
from pikastream_jax.training.rehearsal import Rehearsals
from pikastream_jax.training.stages import STAGES, Entry
from pikastream_jax.training.steps import RECIPE, Step
from pikastream_jax.weights.safetensors_io import restore_into

ROOT = Path(train.__file__).resolve().parent
STEPS = (Step("first", "toy"), Step("pairs", "some.module", reads=("first",)), Step("second", "taker", ("--nan-loss-at", "99")))


@pytest.fixture(autouse=True)
def _environment():
    """A recipe sets variables for the processes that it starts: tests that come later are to run without them."""
    with mock.patch.dict(os.environ):
        yield


class Machine:
    """Plays the processes: a stage does `reach` of its 60 updates, another command makes its folder. A command ends when it is asked for the
    `slow`-th time whether it has; those in `deaf` do not save when they are stopped, they end by the signal."""

    def __init__(self, reach=60, fails=None, slow=None, deaf=()):
        self.reach, self.fails, self.slow, self.deaf = reach, fails, slow or {}, deaf
        self.asked, self.nice, self.log, self.stopped, self.closed = [], [], [], [], 0

    def __call__(self, niceness):
        return Played(self, niceness)


class Played:
    def __init__(self, machine, niceness):
        self.machine, self.niceness, self.name, self.left = machine, niceness, None, 0

    def run(self, command):
        self.machine.asked.append(command)
        self.machine.nice.append(self.niceness)
        self.out = Path(command[command.index("--out") + 1])
        self.name, self.left = self.out.name, self.machine.slow.get(self.out.name, 0)
        self.machine.log.append(f"{self.name} begins")

    def status(self):
        if self.name is None:
            return 0
        if self.left:
            self.left -= 1
            return None
        name, self.name = self.name, None
        self.machine.log.append(f"{name} ends")
        if name == self.machine.fails:
            return 3
        if name in self.machine.deaf and name in self.machine.stopped:
            return -signal.SIGTERM
        (self.out / "checkpoints" / str(self.machine.reach)).mkdir(parents=True)
        return 0

    def stop(self):
        self.machine.stopped.append(self.name)
        self.left = 0

    def close(self):
        self.machine.closed += 1


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(STAGES, "toy", Entry("toy_stage"))
    monkeypatch.setitem(STAGES, "taker", Entry("toy_stage", needs={"pairs": ("pairs",)}))


def test_steps_run_in_order_and_complete_ones_are_passed_over(tmp_path, capsys):
    machine = Machine()
    run_recipe("tiny", tmp_path, 5, None, steps=STEPS, worker=machine)
    common = ["--config", "tiny", "--runs", str(tmp_path), "--seed", "5", "--out"]
    assert machine.asked == [
        ["train.py", "toy", *common, str(tmp_path / "first")],
        ["-m", "some.module", *common, str(tmp_path / "pairs")],
        ["train.py", "taker", *common, str(tmp_path / "second"), "--nan-loss-at", "99"],
    ]
    assert machine.log == [f"{name} {what}" for name in ("first", "pairs", "second") for what in ("begins", "ends")]
    assert machine.closed == 3
    assert "recipe: complete" in capsys.readouterr().err
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert (record["config"], record["seed"], set(record["minutes"])) == ("tiny", 5, {"first", "pairs", "second"})
    again = Machine()
    run_recipe("tiny", tmp_path, 5, None, steps=STEPS, worker=again)
    assert not again.asked


def test_steps_run_side_by_side_as_soon_as_what_they_take_is_there(tmp_path):
    machine = Machine(slow={"first": 4, "free": 2})
    steps = (*STEPS, Step("free", "toy"), Step("last", "toy"))
    run_recipe("tiny", tmp_path, 0, None, jobs=2, steps=steps, worker=machine)
    assert machine.log[:3] == ["first begins", "free begins", "free ends"], "what waits for the first step is passed over"
    assert machine.log.index("first ends") < machine.log.index("pairs begins")
    assert machine.log.index("pairs ends") < machine.log.index("second begins")
    running = 0
    for event in machine.log:
        running += 1 if event.endswith("begins") else -1
        assert running <= 2
    assert {path.name for path in tmp_path.iterdir()} == {step.run for step in steps} | {"recipe.json"}


def test_a_step_takes_nothing_from_steps_behind_it(tmp_path):
    """What could also hand something over, but comes later in the recipe, is not waited for."""
    steps = (Step("pairs", "toy"), Step("second", "taker"), Step("third", "toy"))
    STAGES["taker"].needs["pairs"] = ("third", "pairs")
    machine = Machine()
    run_recipe("tiny", tmp_path, 0, None, steps=steps, worker=machine)
    assert machine.log[::2] == ["pairs begins", "second begins", "third begins"]


def test_processes_side_by_side_do_not_tune_what_they_compile(tmp_path, monkeypatch):
    names = ("XLA_FLAGS", "JAX_THREEFRY_GPU_KERNEL_LOWERING")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    run_recipe("tiny", tmp_path / "alone", 0, None, steps=STEPS, worker=Machine())
    assert not set(names) & set(os.environ)
    run_recipe("tiny", tmp_path / "two", 0, None, jobs=2, steps=STEPS, worker=Machine())
    assert "fusion_autotuner=false" in os.environ["XLA_FLAGS"]
    # XLA ends a process that is given a flag it does not know.
    code = "import jax; print(jax.config.jax_threefry_gpu_kernel_lowering, jax.numpy.ones(3).sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.stdout.split() == ["True", "3.0"], done.stderr
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    run_recipe("tiny", tmp_path / "own", 0, None, jobs=2, steps=STEPS, worker=Machine())
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=4", "what the user sets is kept"


def test_no_job_at_a_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--jobs 0 must be at least 1"):
        run_recipe("tiny", tmp_path, 0, None, jobs=0, steps=STEPS, worker=Machine())


def test_a_step_cut_short_ends_the_stretch_and_is_continued(tmp_path, capsys):
    machine = Machine(reach=30)
    run_recipe("tiny", tmp_path, 0, 8.0, steps=STEPS, worker=machine)
    assert len(machine.asked) == 1 and float(machine.asked[0][-1]) == pytest.approx(8.0, abs=0.1)
    assert "recipe: left: first, pairs, second" in capsys.readouterr().err
    machine.reach = 60
    run_recipe("tiny", tmp_path, 0, 8.0, steps=STEPS, worker=machine)
    assert len(machine.asked) == 4 and "--minutes" not in machine.asked[2], "a command that is no stage runs to its end"


def test_no_time_no_step(tmp_path):
    machine = Machine()
    run_recipe("tiny", tmp_path, 0, 0.5, steps=STEPS, worker=machine)
    assert not machine.asked


def test_in_the_last_minute_only_what_has_rehearsed_begins(tmp_path, monkeypatch):
    """A stage whose programs are there comes to updates soon and saves them; what is no stage would not be cut short."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    steps = (Step("first", "toy"), Step("pairs", "some.module", reads=("first",)), Step("next", "toy"))
    machine = Machine(slow={"first": 30})
    monkeypatch.setattr(time, "monotonic", lambda: 30.0 if "first ends" in machine.log else 0.0)
    run_recipe("nano", tmp_path, 0, 70 / 60, rehearse=True, steps=steps, worker=machine)
    begun = [Path(command[command.index("--out") + 1]) for command in machine.asked]
    assert [path.name for path in begun if path.parent == tmp_path] == ["first", "next"]


def test_a_failure_names_the_step_and_what_is_done_stays(tmp_path):
    machine = Machine(fails="pairs", slow={"free": 99})
    with pytest.raises(ValueError, match="stopped at pairs .exit status 3.; the same command goes on"):
        run_recipe("tiny", tmp_path, 0, None, jobs=2, steps=(*STEPS, Step("free", "toy")), worker=machine)
    assert machine.stopped == ["free"] and (tmp_path / "free" / "checkpoints" / "60").exists(), "the step beside it saves"
    assert set(json.loads((tmp_path / "recipe.json").read_text())["minutes"]) == {"first", "pairs", "free"}, "what was spent is kept"
    machine = Machine()
    run_recipe("tiny", tmp_path, 0, None, steps=STEPS, worker=machine)
    assert len(machine.asked) == 2


def test_sigterm_stops_what_runs_and_nothing_new_begins(tmp_path):
    machine = Machine(slow={"first": 10_000})
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    run_recipe("tiny", tmp_path, 0, None, steps=STEPS, worker=machine)
    assert machine.log == ["first begins", "first ends"] and machine.stopped == ["first"]


def test_what_a_signal_ends_before_it_could_save_is_no_failure(tmp_path, capsys):
    machine = Machine(slow={"first": 10_000, "free": 10_000}, deaf=("first",))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    run_recipe("tiny", tmp_path, 0, None, jobs=2, steps=(*STEPS, Step("free", "toy")), worker=machine)
    assert machine.stopped == ["first", "free"]
    assert (tmp_path / "free" / "checkpoints" / "60").exists() and "recipe: left: first, pairs, second" in capsys.readouterr().err


def test_what_fails_while_it_is_stopped_is_a_failure(tmp_path):
    """A full disk is found when the stage saves."""
    machine = Machine(slow={"first": 10_000}, fails="first")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(ValueError, match="stopped at first .exit status 3."):
        run_recipe("tiny", tmp_path, 0, None, steps=STEPS, worker=machine)


def test_another_seed_or_preset_is_another_recipe(tmp_path):
    """What is there would be taken for what was asked for."""
    run_recipe("tiny", tmp_path, 5, None, steps=STEPS, worker=Machine(reach=30))
    for config, seed, difference in (("tiny", 6, "--seed 5, not 6"), ("nano", 5, "--config tiny, not nano")):
        with pytest.raises(ValueError, match=f"holds a recipe with {difference}: give that, or another folder with --runs"):
            run_recipe(config, tmp_path, seed, None, steps=STEPS, worker=Machine())
    run_recipe("tiny", tmp_path, 5, None, steps=STEPS, worker=Machine())
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json is not JSON .*: remove it"):
        run_recipe("tiny", tmp_path, 5, None, steps=STEPS, worker=Machine())


def test_programs_of_all_commands_are_kept(tmp_path, monkeypatch):
    """Clips are made by a module that names no cache."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    run_recipe("tiny", tmp_path / "own", 0, None, steps=STEPS, worker=Machine())
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(ROOT / ".cache" / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    run_recipe("tiny", tmp_path / "told", 0, None, steps=STEPS, worker=Machine())
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_processes_rehearse_until_it_is_their_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    machine = Machine(slow={"first": 20})
    run_recipe("nano", tmp_path, 0, None, rehearse=True, steps=STEPS, worker=machine)
    rehearsed = [command for command in machine.asked if "rehearsal" in command[command.index("--out") + 1]]
    assert [Path(command[command.index("--out") + 1]).name for command in rehearsed] == ["pairs", "second"]
    assert "--rehearse" in rehearsed[1] and "--rehearse" not in rehearsed[0]
    assert machine.closed == 5
    assert [nice > 0 for nice in machine.nice] == [command in rehearsed for command in machine.asked], "what runs comes before what rehearses"
    assert not (tmp_path / "rehearsal").exists()


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


def test_every_step_can_rehearse(tmp_path):
    """Its command names files that are there, in shapes that fit what takes them, and nothing that it would not take."""
    rehearsals = Rehearsals("nano", tmp_path, 3)
    for step in RECIPE:
        assert rehearsals.possible(step), step.run
        command = rehearsals.command(step)
        assert Path(command[command.index("--out") + 1]) == tmp_path / "rehearsal" / step.run
        if step.is_stage:
            given = command[command.index("--init") + 1 :] if "--init" in command else []
            found = STAGES[step.stage].hand_over(step.stage, train.parse_init(tuple(given)), tmp_path)
            assert set(STAGES[step.stage].needs) <= set(found)
        else:
            (tmp_path / "rehearsal" / step.run).mkdir()  # what it makes, others read
    model = functional(lambda rngs: FlashVAE(preset("nano").flash_vae, rngs=rngs))
    restore_into(model.abstract, load_weights(tmp_path / "rehearsal" / "random" / "flash_vae.safetensors", "flash_vae"))
    rehearsals.close()
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_waits_for_the_records_that_it_reads(tmp_path):
    rehearsals = Rehearsals("nano", tmp_path, 3)
    steps = {step.run: step for step in RECIPE}
    assert not rehearsals.possible(steps["dit_pretrain"]) and rehearsals.possible(steps["reward_identity"])
    (tmp_path / "rehearsal" / "clips").mkdir()
    assert rehearsals.possible(steps["dit_pretrain"]) and not rehearsals.possible(steps["dit_causal"])
    assert rehearsals.possible(steps["dit_causal_rolling"]), "it is trained on clips and makes nothing of trajectories"
    assert "pairs=" not in " ".join(rehearsals.command(steps["dit_causal_rolling"]))
    assert f"--clips {tmp_path / 'rehearsal' / 'clips'}" in " ".join(rehearsals.command(steps["ode_pairs"]))
    (tmp_path / "ode_pairs").mkdir()
    assert rehearsals.possible(steps["dit_causal"]), "the recipe's own serve as well: no rehearsal makes them again"
    command = rehearsals.command(steps["dit_causal"])
    assert f"pairs={tmp_path / 'ode_pairs'}" in command and f"clips={tmp_path / 'rehearsal' / 'clips'}" in command


def worker_script(folder, body):
    """A program of its own that has a `worker`, for a spawned process runs the main module's top again; commands lie in the same folder."""
    start = f"import pathlib, sys, time\nsys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\nfrom pikastream_jax.training.worker import Worker\n"
    script = folder / "script.py"
    script.write_text(f"{start}if __name__ == '__main__':\n    worker = Worker()\n" + textwrap.indent(body, "    "))
    return {"args": [sys.executable, str(script)], "text": True, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}


def test_a_worker_runs_commands_one_after_another(tmp_path):
    """In one process: what the first leaves in memory is there for the second."""
    (tmp_path / "first_command.py").write_text("import builtins, os; builtins.left_here = os.getpid()\n")
    (tmp_path / "second_command.py").write_text("import os, sys; sys.exit(5 if left_here == os.getpid() and sys.argv[1:] == ['x'] else 6)\n")
    body = (
        "said = []\n"
        "for command in (['-m', 'first_command'], ['-m', 'second_command', 'x'], ['-m', 'no_such_module']):\n"
        "    worker.run(command)\n"
        "    while worker.status() is None: time.sleep(0.01)\n"
        "    said.append(worker.status())\n"
        "worker.close()\n"
        "print(said)\n"
    )
    done = subprocess.run(**worker_script(tmp_path, body), capture_output=True, timeout=120)
    assert done.stdout.strip() == "[0, 5, 1]", done.stderr
    assert "no_such_module" in done.stderr


def test_a_worker_that_showed_progress_leaves_nothing_behind(tmp_path):
    """A bar's lock between processes outlives a process that is killed, and Python says so when the recipe ends."""
    (tmp_path / "progress.py").write_text("import tqdm\nfor _ in tqdm.tqdm(range(3)): pass\n")
    body = "worker.run(['-m', 'progress'])\nwhile worker.status() is None: time.sleep(0.01)\nworker.close()\n"
    done = subprocess.run(**worker_script(tmp_path, body), capture_output=True, timeout=120)
    assert done.returncode == 0 and "3/3" in done.stderr and "leaked" not in done.stderr, done.stderr


def test_a_stopped_worker_lets_its_command_leave(tmp_path):
    (tmp_path / "saves.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    body = (
        "worker.run(['-m', 'saves'])\n"
        f"while not pathlib.Path({str(tmp_path / 'up')!r}).exists(): time.sleep(0.01)\n"
        "worker.stop()\n"
        "while worker.status() is None: time.sleep(0.01)\n"
        "print(worker.status())\n"
        "worker.close()\n"
    )
    started = time.monotonic()
    done = subprocess.run(**worker_script(tmp_path, body), capture_output=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("asked", [0, 2])
def test_a_command_leaves_with_who_gave_it(tmp_path, asked):
    """Even where that is killed and can tell nobody: the command saves and its process ends. Nor does it leave in mid-save when it had been asked before."""
    (tmp_path / "saves.py").write_text(
        "import pathlib, time\n"
        "from pikastream_jax.training.signals import stop_on_signal\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "with stop_on_signal() as asked:\n"
        "    (here / 'up').touch()\n"
        "    while not asked: time.sleep(0.01)\n"
        "    (here / 'saving').touch()\n"
        "    time.sleep(1)\n"
        "    (here / 'saved').touch()\n"
    )
    body = (
        "worker.run(['-m', 'saves'])\n"
        f"while not pathlib.Path({str(tmp_path / 'up')!r}).exists(): time.sleep(0.01)\n"
        f"for _ in range({asked}): worker.stop(); time.sleep(0.1)\n"
        "time.sleep(100)\n"
    )
    parent = subprocess.Popen(**worker_script(tmp_path, body), stderr=subprocess.PIPE)
    wait_for(lambda: (tmp_path / ("saving" if asked else "up")).exists())
    parent.kill()
    said = parent.communicate(timeout=60)[1]  # to the end of what the worker writes, so until it has left
    assert (tmp_path / "saved").exists() and "Traceback" not in said


def wait_for(what, seconds=60):
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_the_recipe_refuses_an_unknown_preset(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe", "--config", "huge"])
    assert train.main() == 1
    assert "train.py: no preset is called 'huge'" in capsys.readouterr().err
