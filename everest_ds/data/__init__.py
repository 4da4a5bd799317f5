"""Manifests, video decoding, frame sampling, and the data sets and loader that feed a model."""
