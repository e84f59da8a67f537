"""What is trained: torch, torchvision, kornia, and pytorch_lightning; never Ray."""
