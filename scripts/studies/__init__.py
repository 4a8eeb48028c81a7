"""Studies over many models or problems at once; each command makes a page of docs/results."""
