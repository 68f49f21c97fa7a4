"""Quantities as people read them."""


def in_bytes(count: int) -> str:
    """1_500_000 -> "1.5 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
