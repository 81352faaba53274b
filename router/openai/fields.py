"""Typed access to a JSON object from a client: every wrong value is a 400 that names its path.

Owns: the readers. A JSON number without a fraction is an integer whatever its spelling (`16.0`); a boolean never is.
Explicit null means absent everywhere, as in the OpenAI API.
"""

from __future__ import annotations

import math
from typing import Any

from router.errors import ApiError, bad_request

_MISSING: Any = object()


class Fields:
    """Reads a JSON object once, field by field, and remembers which fields were read."""

    __slots__ = ("_data", "_path", "_read")

    def __init__(self, data: Any, path: str = "") -> None:
        if not isinstance(data, dict):
            raise bad_request(
                path or None, f"{path or 'The request body'}: expected a JSON object, found {_kind(data)}."
            )
        self._data: dict[str, Any] = data
        self._path = path
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """The JSON path of a field, as error objects report it."""
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> Any:
        """The value as it came; None when absent."""
        self._read.add(name)
        return self._data.get(name)

    def skip(self, *names: str) -> None:
        """Marks fields as known although they have no effect."""
        self._read.update(names)

    def unread(self) -> list[str]:
        """Names of the fields nobody asked for."""
        return [name for name in self._data if name not in self._read]

    def wrong(self, name: str, expected: str) -> ApiError:
        """The error for a value of the wrong type."""
        path = self.path(name)
        return bad_request(path, f"{path}: expected {expected}, found {_kind(self._data.get(name))}.")

    def text(self, name: str, default: Any = _MISSING) -> Any:
        """A string. Without a default, the field is required."""
        value = self.raw(name)
        if value is None:
            return self._default(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str, default: Any = False) -> Any:
        """A boolean."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "a boolean")
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """An integer in [low, high]."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if not low <= value <= high:
            raise self._range(name, value, low, high)
        return value

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """A number in [low, high]."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if not math.isfinite(value) or not low <= value <= high:
            raise self._range(name, value, low, high)
        return float(value)

    def items(self, name: str, default: Any = _MISSING) -> list[Any]:
        """A list. Without a default, the field is required."""
        value = self.raw(name)
        if value is None:
            found: list[Any] = self._default(name, default)
            return found
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def fields(self, name: str) -> Fields | None:
        """A nested object; None when absent."""
        value = self.raw(name)
        return None if value is None else Fields(value, self.path(name))

    def choice(self, name: str, allowed: tuple[str, ...], default: Any = _MISSING) -> Any:
        """A string out of `allowed`."""
        value = self.text(name, default)
        if value is not default and value not in allowed:
            path = self.path(name)
            raise bad_request(path, f"{path}: found {value[:80]!r}, expected one of {', '.join(allowed)}.")
        return value

    def _default(self, name: str, default: Any) -> Any:
        if default is _MISSING:
            path = self.path(name)
            raise bad_request(path, f"Missing required parameter: '{path}'.", "missing_required_parameter")
        return default

    def _range(self, name: str, value: object, low: object, high: object) -> ApiError:
        path = self.path(name)
        return bad_request(path, f"{path}: found {value!r:.40}, expected a value from {low} to {high}.")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
