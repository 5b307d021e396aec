"""Reports of a result: a page, a summary for a CI job, plots."""
