"""The command of `benchmarks/gpu.py` without a GPU: statistics, budget, failures, marks and table by hand values."""

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest

from benchmarks import report
from benchmarks.gpu import COMPILE, OUT_OF_TIME, ROOT, START, Processes, Results, _header, all_jobs, parse, run, select
from benchmarks.opponents import STREAMS as OPPONENTS
from benchmarks.presets import DECODERS, STREAMS, decoder_config, stream_config
from benchmarks.rows import Bench, Job, Measurement, NotOfferedError, NotRunError, one_line, run_bench
from benchmarks.timing import Statistics, measure, repeat, summarise
from benchmarks.worker import run_rows


def header(**fields):
    return {"device": "card", "sources": "abc", "smoke": False, "environment": {}} | fields


def statistics(ms):
    return Statistics(ms, ms, ms, ms, 10, 2)


def row(name, ms=None, flops=None, moved=0, **figures):
    found = Measurement("what", None if ms is None else statistics(ms), flops or {}, moved, figures)
    return {"name": name, "status": "ok", **dataclasses.asdict(found)}


def rows_of(*rows):
    return {row["name"]: row for row in rows}


def test_statistics_by_hand():
    found = summarise([4.0, 1.0, 3.0, 2.0, 5.0], warm_up=7)
    assert found == Statistics(median=3.0, min=1.0, p10=1.4, p90=4.6, repeats=5, warm_up=7)
    for wrong in ([], [1.0, 0.0], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="samples"):
            summarise(wrong)


@pytest.mark.parametrize(
    ("each", "expected"),
    [(0.01, 50), (0.1, 10), (0.3, 7), (5.0, 3)],  # enough seconds; enough runs; out of seconds; three at least
)
def test_how_often_is_repeated(each, expected):
    now = [0.0]

    def work():
        now[0] += each
        return now[0]

    found = repeat(work, clock=lambda: round(now[0], 6))
    assert len(found) == expected
    assert found[0] == pytest.approx(3 * each), "two runs of warm-up do not count"


def test_the_time_of_one_of_many():
    found = measure(lambda: time.sleep(0.02), per=4, least=3, seconds=0.0)
    assert 5.0 <= found.min <= found.median < 50.0 and found.repeats == 3


def raising(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (MemoryError("out of\n   memory"), "failed", "MemoryError: out of memory"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
        (NotRunError("no torch"), "not run", "no torch"),
        (NotOfferedError("heads of 16"), "not offered", "heads of 16"),
    ],
)
def test_a_row_that_raises(error, status, text, capsys):
    found = run_bench(Bench("a", raising(error)))
    assert (found["status"], found["error"]) == (status, text)
    assert ("Traceback" in capsys.readouterr().err) == (status == "failed")


def test_wrong_results_are_a_failure():
    found = run_bench(Bench("a", lambda: Measurement("w", figures={"passed": False, "failure": "case x: relative error nan"})))
    assert (found["status"], found["error"]) == ("failed", "case x: relative error nan")
    assert len(one_line(ValueError("x" * 1000))) == 300


def test_a_failing_row_ends_its_process_but_not_the_job():
    """The runner starts another process for what is left."""
    benches = (Bench("a", lambda: Measurement("w")), Bench("b", raising(RuntimeError("illegal address"))), Bench("c", lambda: Measurement("w")))
    prepared, reports = [], []
    job = Job("job", benches, prepared.append)
    assert not run_rows(job, ["a", "b", "c"], reports.append)
    assert [r["begin"] for r in reports if "begin" in r] == ["a", "b"] and prepared == [["a", "b", "c"]]
    assert [r["row"]["status"] for r in reports if "row" in r] == ["ok", "failed"]
    assert run_rows(job, ["c"], reports.append) and reports[-1]["row"]["name"] == "c"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run_with(tmp_path, jobs, launch, budget=100.0):
    clock, results = Clock(), Results(tmp_path / "card.json", header())
    calls = []

    def launched(job, benches, seconds):
        calls.append(([bench.name for bench in benches], seconds))
        return launch(job, benches, clock, results)

    run(jobs, launched, results, budget, clock)
    return calls, results


def takes(seconds):
    def launch(job, benches, clock, results):
        clock.now += seconds
        for bench in benches:
            results.add(row(bench.name, 1.0))
        return {bench.name for bench in benches}, "", False

    return launch


def job(*names, seconds=20.0, **fields):
    return Job(names[0], tuple(Bench(name, lambda: None, seconds, **fields) for name in names))


def test_the_budget(tmp_path):
    """A process takes START and its rows' seconds; what no longer fits is said, and smaller rows behind it still run."""
    jobs = [job("a", "b"), job("c", "d", "e"), job("f", seconds=5.0)]
    calls, results = run_with(tmp_path, jobs, takes(30.0), budget=30.0 + START + 45.0)
    assert calls == [(["a", "b"], 87.0), (["c", "d"], 57.0), (["f"], 27.0)]
    assert results.rows["e"] == {"name": "e", "status": "not run", "error": OUT_OF_TIME}
    assert [name for name, found in results.rows.items() if found["status"] == "ok"] == ["a", "b", "c", "d", "f"]


def test_a_model_that_was_not_compiled_ahead_takes_longer(tmp_path):
    jobs = [job("compile/9b/x", seconds=1.0), job("9b/x"), job("9b/y")]
    calls, results = run_with(tmp_path, jobs, takes(10.0), budget=20.0 + START + COMPILE)
    assert [names for names, _ in calls] == [["compile/9b/x"], ["9b/x"]]
    assert results.rows["9b/y"]["error"] == OUT_OF_TIME


def test_a_row_needs_another_to_have_passed(tmp_path):
    jobs = [job("a"), job("b", requires=("a",)), job("c", requires=("a", "missing"))]
    calls, results = run_with(tmp_path, jobs, takes(1.0))
    assert [names for names, _ in calls] == [["a"], ["b"]]
    assert results.rows["c"] == {"name": "c", "status": "not run", "error": "missing did not pass"}


def test_a_process_that_stops_is_followed_by_another(tmp_path):
    def one_at_a_time(job, benches, clock, results):
        results.add({"name": benches[0].name, "status": "failed", "error": "e"})
        return {benches[0].name}, "", False

    calls, _ = run_with(tmp_path, [job("a", "b", seconds=1.0)], one_at_a_time)
    assert [names for names, _ in calls] == [["a", "b"], ["b"]]


@pytest.mark.parametrize(
    ("answer", "status", "processes"),
    [
        ((set(), "the process ended with status 1", False), "failed", 2),  # tried once for every job
        ((set(), "no GPU", True), "failed", 1),  # and never again
        (({"a"}, OUT_OF_TIME, False), "not run", 2),
    ],
)
def test_nothing_is_left_unsaid(tmp_path, answer, status, processes):
    calls, results = run_with(tmp_path, [job("a", "b", seconds=1.0), job("c", seconds=1.0)], lambda *_: answer)
    assert len(calls) == processes
    assert results.rows["b"] == {"name": "b", "status": status, "error": answer[1]}
    assert results.rows["c"]["status"] == status


def test_the_longest_that_a_job_may_take(tmp_path):
    limited = dataclasses.replace(job("a"), most_seconds=33.0)
    calls, _ = run_with(tmp_path, [limited], takes(1.0))
    assert calls == [(["a"], 33.0)]


def test_results_are_kept_and_replaced(tmp_path):
    path = tmp_path / "card.json"
    results = Results(path, header(environment={"versions": {"torch": "2"}}))
    results.add(row("a", 2.0))
    results.add(row("b", 2.0, worst=math.nan))
    assert json.loads(path.read_text())["rows"]["b"]["figures"]["worst"] == "nan"
    again = Results(path, header(environment={"versions": {"jax": "1"}}))
    assert again.header["environment"]["versions"] == {"jax": "1", "torch": "2"}
    again.add({"name": "a", "status": "not run", "error": OUT_OF_TIME})
    assert again.rows["a"]["ms"]["median"] == 2.0, "a measurement does not give way to none"
    again.add(row("a", 3.0))
    assert Results(path, header()).rows["a"]["ms"]["median"] == 3.0
    assert not Results(path, header(sources="other")).rows, "other code, other results"
    assert not list(tmp_path.glob("*.part"))


PROGRAM = """
import json, os, sys, time
def say(**line):
    with open(sys.argv[1], "a") as file: file.write(json.dumps(line) + "\\n")
say(environment={"versions": {"jax": "1"}})
say(begin="a"); say(row={"name": "a", "status": "ok", "ms": None, "figures": {}})
say(begin="b")
print("the last words", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "limits", "seconds", "status", "error"),
    [
        ("os._exit(9)", {"a": 60.0, "b": 60.0}, 60.0, "failed", "the process ended with status 9: the last words"),
        ("os.kill(os.getpid(), 11)", {"a": 60.0, "b": 60.0}, 60.0, "failed", "the process ended with status -11: the last words"),
        ("time.sleep(60)", {"a": 60.0, "b": 0.2}, 60.0, "failed", "stopped after 0 s"),
        ("time.sleep(60)", {"a": 60.0, "b": 60.0}, 1.0, "not run", OUT_OF_TIME),
    ],
    ids=["exit", "signal", "hang", "time"],
)
def test_a_process_that_crashes_or_hangs(tmp_path, end, limits, seconds, status, error, capsys):
    log, lines = tmp_path / "log", tmp_path / "lines"
    lines.touch()
    results = Results(tmp_path / "card.json", header())
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM + end, str(lines)], stdout=stream, stderr=stream)
        try:
            done, reason, no_device = Processes(results, [], False, log)._follow(process, lines, limits, seconds)
        finally:
            process.kill()
            process.wait()
    assert done == {"a", "b"} and not no_device
    assert results.rows["b"] == {"name": "b", "status": status, "error": error} and reason == error
    assert results.rows["a"]["status"] == "ok" and results.header["environment"]["versions"] == {"jax": "1"}
    assert "ok           a" in capsys.readouterr().out


def test_percent_of_the_limit():
    """1e12 operations at 1e15 a second take 1 ms, 2e9 bytes at 4e12 a second 0.5 ms."""
    limits = {"bf16": 1e15, "fp8": 2e15, "copy": 4e12}
    assert report.percent_of_limit({"bf16": 10**12}, 0, 2.0, limits) == pytest.approx(50)
    assert report.percent_of_limit({"bf16": 10**12, "fp8": 10**12}, 0, 2.0, limits) == pytest.approx(75)
    assert report.percent_of_limit({"bf16": 10**11}, 2 * 10**9, 2.0, limits) == pytest.approx(25)
    assert report.percent_of_limit({"fp8": 10**12}, 0, 2.0, {"bf16": 1e15}) is None
    assert report.percent_of_limit({}, 0, 2.0, limits) is None


def full_results():
    """Every mark met, most of them just so."""
    torch_fps = {"9b/chunk3_steps4_bf16": 50.0, "flash_vae/480p": 1000.0}
    return rows_of(
        row("ceiling/bf16/8192x8192x8192", 1.0, {"bf16": 8 * 10**11}),
        row("ceiling/bf16/1170x4096x4096", 1.0, {"bf16": 5 * 10**11}),
        row("ceiling/copy", 1.0, None, 4 * 10**9),
        row("correct/ring/cudnn/forward", worst=0.004, errors={"a": 0.004}, not_offered={}),
        row("9b/chunk3_steps4_bf16", 180.0, {"bf16": 9 * 10**13}, fps=65.0, peak_bytes=25 * 10**9),
        row("9b/chunk3_steps4_fp8", 120.0, fps=95.0),
        row("9b/chunk1_steps4_bf16", 80.0, fps=50.0, first_frame_ms=dataclasses.asdict(statistics(120.0))),
        row("flash_vae/480p", 3.0, fps=1000.0, peak_bytes=1_100_000_000),
        row("diffusers/wan22_decoder/480p", 100.0, fps=100.0),
        row("base_1_3b/window18", 260.0),
        row("base_1_3b/window6", 190.0),
        *(row(f"torch/{name}", 1.0, fps=fps) for name, fps in torch_fps.items()),
        row(
            "torch/9b/chunk3_steps4_bf16",
            200.0,
            fps=50.0,
            denoise_flops={"bf16": 88 * 10**12},
            denoise_ms=dataclasses.asdict(statistics(200.0)),
        ),
    )


def verdicts(rows):
    return {mark.text: mark.verdict for mark in report.marks(rows)}


def test_marks():
    rows = full_results()
    assert set(verdicts(rows).values()) == {"pass"}
    found = {mark.text: mark.found for mark in report.marks(rows)}
    assert found["the PyTorch path's DiT, % of the matrix ceiling"] == pytest.approx(55)  # 440 of 800 TFLOP/s
    assert found["geometric mean of the ratios to the PyTorch path"] == pytest.approx(math.sqrt(1.3))
    assert set(verdicts({}).values()) == {"not run"}

    rows["9b/chunk3_steps4_bf16"]["figures"]["fps"] = 49.9
    rows["base_1_3b/window6"]["ms"]["median"] = math.nan
    rows["flash_vae/480p"] = {"name": "flash_vae/480p", "status": "failed", "error": "out of memory"}
    rows["base_1_3b/window18"] = {"name": "base_1_3b/window18", "status": "not run", "error": OUT_OF_TIME}
    rows["correct/ring/mosaic/forward"] = {"name": "correct/ring/mosaic/forward", "status": "failed", "error": "nan"}
    assert {text for text, verdict in verdicts(rows).items() if verdict == "fail"} == {
        "9B, chunk 3, 4 steps, bf16, FPS",
        "smallest ratio to the PyTorch path",
        "geometric mean of the ratios to the PyTorch path",
        "base_1_3b, 12 frames, window 6, denoising, ms",
        "FlashVAE decode at 480p, FPS",
        "FlashVAE decode at 480p, peak, GB",
        "FlashVAE decode over diffusers' Wan 2.2 at 480p",
        "kernels: rows of wrong results",
    }
    assert verdicts(rows)["base_1_3b, 12 frames, window 18, denoising, ms"] == "not run"


def test_table():
    rows = full_results() | {"x": {"name": "x", "status": "failed", "error": "ValueError: no"}}
    lines = report.table(rows).splitlines()
    (line,) = [line for line in lines if line.startswith("9b/chunk3_steps4_bf16")]
    # 9e13 operations in 180 ms are 500 of 800 TFLOP/s.
    assert line.split() == "9b/chunk3_steps4_bf16 ok 180 180 180 180 65.0 500 62 peak 25.00 GB".split()
    assert any(line.split() == "ceiling/copy ok 1 1 1 1 4.00 TB/s 100".split() for line in lines)
    assert any(line.startswith("x ") and line.endswith("ValueError: no") for line in lines)
    assert "ours / PyTorch: 9b/chunk3_steps4_bf16 1.30, flash_vae/480p 1.00" in lines
    assert lines[-1] == "pass     base_1_3b, 12 frames, window 6, denoising, ms: 190 (asked: <= 190)"
    assert "marks" not in report.table(rows, smoke=True)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import plot

    assert plot(full_results(), tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not plot({}, tmp_path / "b.png", "title")


def test_rows_are_named_once_and_marks_name_rows():
    jobs = all_jobs()
    names = [bench.name for job in jobs for bench in job.benches]
    assert len(names) == len(set(names)) and names[0] == "ceiling/copy"
    assert {f"torch/{name}" for name in OPPONENTS} < set(names) and set(OPPONENTS) < set(STREAMS)
    for _, _, _, _, needs in report._MARKS:
        assert set(needs) <= set(names)
    for bench in (bench for job in jobs for bench in job.benches):
        assert set(bench.requires) <= set(names)
        assert bench.limit >= bench.seconds


def test_every_kind_of_row_is_explained():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for name in (bench.name for job in all_jobs() for bench in job.benches):
        assert f"`{name.split('/')[0]}/" in text, name


def test_what_is_recorded_names_no_folder_of_this_machine():
    assert str(ROOT) not in json.dumps(_header(parse(["--smoke"])))


def test_selection():
    jobs = all_jobs(smoke=True)
    chosen = select(jobs, ["flash_vae/480p", "kernel", "torch/*720p"])
    assert {job.name for job in chosen} == {"flash_vae/480p", "kernels", "torch/flash_vae/720p"}
    assert select(jobs, []) == jobs
    with pytest.raises(ValueError, match="no row is called 9c; names begin with 9b, base_1_3b"):
        select(jobs, ["9c", "kernel"])


def test_full_sizes():
    config = stream_config("9b/chunk1_steps2_fp8", smoke=False)
    stream = config.stream
    assert (stream.chunk, stream.steps, stream.precision, stream.window, stream.unroll_steps) == (1, 2, "float8", 12, True)
    assert config.dit.dim == 4096 and not stream_config("base_1_3b/window6", False, unroll_steps=False).stream.unroll_steps
    assert [decoder_config(name, smoke=False).latent_grid for name in DECODERS] == [(30, 52), (45, 80)]
