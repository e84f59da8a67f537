"""How to search: the only code that talks to Ray and Optuna."""
