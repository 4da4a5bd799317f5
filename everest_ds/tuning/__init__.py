"""The tuner: a search for the fastest settings by predicted time, and trials that correct the predictions."""
