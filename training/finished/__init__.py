"""What is done with a finished run: predicting, evaluating and checking it again."""
