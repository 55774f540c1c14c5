"""The recipe that drew and trained the small backbone in ``training/weights``."""
