"""Trained models at work on videos: features of many, predictions for one."""
