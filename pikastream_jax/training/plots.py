"""Draws losses: `python -m pikastream_jax.training.plots runs/NAME` writes runs/NAME/loss.png; with --out, one picture of the losses of many runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from pikastream_jax.training.metrics import METRICS_FILE, convergence_verdict, read_rows  # noqa: E402

_COLUMNS = 4  # panels in a row of an overview


def plot(run_dir: str | Path) -> Path:
    """Draws every figure of the run's metrics over the updates, a panel each, training and held-out together.

    Returns:
      The picture's path.

    Raises:
      FileNotFoundError: the folder has no metrics.
      ValueError: the metrics have no rows yet.
    """
    path, curves = Path(run_dir) / METRICS_FILE, _curves(run_dir)
    figure, axes = plt.subplots(len(curves), figsize=(9, 2.6 * len(curves)), sharex=True, squeeze=False)
    for axis, (name, kinds) in zip(axes[:, 0], curves.items(), strict=True):
        _draw(axis, kinds)
        if "loss" in name and all(value > 0 for points in kinds.values() for _, value in points):
            axis.set_yscale("log")
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("update")
    axes[0, 0].set_title(convergence_verdict(path), fontsize=9)
    figure.tight_layout()
    picture = Path(run_dir) / "loss.png"
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def overview(run_dirs: Sequence[str | Path], picture: Path) -> None:
    """Draws the loss of every run, training and held-out together, a panel each.

    Raises:
      FileNotFoundError, ValueError: as `plot`.
    """
    losses = [(Path(run_dir).name, _curves(run_dir)["loss"]) for run_dir in run_dirs]
    columns = min(_COLUMNS, len(losses))
    rows = -(-len(losses) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(losses) :]:
        axis.set_axis_off()
    for axis, (name, kinds) in zip(axes.flat, losses, strict=False):
        _draw(axis, kinds)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _curves(run_dir: str | Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points (step, value) by figure and kind of row."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in read_rows(path):
        step, kind = row.pop("step"), row.pop("kind")
        row.pop("seconds", None)  # a straight line
        for name, value in row.items():
            curves.setdefault(name, {}).setdefault(kind, []).append((step, value))
    if not curves:
        raise ValueError(f"{path} has no rows yet: train for a few updates first")
    return curves


def _draw(axis: Axes, kinds: dict[str, list[tuple[int, float]]]) -> None:
    for kind, points in sorted(kinds.items(), reverse=True):  # one colour for training and one for held-out, whichever came first
        axis.plot(*zip(*points, strict=True), label=kind.replace("_", "-"), marker="." if len(points) < 100 else None)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a run's losses into its folder, or those of many runs into one picture.")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="run_dir", help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw the loss of every run into this picture instead")
    given = parser.parse_args()
    try:
        if given.out:
            overview(given.run_dirs, given.out)
            print(given.out)
        else:
            for run_dir in given.run_dirs:
                print(plot(run_dir))
    except (FileNotFoundError, ValueError) as error:
        print(f"plots: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
