"""How good a classifier is: scores of views, metrics, and comparisons of two results."""
