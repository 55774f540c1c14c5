"""What is done with a finished run: predict and evaluate with it, verify it, look inside it."""
