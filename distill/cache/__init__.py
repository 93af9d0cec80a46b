"""The view cache: what a frozen teacher said about every view of every clip, on disk."""
