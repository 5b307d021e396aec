"""How good images are: Fréchet distance, precision, recall and class agreement, in one pass and constant memory."""
