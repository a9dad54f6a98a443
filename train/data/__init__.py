"""From files of text to batches: sources -> store -> packing -> loader."""
