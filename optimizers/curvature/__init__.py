"""What the families of optimizers share: recorder, layer adapters, block approximations, communication."""
