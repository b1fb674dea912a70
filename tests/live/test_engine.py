"""Sessions over a model that is made up: order, clock, interruption, swaps, admission, failure."""

import asyncio
import time

import numpy as np
import pytest
from fake_model import FakeModel, picture

from pikastream_jax.live.engine import Engine, EngineFull


@pytest.fixture
def engine_of():
    engines = []

    def make(model, **more):
        engines.append(Engine(model, **more))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


async def collect(session, count, then=None):
    """At least so many frames after `then`, with the moments at which they came; machines that test are busy ones."""
    found = []

    async def take():
        async for frame in session.frames():
            found.append((time.monotonic(), frame))

    task = asyncio.create_task(take())
    if then is not None:
        await then()
    enough = len(found) + count
    for _ in range(2000):
        if len(found) >= enough:
            break
        await asyncio.sleep(0.01)
    task.cancel()
    return found


def loud(seconds=1.0, rate=16_000):
    return np.full(round(seconds * rate), 0.5, np.float32)


def test_frames_leave_at_their_moments_and_the_face_listens_in_silence(engine_of):
    session = engine_of(FakeModel()).open(picture(7), "calm")
    found = asyncio.run(collect(session, 20))
    frames = [frame for _, frame in found]
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert all(tuple(frame.picture[0, 0]) == (7, 4, 0) and len(frame.sound) == 1920 and not frame.sound.any() for frame in frames)
    late = np.array([came - frame.at for came, frame in found])
    assert (late >= 0).all()
    steps = np.diff([frame.at for frame in frames])  # longer only where a busy machine made a chunk late
    assert (steps > 0.04 - 1e-6).all() and np.isclose(np.median(steps), 0.04)


def test_speech_is_heard_with_its_lips_and_its_end_is_marked(engine_of):
    session = engine_of(FakeModel()).open(picture(7))

    async def speak():
        await session.push_audio(loud(0.4), 16_000)
        await session.end_utterance()

    frames = [frame for _, frame in asyncio.run(collect(session, 40, speak))]
    spoken = [n for n, frame in enumerate(frames) if frame.spoken]
    assert spoken == list(range(spoken[0], spoken[0] + 10)), "0.4 s in one piece"
    assert [n for n, frame in enumerate(frames) if frame.ends] == [spoken[-1]]
    assert all(frame.picture[0, 0, 2] > 100 for frame in frames[spoken[0] : spoken[0] + 4]), "lips and sound in the same chunk"
    assert (spoken[0] + session.figures.hurried_frames) % 4 == 0, "at the start of a chunk"
    assert sum(frame.spoken for frame in frames) == 19_200


def test_interrupted_it_is_silent_at_once_and_says_what_was_played(engine_of):
    session = engine_of(FakeModel()).open(picture(7))
    cut = {}

    async def speak():
        await session.push_audio(loud(5.0), 16_000)
        await session.end_utterance()
        while session._played < 20_000:
            await asyncio.sleep(0.01)
        cut["at"], cut["what"] = time.monotonic(), await session.interrupt()

    found = asyncio.run(collect(session, 12, speak))
    before = sum(frame.spoken for came, frame in found if came < cut["at"])
    after = [frame for came, frame in found if came > cut["at"]]
    assert len(after) >= 10, "the face goes on"
    assert not any(frame.sound[480:].any() for frame in after), "but for a fade of 5 ms"
    assert cut["what"].played == pytest.approx(before / 48_000)
    assert cut["what"].played + cut["what"].dropped == pytest.approx(5.0, abs=0.01)
    numbers = [frame.number for _, frame in found]
    assert numbers == list(range(len(numbers))), "no picture is missing"


def test_prompt_and_face_change_between_two_chunks(engine_of):
    engine = engine_of(FakeModel(seconds=0.02))
    session = engine.open(picture(7), "calm")
    moments = {}

    async def change():
        await asyncio.sleep(0.3)
        moments["prompt"] = await session.set_prompt("a laugh")
        moments["face"] = await session.set_reference(picture(9))
        with pytest.raises(ValueError, match="resize it first"):
            await session.set_reference(np.zeros((8, 8, 3), np.uint8))

    frames = [frame for _, frame in asyncio.run(collect(session, 10, change))]
    for name, channel, before, after in (("prompt", 1, 4, 7), ("face", 0, 7, 9)):
        assert moments[name] > 0 and round(moments[name] * 25) % 4 == 0
        for frame in frames:
            assert frame.picture[0, 0, channel] == (before if frame.media_time < moments[name] - 1e-6 else after)


def test_the_most_urgent_first_and_no_more_than_can_be_served(engine_of):
    model = FakeModel(seconds=0.05)  # of 0.16 s: two fit into 85%
    engine = engine_of(model, sessions=2)
    assert engine.capacity in (1, 2)
    engine._seconds.extend([0.05] * 256)  # as on a machine that does nothing else
    assert engine.capacity == 2
    sessions = [engine.open(picture(face)) for face in (1, 2)]
    with pytest.raises(EngineFull, match="2 sessions are served and 2 is the most: a step takes"):
        engine.open(picture(3))

    async def both():
        return await asyncio.gather(*(collect(session, 20) for session in sessions))

    found = asyncio.run(both())
    for face, frames in zip((1, 2), found, strict=True):
        assert all(frame.picture[0, 0, 0] == face for _, frame in frames)
    asyncio.run(sessions[0].close())
    engine.open(picture(3))


@pytest.mark.parametrize(("seconds", "load", "capacity"), [(0.05, 0.85, 2), (0.05, 0.7, 2), (0.06, 0.85, 2), (0.06, 0.7, 1), (0.13, 0.7, 1), (0.14, 0.7, 0)])
def test_how_many_sessions_a_machine_holds(engine_of, seconds, load, capacity):
    """Of chunks of 160 ms; a single one may take 0.85 of the time, several what the model allows."""
    engine = engine_of(FakeModel())
    engine.model.load = load
    engine._seconds.extend([seconds] * 256)
    assert engine.capacity == capacity


@pytest.mark.parametrize("rows", [1, 2])
def test_a_second_session_makes_chunks_begin_a_step_sooner(engine_of, rows):
    """With two rows, too: it may fall due when the other's step has just begun."""
    engine = engine_of(FakeModel(seconds=0.02, rows=rows), sessions=2)
    engine._seconds.extend([0.02] * 256)
    alone = engine.open(picture(1))
    assert engine.lead == pytest.approx(1.25 * 0.02 + 0.01)
    other = engine.open(picture(2))
    assert engine.lead == pytest.approx(2 * 1.25 * 0.02 + 0.01)
    asyncio.run(other.close())
    assert engine.lead == alone.latency == pytest.approx(1.25 * 0.02 + 0.01)


def test_a_machine_that_was_busy_at_the_start_serves_when_it_is_free(engine_of, monkeypatch):
    monkeypatch.setattr("pikastream_jax.live.engine.RETRY", 0.05)
    model = FakeModel(seconds=0.2)  # of 0.16 s
    engine = engine_of(model)
    with pytest.raises(EngineFull, match="0 sessions are served and 0 is the most"):
        engine.open(picture(1))
    model.seconds = 0.001
    end = time.monotonic() + 20.0
    while not engine.capacity and time.monotonic() < end:
        time.sleep(0.01)
    session = engine.open(picture(1))
    assert len(asyncio.run(collect(session, 8))) >= 8


def test_chunks_of_several_sessions_are_made_in_one_step(engine_of):
    model = FakeModel(seconds=0.05, rows=2)
    engine = engine_of(model)
    sessions = [engine.open(picture(face)) for face in (1, 2)]

    async def both():
        return await asyncio.gather(*(collect(session, 20) for session in sessions))

    asyncio.run(both())
    assert sum(len(step) == 2 for step in model.steps[10:]) >= 2


def test_after_a_stall_the_stream_is_moved_and_lags_no_more(engine_of):
    model = FakeModel()
    session = engine_of(model).open(picture(7))

    async def stall():
        await asyncio.sleep(0.3)
        model.seconds = 0.5
        await asyncio.sleep(0.2)
        model.seconds = 0.0
        await asyncio.sleep(0.6)
        await session.push_audio(loud(0.16), 16_000)
        await session.end_utterance()
        moment["pushed"] = time.monotonic()

    moment = {}
    found = asyncio.run(collect(session, 20, stall))
    assert session.figures.late_frames and session.figures.stalled > 0.2
    first = next(came for came, frame in found if frame.spoken)
    assert first - moment["pushed"] < 0.5 + session.latency, "the half second of the stall, and more, is not in the way"
    assert [frame.number for _, frame in found] == list(range(len(found)))


@pytest.mark.parametrize(("late", "moved"), [(-0.01, 0.0), (0.09, 0.0), (0.11, 0.11), (2.0, 2.0)])
def test_a_chunk_that_is_a_little_late_moves_no_clock(engine_of, late, moved):
    session = engine_of(FakeModel()).open(picture(7))  # nobody takes frames, so the engine leaves it alone
    state, _, _ = session.next_input()
    session._begun_at = 100.0
    session.deliver(state, np.zeros((4, 16, 16, 3), np.uint8), 100.0 + late)
    assert [frame.at for frame in session._waiting] == pytest.approx([100.0 + moved + n / 25 for n in range(4)])
    assert session.figures.stalled == pytest.approx(moved)
    assert session.figures.late_frames == min(4, int(25 * late) + 1 if late > 0 else 0)


def test_a_taker_who_sleeps_loses_the_oldest(engine_of):
    session = engine_of(FakeModel()).open(picture(7))

    async def slow():
        numbers = []
        async for frame in session.frames():
            numbers.append(frame.number)
            if len(numbers) == 1:
                await asyncio.sleep(2.5)
            if len(numbers) > 20:
                return numbers

    numbers = asyncio.run(slow())
    assert session.figures.lost_frames >= 10
    assert len(session._waiting) <= 1.2 * 25 + 8
    assert numbers[1] > 10


def test_a_failed_model_is_told_to_everybody(engine_of):
    model = FakeModel()
    engine = engine_of(model)
    session = engine.open(picture(7))
    model.fail_at = len(model.steps) + 3

    async def take():
        async for _ in session.frames():
            pass

    with pytest.raises(RuntimeError, match="the engine has failed: no numbers"):
        asyncio.run(take())
    with pytest.raises(RuntimeError, match="the engine has failed"):
        engine.open(picture(7))


def test_closed_sessions_end(engine_of):
    engine = engine_of(FakeModel())
    session = engine.open(picture(7))

    async def run():
        count = 0
        async for _ in session.frames():
            count += 1
            if count == 3:
                await session.close()
        return count

    assert asyncio.run(run()) == 3
    assert engine.sessions == ()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.open(picture(7))
