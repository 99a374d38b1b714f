"""Captioned images (`captions`, `images`), their tokens (`tokens`), and the order of training."""
