import json

import pytest

from pikastream_jax.training.metrics import MetricsFile, convergence_verdict, improvement, read_rows


def write(path, losses):
    with path.open("w") as file:
        for step, loss in losses:
            file.write(json.dumps({"step": step, "kind": "train", "loss": 99.0, "updates_per_second": 3.0}) + "\n")
            file.write(json.dumps({"step": step, "kind": "held_out", "loss": loss}) + "\n")
    return path


def test_improvement_compares_the_end_with_four_fifths(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [(20, 9.0), (80, 2.0), (90, 0.1), (100, 1.5)])
    assert improvement(path) == pytest.approx(0.25)


def test_improvement_interpolates_between_evaluations(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [(60, 3.0), (100, 1.0)])  # 2.0 at update 80
    assert improvement(path) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "end, verdict",
    [(0.994, "improved 0.6% over the last 20%: converged"), (0.9, "10.0% over the last 20%: under-trained"), (1.2, "rose 20.0% over the last 20%: trained too long")],
)
def test_verdict(tmp_path, end, verdict):
    assert verdict in convergence_verdict(write(tmp_path / "metrics.jsonl", [(40, 5.0), (80, 1.0), (100, end)]))


def test_too_few_evaluations_are_no_verdict(tmp_path):
    for losses in ([], [(100, 1.0)], [(40, 1.0), (80, 0.1), (100, -0.1)], [(80, -0.1), (100, -0.2)]):
        assert "convergence unknown" in convergence_verdict(write(tmp_path / "metrics.jsonl", losses))


def test_reopening_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (10, 20, 30):
        metrics.append(step, "train", {"loss": 0.1 * step})
    metrics.close()
    path.write_text(path.read_text() + '{"step": 25, "ki')
    metrics = MetricsFile(path, 20)
    metrics.append(30, "train", {"loss": 5.0})
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(10, 1.0), (20, 2.0), (30, 5.0)]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "ki\n{"step": 2, "kind": "train", "loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_rows(path)
