"""Checking and re-encoding of a data set, each video in a process of its own."""
