"""The address of a Ray cluster: does it answer, to whom, and do we have its token?"""

import ipaddress
import os
from collections.abc import Callable
from pathlib import Path

import grpc
from ray._private.services import canonicalize_bootstrap_address_or_die

from lightning_modules.errors import InputError

# The head tells its identity to whoever may use it, and to nobody else.
ASK_FOR_IDENTITY = "/ray.rpc.NodeInfoGcsService/GetClusterId"
ANSWER_WITHIN_S = 10.0

# Where Ray itself looks, in this order.
TOKEN_SOURCES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"  # noqa: S105  names


def check_address(address: str, *, insecure: bool, tell: Callable[[str], None]) -> str:
    """Refuse a cluster that anybody on the network may use, or that does not let us in.

    Whoever reaches a Ray cluster without a token can run code on it. So the head is asked once as a
    stranger would, before anything is sent to it; Ray would go on asking for minutes. With mutual
    TLS (``RAY_USE_TLS``) strangers are refused before they can ask, and nothing is checked here.

    Args:
        address: HOST:PORT, or ``auto`` for the cluster of this machine or of ``RAY_ADDRESS``.
        insecure: Whether a cluster without a token will do.
        tell: Given a line for the user if the cluster asks for no token.

    Returns:
        HOST:PORT.

    Raises:
        InputError: If it is none, does not answer, lets in everybody, or does not let us in.
    """
    host, port = _parse(address)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return target
    if _lets_in(target, None):
        if not insecure and not _is_loopback(host):
            raise InputError(
                f"a cluster on a network must ask for a token, or whoever reaches it runs code on "
                f"it; {target} lets in everybody: start every node with RAY_AUTH_MODE=token and "
                "one token (`ray get-auth-token --generate`), or accept it with --insecure"
            )
        tell(f"cluster {target} asks for no token: whoever reaches it can run code on it")
        return target
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise InputError(
            f"the cluster asks for a token; RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']}: set it "
            "to token"
        )
    token = _token()
    if not token:
        raise InputError(
            f"the cluster at {target} asks for a token; none was found: give the head's in "
            f"{TOKEN_SOURCES}"
        )
    if not _lets_in(target, token):
        raise InputError(
            f"the cluster at {target} must know the token; it refuses ours: give the head's in "
            f"{TOKEN_SOURCES}"
        )
    return target


def _parse(address: str) -> tuple[str, int]:
    if address.startswith("ray://"):
        raise InputError(
            f"--address must be HOST:PORT of the cluster's head, from a machine in the cluster; "
            f"got {address}: Ray's client would run the record elsewhere"
        )
    if address == "auto":
        try:
            address = canonicalize_bootstrap_address_or_die("auto")
        except (ConnectionError, ValueError) as error:
            raise InputError(
                "--address auto needs one cluster, on this machine or in RAY_ADDRESS; "
                f"{str(error).split('. ')[0]}: give HOST:PORT"
            ) from error
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f"--address must be HOST:PORT of the cluster's head, such as 10.0.0.1:6379, or auto; "
            f"got {address}"
        )
    return host.strip("[]"), int(port)


def _lets_in(target: str, token: str | None) -> bool:
    """Ask a cluster's head who it is, once.

    Raises:
        InputError: If nothing answers there, or not as Ray does.
    """
    headers = () if token is None else (("authorization", f"Bearer {token}"),)
    # Not through a proxy for web pages, which would answer for every address.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask: Callable[..., bytes] = channel.unary_unary(ASK_FOR_IDENTITY)
        try:
            ask(b"", metadata=headers, timeout=ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise InputError(
                f"--address must be a Ray cluster that answers; got {target}: "
                f"{code.name.lower().replace('_', ' ')}: start it with `ray start --head`, or "
                "check host, port, and firewall"
            ) from error
    return True


def _token() -> str:
    """Return the token that Ray would use; empty if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        path = Path(given) if given else Path.home() / ".ray" / "auth_token"
        return path.read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        if given:
            raise InputError(
                f"RAY_AUTH_TOKEN_PATH must be a file that can be read; got {given}"
            ) from error
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
