"""What each inference engine speaks: its routes, and how the trainer joins its weight transfer."""
