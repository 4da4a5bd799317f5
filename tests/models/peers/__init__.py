"""Tests of the other systems of the published tables."""
