"""The demonstration on handwritten digits: `main` runs it."""
