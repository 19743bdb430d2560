"""A training run: the model with its optimizer, the data, the steps, and what is saved of them."""
