"""What makes a shell complete the command line; shtab writes it from the parser."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shtab

from search.cli import parser, place

# Where the names of sweeps are meant; files and folders are told by an option's type and metavar.
SWEEP_METAVAR = "SWEEP"
FOLDER_METAVARS = ("DIR", "DIR|URL", "BUNDLE", "OUT")

# Both look into the folder that --storage names on the line, else into sweeps/.
PREAMBLE = {
    "bash": r"""
_neurosweep_sweeps() {
  local storage=sweeps position
  for ((position = 1; position < COMP_CWORD; position++)); do
    case ${COMP_WORDS[position]} in
      --storage) storage=${COMP_WORDS[position + 1]} ;;
    esac
  done
  local file
  for file in "$storage"/*/sweep.yaml; do
    [[ -f $file ]] || continue
    file=${file%/sweep.yaml}
    compgen -W "${file##*/}" -- "$1"
  done
  _shtab_compgen_dirs "$1"
}
""",
    "zsh": r"""
_neurosweep_sweeps() {
  local storage=sweeps position=${words[(I)--storage]}
  (( position )) && storage=${(Q)words[position + 1]}
  local -a names=( ${(Q)~storage}/*/sweep.yaml(N:h:t) )
  (( $#names )) && compadd -a names
  _files -/
}
""",
}

SWEEP = {"bash": "_neurosweep_sweeps", "zsh": "_neurosweep_sweeps"}


def script_for(shell: str) -> str:
    """Return what a shell is to read to complete ``neurosweep``.

    Args:
        shell: ``bash`` or ``zsh``.
    """
    whole = parser()
    for action in _actions(whole):
        if action.metavar == SWEEP_METAVAR:
            action.complete = SWEEP  # type: ignore[attr-defined]  # where shtab looks
        elif action.metavar in FOLDER_METAVARS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type in (Path, place) or action.dest in ("data", "weights"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    # Its annotation says text; it documents, and takes, one text a shell.
    preamble: Any = PREAMBLE
    return shtab.complete(whole, shell, preamble=preamble)


def _actions(below: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in below._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from _actions(choice)
        else:
            yield action
