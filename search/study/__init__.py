"""The record of a sweep: the Optuna study, and what is kept in it."""
