"""A picture of the results: frames a second against the published figures, and how near each row is to the card's limits."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.report import ceilings, percent_of_limit
from benchmarks.rows import Row

# Published: PikaStream 1.0 (pika.me, 2026) 24-30 FPS and 441 FPS in 1.1 GB; Self-Forcing in NVIDIA FlashDreams, 344 ms for 12 frames.
_PUBLISHED = {
    "9b/": ((24.0, 30.0), "PikaStream 1.0: 24-30"),
    "flash_vae/": ((441.0, 441.0), "PikaStream's FlashVAE: 441"),
    "base_1_3b/": ((12 / 0.344, 12 / 0.344), "Self-Forcing in FlashDreams: 34.9"),
}


def plot(rows: Mapping[str, Row], path: Path, title: str) -> bool:
    """Writes a PNG; False if there is nothing to show.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ok = {name: row for name, row in rows.items() if row["status"] == "ok"}
    groups = {
        prefix: {name: row["figures"]["fps"] for name, row in ok.items() if prefix in name and row["figures"].get("fps")}
        for prefix in _PUBLISHED
    }
    groups["flash_vae/"] |= {name: row["figures"]["fps"] for name, row in ok.items() if name.startswith("diffusers/")}
    limits = ceilings(rows)
    shares = {
        name: percent_of_limit(row["flops"], row["bytes"], row["ms"]["median"], limits)
        for name, row in ok.items()
        if row["ms"] and not name.startswith("ceiling/")
    }
    shares = {name: share for name, share in shares.items() if share is not None}
    panels = [(prefix, values) for prefix, values in groups.items() if values] + ([("", shares)] if shares else [])
    if not panels:
        return False
    heights = [len(values) + 2 for _, values in panels]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(9, 0.28 * sum(heights) + 1), squeeze=False, gridspec_kw={"height_ratios": heights}, layout="constrained"
    )
    for axis, (prefix, values) in zip(axes[:, 0], panels, strict=True):
        names = list(values)[::-1]
        colours = ["tab:grey" if name.startswith(("torch/", "diffusers/")) else "tab:blue" for name in names]
        bars = axis.barh(names, [values[name] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.4g", padding=2, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.1)
        axis.set_xlabel("frames a second" if prefix else "% of what the card's measured limits allow", fontsize=8)
        if prefix:
            (low, high), label = _PUBLISHED[prefix]
            axis.axvspan(low, high, color="tab:red", linewidth=1, alpha=0.7, label=label)
            axis.legend(fontsize=7, loc="lower right")
        else:
            axis.axvline(100, color="tab:red", linewidth=1)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
