"""How to search: the only code that talks to Ray and Optuna.

    from search import launch, load_results

is the same as the commands, from Python and from notebooks.
"""

import os

# Read by Ray when it is imported, which any module here may be the first to do. Under `uv run`, Ray
# would start every worker with uv again, and send all nodes the current folder, with its .venv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# The study is the record: Ray's own files would only repeat it.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Ctrl-C is ours: Tune waits in silence for epochs to end, and then for ten seconds more.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

from search.notebook import launch, load_results

__all__ = ["launch", "load_results"]
