"""Rows and arrays in, text and pictures out: pure functions, someone else writes the files."""
