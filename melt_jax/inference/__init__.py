"""Generation, sampling, scoring, and the results of a run."""
