"""What to type to look at a sweep in TensorBoard, here or from another machine."""

import getpass
import ipaddress
import os
import shlex

from search.sweep import Sweep

# Where TensorBoard listens unless told otherwise: on loopback alone.
PORT = 6006


def tensorboard_command(sweep: Sweep) -> str:
    """Return the command that shows a sweep."""
    folder = shlex.quote(f"{sweep.location}/tensorboard")
    # Without a password: for this machine alone, whatever TensorBoard's default is.
    return f"tensorboard --host 127.0.0.1 --logdir {folder}"


def tunnel_command() -> str | None:
    """Return what to type at home to reach TensorBoard here; none if nobody came by ssh.

    TensorBoard has no password, and its images are of patients: it stays on loopback.
    """
    # Client's address and port, then the address and port here, as the client reached them.
    parts = os.environ.get("SSH_CONNECTION", "").split()
    if len(parts) != 4 or not parts[3].isdecimal():
        return None
    host, port = parts[2:]
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    other_port = "" if port == "22" else f" -p {port}"
    user = shlex.quote(getpass.getuser())
    return f"ssh -N -L {PORT}:localhost:{PORT}{other_port} {user}@{host}"
