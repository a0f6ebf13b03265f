"""A port that another program listens at is one sentence, in both frameworks."""

from __future__ import annotations

import socket

import pytest

from fsam_core import UserError
from fsam_trainers import processes


def torchs_error(port: int) -> Exception:
    import torch.distributed as dist

    with pytest.raises(dist.DistNetworkError) as error:
        dist.TCPStore("localhost", port, 1, is_master=True)
    return error.value


def jaxs_error(port: int) -> Exception:
    return RuntimeError("UNKNOWN: Failed to start RPC server")  # a process whose coordinator cannot start may crash


@pytest.mark.parametrize("failing", [torchs_error, jaxs_error])
def test_a_port_in_use_is_named(failing, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        error = failing(port)
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(
        UserError, match=f"MASTER_PORT: got {port}, this port .* is in use on this machine: give another"
    ):
        processes.raise_if_lost(error)
