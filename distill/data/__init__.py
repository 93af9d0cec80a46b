"""From a list of videos to batches of clips: index, sample, decode, augment, load."""
