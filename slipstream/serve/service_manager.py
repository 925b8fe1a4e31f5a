"""What systemd, or whoever started us, is told of our state: sd_notify(3), which is a datagram."""

import os
import socket


def tell_service_manager(state: str) -> None:
    """state: such as READY=1. Nothing is sent where nobody asked ($NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect("\0" + address[1:] if address.startswith("@") else address)
            connection.send(state.encode())
