"""What several models are made of: starting values, first convolutions, plain layers, and checks of options."""
