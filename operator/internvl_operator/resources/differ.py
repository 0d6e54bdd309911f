"""Whether a live object lacks something of what was asked for."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]*)?)(?:[eE]([+-]?[0-9]+)|([numkMGTPE]|[KMGTPE]i))?$")
_DECIMAL_PREFIXES = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY_PREFIXES = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def differs(desired: Any, live: Any) -> bool:
    """Whether `live` does not contain `desired`.

    What the API server has added does not count, quantities are compared by
    value, and lists of the same length item by item.
    """
    if isinstance(desired, Mapping):
        return _mapping_differs(desired, live)
    if isinstance(desired, Sequence) and not isinstance(desired, str):
        return (
            not isinstance(live, list)
            or len(desired) != len(live)
            or any(map(differs, desired, live))
        )
    return desired != live and not _are_equal_quantities(desired, live)


def _mapping_differs(desired: Mapping[str, Any], live: Any) -> bool:
    if not desired:
        return False
    return not isinstance(live, Mapping) or any(
        differs(value, live.get(key)) for key, value in desired.items()
    )


def _are_equal_quantities(one: object, other: object) -> bool:
    values = [_parse(str(one)), _parse(str(other))]
    return None not in values and values[0] == values[1]


def _parse(text: str) -> Decimal | None:
    """Return the value of a Kubernetes quantity, None for any other text."""
    match = _QUANTITY.match(text)
    if match is None:
        return None
    number, exponent, suffix = match.groups()
    if suffix in _BINARY_PREFIXES:
        return Decimal(number) * Decimal(2) ** _BINARY_PREFIXES[suffix]
    return Decimal(number).scaleb(int(exponent or _DECIMAL_PREFIXES.get(suffix, 0)))
