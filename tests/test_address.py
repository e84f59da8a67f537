"""A cluster's address is looked at as a stranger would, before anything is sent to it.

The heads here are real gRPC servers that answer this one question as Ray's head does, which
``test_nodes`` compares with Ray's own.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from lightning_modules.errors import InputError
from search.tuning.address import ASK_FOR_IDENTITY, check_address

TOKEN = "c0ffee" * 10

StartHead = Callable[[str | None], str]


@pytest.fixture
def start_head() -> Iterator[StartHead]:
    """Starts a head on loopback that asks for a token, or for none; returns HOST:PORT."""
    servers = []

    def start(token: str | None) -> str:
        def identify(request: bytes, context: grpc.ServicerContext) -> bytes:
            given = dict(context.invocation_metadata()).get("authorization")
            if token is not None and given != f"Bearer {token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b"identity"

        service, method = ASK_FOR_IDENTITY.strip("/").split("/")
        handler = grpc.unary_unary_rpc_method_handler(identify)
        server = grpc.server(futures.ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.fixture(autouse=True)
def _no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def check(address: str, *, insecure: bool = False) -> list[str]:
    told: list[str] = []
    check_address(address, insecure=insecure, tell=told.append)
    return told


def refusal(address: str) -> str:
    with pytest.raises(InputError) as refused:
        check(address)
    return str(refused.value)


def test_with_the_token_the_cluster_is_entered_without_a_word(
    start_head: StartHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = start_head(TOKEN)
    # In Ray's own order of places: a later one is not looked at.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert check(address) == []
    (tmp_path / "given").write_text(TOKEN)
    (tmp_path / ".ray" / "auth_token").write_text("other")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "given"))
    assert check(address) == []
    (tmp_path / "given").write_text("other")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert check(address) == []


def test_no_token_and_a_wrong_one_are_told_apart_and_neither_is_shown(
    start_head: StartHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = start_head(TOKEN)
    assert "none was found" in refusal(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-one")
    assert "it refuses ours" in refusal(address)
    assert "wrong-one" not in refusal(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE is disabled" in refusal(address)


def test_a_token_file_that_is_not_there_is_named(
    start_head: StartHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in refusal(start_head(TOKEN))


def test_a_cluster_on_a_network_without_a_token_needs_insecure(
    start_head: StartHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = start_head(None)
    # On loopback it will do, and is mentioned.
    [line] = check(address)
    assert "asks for no token" in line
    # As if this head's address were one of a network.
    monkeypatch.setattr("search.tuning.address._is_loopback", lambda host: False)
    message = refusal(address)
    assert "lets in everybody" in message
    assert "--insecure" in message
    assert check(address, insecure=True) == [line]


@pytest.mark.parametrize(
    ("host", "is_one"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("head.example", False),
        ("2001:db8::1", False),
    ],
)
def test_loopback_is_told_from_a_network(host: str, is_one: bool) -> None:
    from search.tuning.address import _is_loopback

    assert _is_loopback(host) is is_one


@pytest.mark.parametrize(
    "address",
    ["head", "head:", ":6379", "head:port", "head:0", "head:65536", "http://head:8265", "local"],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    message = refusal(address)
    assert message.startswith("--address must be HOST:PORT")
    assert address in message


def test_rays_client_is_refused_with_the_reason() -> None:
    assert "would run the record elsewhere" in refusal("ray://head:10001")


def test_an_address_where_nothing_answers_is_refused_at_once() -> None:
    # Port 1 is nobody's here: the connection is refused, not waited for.
    assert "must be a Ray cluster that answers; got 127.0.0.1:1: unavailable" in refusal(
        "127.0.0.1:1"
    )


def test_a_server_that_is_not_ray_is_refused() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert "unimplemented" in refusal(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


def test_auto_without_a_cluster_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance. Please specify ...")

    # There may be one on this machine that is not ours.
    monkeypatch.setattr("search.tuning.address.canonicalize_bootstrap_address_or_die", none)
    assert "Could not find any running Ray instance: give HOST:PORT" in refusal("auto")


def test_auto_is_the_cluster_of_the_environment(
    start_head: StartHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert ":1: unavailable" in refusal("auto")


def test_a_mistaken_address_ends_in_one_line_before_images_are_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from search.cli import main

    file = tmp_path / "sweep.yaml"
    file.write_text("name: nowhere\ndata: {phantom: {num_patients: 30}}\n")
    with pytest.raises(SystemExit) as ended:
        main(["launch", str(file), "--storage", str(tmp_path / "s"), "--address", "127.0.0.1:1"])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("neurosweep: --address must be a Ray cluster that answers")
    assert not list((tmp_path / "s").rglob("*.*"))


def test_ray_does_not_write_the_drivers_keys_into_its_logs() -> None:
    from ray.tune.execution import class_cache

    from search.tuning import tuner

    assert tuner.connected
    assert not any(name.startswith("AWS_") for name in class_cache.ENV_VARS_TO_PROPAGATE)


def test_ray_does_not_start_workers_through_uv_whoever_imports_it_first() -> None:
    # By default it also packs the current folder and sends it to every node.
    code = (
        "import search.tuning.address, ray._private.ray_constants as told; "
        "raise SystemExit(told.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0
