"""What runs leave behind, as figures and tables. Everything here is a function that returns its result."""
