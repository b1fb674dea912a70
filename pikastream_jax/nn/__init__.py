"""Parts that both models are built of."""
