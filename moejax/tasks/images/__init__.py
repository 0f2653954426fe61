"""Image classification: digits or a folder of images, a vision transformer, and its loss."""
