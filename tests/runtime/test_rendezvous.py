"""Ranks that look for each other while their launcher, or the store, is gone; and who can reach that store."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from partialfc.errors import ConfigError
from partialfc.runtime import rendezvous
from partialfc.runtime.agreement import code_digest, require_same_over
from tests.harness.running import ENVIRONMENT, finish, free_port, started, wait_until

JOIN = (
    "import os, time\n"
    "from datetime import timedelta\n"
    "from partialfc.runtime.rendezvous import fresh_store\n"
    "if os.environ.get('FORKS') and os.fork():\n"
    "    time.sleep(600)\n"
    "try:\n"
    "    fresh_store(timedelta(minutes=60), float(os.environ['SILENCE']))\n"
    "except Exception as error:\n"
    "    print(type(error).__name__, error, flush=True)\n"
)
RANK_OF_TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run"}


def environment(rank: int, address: str, port: int, **more: str) -> dict[str, str]:
    own = {"RANK": str(rank), "MASTER_ADDR": address, "MASTER_PORT": str(port), "SILENCE": "600"}
    return ENVIRONMENT | RANK_OF_TWO | own | more


def answers(address: str, port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(5)
        return connection.connect_ex((address, port)) == 0


def test_a_store_that_the_launcher_took_with_it_is_noticed() -> None:
    env = environment(1, "127.0.0.1", free_port(), TORCHELASTIC_USE_AGENT_STORE="True", SILENCE="1")
    done = finish([sys.executable, "-c", JOIN], env=env, seconds=60)
    assert "RankLost the ranks have not found each other: the store at 127.0.0.1:" in done.stdout


def test_a_store_that_goes_while_others_are_awaited_is_noticed(tmp_path: Path) -> None:
    output, store = tmp_path / "output", dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = environment(0, "127.0.0.1", store.port, TORCHELASTIC_USE_AGENT_STORE="True")
    with started([sys.executable, "-c", JOIN], output, env=env) as process:
        store.set("partialfc-run/asks-1", "me")
        stores = [store]
        del store
        wait_until(lambda: stores[0].check(["partialfc-run/invites-me"]), of=process)
        stores.clear()
        assert process.wait(60) == 0
    assert "RankLost" in output.read_text()


def test_a_launcher_that_dies_while_others_are_awaited_is_noticed(tmp_path: Path) -> None:
    output, port = tmp_path / "output", free_port()
    with started([sys.executable, "-c", JOIN], output, env=environment(0, "127.0.0.1", port, FORKS="1")) as process:
        wait_until(lambda: answers("127.0.0.1", port), of=process)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: "the launcher that has started this rank has ended" in output.read_text(), seconds=60)
        wait_until(lambda: not answers("127.0.0.1", port), seconds=60)


def test_the_store_of_rank_0_listens_where_the_ranks_look_for_it_only(tmp_path: Path) -> None:
    port = free_port()
    with started([sys.executable, "-c", JOIN], tmp_path / "output", env=environment(0, "127.0.0.2", port)) as process:
        wait_until(lambda: answers("127.0.0.2", port), of=process)
        assert not answers("127.0.0.1", port)
        meeting = dist.PrefixStore("partialfc-run", dist.TCPStore("127.0.0.2", port, is_master=False))
        meeting.set("asks-1", "me")
        wait_until(lambda: meeting.check(["invites-me"]), of=process)
        assert len(meeting.get("invites-me")) == 32, "the random name that all further keys carry"


@pytest.mark.parametrize(
    ("host", "address", "local_ranks", "everywhere"),
    [
        ("node17", "127.0.1.1", "2", True),  # what the other hosts do not have
        ("node17", "127.0.1.1", "4", False),  # there is no other host
        ("localhost", "127.0.0.1", "2", False),
        ("node17", "192.0.2.1", "2", True),  # somebody else's: a proxy passes connections on
    ],
)
def test_a_name_that_the_other_hosts_understand_in_another_way_opens_all_interfaces(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str, local_ranks: str, everywhere: bool
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    with rendezvous._listen(host, 0) as listener:
        assert (listener.getsockname()[0] in ("::", "0.0.0.0")) == everywhere


def test_ranks_compare_their_software_before_they_form_a_group() -> None:
    store, errors = dist.HashStore(), {}

    def compare(rank: int) -> None:
        facts = {"torch": "2.11.0" if rank in (1, 2, 4) else "2.12.0", "device": "cpu", "Python": "3.11"}
        try:
            require_same_over(store, rank, 5, facts)
        except ConfigError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=compare, args=(rank,)) for rank in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 5
    assert len(set(errors.values())) == 1
    assert "torch (2.12.0 on ranks 0, 3; 2.11.0 on ranks 1-2, 4)" in errors[0]
    assert "cpu" not in errors[0]


def test_the_digest_of_code_knows_content_and_names_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("a = 1")
    digests = [code_digest(tmp_path)]
    (tmp_path / "inner" / "__pycache__").mkdir()
    (tmp_path / "inner" / "__pycache__" / "a.pyc").touch()
    assert code_digest(tmp_path) == digests[0]
    (tmp_path / "inner" / "a.py").write_text("a = 2")
    digests.append(code_digest(tmp_path))
    (tmp_path / "inner" / "a.py").rename(tmp_path / "a.py")
    digests.append(code_digest(tmp_path))
    assert len(set(digests)) == 3
