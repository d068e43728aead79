"""Writing a model for other tools, and proving that it is the same model."""
