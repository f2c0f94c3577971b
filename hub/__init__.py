"""Converting the authors' checkpoints and publishing our own."""
