"""Fixtures of the signal matrix on one machine."""

from tests.signals.fixtures import local_cases, signal_report

__all__ = ["local_cases", "signal_report"]
