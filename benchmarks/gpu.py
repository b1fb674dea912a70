"""Everything that is claimed of speed, measured on one NVIDIA GPU by one command.

    python -m benchmarks.gpu

takes at most ten minutes, writes `benchmarks/results/DEVICE.json` after every row, draws `DEVICE.png`, and prints a table last. README.md
beside this file says what each row times. Rows run in processes of their own, most important first; one that fails, runs out of memory or
hangs is recorded as such and the rest goes on. What no longer fits the time is recorded as "not run: out of time"; a second call, with
`--only` and the names that are missing, adds them to the same file as long as neither the card nor the sources have changed.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import report, worker
from benchmarks.rows import Bench, Job, Row, failed, not_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
BUDGET = 570.0  # seconds
START = 12.0  # seconds: what a process takes before its first row
COMPILE = 75.0  # seconds that a model's row takes longer if its program is not in the cache
OUT_OF_TIME = "out of time"

# Settings of the rows' processes, in one place. XLA's own flags stay at their defaults: CUDA graphs are on, and the unrolled step has no
# loop that would keep them out. What the environment already sets in XLA_FLAGS is kept, and recorded.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda,cpu",
    "XLA_CLIENT_MEM_FRACTION": "0.92",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "gpu" / "jax"),
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "gpu" / "inductor"),
}


def all_jobs(smoke: bool = False, unroll_steps: bool = True) -> list[Job]:
    """Every job, the most important first. Nothing touches a device yet."""
    from benchmarks import ceilings, correctness, kernels, models, opponents

    ours, others = models.jobs(smoke, unroll_steps), opponents.jobs(smoke)
    first = ["9b/chunk3_steps4_bf16", "9b/chunk3_steps4_fp8", "9b/chunk1_steps4_bf16", "flash_vae/480p"]
    second = ["base_1_3b/window18", "base_1_3b/window6", "9b/chunk3_steps4_bf16_mosaic"]
    against = ["torch/9b/chunk3_steps4_bf16", "torch/flash_vae/480p"]
    return [
        *ceilings.jobs(smoke),
        *correctness.jobs(smoke),
        models.compile_job(smoke, unroll_steps),
        *(ours.pop(name) for name in [*first, *second]),
        *(others.pop(name) for name in against),
        *kernels.jobs(smoke),
        *others.values(),
        *ours.values(),
    ]


class Results:
    """The rows so far, and the file that holds them."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header
        self.rows: dict[str, Row] = {}
        if path.exists():
            before = json.loads(path.read_text())
            if all(before.get(key) == header[key] for key in ("device", "sources", "smoke")):
                self.rows = before["rows"]
                _merge(header["environment"], before["environment"])

    def add(self, row: Row) -> None:
        """Adds a row and saves; what was measured before gives way only to another measurement."""
        before = self.rows.get(row["name"], {}).get("status")
        if row["status"] == "not run" and before in ("ok", "failed", "not offered"):
            return
        self.rows[row["name"]] = row
        self.save()

    def save(self) -> None:
        """Writes the whole file anew beside the old one, then puts it in its place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        contents = {**self.header, **report.derived(self.rows, self.header["smoke"]), "rows": self.rows}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(_plain(contents), indent=1) + "\n")
        part.replace(self.path)


def _plain(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


Launch = Callable[[Job, list[Bench], float], tuple[set[str], str, bool]]


class Processes:
    """Runs jobs in processes of their own."""

    def __init__(self, results: Results, arguments: list[str], smoke: bool, log: Path):
        self._results, self._arguments, self._smoke, self._log = results, arguments, smoke, log

    def __call__(self, job: Job, benches: list[Bench], seconds: float) -> tuple[set[str], str, bool]:
        """Runs the rows of one process and adds them to the results as they come.

        Args:
          seconds: the process is ended after them.

        Returns:
          The names of the rows that are done; why the process ended, if not by itself; whether there is no device at all.
        """
        limits = {bench.name: bench.limit for bench in benches}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, self._log.open("ab") as log:
            lines = Path(folder) / "rows.jsonl"
            lines.touch()
            command = [sys.executable, "-m", "benchmarks.gpu", "--worker", job.name, str(lines), *self._arguments, "--only", *limits]
            log.write(f"\n== {job.name}: {', '.join(limits)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(job), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                return self._follow(process, lines, limits, seconds)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _environment(self, job: Job) -> dict[str, str]:
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the old name; JAX refuses both
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if self._smoke or job.uses_torch:
            environment["JAX_PLATFORMS"] = "cpu"
        if self._smoke:
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tiny programs take longer to compile than to run
        return environment

    def _follow(self, process: subprocess.Popen, path: Path, limits: dict[str, float], seconds: float) -> tuple[set[str], str, bool]:
        done: set[str] = set()
        start = begun = time.monotonic()
        current, no_device = None, ""
        with path.open("rb") as file:
            while True:
                ended = process.poll() is not None  # asked before reading, so that the last lines are read
                unread = file.read()
                whole = unread[: unread.rfind(b"\n") + 1]
                file.seek(len(whole) - len(unread), os.SEEK_CUR)  # half a line is read again
                for message in map(json.loads, whole.splitlines()):
                    if "begin" in message:
                        current, begun = message["begin"], time.monotonic()
                    elif "row" in message:
                        done.add(current)
                        current = None
                        self._results.add(message["row"])
                        print(_progress(message["row"]), flush=True)
                    elif "environment" in message:
                        _merge(self._results.header["environment"], message["environment"])
                    else:
                        no_device = message["no_device"]
                now = time.monotonic()
                reason = None
                if ended:
                    reason = "" if process.returncode in (0, worker.ROW_FAILED) else f"the process ended with status {process.returncode}"
                    if reason and not no_device:
                        reason += f": {_last_line(self._log)}"
                elif now - start > seconds:
                    reason = OUT_OF_TIME
                elif current and now - begun > limits[current]:
                    reason = f"stopped after {limits[current]:.0f} s"
                if reason is not None:
                    if current:
                        self._results.add(not_run(current, reason) if reason == OUT_OF_TIME else failed(current, reason))
                        done.add(current)
                    return done, no_device or reason, bool(no_device)
                time.sleep(0.1)


def run(jobs: Iterable[Job], launch: Launch, results: Results, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Runs all jobs, within the budget in seconds, and records every row, run or not."""
    deadline = clock() + budget
    no_device = ""
    for job in jobs:
        left = list(job.benches)
        while left:
            blocked = {bench.name: _unmet(bench, results.rows) for bench in left}
            for name, requirement in blocked.items():
                if requirement:
                    results.add(not_run(name, f"{requirement} did not pass"))
            left = [bench for bench in left if not blocked[bench.name]]
            fitting, needed = [], START
            for bench in left:
                needed += bench.seconds + _compile_seconds(bench, results.rows)
                if needed <= deadline - clock():
                    fitting.append(bench)
                else:
                    break
            if no_device or not fitting:
                for bench in left:
                    results.add(failed(bench.name, no_device) if no_device else not_run(bench.name, OUT_OF_TIME))
                break
            done, reason, missing = launch(job, fitting, min(deadline - clock(), job.most_seconds or math.inf))
            no_device = reason if missing else ""
            left = [bench for bench in left if bench.name not in done]
            if reason == OUT_OF_TIME or (not done and not missing):  # ended before its first row: it would do so again
                for bench in left:
                    results.add(not_run(bench.name, reason) if reason == OUT_OF_TIME else failed(bench.name, reason))
                break


def _unmet(bench: Bench, rows: dict[str, Row]) -> str:
    return next((name for name in bench.requires if rows.get(name, {}).get("status") != "ok"), "")


def _compile_seconds(bench: Bench, rows: dict[str, Row]) -> float:
    """What is to be added for a model whose program was not compiled ahead."""
    if not bench.name.startswith(("9b/", "base_1_3b/")) or rows.get(f"compile/{bench.name}", {}).get("status") == "ok":
        return 0.0
    return COMPILE


def _progress(row: Row) -> str:
    detail = f"{row['ms']['median']:.4g} ms" if row["status"] == "ok" and row["ms"] else row.get("error") or ""
    return f"{row['status']:12} {row['name']}  {detail}"


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it wrote nothing"


def select(jobs: Iterable[Job], patterns: list[str]) -> list[Job]:
    """The jobs with the rows that match one of the patterns: a name, the beginning of one up to a slash, or with * and ?.

    Raises:
      ValueError: a pattern matches no row.
    """
    jobs, found, unused = list(jobs), [], set(patterns)
    if not patterns:
        return jobs
    for job in jobs:
        kept = []
        for bench in job.benches:
            hits = {p for p in patterns if bench.name == p or bench.name.startswith(p.rstrip("/") + "/") or fnmatch.fnmatchcase(bench.name, p)}
            unused -= hits
            kept += [bench] if hits else []
        if kept:
            found.append(dataclasses.replace(job, benches=tuple(kept)))
    if unused:
        names = sorted({bench.name.split("/")[0] for job in jobs for bench in job.benches})
        raise ValueError(f"--only: no row is called {', '.join(sorted(unused))}; names begin with {', '.join(names)}")
    return found


def sources() -> str:
    """A digest of all code that the measurements depend on, to tell whether earlier rows still hold where there is no git."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "configs", "pallas_kernels", "pikastream_jax"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _output(*command: str) -> str | None:
    """What a command prints, None if it cannot be run."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _header(options: argparse.Namespace) -> dict[str, Any]:
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    line = None if options.smoke else _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    card = dict(zip(fields, (part.strip() for part in line.splitlines()[0].split(",")), strict=False)) if line else {}
    return {
        "device": "smoke" if options.smoke else card.get("name", "unknown GPU"),
        "card": card,
        "commit": options.commit or _output("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "sources": sources(),
        "smoke": options.smoke,
        "unroll_steps": not options.scan_steps,
        "flags": {name: value.removeprefix(f"{ROOT}{os.sep}") for name, value in ENVIRONMENT.items()} | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "environment": {},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "timing": "host clock around work that is waited for; 2 runs of warm-up, then at least 10 runs and 0.5 s, or 3 runs after 2 s; median, minimum, "
        "10th and 90th percentile in milliseconds",
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {RESULTS}; of --smoke: a temporary one)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows to run: a name, its beginning up to a slash, or with * and ?")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="after which no row is begun, and the last is ended")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does the code run?")
    parser.add_argument("--scan-steps", action="store_true", help="denoising steps as a loop: compiles several times faster")
    parser.add_argument("--commit", help="to be recorded, where there is no git")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status is 1 if a row failed."""
    options = parse(arguments)
    try:
        jobs = select(all_jobs(options.smoke, not options.scan_steps), options.only)
    except ValueError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    if options.worker:
        name, path = options.worker
        (job,) = [job for job in jobs if job.name == name]
        return worker.work(job, [bench.name for bench in job.benches], Path(path), options.smoke)

    out = options.out or (Path(tempfile.mkdtemp(prefix="smoke-")) if options.smoke else RESULTS)
    header = _header(options)
    path = out / (re.sub(r"[^a-z0-9]+", "_", header["device"].lower()).strip("_") + ".json")
    results = Results(path, header)
    flags = [flag for flag, given in (("--smoke", options.smoke), ("--scan-steps", options.scan_steps)) if given]
    run(jobs, Processes(results, flags, options.smoke, out / "gpu.log"), results, options.budget)
    results.save()
    title = f"{header['device']}, commit {str(header['commit'])[:12]}, {header['started'][:10]}"
    try:
        from benchmarks.plot import plot

        if plot(results.rows, path.with_suffix(".png"), title):
            print(f"plot: {path.with_suffix('.png')}")
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"results: {path}\n\n{title}\n{report.table(results.rows, options.smoke)}")
    return int(any(row["status"] == "failed" for row in results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
