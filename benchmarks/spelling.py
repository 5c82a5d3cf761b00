"""How the documents' tables write numbers."""

UNKNOWN = "–"


def num_bytes(value: float | None) -> str:
    """Bytes, in the largest decimal unit of which there is one."""
    if value is None:
        return UNKNOWN
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * factor:
            return f"{digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def digits(value: float | None) -> str:
    """A number to two or three digits, or to its last before the point."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"
