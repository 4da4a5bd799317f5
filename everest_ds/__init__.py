"""EVEREST-DS: large-scale training of EVEREST, the masked video autoencoder of the moving tokens."""

__version__ = "0.1.0"
