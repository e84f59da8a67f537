"""How to search: the only code that talks to Ray and Optuna.

    from search import launch, load_results

is the same as the commands, from Python and from notebooks.
"""

from search.notebook import launch, load_results

__all__ = ["launch", "load_results"]
