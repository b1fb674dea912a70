"""Without the extra `parity` nothing here is collected; with it, a run ends with the worst error of every comparison."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    compare = sys.modules.get("tests.parity.compare")  # not imported where PyTorch is missing
    if compare is not None and compare.WORST:
        terminalreporter.section("largest relative errors, max |a - b| / max |b|")
        for name, error in sorted(compare.WORST.items()):
            terminalreporter.write_line(f"{error:.1e}  {name}")
