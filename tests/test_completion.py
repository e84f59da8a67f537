"""Shells complete commands, options, sweeps, and files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from search.completion import script_for

# Does what a key press does: sets what the shell would, and calls what it registered.
BASH = """
eval "$(<completion.bash)"
COMP_WORDS=({words} '{last}')
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMP_LINE="${{COMP_WORDS[*]}}"
COMP_POINT=${{#COMP_LINE}}
registered=$(complete -p neurosweep)
[[ $registered =~ -F\\ ([^ ]+) ]] && ${{BASH_REMATCH[1]}} neurosweep '{last}' ''
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

# zsh completes only in a terminal: here one of its own, which it is made to leave at once.
ZSH = r"""
zmodload zsh/zpty
zpty shell 'PS1=READY TERM=dumb zsh -f -i'
zpty -w shell 'unsetopt zle_bracketed_paste; LISTMAX=1000; autoload -Uz compinit; compinit -u -D'
zpty -w shell 'zstyle ":completion:*" list-grouped no; zstyle ":completion:*" menu no'
zpty -w shell 'eval "$(<completion.zsh)"; print SOURCED'
zpty -r -m shell text '*SOURCED*SOURCED*'
zpty -w -n shell "$1"$'\t'
sleep 3
zpty -w -n shell $'\C-U exit\n'
while zpty -r shell text; do print -r -- $text; done
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with sweeps in the usual place and in another, and with files."""
    for name in ("sweeps/brain_mri", "sweeps/brain_two", "elsewhere/third"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "sweep.yaml").touch()
    (tmp_path / "sweeps" / "brain_no_sweep").mkdir()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "completion.bash").write_text(script_for("bash"))
    (tmp_path / "completion.zsh").write_text(script_for("zsh"))
    return tmp_path


def completed_by_bash(folder: Path, line: str) -> set[str]:
    *words, last = line.split(" ")
    script = BASH.format(words=" ".join(words), last=last)
    run = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert not run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("neurosweep re", {"report", "resume", "replay"}),
        ("neurosweep completion ", {"bash", "zsh"}),
        ("neurosweep top brain", {"brain_mri", "brain_two"}),
        ("neurosweep top --storage elsewhere th", {"third"}),
        ("neurosweep report brain_mri brain_t", {"brain_two"}),
        ("neurosweep launch mi", {"mine.yaml"}),
        ("neurosweep launch mine.yaml --storage els", {"elsewhere"}),
        ("neurosweep launch mine.yaml --allow", {"--allow-leakage"}),
    ],
)
def test_bash_completes(folder: Path, line: str, offered: set[str]) -> None:
    assert completed_by_bash(folder, line) == offered


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("neurosweep resu", "neurosweep resume"),
        ("neurosweep top brain_m", "neurosweep top brain_mri"),
        ("neurosweep top --storage elsewhere th", "neurosweep top --storage elsewhere third"),
        ("neurosweep launch mi", "neurosweep launch mine.yaml"),
    ],
)
def test_zsh_completes(folder: Path, line: str, result: str) -> None:
    run = subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", line],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Typed text comes back as a terminal shows it.
    assert result in run.stdout.replace("\r", ""), run.stdout
