"""The modules of `tools/study_selection.py`: protocol, runs, linear probe and report."""
