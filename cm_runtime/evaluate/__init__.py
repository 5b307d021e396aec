"""Quality of images: Fréchet distance, precision, recall and class agreement, in one pass and constant memory."""
