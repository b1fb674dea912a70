"""Without the extra `parity` nothing here is collected; with it, a run ends with the worst error of every comparison."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    from tests.parity.compare import WORST

    if WORST:
        terminalreporter.section("largest relative errors, max |a - b| / max |b|")
        for name, error in sorted(WORST.items()):
            terminalreporter.write_line(f"{error:.1e}  {name}")
