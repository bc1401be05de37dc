"""Amounts as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.amounts import BYTES, SECONDS, read_bytes, read_numbers, read_seconds
from fourfold.compiler.errors import DataError

NONSENSE = ("", " ", "five", "1e400", "-1", "nan", "inf", "-inf", "0", "1,5", "1 000", "0x10")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1GB", 10**9),
        ("2GiB", 2 << 30),
        ("500 MB", 500_000_000),
        ("500mb", 500_000_000),
        ("1.5kb", 1500),
        ("64kib", 65536),
        ("0.5MiB", 1 << 19),
        ("100", 100),
        (" 100 ", 100),
        ("7b", 7),
        ("1e3", 1000),
        ("1.9", 1),
    ],
)
def test_bytes(text, amount):
    found = read_bytes(text)
    assert (found, type(found)) == (amount, int)


@pytest.mark.parametrize(
    "text", [*NONSENSE, "GB", "0.5", "1TBB", "1TB", "5ms", "MB5", "1 G B", "1e30"]
)
def test_no_bytes(text):
    with pytest.raises(DataError, match=r"not an amount of bytes: .* expected e.g. 500MB or 2GiB"):
        read_bytes(text)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("5ms", 0.005),
        ("5 ms", 0.005),
        ("0.2s", 0.2),
        ("0.2", 0.2),
        ("250US", 0.00025),
        ("1e-3", 0.001),
        ("3e2s", 300.0),
    ],
)
def test_seconds(text, amount):
    assert read_seconds(text) == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    "text", [*NONSENSE, "ms", "0ms", "-5ms", "5m", "5min", "5ns", "1e9", "5 m s"]
)
def test_no_seconds(text):
    with pytest.raises(DataError, match=r"not a time: .* expected e.g. 5ms or 0.2s"):
        read_seconds(text)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("8,4,2", (8, 4, 2)), (" 8 , 4 ", (8, 4)), ("8", (8,)), ("-1,0", (-1, 0)), ("4,4", (4, 4))],
)
def test_numbers(text, numbers):
    assert read_numbers(text) == numbers


@pytest.mark.parametrize(
    "text", ["", ",", "8,", "8,,2", "8.0", "8 4 2", "eight", "8;4", "1e1", "9" * 5000]
)
def test_no_numbers(text):
    with pytest.raises(DataError, match=r"not a list of numbers: .* expected e.g. 8,4,2"):
        read_numbers(text)


@given(st.integers(1, 10**6), st.sampled_from(sorted(BYTES)), st.booleans())
def test_every_unit_of_bytes(count, unit, upper):
    text = f"{count}{unit.upper() if upper else unit}"
    assert read_bytes(text) == int(count * BYTES[unit])


@given(st.floats(1e-3, 1e3), st.sampled_from(sorted(SECONDS)))
def test_every_unit_of_seconds(count, unit):
    assert read_seconds(f"{count!r}{unit}") == count * SECONDS[unit]


@given(st.lists(st.integers(), min_size=1, max_size=5))
def test_numbers_read_back(numbers):
    assert read_numbers(",".join(map(str, numbers))) == tuple(numbers)


@given(st.text(max_size=12))
def test_any_text_is_an_amount_or_refused(text):
    for read in (read_bytes, read_seconds):
        try:
            amount = read(text)
        except DataError as error:
            assert repr(text) in str(error)
        else:
            assert 0 < amount < 1 << 63
