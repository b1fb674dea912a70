"""How fast a run is: updates, frames and matrix products per second, and how much of the card that is."""

import jax
from jax.stages import Traced

from pikastream_jax.nn.operations import count_products

# Dense bfloat16 products with float32 sums, operations per second, from the vendor's data sheets (of the values "with sparsity", half).
# A part of the name that the driver gives decides, the first that fits. No CPU: its peak depends on its clock and on how many cores a run gets.
PEAK_OPERATIONS = {
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
}


def update_operations(traced: Traced) -> int | None:
    """Floating-point operations of all matrix products of one traced update, or None where a loop's length is data.

    They are those that the update performs, over all devices: a forward pass done again to save memory counts again.
    """
    try:
        return count_products(traced.jaxpr.jaxpr)
    except ValueError:
        return None


def peak_operations(device_kind: str) -> float | None:
    """What a device of this name can do per second in bfloat16; None if that is not known."""
    return next((peak for part, peak in PEAK_OPERATIONS.items() if part in device_kind), None)


def speed_figures(updates_per_second: float, frames: int | None, operations: int | None) -> dict[str, float]:
    """The clock's figures of a row of metrics.

    Args:
      updates_per_second: as measured.
      frames: video frames of an update, if the stage says how many.
      operations: of an update, if they could be counted.

    Returns:
      `updates_per_second`; `frames_per_second` and `tera_operations_per_second` where known; `utilisation`, the share of all devices' bfloat16 peak, where
      that is known too.
    """
    figures = {"updates_per_second": round(updates_per_second, 3)}
    if frames is not None:
        figures["frames_per_second"] = round(frames * updates_per_second, 1)
    if operations is not None:
        figures["tera_operations_per_second"] = round(operations * updates_per_second / 1e12, 4)
        if (peak := peak_operations(jax.devices()[0].device_kind)) is not None:
            figures["utilisation"] = round(operations * updates_per_second / (peak * jax.device_count()), 4)
    return figures
