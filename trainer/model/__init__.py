"""The policy: loaded exactly or refused; its attention over trees, its head, and its tokens' log-probs."""
