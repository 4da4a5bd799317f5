"""Token selection: ReRo, masks, information-intensive frames, and the module that applies a config's rule."""
