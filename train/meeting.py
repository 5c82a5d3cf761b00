"""The port where machines meet, taken or waited for before torch's launcher would, which hears no signal then."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from train.machines import split_address

logger = logging.getLogger(__name__)

#: How long a launcher waits for the machine of --rdzv, as long as torch waits for the others to join.
PATIENCE_S = 600.0
#: Time in which a launcher that listens answers.
ANSWER_S = 20.0
#: Time of one try.
_TRY_S = 1.0


def listen(rdzv: str) -> socket.socket | None:
    """A socket for every interface at the port of `rdzv`; None if another process of this machine has the port.

    Raises ValueError if it cannot be opened for another reason.
    """
    _, port = split_address(rdzv)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise ValueError(
            f"--rdzv {rdzv}: this machine is to listen at port {port} and cannot: {error.strerror or error}. Choose "
            "another, from 1024 to 65535."
        ) from error


def await_listener(rdzv: str) -> None:
    """Wait until something listens at `rdzv`, in short tries. Raises TimeoutError if nothing does within PATIENCE_S."""
    address = split_address(rdzv)
    deadline = time.monotonic() + PATIENCE_S
    said = False
    while True:
        with suppress(OSError), socket.create_connection(address, timeout=_TRY_S):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"nothing listens there. The host of --rdzv {rdzv} has to be an address of one of the machines "
                "themselves, as `ip address` shows it there: that machine listens. One of a gateway or a cluster's "
                "service is nobody's"
            )
        if not said:
            logger.warning("waiting up to %.0f s for the machine of --rdzv %s", PATIENCE_S, rdzv)
            said = True
        time.sleep(_TRY_S / 2)


def await_answer(rdzv: str, ask: Callable[[], object]) -> None:
    """Wait until `ask` returns or fails. Raises ValueError if it does neither within ANSWER_S."""

    def answer() -> None:
        with suppress(Exception):  # the launcher will meet the same, and says it
            ask()

    thread = threading.Thread(target=answer, name="meeting", daemon=True)  # a call that hangs keeps nobody
    thread.start()
    deadline = time.monotonic() + ANSWER_S
    while thread.is_alive():
        if time.monotonic() > deadline:
            raise ValueError(
                f"--rdzv {rdzv}: what listens at this port takes connections and does not answer within "
                f"{ANSWER_S:.0f} s: it is no launcher. Choose a port that is free on that machine."
            )
        thread.join(_TRY_S / 2)
