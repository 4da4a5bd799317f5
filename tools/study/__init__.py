"""The modules of `tools/study_selection.py`: arms, protocol, runs, videos in memory, judges and report."""
