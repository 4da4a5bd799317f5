"""Conversion of weights between EVEREST-DS and other systems, with a report on every key."""
