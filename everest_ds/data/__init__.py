"""Manifests, decoding, choice of frames, and the clips that reach a model."""
