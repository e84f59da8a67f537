"""What is trained: torch, torchvision, kornia, and pytorch_lightning; never Ray."""

import os

# Read by ONNX Runtime when it is imported: 1.31 comes for Linux with telemetry turned on,
# which begins with a session id in the temporary folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
