"""Human-readable formats for counts, bytes and durations, each with its unit."""

from __future__ import annotations

GIB = 1024**3


def format_count(value: float) -> str:
    """Format a count of parameters or multiply-accumulates: `94_210_944` -> `94.2 M`."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {suffix}" if value >= 1e12 else f"{value / factor:.1f} {suffix}"
    return f"{value:g}"


def format_bytes(value: float) -> str:
    """Format a number of bytes: `1610612736` -> `1.50 GiB`."""
    for factor, suffix in ((GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if value >= factor:
            return f"{value / factor:.2f} {suffix}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """Format a duration: `4523` seconds -> `1h 15m 23s`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m {secs:02d}s"
    return f"{minutes}m {secs:02d}s" if minutes else f"{secs}s"
