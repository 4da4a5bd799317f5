"""Pure functions that render rows and arrays as text and pictures; the callers write the files."""
