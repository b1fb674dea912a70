"""Records of NumPy arrays on disk: a folder of ArrayRecord shards that is whole or absent, and that a killed writer goes on with.

```
clips/record.json                             what every record holds, how many there are, and what they were made with
clips/constants.npz                           arrays that belong to all records together
clips/train-00000-of-00004.array_record      ...
```
ArrayRecord (github.com/google/array_record) is grain's format of random access; it keeps a hash of every record, which is checked
whenever the record is read. `Records` is a source for `grain.MapDataset.source`.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import ml_dtypes  # noqa: F401 (NumPy learns the name bfloat16)
import numpy as np

from pikastream_jax.training.only_writer import only_writer
from pikastream_jax.training.whole_file import UNFINISHED, write_whole

RECORD, CONSTANTS = "record.json", "constants.npz"
FORMAT = 1
Record = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder of records is to hold; a writer that was killed is only gone on with by the same plan."""

    counts: dict[str, int]  # records of each split
    shard: int  # records of a shard; what a killed writer loses at most
    made_with: dict[str, Any]  # JSON: what the records follow from, and what belongs to them

    def __post_init__(self):
        if self.shard < 1:
            raise ValueError(f"shard={self.shard} records must be at least 1")
        if not self.counts or min(self.counts.values()) < 1:
            raise ValueError(f"counts={self.counts}: every split needs at least 1 record")

    def shards(self, split: str) -> Iterator[tuple[str, int, int]]:
        """File name, first record and number of records of each shard."""
        count = self.counts[split]
        total = -(-count // self.shard)
        for index in range(total):
            first = index * self.shard
            yield f"{split}-{index:05d}-of-{total:05d}.array_record", first, min(self.shard, count - first)

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format": FORMAT} | dataclasses.asdict(self)))  # tuples come back as lists


def write_records(
    folder: Path,
    plan: Plan,
    make: Callable[[str, int, int], Iterable[Mapping[str, np.ndarray]]],
    conclude: Callable[[Callable[[str], "Records"]], Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Writes a folder of records, or what is missing of it; a folder that holds the same plan already is left alone.

    The work stands in `<folder>.partial` until everything is whole, so nothing half-written ever has the folder's name.

    Args:
      make: (split, first, count) -> the `count` records from number `first` of a split, all with the same fields. A function of its
        arguments alone, because a writer that goes on asks for the missing shards only.
      conclude: (function that opens a split) -> arrays for `constants.npz`, once all records are written.

    Raises:
      ValueError: the folder, or the unfinished work beside it, is of another plan, or another process is at it; or records whose fields differ.
      OSError: the disk is full or not writable. Whole shards are kept for the next try.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        _check_same(plan, _read_json(folder), folder, "holds other records")
        return
    with only_writer(partial):
        _write_missing(partial, plan, make, conclude)
        os.rename(partial, folder)


def _write_missing(partial: Path, plan: Plan, make: Callable, conclude: Callable | None) -> None:
    record = plan.as_json()
    if (partial / RECORD).exists():
        before = _read_json(partial)
        _check_same(plan, before, partial, "is unfinished work of another kind")
        record["fields"] = before["fields"]
    else:
        _write_record(partial, record | {"fields": None})  # before any shard: of which plan they are
    for split in plan.counts:
        for name, first, count in plan.shards(split):
            if not (partial / name).exists():
                fields = _write_shard(partial / name, make(split, first, count), count, record.get("fields"))
                if record.get("fields") is None:
                    record["fields"] = fields
                    _write_record(partial, record)
    shards = {split: [(name, count) for name, _, count in plan.shards(split)] for split in plan.counts}
    record["shards"] = {
        split: [{"file": name, "count": count, "bytes": (partial / name).stat().st_size} for name, count in files]
        for split, files in shards.items()
    }
    _write_record(partial, record)
    constants = {} if conclude is None else dict(conclude(lambda split: Records(partial, split)))
    with _told(partial / CONSTANTS):
        np.savez(partial / CONSTANTS, **constants)


class Records:
    """The records of one split, by number; each is a dict of read-only arrays. `fields` are their shapes and dtypes by name.

    Raises:
      FileNotFoundError: no such folder, or a shard is missing.
      ValueError: the folder is not one of records, has no such split, lacks `fields`, or a shard was cut short.
    """

    def __init__(self, folder: Path, split: str, fields: Iterable[str] = ()):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        folder = Path(folder)
        record = read_record(folder)
        if split not in record["shards"]:
            raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(record['shards'])}")
        if missing := sorted(set(fields) - set(record["fields"])):
            raise ValueError(f"the records in {folder} lack {', '.join(missing)}: delete the folder and make it anew")
        self._layout, self._bytes = {}, 0
        for name, (shape, kind) in record["fields"].items():
            dtype, size = np.dtype(kind).newbyteorder("<"), math.prod(shape)
            self._layout[name] = (tuple(shape), size, dtype, self._bytes)
            self._bytes += dtype.itemsize * size
        paths = []
        for shard in record["shards"][split]:
            path = folder / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: copy the whole folder, or delete {folder} and make it anew")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, not {shard['bytes']}: it is damaged, delete {folder} and make it anew")
            # Told how many records there are, the source need not open every shard to count them.
            paths.append(f"{path}[0:{shard['count']}]")
        self._source = ArrayRecordDataSource(paths)
        self.folder, self.split, self.fields = folder, split, record["fields"]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Record:
        """Raises ValueError where the record is damaged, IndexError where there is none."""
        number = index.__index__()
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder} has {len(self)} records of {self.split}, there is no number {number}")
        try:
            data = self._source[number]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"record {number} of {self.split} in {self.folder} is damaged, delete the folder and make it anew: {error}") from error
        if len(data) != self._bytes:
            raise ValueError(f"record {number} of {self.split} in {self.folder} has {len(data)} bytes, its fields {self._bytes}: a shard is another folder's")
        return {
            name: np.frombuffer(data, dtype, size, start).reshape(shape)
            for name, (shape, size, dtype, start) in self._layout.items()
        }

    def stacked(self, *fields: str) -> Record:
        """Those fields of all records, along a new first axis."""
        rows = [[record[name] for name in fields] for record in map(self.__getitem__, range(len(self)))]
        return dict(zip(fields, map(np.stack, zip(*rows, strict=True)), strict=True))


def read_record(folder: Path) -> dict[str, Any]:
    """`record.json`: `made_with`, `counts`, `fields` {name: [shape, dtype]} and `shards`.

    Raises:
      FileNotFoundError: no such folder; says so where it is unfinished.
      ValueError: not a folder of records.
    """
    record = _read_json(Path(folder))
    if not {"shards", "fields", "made_with"} <= record.keys():
        raise ValueError(f"{folder}/{RECORD} is incomplete: delete the folder and make it anew")
    return record


def read_constants(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of `constants.npz`.

    Raises:
      FileNotFoundError, ValueError: it is missing or damaged.
    """
    path = Path(folder) / CONSTANTS
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return dict(stored)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged, delete the folder and make it anew: {error}") from error


class _told:
    """Errors of writing name the file and what to do."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # ArrayRecord's errors of the file system are RuntimeErrors.
        if isinstance(error, OSError | RuntimeError):
            self.path.unlink(missing_ok=True)
            raise OSError(f"cannot write {self.path}: {error}. What is whole is kept: make room and run the same command again") from error


def _write_shard(path: Path, made: Iterable[Mapping[str, np.ndarray]], count: int, fields: dict | None) -> dict:
    """Writes a shard under another name and renames it when it is whole. Returns the fields of its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_suffix(UNFINISHED)
    with _told(unfinished):
        # One record to a group: they are read at random. Latents hardly shrink under compression.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    written = 0
    for arrays in made:
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        found = {name: [list(value.shape), value.dtype.name] for name, value in arrays.items()}
        if fields is None:
            fields = found
        if found != fields:
            raise ValueError(f"record {written} of {path.name} has the fields {found}, the ones before it have {fields}: they must be the same")
        data = b"".join(arrays[name].astype(arrays[name].dtype.newbyteorder("<"), order="C").tobytes() for name in fields)
        with _told(unfinished):
            writer.write(data)
        written += 1
    if written != count:
        raise ValueError(f"{path.name} got {written} records, it needs {count}")
    with _told(unfinished):
        writer.close()
        _to_disk(unfinished)
        os.rename(unfinished, path)
    return fields


def _write_record(partial: Path, record: dict[str, Any]) -> None:
    with _told((partial / RECORD).with_suffix(UNFINISHED)):
        write_whole(partial / RECORD, json.dumps(record, indent=1))


def _to_disk(path: Path) -> None:
    """Returns once the file's bytes would survive a loss of power, so that a rename cannot get ahead of them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        unfinished = folder.with_name(folder.name + ".partial").is_dir()
        fix = "it is unfinished, run the command that makes it again" if unfinished else "make it first, or name another folder"
        raise FileNotFoundError(f"there are no records in {folder}: {fix}")
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, delete the folder and make it anew: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: make the folder anew")
    return record


def _check_same(plan: Plan, record: dict[str, Any], folder: Path, what: str) -> None:
    asked = plan.as_json()
    now, before = asked.pop("made_with"), record.get("made_with", {})
    flat = {f"made_with {name}": (now.get(name), before.get(name)) for name in sorted(now.keys() | before.keys())}
    flat |= {name: (value, record.get(name)) for name, value in asked.items()}
    if differences := [name for name, (wanted, found) in flat.items() if wanted != found]:
        raise ValueError(f"{folder} {what} ({', '.join(differences)} differ): delete it, or choose another folder")
