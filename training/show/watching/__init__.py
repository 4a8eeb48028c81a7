"""What is seen of a run while it trains: curvature and steps layer by layer, and the loss as the rate grows."""
