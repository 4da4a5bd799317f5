"""Conversion of weights between EVEREST-DS and other systems, with an account of every key."""
