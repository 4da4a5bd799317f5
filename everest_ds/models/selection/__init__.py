"""Token selection: ReRo, masks, information-intensive frames, and the selector that a config names."""
