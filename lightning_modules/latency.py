"""How long one image takes on one CPU thread: what a clinic's laptop would wait."""

import time
from pathlib import Path

import numpy as np
import onnxruntime

NUM_WARM_UP = 5
NUM_TIMED = 30


def measure_latency_ms(model: Path, image_size_px: int) -> float:
    """Return the median time of one image through an ONNX model, in milliseconds.

    One thread, batch 1, ONNX Runtime on the CPU; decoding the image is not counted. For a model of
    one's own: it is opened as it is.

    Args:
        model: A ``model.onnx`` that this process has written.
        image_size_px: Height and width of its input.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 1, image_size_px, image_size_px), np.float32)
    times_s = []
    for _ in range(NUM_WARM_UP + NUM_TIMED):
        start_s = time.perf_counter()
        session.run(None, {"intensities": image})
        times_s.append(time.perf_counter() - start_s)
    return 1000 * float(np.median(times_s[NUM_WARM_UP:]))
