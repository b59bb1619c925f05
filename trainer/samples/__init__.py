"""Samples: token sequences with all that training needs of them, and every reason not to train on a group."""
