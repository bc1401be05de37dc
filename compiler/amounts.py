"""Reads amounts as people write them: `500MB`, `5ms`, `8,4,2`."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import DataError

BYTES = {
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": float(1 << 10),
    "mib": float(1 << 20),
    "gib": float(1 << 30),
    "b": 1.0,
}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def read_bytes(text: str) -> int:
    """Read `500MB`, `2GB` or a number of bytes.

    Raises:
        DataError: It is none of these.
    """
    amount = _amount(text, BYTES)
    if not 1 <= amount < 1 << 63:  # nan is refused too
        raise DataError(f"not an amount of bytes: {text!r}; expected e.g. 500MB or 2GiB")
    return int(amount)


def read_seconds(text: str) -> float:
    """Read `5ms`, `0.2s` or a number of seconds.

    Raises:
        DataError: It is none of these, or not above zero.
    """
    amount = _amount(text, SECONDS)
    if not 0 < amount < 1e9:
        raise DataError(f"not a time: {text!r}; expected e.g. 5ms or 0.2s")
    return amount


def read_numbers(text: str) -> tuple[int, ...]:
    """Read `8,4,2`.

    Raises:
        DataError: It is no list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"not a list of numbers: {text!r}; expected e.g. 8,4,2") from None


def _amount(text: str, units: Mapping[str, float]) -> float:
    """Return a number times its unit; 0 where it is no number."""
    plain = text.strip().lower()
    unit = next((u for u in sorted(units, key=len, reverse=True) if plain.endswith(u)), "")
    try:
        return float(plain.removesuffix(unit)) * units.get(unit, 1.0)
    except ValueError:
        return 0.0
