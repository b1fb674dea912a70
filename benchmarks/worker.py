"""The process that runs a job's rows, and how it tells of them: lines of JSON appended to a file."""

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.rows import Job, run_bench

NO_DEVICE = 3  # exit status: nothing can be measured here
ROW_FAILED = 4  # exit status: a row failed, the ones after it want a new process


def environment(uses_torch: bool) -> dict[str, Any]:
    """Versions, and what the device says of itself."""
    names = ("jax", "jaxlib", "flax", "torch", "triton", "diffusers", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"python": sys.version.split()[0], "versions": versions}
    if not uses_torch:
        import jax

        device = jax.local_devices()[0]
        found |= {"device": device.device_kind, "platform": device.platform, "platform_version": device.client.platform_version}
    return found


def run_rows(job: Job, names: list[str], report: Callable[[dict[str, Any]], None], stop_at_failure: bool = True) -> bool:
    """Runs the rows of those names in turn; True unless one failed and the rest was left for another process."""
    job.prepare(names)
    for bench in job.benches:
        if bench.name not in names:
            continue
        report({"begin": bench.name})
        row = run_bench(bench)
        report({"row": row})
        # After an error on the device every later call may fail too, and what was allocated may still be held.
        if row["status"] == "failed" and stop_at_failure and "passed" not in row.get("figures", {}):
            return False
    return True


def work(job: Job, names: list[str], path: Path, smoke: bool) -> int:
    """The whole process; returns its exit status."""
    with path.open("a") as file:

        def report(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            described = environment(job.uses_torch)
        except RuntimeError as error:  # JAX finds no device
            report({"no_device": f"JAX finds no GPU: {error}"})
            return NO_DEVICE
        report({"environment": described})
        if not smoke and not job.uses_torch and described["platform"] not in ("gpu", "cuda"):
            report({"no_device": f"JAX runs on {described['platform']}, not on a GPU: install jax[cuda12], or pass --smoke"})
            return NO_DEVICE
        finished = run_rows(job, names, report)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: a device that hangs in its destructors, or threads that still compile, must not hold the next rows up.
    os._exit(0 if finished else ROW_FAILED)
