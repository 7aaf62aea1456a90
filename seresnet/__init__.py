"""A small, accurate SE-ResNet on CIFAR-10 and other sets of small images, trained fast through FFCV."""

__version__ = "0.1.0"
