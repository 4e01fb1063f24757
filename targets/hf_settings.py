"""Typed reading of a Hugging Face `config.json`: every key is asked for, or known not to matter, or refused."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from farrier.targets.errors import CheckpointError, UnsupportedModelError

_LARGEST_INTEGER = 2**31 - 1
_SMALLEST_NUMBER, _LARGEST_NUMBER = 1e-12, 1e12
_REQUIRED: Any = object()


class Settings:
    """One JSON object of a config. Every reader names the offending key in a CheckpointError.

    Null means absent, except that it beats a class default. Numbers are positive, of a magnitude that float32 bears.
    """

    def __init__(self, values: Any, where: str = "config.json", defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must hold a JSON object, not {_shown(values)}")
        self._stated: dict[str, Any] = values
        self._values: dict[str, Any] = {**(defaults or {}), **values}
        self._where = where
        self._asked: set[str] = set()

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Settings":
        return Settings(self._stated, self._where, {**defaults})

    def raw(self, key: str) -> Any:
        self._asked.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = _LARGEST_INTEGER) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.bad(key, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.raw(key) is None else self.integer(key)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._value(key, default)
        if not _is_number(value):
            raise self.bad(key, f"a number from {_SMALLEST_NUMBER} to {_LARGEST_NUMBER}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.raw(key) is None else self.number(key)

    def numbers(self, key: str, length: int) -> list[float]:
        values = self._value(key, _REQUIRED)
        if not isinstance(values, list) or len(values) != length or not all(map(_is_number, values)):
            raise self.bad(key, f"a list of {length} numbers from {_SMALLEST_NUMBER} to {_LARGEST_NUMBER}")
        return [float(value) for value in values]

    def flag(self, key: str) -> bool:
        """True or false; false when absent."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """The object under `key`; an empty one when absent."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.bad(key, "a JSON object")
        return value

    def bad(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"'{key}' in {self._where} must be {expected}, not {_shown(self._values.get(key))}")

    def unsupported(self, key: str, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"'{key}' = {_shown(self._values.get(key))} in {self._where} is not supported: {why}"
        )

    def refuse_unasked(self, irrelevant: Iterable[str] = (), implied: Mapping[str, Any] | None = None) -> None:
        """Raises UnsupportedModelError for the first key that is set and that nothing has asked for.

        Null and false switch a setting off, whatever it is; at its value in `implied` it says nothing new.
        """
        known = self._asked.union(irrelevant)
        for key, value in self._values.items():
            if key in known or key.startswith("_") or value is None or value is False:
                continue
            if value != (implied or {}).get(key):
                raise self.unsupported(
                    key, "this setting is unknown; remove it if it does not change what the model computes"
                )

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self._where} lacks '{key}'")
        return default


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return _SMALLEST_NUMBER <= value <= _LARGEST_NUMBER


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
