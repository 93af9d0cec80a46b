"""Pages about runs and caches: one HTML file each, with everything in it."""
