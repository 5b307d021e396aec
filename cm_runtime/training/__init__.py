"""Making consistency models: data, losses, averaging, and one visible loop."""
