"""A word that finds the face listening: frames of silence are left out, and the clock of what follows is moved by as much."""

import asyncio
import types

import numpy as np
import pytest
from fake_model import FakeModel, picture
from hypothesis import given
from hypothesis import strategies as st

from pikastream_jax.live.engine import Engine
from pikastream_jax.live.session import AHEAD, LiveSession

PERIOD, FPS = 0.16, 25


def listening(lead: float, chunks: int, begun_at: float = 100.0):
    """A session that has made so many silent chunks and shown none of their frames; and its engine, whose clock is an attribute."""
    engine = types.SimpleNamespace(model=FakeModel(), lead=lead, chunk_seconds=PERIOD, now=0.0, wake=lambda: None)
    engine.clock = lambda: engine.now
    session = LiveSession(engine)
    session.begin(engine.model.start(picture(7), "", 0))
    session._begun_at = begun_at
    for _ in range(chunks):
        make(session, 0.0)
    return engine, session


def make(session, now):
    states, frames = session.model.step([session.next_input()])
    session.deliver(states[0], frames[0], now)


def always(moment):
    return True


def hurried(session, now):
    """Frames left out by this call."""
    before = session.figures.hurried_frames
    session.hurry(now, always)
    return session.figures.hurried_frames - before


def say(session, seconds, over=True):
    session.voice.push(np.full(round(16_000 * seconds), 0.5, np.float32), 16_000, session._engine.now)
    if over:
        session.voice.end()


@given(lead=st.floats(0.01, 0.16), chunks=st.integers(1, 3), shown=st.integers(0, 3), sooner=st.floats(0.0, 0.6))
def test_frames_go_on_evenly_and_at_no_more_than_twice_the_speed(lead, chunks, shown, sooner):
    engine, session = listening(lead, chunks)
    for _ in range(shown):
        session._waiting.popleft()
    engine.now = now = session.begins() - sooner
    before, due = list(session._waiting), session.begins() + lead
    say(session, 0.4)
    moments = []
    session.hurry(now, lambda moment: not moments.append(moment))
    left_out = session.figures.hurried_frames
    assert 0 <= left_out <= len(before) // 2
    assert left_out / FPS < sooner + 1e-6, "no chunk is wanted before now"
    assert moments == ([pytest.approx(session.begins())] if left_out else [])
    after = list(session._waiting)
    assert [frame.number for frame in after] == list(range(shown, shown + len(before) - left_out))
    assert [frame.at for frame in after] == pytest.approx([before[0].at + n / FPS for n in range(len(after))])
    kept = [next(n for n, frame in enumerate(before) if frame.picture is one.picture) for one in after]
    assert kept[0] == 0 and max(np.diff([*kept, len(before)]), default=1) <= 2, "of two frames side by side one is shown"
    assert session.begins() + lead == pytest.approx(due - left_out / FPS)
    session.hurry(now, always)
    assert session.figures.hurried_frames == left_out, "once"
    make(session, now)
    first = session._waiting[len(after)]
    assert first.spoken and first.number == after[-1].number + 1 and first.at == pytest.approx(after[-1].at + 1 / FPS)
    assert first.media_time == pytest.approx(first.number / FPS)


def test_only_for_a_word_that_begins_and_will_not_run_dry():
    engine, session = listening(0.02, 2)
    engine.now = 100.0
    assert not hurried(session, 100.0), "nobody speaks"
    say(session, PERIOD + AHEAD - 0.01, over=False)
    assert not hurried(session, 100.0), "it comes as it is spoken, and a chunk's worth is barely there"
    say(session, 0.02, over=False)
    assert hurried(session, 100.0) == 4
    make(session, 0.0)
    say(session, 1.0)
    assert not hurried(session, 100.0), "frames with its sound wait"


def test_the_engine_lets_nobody_hurry_into_the_step_of_another():
    engine, session = listening(0.02, 2)
    other = listening(0.02, 2, begun_at=100.0)[1]
    engine.now = 100.0
    say(session, 0.4)
    frames = 4  # of eight
    sooner = session.begins() - frames / FPS
    working = types.SimpleNamespace(_sessions=[session, other], model=session.model, steps=types.SimpleNamespace(p95=0.05))
    other._begun_at += sooner - other.begins() + 0.04
    Engine._hurry(working, engine.now)
    assert session.figures.hurried_frames == 0
    other._begun_at += 0.02
    Engine._hurry(working, engine.now)
    assert session.figures.hurried_frames == frames


def test_words_into_a_live_stream_lose_no_frame_and_no_sound():
    engine = Engine(FakeModel(seconds=0.03))
    session, found = engine.open(picture(7)), []

    async def run():
        async def take():
            async for frame in session.frames():
                found.append(frame)

        task = asyncio.create_task(take())
        for turn in range(6):
            await asyncio.sleep(0.45 + 0.03 * turn)
            await session.push_audio(np.full(3200, 0.5, np.float32), 16_000)
            await session.end_utterance()
        await asyncio.sleep(1.0)
        task.cancel()

    asyncio.run(run())
    engine.close()
    assert [frame.number for frame in found] == list(range(len(found)))
    assert {len(frame.sound) for frame in found} == {1920}
    assert sum(frame.spoken for frame in found) == 6 * 9600 and sum(frame.ends for frame in found) == 6
    assert session.figures.hurried_frames > 0
    assert session.figures.chunks * 4 - session.figures.hurried_frames == len(found) + len(session._waiting)
