"""CogView: text-to-image generation with one transformer over text and image tokens."""
