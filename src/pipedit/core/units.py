"""Numbers with units, as people write and read them."""

KIB, MIB, GIB = 1024, 1024**2, 1024**3


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'. Binary units, three digits at most before the unit."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """0.0421 -> '42 ms', 7.5 -> '7.5 s', 125 -> '2 min 05 s', 7260 -> '2 h 01 min'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
