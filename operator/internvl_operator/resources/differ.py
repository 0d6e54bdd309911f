"""Whether a live object lacks something of what was asked for."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

_QUANTITY = re.compile(r"^([0-9.]+)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")
_FACTORS = {
    "": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6),
    "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15), "Ki": Decimal(2**10),
    "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40), "Pi": Decimal(2**50),
}  # fmt: skip


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
    match = _QUANTITY.match(text)
    return Decimal(match[1]) * _FACTORS[match[2] or ""] if match else None
