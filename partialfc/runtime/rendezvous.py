"""A store that only the processes of this start use.

A launcher that restarts failed workers may hand them the store of the previous start (torchrun does, since it shares
its own store with the workers: pytorch issue 135712). That store holds addresses of dead processes, to which nobody can
connect. Nothing in the environment distinguishes one start from the next on all nodes; the restart count is kept by
each node for itself. So the ranks find each other by name: each writes a random name, and rank 0 answers it. Nobody
reads an answer to the name of a dead process.

The keys of a start carry its random name. What is written before it is known lies under the launcher's id of the run.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from partialfc.errors import RankLost

_LOOK_EVERY = 0.05  # seconds
_BACKLOG = 2048  # ranks that connect at once


def fresh_store(timeout: timedelta, silence: float) -> tuple[dist.Store, int, int]:
    """Return a store that the ranks of this start share, the rank of this process, and the number of ranks.

    Args:
        timeout: time in which all ranks have to join.
        silence: seconds after which a store that does not answer is lost.

    Raises:
        RankLost: another rank has not joined in time, the store is lost, or the launcher has ended.
    """
    joining = _Joining(timeout, timedelta(seconds=min(5.0, silence / 4)))
    thread = threading.Thread(target=joining.run, name="joining", daemon=True)
    thread.start()
    # Whatever the thread waits for, possibly within a call that nothing can interrupt, this one watches. As in liveness
    # it counts its own wake-ups: after a suspension of this process nothing is lost.
    launcher = os.getppid()
    signs, silent = joining.signs, 0
    while thread.is_alive():
        thread.join(_LOOK_EVERY)
        silent = silent + 1 if joining.signs == signs else 0
        signs = joining.signs
        if _is_watched_over() and os.getppid() != launcher:
            raise _not_joined("the launcher that has started this rank has ended")
        if silent * _LOOK_EVERY >= silence:
            raise _not_joined(
                f"the store at {joining.address} has not answered for {silence:g} s: it is gone, or cut off"
            )
    if joining.store is None:
        raise _not_joined(joining.problem)
    return joining.store, joining.rank, joining.world_size


def _is_watched_over() -> bool:
    """Return True if the process that has started this one stays until its end; a shell may go before."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _not_joined(problem: str) -> RankLost:
    return RankLost(f"the ranks have not found each other: {problem}")


class _Joining:
    """The work of :func:`fresh_store`, for a thread: any call of a store may block.

    Args:
        connect_within: time of one try to connect; the store of rank 0 may not be there yet.

    Attributes:
        signs: counts the answers of the store.
    """

    def __init__(self, timeout: timedelta, connect_within: timedelta) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.address = f"{self._host}:{self._port}"
        self._timeout, self._connect_within = timeout, connect_within
        self._deadline = time.monotonic() + timeout.total_seconds()
        self.signs = 0
        self.store: dist.Store | None = None
        self.problem = ""

    def run(self) -> None:
        try:
            store = self._connect()
            store.set_timeout(self._timeout)
            run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
            meeting = dist.PrefixStore(f"partialfc-{run_id}", store)
            name = self._invite(meeting) if self.rank == 0 else self._accept(meeting)
            self.store = dist.PrefixStore(name, meeting)
        except TimeoutError as error:
            self.problem = str(error)
        except (OSError, RuntimeError) as error:  # torch's errors of stores and networks are RuntimeErrors
            self.problem = f"the store at {self.address}: {str(error).splitlines()[0]}"

    # --- the store ----------------------------------------------------------------------------------------------------

    def _connect(self) -> dist.Store:
        """Connect to the launcher's store, or to that of rank 0, which opens it here."""
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.rank == 0 and not shared:
            return _open_store(self._host, self._port, self._timeout)
        while True:
            try:
                return dist.TCPStore(
                    self._host, self._port, None, False, timeout=self._connect_within, wait_for_workers=False
                )
            except (dist.DistNetworkError, dist.DistStoreError):
                # The launcher's store is older than its ranks; rank 0 may still be starting.
                self._pause(f"the store at {self.address} cannot be reached", answered=not shared)

    # --- meeting ------------------------------------------------------------------------------------------------------

    def _invite(self, store: dist.Store) -> str:
        """Publish the name of this start until all ranks have confirmed it (rank 0)."""
        name = uuid.uuid4().hex
        missing = set(range(1, self.world_size))
        asked: dict[int, bytes] = {}
        while missing:
            for rank in sorted(missing):
                if store.check([f"asks-{rank}"]):
                    asker = store.get(f"asks-{rank}")
                    if asked.get(rank) != asker:  # the first one, or the successor of a dead process
                        asked[rank] = asker
                        store.set(f"invites-{asker.decode()}", name)
                if store.check([f"joins-{name}-{rank}"]):
                    missing.discard(rank)
            self._pause(f"rank {min(missing, default=0)} has not joined")
        store.set(f"begins-{name}", "")
        return name

    def _accept(self, store: dist.Store) -> str:
        """Ask for the name of this start, confirm it, and wait until all ranks have (ranks other than 0)."""
        me = uuid.uuid4().hex
        store.set(f"asks-{self.rank}", me)
        name = ""
        while not (name and store.check([f"begins-{name}"])):
            if store.check([f"invites-{me}"]):
                invited = store.get(f"invites-{me}").decode()
                if invited != name:  # the first one came from a rank 0 that was about to be ended
                    name = invited
                    store.set(f"joins-{name}-{self.rank}", "")
            self._pause("rank 0 has not answered" if not name else "another rank has not joined")
        return name

    def _pause(self, problem: str, answered: bool = True) -> None:
        self.signs += answered
        if time.monotonic() > self._deadline:
            raise TimeoutError(problem)
        time.sleep(_LOOK_EVERY)


def _open_store(host: str, port: int, timeout: timedelta) -> dist.Store:
    """Open the store of rank 0, at the address by which the other ranks know it and at no other one of this host."""
    with _listen(host, port) as listener:
        return dist.TCPStore(
            host, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def _listen(host: str, port: int) -> socket.socket:
    """Listen at ``host``; at all interfaces if that address is not one of this host, or one that other hosts lack."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not _is_own_loopback(host, str(address[0])):
        with suppress(OSError):  # an address that something else translates
            return socket.create_server(address, family=family, backlog=_BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=_BACKLOG)


def _is_own_loopback(host: str, address: str) -> bool:
    """Return True if ``host`` is a name that means loopback here (Debian's 127.0.1.1), and other hosts take part."""
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return ipaddress.ip_address(address).is_loopback and not alone and host not in ("localhost", address)
