"""Checkpoints: this project's, OpenAI's and diffusers', read into one form."""
