"""What a loop is made of: budgets, number formats, processes, random numbers, signals, the backward pass."""
