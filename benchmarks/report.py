"""What follows from the rows: distance from the card's limits, ratios to PyTorch, the project's marks, and the table."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.rows import Row

GIGABYTE = 1e9
Rows = Mapping[str, Row]


def ceilings(rows: Rows) -> dict[str, float]:
    """The card's limits as measured: operations per second for "bf16" and "fp8", bytes per second for "copy"; only what was measured."""
    found: dict[str, float] = {}
    for name, row in rows.items():
        if not name.startswith("ceiling/") or row["status"] != "ok":
            continue
        kind = name.split("/")[1]
        amount = row["bytes"] if kind == "copy" else row["flops"][kind]
        found[kind] = max(found.get(kind, 0.0), amount / (row["ms"]["median"] * 1e-3))
    return found


def percent_of_limit(flops: Mapping[str, int], moved: int, ms: float, limits: Mapping[str, float]) -> float | None:
    """100 x the least time that the operations, or the bytes if they take longer, need on this card / the time taken; None if a limit is unknown."""
    if not flops and not moved:
        return None
    if any(kind not in limits for kind in flops) or (moved and "copy" not in limits):
        return None
    arithmetic = sum(count / limits[kind] for kind, count in flops.items())
    return 100 * max(arithmetic, moved / limits["copy"] if moved else 0.0) * 1e3 / ms


def ratios(rows: Rows) -> dict[str, float]:
    """Our speed over the PyTorch path's, for every row that both have."""
    found = {}
    for name in rows:
        ours, theirs = _figure(rows, name, "fps"), _figure(rows, f"torch/{name}", "fps")
        if ours and theirs:
            found[name] = ours / theirs
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclasses.dataclass(frozen=True)
class Mark:
    """A figure that the project aims at."""

    text: str
    verdict: str  # "pass", "fail", "not run"
    found: float | None
    asked: float
    at_most: bool

    def line(self) -> str:
        found = "-" if self.found is None else f"{self.found:.4g}"
        return f"{self.verdict:8} {self.text}: {found} (asked: {'<=' if self.at_most else '>='} {self.asked:g})"


def _figure(rows: Rows, name: str, *path: str) -> Any:
    """A figure of a row that is ok, else None."""
    row = rows.get(name)
    if row is None or row["status"] != "ok":
        return None
    value: Any = row["figures"]
    for key in path:
        value = value.get(key) if value else None
    return value


def _median(rows: Rows, name: str) -> float | None:
    row = rows.get(name)
    return row["ms"]["median"] if row and row["status"] == "ok" and row["ms"] else None


def _torch_dit_percent(rows: Rows) -> float | None:
    """The PyTorch path's share of the measured bfloat16 ceiling in the DiT."""
    name, limits = "torch/9b/chunk3_steps4_bf16", ceilings(rows)
    flops, ms = _figure(rows, name, "denoise_flops", "bf16"), _figure(rows, name, "denoise_ms", "median")
    return 100 * flops / limits["bf16"] * 1e3 / ms if flops and ms and "bf16" in limits else None


def _over_diffusers(rows: Rows) -> float | None:
    ours, theirs = _figure(rows, "flash_vae/480p", "fps"), _figure(rows, "diffusers/wan22_decoder/480p", "fps")
    return ours / theirs if ours and theirs else None


def _gigabytes(rows: Rows) -> float | None:
    peak = _figure(rows, "flash_vae/480p", "peak_bytes")
    return peak / GIGABYTE if peak else None


# Text, figure, bound, whether the figure may be at most that, and the rows that must have run for it.
_MARKS: tuple[tuple[str, Callable[[Rows], float | None], float, bool, tuple[str, ...]], ...] = (
    ("9B, chunk 3, 4 steps, bf16, FPS", lambda r: _figure(r, "9b/chunk3_steps4_bf16", "fps"), 65, False, ("9b/chunk3_steps4_bf16",)),
    ("9B, chunk 3, 4 steps, fp8, FPS", lambda r: _figure(r, "9b/chunk3_steps4_fp8", "fps"), 95, False, ("9b/chunk3_steps4_fp8",)),
    (
        "9B, chunk 1, 4 steps, bf16, last sample to first frame in host memory, ms",
        lambda r: _figure(r, "9b/chunk1_steps4_bf16", "first_frame_ms", "median"),
        120,
        True,
        ("9b/chunk1_steps4_bf16",),
    ),
    ("FlashVAE decode at 480p, FPS", lambda r: _figure(r, "flash_vae/480p", "fps"), 1000, False, ("flash_vae/480p",)),
    ("FlashVAE decode at 480p, peak, GB", _gigabytes, 1.1, True, ("flash_vae/480p",)),
    (
        "FlashVAE decode over diffusers' Wan 2.2 at 480p",
        _over_diffusers,
        10,
        False,
        ("flash_vae/480p", "diffusers/wan22_decoder/480p"),
    ),
    ("smallest ratio to the PyTorch path", lambda r: min(ratios(r).values(), default=None), 1, False, ()),
    (
        "geometric mean of the ratios to the PyTorch path",
        lambda r: geometric_mean(list(ratios(r).values())) if ratios(r) else None,
        1.1,
        False,
        (),
    ),
    ("the PyTorch path's DiT, % of the matrix ceiling", _torch_dit_percent, 55, False, ("torch/9b/chunk3_steps4_bf16",)),
    ("base_1_3b, 12 frames, window 18, denoising, ms", lambda r: _median(r, "base_1_3b/window18"), 260, True, ("base_1_3b/window18",)),
    ("base_1_3b, 12 frames, window 6, denoising, ms", lambda r: _median(r, "base_1_3b/window6"), 190, True, ("base_1_3b/window6",)),
)


def marks(rows: Rows) -> list[Mark]:
    """Pass, fail or not run, for each of the project's figures and for the kernels' correctness. A row that failed fails its marks."""
    found = []
    for text, figure, asked, at_most, needs in _MARKS:
        value = figure(rows)
        if value is not None:
            passed = value <= asked if at_most else value >= asked  # neither for NaN
            verdict = "pass" if passed else "fail"
        else:
            verdict = "fail" if any(rows.get(name, {}).get("status") == "failed" for name in needs) else "not run"
        found.append(Mark(text, verdict, value, asked, at_most))
    checked = [row for name, row in rows.items() if name.startswith("correct/") and row["status"] in ("ok", "failed")]
    wrong = sum(row["status"] == "failed" for row in checked)
    verdict = "not run" if not checked else "fail" if wrong else "pass"
    return [Mark("kernels: rows of wrong results", verdict, wrong if checked else None, 0, True), *found]


def derived(rows: Rows, smoke: bool = False) -> dict[str, Any]:
    """What the JSON file says beyond the rows; tiny models meet no marks."""
    limits, against = ceilings(rows), ratios(rows)
    percents = {}
    for name, row in rows.items():
        if row["status"] == "ok" and row["ms"]:
            percents[name] = percent_of_limit(row["flops"], row["bytes"], row["ms"]["median"], limits)
    return {
        "ceilings": limits,
        "percent_of_limit": percents,
        "torch_dit_percent_of_matrix_ceiling": _torch_dit_percent(rows),
        "ours_over_torch": against,
        "ours_over_torch_geometric_mean": geometric_mean(list(against.values())) if against else None,
        "marks": [] if smoke else [dataclasses.asdict(mark) for mark in marks(rows)],
    }


def _cells(row: Row, limits: Mapping[str, float]) -> list[str]:
    if row["status"] != "ok":
        return [row["name"], row["status"], "", "", "", "", "", row.get("error", "")]
    figures, ms = row["figures"], row["ms"]
    time = spread = rate = share = ""
    if ms:
        time, spread = f"{ms['median']:.4g}", f"{ms['min']:.4g} {ms['p10']:.4g} {ms['p90']:.4g}"
        flops = sum(row["flops"].values())
        rate = f"{flops / ms['median'] / 1e9:.0f}" if flops else f"{row['bytes'] / ms['median'] / 1e9:.2f} TB/s"
        percent = percent_of_limit(row["flops"], row["bytes"], ms["median"], limits)
        share = "" if percent is None else f"{percent:.0f}"
    note = []
    if figures.get("first_frame_ms"):
        note.append(f"first frame {figures['first_frame_ms']['median']:.1f} ms")
    if figures.get("step_ms") and figures.get("copy_ms"):
        note.append(f"step {figures['step_ms']['median']:.1f} + copy {figures['copy_ms']['median']:.1f}")
    if figures.get("peak_bytes"):
        note.append(f"peak {figures['peak_bytes'] / GIGABYTE:.2f} GB")
    if "worst" in figures:
        note.append(f"worst error {figures['worst']:.2g} of {len(figures['errors'])}, {len(figures['not_offered'])} not offered")
    if "same_again_percent" in figures:
        note.append(f"timed again: {figures['same_again_percent']:.1f}% off")
    if "compile_seconds" in figures and not ms:
        note.append(f"trace {figures['trace_seconds']:.0f} s, compile {figures['compile_seconds']:.0f} s")
    fps = f"{figures['fps']:.1f}" if figures.get("fps") else ""
    return [row["name"], "ok", time, spread, fps, rate, share, ", ".join(note)]


def table(rows: Rows, smoke: bool = False) -> str:
    """The rows, then the ratios, then the marks, as plain text."""
    limits = ceilings(rows)
    cells = [["row", "status", "ms", "min p10 p90", "FPS", "TFLOP/s", "% limit", "notes"]]
    cells += [_cells(row, limits) for row in rows.values()]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip() for line in cells]
    against = ratios(rows)
    if against:
        lines += ["", "ours / PyTorch: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in against.items())]
        lines.append(f"geometric mean {geometric_mean(list(against.values())):.3f}")
    if smoke:
        return "\n".join([*lines, "", "tiny models on a CPU: none of these figures means anything"])
    return "\n".join([*lines, "", "marks", *(mark.line() for mark in marks(rows))])
