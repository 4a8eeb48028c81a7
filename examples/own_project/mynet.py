"""A small convolutional net. Facts of the data set are filled in by the names of parameters, of whatever kind."""

from torch import Tensor, nn


class MyNet(nn.Module):
    """One convolution and one linear layer; ``num_outputs`` is a fact where targets are numbers, not classes."""

    def __init__(self, in_channels: int, num_classes: int = 0, num_outputs: int = 0, width: int = 16) -> None:
        super().__init__()
        layers = nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(9 * width, num_classes or num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images to logits, or to numbers."""
        return self.head(self.features(inputs))
