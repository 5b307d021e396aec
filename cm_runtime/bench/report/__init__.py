"""What a result says, for people: a page, a summary for a CI job, plots."""
