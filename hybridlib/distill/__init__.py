"""Text, objectives, one training loop with its two stages, and what a hybrid lost."""
