"""What a step of training is made of: heads, loss, optimiser and the model as it is called."""
