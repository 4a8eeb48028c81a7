"""Convolutional classifiers of images, and FocalNets, which are built like them."""
