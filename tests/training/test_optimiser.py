import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_stage import initial_params, loss_function

from pikastream_jax.training.optimiser import (
    OptimiserConfig,
    ema_update,
    gradient_norms,
    learning_rate_schedule,
    make_optimiser,
    muon_dimensions,
)


def model_params():
    """One of everything, with the names a Transformer gives: true marks the hidden matrices."""
    shapes = {
        ("blocks", 0, "attention", "qkv", "kernel"): ((8, 24), True),
        ("blocks", 0, "attention", "qkv", "bias"): ((24,), False),
        ("blocks", 0, "text_attention", "q", "kernel"): ((8, 24), False),
        ("blocks", 0, "norm", "scale"): ((8,), False),
        ("blocks", 0, "modulation", "kernel"): ((8, 48), False),
        ("blocks", 1, "conv", "kernel"): ((3, 8, 8), False),
        ("layers", "mlp", "kernel"): ((5, 8, 16), True),  # five blocks stacked
        ("layers", "mlp", "bias"): ((5, 16), False),
        ("layers", "norm", "scale"): ((5, 8), False),
        ("patch_embed", "kernel"): ((48, 8), False),
        ("text", "embedding"): ((20, 8), False),
        ("modulation_table",): ((6, 8), False),
        ("pixel_head", "kernel"): ((8, 12), False),
    }
    params, hidden = {}, {}
    for seed, (path, (shape, is_hidden)) in enumerate(shapes.items()):
        for tree, leaf in (
            (params, jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)),
            (hidden, is_hidden),
        ):
            for key in path[:-1]:
                tree = tree.setdefault(key, {})
            tree[path[-1]] = leaf
    return params, hidden


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    params, hidden = model_params()
    chosen = jax.tree.map(
        lambda leaf, dims: dims is not None, params, muon_dimensions(params), is_leaf=lambda x: hasattr(x, "shape")
    )
    assert chosen == hidden


def test_a_muon_update_is_orthogonal_per_layer_and_of_adamw_size():
    params, hidden = model_params()
    config = OptimiserConfig(1e-2, warmup_steps=0, clip_norm=1e9)
    optimiser = make_optimiser(params, config, total_steps=1000)
    gradients = jax.tree.map(lambda p: jnp.sin(37 * p), params)
    updates, _ = jax.jit(optimiser.update)(gradients, optimiser.init(params), params)
    for update, is_hidden in zip(jax.tree.leaves(updates), jax.tree.leaves(hidden), strict=True):
        update = np.asarray(update, np.float64)
        if is_hidden:
            for matrix in update.reshape(-1, *update.shape[-2:]):
                singular = np.linalg.svd(matrix, compute_uv=False)
                assert singular.max() < 2.5 * singular.min()  # five Newton-Schulz steps: 0.7 to 1.2 of the same value
                assert 0.1 < np.sqrt(np.mean(matrix**2)) / 1e-2 < 0.3
        else:  # the first step of Adam is the gradient's sign times the rate, 1.47 of it with Nesterov momentum
            np.testing.assert_allclose(abs(update), 1.474e-2, rtol=1e-2)


def test_stacks_change_nothing():
    """Against optax's Muon on every matrix by itself; 2 + 5 matrices of one shape, so that a stack has more than one member."""
    params, _ = model_params()
    params["blocks"][1]["mlp"] = {"kernel": jnp.cos(jnp.arange(128.0)).reshape(8, 16)}
    params["blocks"][1]["out"] = {"kernel": jnp.cos(jnp.arange(3, 131.0)).reshape(8, 16)}
    optimiser = make_optimiser(params, OptimiserConfig(1e-2, warmup_steps=0, clip_norm=1e9, weight_decay=0.1), 1000)
    rate = learning_rate_schedule(OptimiserConfig(1e-2, warmup_steps=0), 1000)
    plain = optax.contrib.muon(
        rate,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
        weight_decay=0.1,
        adam_b2=0.99,
        adam_learning_rate=rate,
    )
    ours, theirs = optimiser.init(params), plain.init(params)
    for step in range(3):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(37 * p + step), params)
        got, ours = jax.jit(optimiser.update)(gradients, ours, params)
        expected, theirs = jax.jit(plain.update)(gradients, theirs, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)


@pytest.mark.parametrize("muon", [True, False])
def test_training_descends(muon):
    params = initial_params()
    optimiser = make_optimiser(params, OptimiserConfig(2e-2, warmup_steps=5, muon=muon), 100)

    @jax.jit
    def step(params, opt_state, key):
        gradients = jax.grad(loss_function)(params, key)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, held_out = optimiser.init(params), jax.random.key(99)
    before = loss_function(params, held_out)
    for key in jax.random.split(jax.random.key(0), 100):
        params, opt_state = step(params, opt_state, key)
    assert loss_function(params, held_out) < 0.5 * before
    assert all(leaf.dtype != jnp.float64 and leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(opt_state))


def test_the_clip_bounds_what_one_bad_batch_does():
    params = initial_params()
    optimiser = make_optimiser(params, OptimiserConfig(1e-2, warmup_steps=0, muon=False), 100)
    gradients = jax.tree.map(jnp.ones_like, params)
    clip = jax.jit(optimiser.update)
    _, small = clip(gradients, optimiser.init(params), params)
    _, large = clip(jax.tree.map(lambda g: 1e6 * g, gradients), optimiser.init(params), params)
    for a, b in zip(jax.tree.leaves(small[1:]), jax.tree.leaves(large[1:]), strict=True):  # [0] is the norms themselves
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("muon", [True, False])
def test_weight_decay_touches_matrices_only(muon):
    params = {"mlp": {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.ones(4)}, "text": {"embedding": jnp.ones((5, 4))}}
    optimiser = make_optimiser(params, OptimiserConfig(1e-2, warmup_steps=0, weight_decay=0.5, muon=muon), 100)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimiser.update)(zero, optimiser.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.01 * 0.5 * 2.0, rtol=1e-5)
    assert not updates["mlp"]["bias"].any() and not updates["text"]["embedding"].any()


def test_betas_are_adams():
    """Two steps of Adam with (0, 0.999) by hand: the first moment is the gradient itself, the second's bias is corrected."""
    config = OptimiserConfig(1e-2, warmup_steps=0, clip_norm=1e9, betas=(0.0, 0.999), muon=False, final_fraction=1.0)
    params = {"head": {"bias": jnp.zeros(3)}}
    optimiser = make_optimiser(params, config, 100)
    state = optimiser.init(params)
    first, second = np.array([1.0, -2.0, 0.5]), np.array([3.0, 0.1, -0.5])
    _, state = optimiser.update({"head": {"bias": jnp.asarray(first, jnp.float32)}}, state, params)
    updates, _ = optimiser.update({"head": {"bias": jnp.asarray(second, jnp.float32)}}, state, params)
    variance = (0.001 * 0.999 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    np.testing.assert_allclose(updates["head"]["bias"], -1e-2 * second / np.sqrt(variance), rtol=1e-4)


def test_gradient_norms_are_those_before_the_clip_by_group():
    params = initial_params()
    optimiser = make_optimiser(params, OptimiserConfig(1e-2, clip_norm=1e-3), 1000)
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 2.0), params)
    _, state = optimiser.update(gradients, optimiser.init(params), params)
    blocks, head = 2 * np.sqrt(8 * 16 + 16 + 16 * 8), 2 * np.sqrt(8 * 4)
    found = gradient_norms({"mine": 0.0, "opt": (state,)})
    assert found.keys() == {"gradient_norm/opt/blocks", "gradient_norm/opt/head"}
    np.testing.assert_allclose([found["gradient_norm/opt/blocks"], found["gradient_norm/opt/head"]], [blocks, head], rtol=1e-6)
    assert gradient_norms(state).keys() == {"gradient_norm/blocks", "gradient_norm/head"}
    assert gradient_norms({"params": params}) == {}


def test_cosine_schedule():
    rate = learning_rate_schedule(OptimiserConfig(1e-3, warmup_steps=10, final_fraction=0.1), 110)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 5e-4, 1e-3], atol=1e-9)
    np.testing.assert_allclose([rate(60), rate(110)], [5.5e-4, 1e-4], rtol=1e-5)


def test_linear_schedule_holds_then_falls_over_the_last_fifth():
    rate = learning_rate_schedule(OptimiserConfig(1e-3, warmup_steps=10, decay="linear", final_fraction=0.0), 100)
    np.testing.assert_allclose(
        [rate(10), rate(50), rate(80), rate(90), rate(100)], [1e-3, 1e-3, 1e-3, 5e-4, 0], atol=1e-9
    )


def test_ema_follows_its_recurrence():
    values = np.linspace(1, 3, 200)
    ema, expected = {"w": jnp.float32(0)}, 0.0
    for step, value in enumerate(values):
        ema = ema_update(ema, {"w": jnp.float32(value)}, jnp.int32(step), 0.9)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-5)
    assert 2.85 < expected < 2.95  # the last value less about 1 / (1 - 0.9) steps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be above 0, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"decay": "step"}, "decay must be 'cosine' or 'linear', got 'step'"),
        ({"final_fraction": 1.5}, "final_fraction must lie in 0 to 1, got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, each at least 0 and below 1, got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimiserConfig(**({"learning_rate": 1e-3} | changes))


def test_a_run_shorter_than_its_warm_up_is_refused():
    with pytest.raises(ValueError, match="total_steps=100 must exceed warmup_steps=100"):
        learning_rate_schedule(OptimiserConfig(1e-3, warmup_steps=100), 100)


def test_muon_without_a_hidden_matrix_is_refused():
    with pytest.raises(ValueError, match="no parameter is a hidden `kernel`"):
        make_optimiser({"w": jnp.ones((4, 4))}, OptimiserConfig(1e-3), 1000)
