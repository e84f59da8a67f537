"""Where a sweep's initial weights came from, as its record has it."""

import json

from pydantic import TypeAdapter

from lightning_modules.weights import WeightOrigin
from search.study.reading import Facts, reading
from search.study.record import Record

_ORIGINS = TypeAdapter(dict[str, WeightOrigin])


def recorded_weights(record: Record) -> dict[str, WeightOrigin]:
    """Return each backbone's initial weights.

    Raises:
        InputError: If the record does not say.
    """
    stored = record.facts["weights"]
    with reading(record.sweep):
        # By way of JSON, in which tuples are lists.
        return Facts(_ORIGINS.validate_json(json.dumps(stored), strict=True))
