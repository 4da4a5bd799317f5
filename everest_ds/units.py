"""Numbers for people: counts, bytes and durations, each with its unit."""

from __future__ import annotations

GIB = 1024**3


def format_count(value: float) -> str:
    """`94_210_944` -> `94.2 M`: for parameters and multiply-accumulates."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {suffix}" if value >= 1e12 else f"{value / factor:.1f} {suffix}"
    return f"{value:g}"


def format_bytes(value: float) -> str:
    """`1610612736` -> `1.50 GiB`."""
    for factor, suffix in ((GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if value >= factor:
            return f"{value / factor:.2f} {suffix}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """`4523` -> `1h 15m 23s`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m {secs:02d}s"
    return f"{minutes}m {secs:02d}s" if minutes else f"{secs}s"
