"""What a recipe may not say, found before anything runs."""
