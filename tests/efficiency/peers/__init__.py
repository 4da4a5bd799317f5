"""Tests of the peers: the other systems of the published tables."""
