"""Python's search for garbage, put off while torch and Lightning are imported."""

import gc

# Objects that a process makes before it is looked through, by default 700. What imports make stays:
# to look through it again and again takes a sixth of their time.
RARELY = 100_000

_AS_EVER = gc.get_threshold()


def collect_rarely() -> None:
    """Look for garbage rarely from now on, as a process does that only begins."""
    gc.set_threshold(RARELY, *_AS_EVER[1:])


def collect_as_ever() -> None:
    """Look for garbage as often as Python does; what there is by now stays, and is passed over."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_AS_EVER)
