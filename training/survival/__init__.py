"""What lets a run go on after it was interrupted: checkpoints, locks and signals."""
