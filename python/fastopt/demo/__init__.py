"""The demo: train, prune and pack a small classifier, and compare it with NumPy."""
