"""Inference on videos with trained models: feature tables, class predictions and token selections."""
