"""Draws a run's losses: `python -m pikastream_jax.training.plots runs/NAME` writes runs/NAME/loss.png."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402

from pikastream_jax.training.metrics import METRICS_FILE, convergence_verdict, read_rows  # noqa: E402


def plot(run_dir: str | Path) -> Path:
    """Draws every figure of the run's metrics over the updates, a panel each, training and held-out together.

    Returns:
      The picture's path.

    Raises:
      FileNotFoundError: the folder has no metrics.
      ValueError: the metrics have no rows yet.
    """
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
    figure, axes = plt.subplots(len(curves), figsize=(9, 2.6 * len(curves)), sharex=True, squeeze=False)
    for axis, (name, kinds) in zip(axes[:, 0], curves.items(), strict=True):
        for kind, points in kinds.items():
            axis.plot(
                *zip(*points, strict=True), label=kind.replace("_", "-"), marker="." if len(points) < 100 else None
            )
        if "loss" in name and all(value > 0 for points in kinds.values() for _, value in points):
            axis.set_yscale("log")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[-1, 0].set_xlabel("update")
    axes[0, 0].set_title(convergence_verdict(path), fontsize=9)
    figure.tight_layout()
    picture = Path(run_dir) / "loss.png"
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws a run's losses into its folder.")
    parser.add_argument("run_dir", type=Path, help="folder that train.py wrote")
    try:
        print(plot(parser.parse_args().run_dir))
    except (FileNotFoundError, ValueError) as error:
        print(f"plots: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
