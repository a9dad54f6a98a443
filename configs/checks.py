"""What several parts of a run refuse in the same words."""

from __future__ import annotations

from errors import UserError


def check_range(part: object, prefix: str, lowest: float, *names: str) -> None:
    """Refuses fields of `part` that are less than `lowest`."""
    for name in names:
        if not getattr(part, name) >= lowest:
            raise UserError(f"{prefix}{name}={getattr(part, name)} must be at least {lowest}")
