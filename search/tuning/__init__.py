"""How Ray Tune is driven, and what runs in its workers."""
