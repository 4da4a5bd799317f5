"""What `tools/study_selection.py` is made of: protocol, runs, linear probe, report."""
