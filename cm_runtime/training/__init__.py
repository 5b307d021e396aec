"""Training of consistency models: data, losses, averages, and one visible loop."""
