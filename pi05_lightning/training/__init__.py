"""What a training run does besides training: precision, checkpoint files, callbacks."""
