"""Every kernel in every implementation against `cases.dense`, on random inputs of many sizes and fills, forwards and backwards."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.cases import (
    AUDIO_9B,
    FLASH_VAE_RING,
    REFINEMENT,
    Case,
    Chunked,
    Frame,
    Ring,
    base_ring,
    dense,
    nine_b_ring,
)
from benchmarks.rows import Bench, Job, Measurement, NotOfferedError, NotRunError

PASS_MARK = 1e-2  # relative error of bfloat16 results; what rounding alone gives is 2e-3 to 6e-3
IMPLEMENTATIONS = ("xla", "cudnn", "mosaic")

_ODD = {
    "odd ring": Ring(77, 4, 2, 64, 2, 300, 100, (100, 37, 0), (200, 0, 53)),
    "odd frame": Frame(2, 3, 50, 5, 4, 2, 64, (5, 1, 3, 2, 4, 5)),
    "odd chunked": Chunked(((0, 0, 1, 2, 2, 2), (0, 1, 1, 2, 3, 3)), 13, 2, 2, 24, 4, 2, 64),
}
_REAL = _ODD | {
    "9B, ring half full": Ring(1170, 32, 32, 128, 2, 13 * 390, 390, (390,), (6 * 390,)),
    "9B, chunk of 1": nine_b_ring(1),
    "FlashVAE, second latent frame": Ring(*(1560, 16, 4, 64), FLASH_VAE_RING.layers, FLASH_VAE_RING.slots, 0, (0,), (1560,)),
    "1.3B, window 6": base_ring(6),
    "9B sound": AUDIO_9B,
    "9B text, 77 tokens": Frame(1, 1, 1170, 128, 32, 32, 128, (77,)),
    "FlashVAE refinement": REFINEMENT,
    "a group with no key": Frame(1, 2, 64, 16, 2, 2, 64, (0, 9)),
    "9B training, 6 latent frames": Chunked(((0, 0, 0, 1, 2, 2),), 390, 3, 2, 390, 32, 32, 128),
    "FlashVAE clip": Chunked(((0, 1, 2, 3),), 1560, 2, 1, 0, 16, 4, 64),
}
# Nothing trains on the large ones; and what the gradient is where nothing is seen, nobody asks.
_FORWARD_ONLY = {"1.3B, window 6", "FlashVAE refinement", "9B, chunk of 1", "a group with no key"}


def relative_error(found: Array, expected: Array) -> float:
    """||found - expected|| / ||expected||; NaN where anything is not a number."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def check(kernel: str, impl: str, direction: str, smoke: bool) -> Measurement:
    """The row of one kernel, implementation and direction: it passes if every case that is offered does.

    Raises:
      NotOfferedError: no case is offered.
    """
    if smoke and impl != "xla":
        raise NotRunError("smoke: this implementation needs a GPU")
    cases = {name: case for name, case in (_ODD if smoke else _REAL).items() if case.kernel == kernel}
    if direction == "backward":
        cases = {name: case for name, case in cases.items() if name not in _FORWARD_ONLY}
    errors, refused = {}, {}
    for index, (name, case) in enumerate(cases.items()):
        try:
            errors[name] = error_of(case, impl, direction, jax.random.key(index))
        except ValueError as error:
            refused[name] = refusal(error, case)
    if not errors:
        raise NotOfferedError(next(iter(refused.values())))
    bad = {name: error for name, error in errors.items() if not error <= PASS_MARK}
    failure = "; ".join(f"{name}: relative error {error:.2g}" for name, error in bad.items())
    return Measurement(
        f"relative error of bfloat16 {direction} results against float32 at highest precision, pass mark {PASS_MARK}",
        figures={
            "errors": errors,
            "worst": max(errors.values(), key=lambda error: error if error == error else float("inf")),
            "not_offered": refused,
            "passed": not bad,
            "failure": failure,
        },
    )


def refusal(error: ValueError, case: Case) -> str:
    """What a front door says when it does not take a shape.

    Raises:
      ValueError: `error` itself, if it comes from elsewhere.
    """
    text = " ".join(str(error).split())
    if not text.startswith(f"{case.kernel}_attention:"):
        raise error
    return text[:200]


def error_of(case: Case, impl: str, direction: str, key: Array) -> float:
    """The relative error of the result, or the largest of the gradients'."""
    inputs, given = jax.random.split(key)
    arrays = jax.jit(case.draw)(inputs)
    n = case.differentiated

    def result(wanted, rest):
        return case.attend((*wanted, *rest), impl)

    if direction == "forward":
        program = jax.jit(result)
        arguments = (arrays[:n], arrays[n:])
    else:

        def gradients(wanted, rest, d_out):
            return jax.vjp(lambda wanted: result(wanted, rest), wanted)[1](d_out)[0]

        program = jax.jit(gradients)
        d_out = jax.random.normal(given, jax.eval_shape(result, arrays[:n], arrays[n:]).shape, jnp.bfloat16)
        arguments = (arrays[:n], arrays[n:], d_out)
    program = program.lower(*arguments).compile()
    _poison(arrays[0].nbytes)
    found = program(*arguments)

    parts = case.parts(arrays)
    queries = parts[0][0]
    d_out = arguments[2].reshape(queries.shape) if direction == "backward" else queries
    out, of_parts = dense(parts, d_out, backward=direction == "backward")
    if direction == "forward":
        return relative_error(found.reshape(out.shape), out)
    errors = [relative_error(*pair) for pair in zip(found, case.gradients(of_parts), strict=True)]
    return max(errors, key=lambda error: error if error == error else float("inf"))


def _poison(size: int) -> None:
    """Leaves NaN in memory that the next results are likely to get, so that what a kernel does not write shows."""
    jax.block_until_ready([jnp.full(size // 2, jnp.nan, jnp.bfloat16) for _ in range(4)])


def row_name(kernel: str, impl: str, direction: str) -> str:
    return f"correct/{kernel}/{impl}/{direction}"


def _benches(smoke: bool, implementations: tuple[str, ...], kernels: tuple[str, ...]) -> tuple[Bench, ...]:
    return tuple(
        Bench(row_name(kernel, impl, direction), functools.partial(check, kernel, impl, direction, smoke), seconds=8)
        for kernel in kernels
        for impl in implementations
        for direction in ("forward", "backward")
    )


def jobs(smoke: bool) -> list[Job]:
    """XLA's and cuDNN's together; our own kernels in a process each, since one that faults or hangs takes its process with it."""
    kernels = ("ring", "frame", "chunked")
    found = [Job(f"correct {kernel} mosaic", _benches(smoke, ("mosaic",), (kernel,))) for kernel in kernels]
    return [*found, Job("correct libraries", _benches(smoke, ("xla", "cudnn"), kernels))]
