"""Decoders that read the chosen frames of a video file."""
