"""Commands that keep pages of docs/ what the code is."""
