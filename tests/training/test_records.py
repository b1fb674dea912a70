"""Records on disk: what is written comes back, a killed writer goes on, damage is named, nothing half-written has the folder's name."""

import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pikastream_jax.training import records
from pikastream_jax.training.records import Plan, Records, read_constants, read_record, write_records
from pikastream_jax.training.whole_file import write_whole

PLAN = Plan(counts={"train": 7, "held_out": 2}, shard=3, made_with={"seed": 1, "sizes": (4, 2)})


def record_of(split: str, number: int) -> dict[str, np.ndarray]:
    """Differs with every number and split; 40 kB."""
    rng = np.random.default_rng([number, len(split)])
    return {"latents": rng.normal(size=(100, 100)).astype(np.float32), "number": np.int32(number)}


def make(split, first, count):
    return (record_of(split, first + i) for i in range(count))


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "clips", PLAN, make, lambda open_split: {"total": open_split("train").stacked("number")["number"].sum()})
    return tmp_path / "clips"


def test_round_trip(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["constants.npz", "held_out-00000-of-00001.array_record", "record.json"] + [f"train-0000{i}-of-00003.array_record" for i in range(3)]
    for split, count in PLAN.counts.items():
        records = Records(folder, split, ["latents"])
        assert len(records) == count
        for number in np.random.default_rng(0).permutation(count):
            for name, value in record_of(split, number).items():
                np.testing.assert_array_equal(records[number][name], value)
                assert records[number][name].dtype == value.dtype
    assert read_constants(folder)["total"] == sum(range(7))
    assert read_record(folder)["made_with"] == {"seed": 1, "sizes": [4, 2]}
    with pytest.raises(IndexError, match="has 7 records of train, there is no number 7"):
        Records(folder, "train")[7]


kinds = [np.dtype(name) for name in ("float16", "float32", "float64", "uint8", "int32", ">i4", "bool", "bfloat16")]


@st.composite
def batches_of_records(draw):
    """Some records of the same random fields."""
    count = draw(st.integers(1, 5))
    fields = draw(st.dictionaries(st.text("abc_.", min_size=1, max_size=4), st.tuples(st.sampled_from(kinds), hnp.array_shapes(min_dims=0, max_side=3)), max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [{name: rng.integers(0, 256, shape).astype(np.uint8).astype(kind) for name, (kind, shape) in fields.items()} for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(rows=batches_of_records(), shard=st.integers(1, 6))
def test_any_arrays_come_back_as_they_were(rows, shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "records"
    write_records(folder, Plan({"all": len(rows)}, shard, {}), lambda split, first, count: rows[first : first + count])
    records = Records(folder, "all", rows[0])
    assert len(records) == len(rows)
    for number, row in enumerate(rows):
        found = records[number]
        assert found.keys() == row.keys()
        for name, value in row.items():
            assert found[name].dtype.name == value.dtype.name and found[name].shape == value.shape
            np.testing.assert_array_equal(found[name], value)


def test_a_killed_writer_goes_on_at_the_last_whole_shard(tmp_path):
    asked = []

    def until(limit):
        def make_some(split, first, count):
            for row in make(split, first, count):
                if len(asked) == limit:
                    raise KeyboardInterrupt
                asked.append((split, int(row["number"])))
                yield row

        return make_some

    folder = tmp_path / "clips"
    with pytest.raises(KeyboardInterrupt):
        write_records(folder, PLAN, until(5))
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="unfinished, run the command that makes it again"):
        Records(folder, "train")
    with pytest.raises(ValueError, match=r"clips.partial is unfinished work of another kind \(made_with seed differ\)"):
        write_records(folder, Plan(PLAN.counts, 3, PLAN.made_with | {"seed": 2}), make)
    asked.clear()
    write_records(folder, PLAN, until(99))
    assert asked == [("train", n) for n in (3, 4, 5, 6)] + [("held_out", 0), ("held_out", 1)], "the first shard was whole"
    assert not (tmp_path / "clips.partial").exists()
    assert Records(folder, "train").stacked("number")["number"].tolist() == list(range(7))
    asked.clear()
    write_records(folder, PLAN, until(0))
    assert not asked, "what is there is left alone"
    with pytest.raises(ValueError, match=r"clips holds other records \(counts differ\): delete it, or choose another folder"):
        write_records(folder, Plan({"train": 8, "held_out": 2}, 3, PLAN.made_with), make)


@pytest.mark.parametrize("position", [80, 40_100, 65_540, 100_000])
def test_a_flipped_byte_is_named(folder, position):
    """In a header, in data and where blocks meet; records before the damage are still read."""
    path = folder / "train-00001-of-00003.array_record"
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    records = Records(folder, "train")
    np.testing.assert_array_equal(records[2]["latents"], record_of("train", 2)["latents"])
    with pytest.raises(ValueError, match=r"record \d of train in .*clips is damaged, delete the folder and make it anew: ") as caught:
        [records[number] for number in range(7)]
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_short_missing_or_anothers_is_named(folder, tmp_path):
    path = folder / "train-00001-of-00003.array_record"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"train-00001-of-00003.array_record has {len(data) - 1} bytes, not {len(data)}: it is damaged"):
        Records(folder, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train-00001-of-00003.array_record is missing: copy the whole folder"):
        Records(folder, "train")
    write_records(tmp_path / "other", Plan({"train": 3}, 3, {}), lambda *_: ({"latents": np.zeros((100, 101), np.float32)} for _ in range(3)))
    other = (tmp_path / "other" / "train-00000-of-00001.array_record").read_bytes()
    assert len(other) == len(data), "padded to blocks"
    path.write_bytes(other)
    with pytest.raises(ValueError, match="record 3 of train .* has 40400 bytes, its fields 40004: a shard is another folder's"):
        Records(folder, "train")[3]


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no records in .*nowhere: make it first"):
        Records(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="has no split 'test': it has train, held_out"):
        Records(folder, "test")
    with pytest.raises(ValueError, match="lack boxes, truth: delete the folder and make it anew"):
        Records(folder, "train", ["truth", "latents", "boxes"])
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"format": 0}))
    with pytest.raises(ValueError, match="record.json is not of format 1"):
        Records(folder, "train")
    (folder / "record.json").write_text(json.dumps(record)[:-9])
    with pytest.raises(ValueError, match="record.json is damaged, delete the folder and make it anew"):
        Records(folder, "train")
    (folder / "constants.npz").write_bytes(b"PK\3\4" + bytes(30))
    with pytest.raises(ValueError, match="constants.npz is damaged"):
        read_constants(folder)


def test_records_that_differ_are_refused(tmp_path):
    with pytest.raises(ValueError, match="record 1 of train-00000-of-00001.array_record has the fields .* must be the same"):
        write_records(tmp_path / "a", Plan({"train": 2}, 2, {}), lambda *_: iter([{"x": np.zeros(2)}, {"x": np.zeros(3)}]))
    with pytest.raises(ValueError, match="got 1 records, it needs 2"):
        write_records(tmp_path / "b", Plan({"train": 2}, 2, {}), lambda *_: iter([{"x": np.zeros(2)}]))
    for bad, message in (({"counts": {}}, "at least 1 record"), ({"shard": 0}, "shard=0")):
        with pytest.raises(ValueError, match=message):
            Plan(**{"counts": {"train": 1}, "shard": 1, "made_with": {}} | bad)


def test_the_first_shard_is_no_other_plan_s(tmp_path, monkeypatch):
    """The disk is full just after the first shard: whose it is stands there already."""
    writes = []

    def full(path, data):
        writes.append(path)
        if len(writes) == 2:
            raise OSError(28, "No space left on device")
        write_whole(path, data)

    monkeypatch.setattr(records, "write_whole", full)
    with pytest.raises(OSError, match="make room"):
        write_records(tmp_path / "clips", PLAN, make)
    assert list((tmp_path / "clips.partial").glob("train-00000-*"))
    with pytest.raises(ValueError, match=r"unfinished work of another kind \(made_with seed differ\)"):
        write_records(tmp_path / "clips", Plan(PLAN.counts, 3, PLAN.made_with | {"seed": 2}), make)
    write_records(tmp_path / "clips", PLAN, make)
    assert Records(tmp_path / "clips", "train").stacked("number")["number"].tolist() == list(range(7))


def test_a_full_disk_leaves_nothing_under_the_name_and_keeps_whole_shards(tmp_path):
    """A limit on the size of files stands for the full disk: the second shard, of larger records, does not fit."""
    script = """
        import resource, sys, numpy as np
        from pathlib import Path
        from pikastream_jax.training.records import Plan, write_records
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        def make(split, first, count):
            print(split, first)
            return ({"x": np.zeros(20_000, np.uint8)} for _ in range(count))
        try:
            write_records(Path(sys.argv[1]), Plan({"small": 2, "large": 20}, 20, {}), make)
        except OSError as error:
            print(error)
    """

    def run(limit):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "clips"), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout.splitlines()

    lines = run(200_000)
    assert lines[:2] == ["small 0", "large 0"] and len(lines) == 3
    assert "cannot write" in lines[2] and "large-00000-of-00001" in lines[2] and "File too large" in lines[2] and "make room" in lines[2]
    assert not (tmp_path / "clips").exists()
    assert sorted(path.name for path in (tmp_path / "clips.partial").iterdir()) == ["record.json", "small-00000-of-00001.array_record"]
    assert run(resource.RLIM_INFINITY) == ["large 0"]
    assert len(Records(tmp_path / "clips", "large")) == 20
