"""Teacher caches: what is read is what was written, whatever kills, damages or repeats the writing."""

import errno
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from commands import contents, limit_files_to
from processes import Crew

from kcd_ext.cache import TeacherCache, TeacherCacheWriter, writer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ENTRY_SIZE = 40  # bytes, as documented


def logits_of(sample: int, rows: int | None = None, classes: int = 7) -> torch.Tensor:
    """Return logits that depend on the sample alone: (classes,), or (rows, classes)."""
    shape = (classes,) if rows is None else (rows, classes)
    return torch.randn(shape, generator=torch.Generator().manual_seed(sample)) * 5


def fill(path, samples, rows=None, classes=7, **options):
    with TeacherCacheWriter(path, classes=classes, **options) as cache:
        for sample in samples:
            cache.write(sample, logits_of(sample, rows, classes))
    return TeacherCache(path)


def read_all(path) -> dict[int, torch.Tensor]:
    cache = TeacherCache(path)
    return {sample: cache[sample] for sample in cache}


def entropy_in_float64(logits: torch.Tensor, temperature: float) -> np.ndarray:
    z = logits.double().numpy() / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 10, 129])
def test_records_are_read_as_torch_rounds_them(tmp_path, dtype, classes):
    """In any order, repeatedly, from two shards, with ids that are neither dense nor sorted."""
    samples, temperature = [5, 0, 2**40, 17, 3, 8], 2.5
    for part in (samples[:4], samples[3:]):  # sample 17 is written twice, with the same bytes
        cache = fill(tmp_path, part, classes=classes, dtype=dtype, temperature=temperature)
    assert len(cache) == 6 and [*cache] == sorted(samples) and 17 in cache and 4 not in cache and "a" not in cache
    expected = {sample: logits_of(sample, None, classes).to(DTYPES[dtype]) for sample in samples}
    for sample in samples:
        assert torch.equal(cache[sample], expected[sample]) and cache[sample].dtype == DTYPES[dtype]
    asked = [17, 3, 17, 2**40]
    stacked = torch.stack([expected[sample] for sample in asked])
    assert torch.equal(cache.batch(asked), stacked) and torch.equal(cache.rows(np.array(asked)), stacked)
    assert torch.equal(cache.batch(torch.tensor(asked)), stacked)
    exact = np.stack([entropy_in_float64(logits_of(sample, None, classes), temperature) for sample in asked])
    assert abs(cache.entropy(asked).numpy() - exact).max() <= math.log(classes) / 510 + 1e-6
    for lookup in (lambda: cache[4], lambda: cache.batch([5, 4]), lambda: cache.rows(np.array([4])), lambda: cache[-1]):
        with pytest.raises(KeyError, match="has no record of sample"):
            lookup()
    for lookup, error in (
        (lambda: cache.rows(np.array([5]), 1), IndexError),
        (lambda: cache.batch([0.5]), TypeError),
        (lambda: cache.batch([5], [1]), ValueError),
        (lambda: cache.batch([]), ValueError),
    ):
        with pytest.raises(error):
            lookup()


def test_records_of_any_length_are_padded_with_zeros(tmp_path):
    lengths = {0: 1, 1: 4, 2: 3, 3: 300}
    with TeacherCacheWriter(tmp_path, classes=7) as cache:
        for sample, length in lengths.items():
            cache.write(sample, logits_of(sample, length))
    cache = TeacherCache(tmp_path)
    assert cache.lengths.tolist() == [*lengths.values()]
    for asked, wanted in (([3, 0, 2], None), ([1, 2, 1], [0, 3, 2]), ([1], [0])):
        each = wanted or [lengths[sample] for sample in asked]
        batch, entropy = cache.batch(asked, wanted), cache.entropy(asked, wanted)
        assert batch.shape == (len(asked), max(each), 7) and entropy.shape == batch.shape[:2]
        for row, (sample, length) in enumerate(zip(asked, each, strict=True)):
            full = logits_of(sample, lengths[sample])
            assert torch.equal(batch[row, :length], full[:length].half())
            assert not batch[row, length:].any() and not entropy[row, length:].any()
            if length:
                exact = entropy_in_float64(full[:length], 1.0)
                assert abs(entropy[row, :length].numpy() - exact).max() <= math.log(7) / 510 + 1e-6
    assert torch.equal(cache.rows(np.array([3, 1]), 0), torch.stack([cache[3][0], cache[1][0]]))
    for asked, wanted in (([1], [5]), ([1], [-1]), ([1, 2], [1])):
        with pytest.raises(ValueError, match="lengths must be"):
            cache.batch(asked, wanted)
    with pytest.raises(IndexError, match=r"row must be in \[0, 1\)"):
        cache.rows(np.array([3, 0]), 1)
    with TeacherCacheWriter(tmp_path, classes=7) as more:
        more.write(9, logits_of(9))
    with pytest.raises(ValueError, match="got both"):
        TeacherCache(tmp_path).batch([1, 9])


def test_cache_reads_in_other_processes_and_shows_the_records_of_its_opening(tmp_path):
    cache = fill(tmp_path, range(50))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.digest == cache.digest and torch.equal(copy[3], cache[3])

    def read(rank):
        for sample in random.Random(rank).sample(range(50), 50):
            assert torch.equal(cache[sample], logits_of(sample).half())

    assert Crew(read, 4).wait() == [0] * 4
    later = fill(tmp_path, range(40, 60))
    assert len(cache) == 50 and len(later) == 60 and later.digest != cache.digest


def test_digest_does_not_depend_on_how_records_were_spread(tmp_path):
    one = fill(tmp_path / "one", range(20))
    for part in (range(10, 20), range(12), [19, 3]):
        other = fill(tmp_path / "other", part)
    assert one.digest == other.digest
    with TeacherCacheWriter(tmp_path / "third", classes=7) as third:
        third.write_batch(torch.arange(20), torch.stack([logits_of(s) + (s == 11) for s in range(20)]))
    assert TeacherCache(tmp_path / "third").digest != one.digest


def test_import_needs_torch_and_numpy_alone():
    code = (
        "import sys\nfor name in ('filelock', 'accelerate', 'safetensors', 'tqdm', 'PIL'): sys.modules[name] = None\n"
    )
    subprocess.run([sys.executable, "-c", code + "import kcd_ext.cache"], check=True, timeout=120)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "got"),
    [
        (math.nan, "bfloat16", "nan"),
        (math.inf, "float32", "inf"),
        (7e4, "float16", "70000.0"),
        (-7e4, "float16", "-70000.0"),
    ],
)
def test_logits_that_cannot_be_stored_are_refused_and_nothing_is_lost(tmp_path, value, dtype, got):
    masked = logits_of(1)
    masked[2] = -math.inf
    bad = torch.stack([logits_of(7, 3), logits_of(8, 3)])
    bad[1, 2, 4] = value
    with TeacherCacheWriter(tmp_path, classes=7, dtype=dtype) as cache:
        cache.write(1, masked)
        with pytest.raises(ValueError, match=f"^sample 8: logits must be .* got {got}$"):
            cache.write_batch([7, 8], bad)
    assert torch.equal(read_all(tmp_path)[1], masked.to(DTYPES[dtype])) and len(read_all(tmp_path)) == 1


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    for options, message in (
        ({"kind": "hidden"}, "kind must be one of 'dense', got 'hidden'"),
        ({"dtype": "int8"}, "dtype must be one of 'float16', 'bfloat16', 'float32', got 'int8'"),
        ({"classes": 0}, "classes must be an integer in"),
        ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ({"about": {"x": math.nan}}, "JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherCacheWriter(tmp_path / "new", **{"classes": 7, **options})
    assert not (tmp_path / "new").exists()
    with TeacherCacheWriter(tmp_path, classes=7) as cache:
        for sample, logits, error in (
            (-1, logits_of(1), ValueError),
            (1.5, logits_of(1), TypeError),
            (1, torch.ones(8), ValueError),
            (1, torch.ones(0, 7), ValueError),
            (1, torch.ones(1, 1, 7), ValueError),
            (1, torch.ones(7, dtype=torch.int64), TypeError),
            (1, [1.0] * 7, TypeError),
        ):
            with pytest.raises(error):
                cache.write(sample, logits)
        with pytest.raises(ValueError, match="logits must have shape"):
            cache.write_batch([1, 2], torch.ones(3, 7))
        cache.write_batch([], torch.ones(0, 7))
    with pytest.raises(ValueError, match="closed"):
        cache.write(1, logits_of(1))
    assert len(TeacherCache(tmp_path)) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"classes": 8}, "classes=7, got classes=8"),
        ({"dtype": "bfloat16"}, "dtype='float16', got dtype='bfloat16'"),
        ({"temperature": 4}, "temperature=1.0, got temperature=4.0"),
        ({"about": {"a": {"b": 2}}}, "a.b=1, got a.b=2"),
        ({"about": {}}, "a=dict of length 1, got a=None"),
    ],
)
def test_writer_refuses_cache_with_another_header(tmp_path, changed, named):
    fill(tmp_path, [1], about={"a": {"b": 1}})
    before = contents(tmp_path)
    with pytest.raises(ValueError) as caught:
        TeacherCacheWriter(tmp_path, **{"classes": 7, "about": {"a": {"b": 1}}, **changed})
    assert str(caught.value) == f"{tmp_path} was made with {named}: choose another folder"
    assert contents(tmp_path) == before


def test_other_record_of_a_sample_is_an_error(tmp_path):
    fill(tmp_path, [1, 2])
    for earlier in (True, False):  # of an earlier writer, and of this one
        with TeacherCacheWriter(tmp_path, classes=7) as cache:
            if not earlier:
                cache.write(3, logits_of(3))
            with pytest.raises(ValueError, match="already has another record of sample"):
                cache.write(2 if earlier else 3, logits_of(4))
            with pytest.raises(ValueError, match="already has another record of sample 1"):
                cache.write(1, logits_of(1)[None])  # the same numbers in another shape
    one, other = (TeacherCacheWriter(tmp_path, classes=7) for _ in range(2))
    with one, other:  # neither knows of the other
        one.write(9, logits_of(9)), other.write(9, logits_of(10))
    with pytest.raises(ValueError, match=r"different records of sample 9, in shard-0002.index and shard-0003.index"):
        TeacherCache(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_index_cut_anywhere_shows_its_complete_entries(tmp_path):
    fill(tmp_path, range(6))
    index = tmp_path / "shard-0000.index"
    whole = index.read_bytes()
    assert len(whole) == 6 * ENTRY_SIZE
    for size in range(len(whole)):
        index.write_bytes(whole[:size])
        found = read_all(tmp_path)
        assert [*found] == [*range(size // ENTRY_SIZE)]
        index.write_bytes(whole[:size].ljust(len(whole), b"\0"))  # as a file system may leave it after a power cut
        assert [*read_all(tmp_path)] == [*range(size // ENTRY_SIZE)]
    fill(tmp_path, range(6))  # a new writer completes it in a shard of its own
    assert all(torch.equal(found, logits_of(sample).half()) for sample, found in read_all(tmp_path).items())
    assert len(read_all(tmp_path)) == 6


def test_damage_is_named_in_one_line(tmp_path):
    fill(tmp_path, range(6), about={"a": [1, 2], "b": None})
    data, index, header = (tmp_path / name for name in ("shard-0000.data", "shard-0000.index", "cache.json"))
    whole = {path: path.read_bytes() for path in (data, index, header)}

    def message(path, content, sample=None):
        path.write_bytes(content)
        try:
            with pytest.raises(ValueError) as caught:
                cache = TeacherCache(tmp_path)
                cache[sample]
            return str(caught.value)
        finally:
            path.write_bytes(whole[path])

    def flipped(path, position):
        content = bytearray(whole[path])
        content[position] ^= 1
        return bytes(content)

    remedy = "remove shard-0000.data and shard-0000.index, and run the command that made the cache again"
    for position in range(ENTRY_SIZE, 2 * ENTRY_SIZE):
        text = message(index, flipped(index, position))
        assert text == f"{index} is damaged: entry 1 does not match its checksum; {remedy}"
    size = len(whole[data])
    for cut in (0, size // 2, size - 8):
        assert message(data, whole[data][:cut]).startswith(f"{data} is damaged: it has {cut} bytes, its index needs ")
    record = size // 6
    for position in (2 * record, 2 * record + 7 * 2, 2 * record + 7 * 2 - 1):  # the third record, its entropy included
        text = message(data, flipped(data, position), 2)
        assert text == f"{data} is damaged: the record of sample 2 does not match its checksum; {remedy}"
        data.write_bytes(flipped(data, position))
        cache = TeacherCache(tmp_path)
        assert torch.equal(cache[1], logits_of(1).half())  # the others are intact
        for read in (TeacherCache.batch, TeacherCache.rows, TeacherCache.entropy):
            with pytest.raises(ValueError, match="record of sample 2"):
                read(cache, np.array([0, 2]))
        with pytest.raises(ValueError, match="record of sample 2"):
            cache.verify()
        data.write_bytes(whole[data])
    data.unlink()
    with pytest.raises(ValueError, match="it has 0 bytes"):
        TeacherCache(tmp_path)
    data.write_bytes(whole[data])
    content = json.loads(whole[header])
    for changed, text in (
        ({"format": 2}, "is a teacher cache of format 2, and this version of kcd_ext reads format 1"),
        ({"kind": "hidden"}, "is a teacher cache of kind 'hidden', and this version of kcd_ext reads dense"),
        ({"classes": "7"}, "cache.json is damaged: classes='7' does not match its checksum"),
        (
            {"classes": 8},
            "cache.json is damaged: classes=8 does not match its checksum; restore it, or make the cache in ",
        ),
        ({"dtype": "bfloat16"}, "cache.json is damaged: dtype='bfloat16' does not match its checksum"),
        ({"temperature": 2.0}, "cache.json is damaged: temperature=2.0 does not match its checksum"),
        ({"about": {"a": [1, 3]}}, "cache.json is damaged: about.a=list of length 2 does not match its checksum"),
        ({"about": {"a": [1, 2], "b": None, "c": 1}}, "cache.json is damaged: about.c=1 does not match its checksum"),
        ({"about": {"b": None}}, "cache.json is damaged: it has no about.a, which does not match its checksum"),
        ({"about": 3}, "cache.json is damaged: about=3 does not match its checksum"),
        ({"checks": {}}, "cache.json is damaged: format=1 does not match its checksum"),
        ({"checks": 3}, "cache.json is damaged"),
    ):
        assert text in message(header, json.dumps({**content, **changed}).encode())
    assert "cache.json is damaged" in message(header, b"{")
    fill(tmp_path / "wider", [7], classes=8)
    for file in (data, index):  # a shard of another cache
        file.write_bytes((tmp_path / "wider" / file.name).read_bytes())
    with pytest.raises(
        ValueError, match=r"cache.json does not fit the record of sample 7: its classes or dtype are not"
    ):
        TeacherCache(tmp_path)


def test_header_has_a_checksum_of_every_field(tmp_path):
    fill(tmp_path, [0], about={"name": "é", "views": {"b": 1, "a": 0.5}})
    header = json.loads((tmp_path / "cache.json").read_bytes())
    assert header["checks"] == {
        "format": zlib.crc32(b"1"),
        "kind": zlib.crc32(b'"dense"'),
        "classes": zlib.crc32(b"7"),
        "dtype": zlib.crc32(b'"float16"'),
        "temperature": zlib.crc32(b"1.0"),
        "about.name": zlib.crc32(b'"\\u00e9"'),
        "about.views": zlib.crc32(b'{"a":0.5,"b":1}'),
    }


def test_not_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a teacher cache: it has no cache.json"):
        TeacherCache(tmp_path / "elsewhere")


def test_full_disk_loses_no_earlier_record(tmp_path):
    fill(tmp_path, range(5))

    def job(rank):
        limit_files_to(3000)()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError) as caught:
            fill(tmp_path, range(200))
        assert caught.value.errno == errno.EFBIG and "shard-0001.data" in caught.value.filename

    assert Crew(job).wait() == [0]
    assert [*read_all(tmp_path)] == [*range(5)]
    assert len(fill(tmp_path, range(200))) == 200


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_writers_killed_at_any_moment_leave_a_cache_that_others_complete(tmp_path, monkeypatch):
    """Three writers at a time, with overlapping shares, from the first moment on; readers look on."""
    monkeypatch.setattr(writer, "BUFFER_SIZE", 100)  # many small blocks
    samples, path, moments = 3000, tmp_path / "cache", random.Random(3)

    def write(rank):
        with TeacherCacheWriter(path, classes=7) as cache:
            order = [*range(samples)]
            random.Random(os.getpid()).shuffle(order)
            for sample in (number for number in order if number % 3 in (rank, (rank + 1) % 3)):
                if sample not in cache:
                    cache.write(sample, logits_of(sample))

    sizes = []
    for kill in range(12):
        crew = Crew(write, 3)
        deadline = time.monotonic() + moments.random() * (0.02 if kill < 4 else 0.3)
        while time.monotonic() < deadline:
            if (path / "cache.json").exists():
                TeacherCache(path)  # never an error while others write
        crew.kill()
        found = read_all(path) if (path / "cache.json").exists() else {}
        assert all(torch.equal(found[sample], logits_of(sample).half()) for sample in found)
        sizes.append(len(found))
    assert sizes == sorted(sizes) and any(0 < size < samples for size in sizes), sizes
    assert Crew(write, 3).wait() == [0] * 3
    cache = TeacherCache(path)
    assert cache.ids.tolist() == [*range(samples)]
    assert torch.equal(cache.rows(cache.ids), torch.stack([logits_of(s) for s in range(samples)]).half())
