"""The rows themselves: the kernels' reference against loops in float64, and every row's code at tiny sizes."""

import json

import jax
import numpy as np
import pytest

from benchmarks.cases import Chunked, Frame, Ring, base_ring, dense, nine_b_ring, training
from benchmarks.correctness import error_of, refusal, relative_error
from benchmarks.gpu import all_jobs, main
from benchmarks.models import operations
from benchmarks.presets import stream_config
from benchmarks.random_models import full_state, model_params, served_models
from benchmarks.worker import run_rows
from pallas_kernels import ring_attention


@pytest.fixture(scope="module", autouse=True)
def quick():
    """These programs take longer to compile than to run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


CASES = {
    "ring": Ring(3, 4, 2, 8, 2, 7, 2, (1, 2), (4, 0)),
    "frame": Frame(1, 2, 3, 5, 2, 1, 8, (2, 5)),
    "chunked": Chunked(((0, 0, 1), (0, 1, 2)), 2, 1, 2, 3, 2, 1, 8),
}


def attend(parts, row, token, head):
    """One query over what it sees in all parts, in float64, with the weights."""
    logits, values = [], []
    for q, k, v, seen in parts:
        group = head * k.shape[2] // q.shape[2]
        keys = np.arange(k.shape[1]) if seen is None else np.flatnonzero(seen[row, token])
        logits.append(k[row, keys, group].astype(np.float64) @ q[row, token, head].astype(np.float64) / np.sqrt(q.shape[-1]))
        values.append(v[row, keys, group].astype(np.float64))
    weights = np.exp(np.concatenate(logits))
    return weights @ np.concatenate(values) / weights.sum()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_right(name):
    case = CASES[name]
    arrays = [np.asarray(x, np.float32) for x in case.draw(jax.random.key(0))]
    parts = case.parts(arrays)
    d_out = np.random.default_rng(0).normal(size=parts[0][0].shape).astype(np.float32)
    out, of_parts = dense(parts, d_out, backward=True)
    for row, token, head in np.ndindex(out.shape[:3]):
        np.testing.assert_allclose(out[row, token, head], attend(parts, row, token, head), atol=1e-5)

    def loss(*wanted):
        """Through the front door in float32, differentiated by JAX."""
        return (case.attend((*wanted, *arrays[len(wanted) :]), "xla").reshape(d_out.shape) * d_out).sum()

    n = case.differentiated
    for found, expected in zip(case.gradients(of_parts), jax.grad(loss, tuple(range(n)))(*arrays[:n]), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_seen(name):
    case = CASES[name]
    parts = case.parts(case.draw(jax.random.key(0)))
    seen = sum(q.shape[0] * q.shape[1] * k.shape[1] if seen is None else seen.sum() for q, k, _, seen in parts)
    assert case.pairs == case.heads * seen


def test_full_size_shapes_by_hand():
    assert nine_b_ring().pairs == 32 * 1170 * (390 + 12 * 390 + 1170)
    assert 4 * 128 * nine_b_ring().pairs * 30 == pytest.approx(3.6e12, rel=0.01)  # a pass, as in the budget
    assert base_ring(18).slots == 19 * 1560 and base_ring(6).pairs == 12 * 4680 * 10 * 1560
    # Context copy and query copy of 4 chunks of 3 that see all chunks before: 3 (3 + 6 + 9 + 12) pairs of frames each.
    assert training(32, 390).pairs == 32 * (2 * 3 * 30 * 390**2 + 24 * 390 * 390)


def test_errors():
    x = jax.numpy.array([3.0, 4.0])
    assert relative_error(x * 1.01, x) == pytest.approx(0.01, rel=1e-3)
    assert not relative_error(x.at[0].set(np.nan), x) <= 1e-2
    assert 1e-4 < error_of(CASES["ring"], "xla", "backward", jax.random.key(0)) < 1e-2


def test_a_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setattr("benchmarks.cases.ring_attention", lambda *args, **kwargs: ring_attention(*args, **kwargs) * 1.02)
    assert error_of(CASES["ring"], "xla", "forward", jax.random.key(0)) > 1e-2


def test_only_a_front_door_refuses():
    case = CASES["ring"]
    with pytest.raises(ValueError) as refused:
        case.attend(case.draw(jax.random.key(0)), "no such")
    assert refusal(refused.value, case).startswith("ring_attention: impl 'no such'")
    with pytest.raises(ValueError, match="something else"):
        refusal(ValueError("something else"), case)


def test_operations_of_fp8_are_counted_apart():
    """All products of a block's eight layers with the tokens, at every step."""
    found = operations("9b/chunk3_steps4_fp8", smoke=True)
    d, mlp, blocks, tokens = 32, 64, 2, 3 * 2 * 3
    assert found["fp8"] == 4 * tokens * blocks * 2 * (3 * d * d + d * d + 4 * d * d + 2 * d * mlp)
    assert sum(found.values()) == sum(operations("9b/chunk3_steps4_bf16", smoke=True).values())


def test_random_models_have_the_served_types_and_full_windows():
    config = stream_config("9b/chunk3_steps4_fp8", smoke=True)
    models = served_models(config)
    params, state = model_params(models), full_state(config)
    for abstract, real in ((models.denoiser.abstract, params.denoiser), (models.flash_vae.abstract, params.flash_vae)):
        described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)
        assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real)
        assert all(float(np.abs(np.asarray(leaf, np.float32)).max()) > 0 for leaf in jax.tree.leaves(real))
    eighth = params.denoiser["dit"]["blocks"][0]["mlp"]["up"]
    weights = np.asarray(eighth["kernel"], np.float32) * np.asarray(eighth["scale"])[:, None]
    assert weights.std() == pytest.approx(32**-0.5, rel=0.2)
    assert int(state.ring_count[0]) == config.stream.window and int(state.vae.count[0]) == config.flash_vae.window
    assert float(np.asarray(state.dit_v, np.float32).std()) == pytest.approx(1.0, rel=0.1)


# A row of every kind; `test_every_row` runs them all.
QUICK = ("ceiling/copy", "ceiling/fp8/24x16x48", "correct/frame/xla/backward", "kernel/rotate_9b", "flash_vae/480p", "9b/chunk3_steps4_fp8")


@pytest.mark.parametrize("name", QUICK)
def test_a_row_of_every_kind(name):
    (job,) = [job for job in all_jobs(smoke=True) if name in {bench.name for bench in job.benches}]
    reports = []
    assert run_rows(job, [name], reports.append)
    row = json.loads(json.dumps(reports[-1]["row"]))
    assert row["status"] == "ok" and row["name"] == name and row["what"]
    assert row["ms"] is None or row["ms"]["repeats"] >= 3
    if name.startswith("9b/"):
        figures = row["figures"]
        assert figures["fps"] > 0 and figures["first_frame_ms"]["median"] > 0 and figures["step_ms"]["median"] > 0
        assert set(row["flops"]) == {"bf16", "fp8"} and row["bytes"] > 0


def test_the_command(tmp_path, capsys):
    """Through a process of its own, twice: the second adds to the first's file."""
    assert main(["--smoke", "--out", str(tmp_path), "--only", "ceiling/copy"]) == 0
    assert main(["--smoke", "--out", str(tmp_path), "--only", "ceiling/bf16/24x16x48", "--budget", "1"]) == 0
    results = json.loads((tmp_path / "smoke.json").read_text())
    assert {name: row["status"] for name, row in results["rows"].items()} == {"ceiling/copy": "ok", "ceiling/bf16/24x16x48": "not run"}
    assert results["environment"]["platform"] == "cpu" and results["sources"] and results["ceilings"]["copy"] > 0
    printed = capsys.readouterr().out
    assert "none of these figures means anything" in printed and "out of time" in printed


@pytest.mark.slow
def test_every_row(tmp_path):
    """The whole command, minutes of it; only what needs a GPU or an absent package is not run."""
    assert main(["--smoke", "--out", str(tmp_path), "--budget", "3000"]) == 0
    rows = json.loads((tmp_path / "smoke.json").read_text())["rows"]
    assert set(rows) == {bench.name for job in all_jobs(smoke=True) for bench in job.benches}
    for name, row in rows.items():
        if row["status"] != "ok":
            assert any(word in row["error"] for word in ("needs a GPU", "mosaic", "torch", "diffusers")), (name, row)
