"""What is kept is found again; what is damaged is as good as not there."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fourfold
from fourfold.compiler import cache
from fourfold.compiler.cache import Cache, home

HOME = Path(fourfold.__path__[0])

NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(1 << 60), 1 << 60)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part),
    max_leaves=6,
)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def kept(tmp_path):
    """A cache that holds one result, and the file that holds it."""
    store = Cache("kind", tmp_path)
    assert store.put({"a": 1}, [1.5])
    (path,) = files(tmp_path)
    return store, path


@settings(max_examples=60)
@given(key=PLAIN, result=PLAIN)
def test_what_is_put_is_got(tmp_path_factory, key, result):
    store = Cache("kind", tmp_path_factory.mktemp("cache"))
    assert store.get(key) is None
    assert store.put(key, result)
    assert store.get(key) == result
    assert store.put(key, [result])
    assert store.get(key) == [result]


def test_keys_and_kinds_are_apart(tmp_path):
    first, second = Cache("first", tmp_path), Cache("second", tmp_path)
    keys = [{"a": 1}, {"a": 2}, {"b": 1}, {}, [], None, "", 0, [1, 2], [2, 1]]
    for number, key in enumerate(keys):
        assert first.get(key) is None
        first.put(key, number)
    assert [first.get(key) for key in keys] == list(range(len(keys)))
    assert [second.get(key) for key in keys] == [None] * len(keys)


def test_the_order_of_a_keys_fields_does_not_matter(tmp_path):
    store = Cache("kind", tmp_path)
    store.put({"a": 1, "b": [1, 2]}, "found")
    assert store.get({"b": [1, 2], "a": 1}) == "found"
    assert len(files(tmp_path)) == 1


def test_another_process_finds_it(kept):
    _, path = kept
    again = Cache("kind", path.parents[2])
    assert again.get({"a": 1}) == [1.5]
    assert json.loads(path.read_text()) == {"key": {"a": 1}, "result": [1.5]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[1.5]",
        b'"text"',
        b"{}",
        b'{"result": [1.5]}',
        b'{"key": {"a": 2}, "result": [1.5]}',
        b'{"key": {"a": 1}}',
        b"[" * 100_000,
        b"9" * 100_000,
    ],
)
def test_a_damaged_file_is_as_good_as_none(kept, content):
    store, path = kept
    path.write_bytes(content)
    assert store.get({"a": 1}) is None
    assert store.put({"a": 1}, [2.5])
    assert store.get({"a": 1}) == [2.5]


def test_a_file_that_is_too_large_is_not_read(kept, monkeypatch):
    store, path = kept
    size = path.stat().st_size
    monkeypatch.setattr(cache, "LARGEST", size)
    assert store.get({"a": 1}) == [1.5]
    monkeypatch.setattr(cache, "LARGEST", size - 1)
    assert store.get({"a": 1}) is None


def test_a_folder_in_the_place_of_a_file(kept):
    store, path = kept
    path.unlink()
    (path / "inside").mkdir(parents=True)
    assert store.get({"a": 1}) is None
    assert not store.put({"a": 1}, [2.5])
    assert files(path.parents[2]) == []  # nothing half done is left


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = Cache("kind", root)
        assert not store.put({"a": 1}, [1.5])
        assert store.get({"a": 1}) is None


def test_a_write_that_fails_leaves_the_old_result_and_no_part(kept, monkeypatch):
    store, path = kept

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert not store.put({"a": 1}, [2.5])
    assert store.get({"a": 1}) == [1.5]
    assert files(path.parents[2]) == [path]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_knows_no_infinity(tmp_path, number):
    store = Cache("kind", tmp_path)
    for call in (lambda: store.put({"a": 1}, number), lambda: store.put({"a": number}, 1)):
        with pytest.raises(ValueError, match="JSON compliant"):
            call()
    assert files(tmp_path) == []


def test_many_at_a_time_leave_one_whole_result(tmp_path):
    """Every reader sees nothing or one of the results in full."""
    results = [[number] * 2000 for number in range(8)]
    key = {"shared": True}

    def write(result):
        store = Cache("kind", tmp_path)
        done = [store.put(key, result) for _ in range(10)]
        return all(done), store.get(key)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, results))
    assert all(done and result in results for done, result in found)
    assert len(files(tmp_path)) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from fourfold.compiler.cache import Cache
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Cache("kind", Path(sys.argv[1])).put({"a": 1}, [2.5])
"""


def test_a_killed_run_leaves_no_half_result(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HOME.parent)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = Cache("kind", tmp_path)
    assert store.get({"a": 1}) is None
    assert store.put({"a": 1}, [1.5])
    assert store.get({"a": 1}) == [1.5]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "own"))
    assert home() == tmp_path / "own"
    Cache("kind").put("key", "result")
    assert [path.relative_to(tmp_path).parts[:2] for path in files(tmp_path)] == [("own", "kind")]
    monkeypatch.setenv("FOURFOLD_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "fourfold"
    monkeypatch.delenv("FOURFOLD_CACHE")
    assert home() == tmp_path / ".cache" / "fourfold"


# Arrays.

ARRAYS = {
    "codes": np.arange(-3, 3, dtype=np.int8).reshape(2, 3),
    "scale": np.float32(0.5),
    "delta": np.zeros(0),
}


@pytest.fixture
def shelved(tmp_path):
    """A cache that holds arrays, and the file that holds them."""
    store = Cache("kind", tmp_path)
    assert store.put_arrays({"a": 1}, ARRAYS)
    (path,) = files(tmp_path)
    return store, path


def same(found):
    """Whether these are the arrays that were put, by name, type, shape and content."""
    assert found.keys() == ARRAYS.keys()
    return all(
        (found[n].dtype, found[n].shape) == (a.dtype, a.shape) and np.array_equal(found[n], a)
        for n, a in ARRAYS.items()
    )


def test_arrays_that_are_put_are_got(shelved):
    store, path = shelved
    assert same(store.get_arrays({"a": 1}))
    assert same(Cache("kind", path.parents[2]).get_arrays({"a": 1}))
    assert store.get_arrays({"a": 2}) is None
    assert Cache("other", path.parents[2]).get_arrays({"a": 1}) is None
    assert store.put_arrays({"a": 1}, {"one": np.ones(2)})
    assert {n: a.tolist() for n, a in store.get_arrays({"a": 1}).items()} == {"one": [1, 1]}


def test_arrays_and_plain_results_of_one_key_are_apart(shelved):
    store, _ = shelved
    assert store.get({"a": 1}) is None
    assert store.put({"a": 1}, "plain")
    assert same(store.get_arrays({"a": 1}))
    assert store.get({"a": 1}) == "plain"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_arrays_cut_off_are_as_good_as_none(shelved, share):
    store, path = shelved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * (len(content) - 1))])
    assert store.get_arrays({"a": 1}) is None
    assert store.put_arrays({"a": 1}, ARRAYS)
    assert same(store.get_arrays({"a": 1}))


def test_no_damaged_byte_gives_other_arrays_or_an_error(shelved):
    store, path = shelved
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        found = store.get_arrays({"a": 1})
        assert found is None or same(found), place


def test_arrays_of_another_key_are_not_taken(shelved):
    store, path = shelved
    store.put_arrays({"a": 2}, {"one": np.ones(2)})
    (other,) = set(files(path.parents[1])) - {path}
    other.replace(path)
    assert store.get_arrays({"a": 1}) is None


def test_objects_are_neither_kept_nor_read(shelved, tmp_path):
    store, path = shelved
    with pytest.raises(ValueError, match="allow_pickle"):
        store.put_arrays({"a": 1}, {"one": np.array([{}])})
    np.savez(path.with_suffix(""), one=np.array([{}]))
    assert path.exists()
    assert store.get_arrays({"a": 1}) is None


def test_arrays_where_the_cache_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = Cache("kind", tmp_path / "file")
    assert not store.put_arrays({"a": 1}, ARRAYS)
    assert store.get_arrays({"a": 1}) is None
