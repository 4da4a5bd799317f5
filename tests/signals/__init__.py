"""The signal matrix: every stop signal, sent to every process of a run in every phase, costs no step."""
